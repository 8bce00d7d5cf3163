"""`diffpolicy eval`: roll a trained policy out and score it.

usage: diffpolicy eval RUN [key=value] ...
       diffpolicy eval compare RUN RUN [RUN ...] output=DIR [score=SCORE]

Rolls a policy out in its environment, one episode per seed, and prints `RESULT {json}`;
everything about each episode goes to eval.json, in output= or in RUN/eval (RUN/eval_2, ... for
later evaluations: none is overwritten). Of an environment with several tasks it prints a table:
episodes, success and return of each, their mean, and means of the groups that the environment
declares. `compare` pairs evaluations (RUN is a run, a directory or an eval.json) episode by
episode, task by task; score=success, final_success, max_reward or return.

settings:
$settings

evaluation.KEY:
$evaluation

$groups

Examples:
    diffpolicy eval runs/demo evaluation.episodes=100
    diffpolicy eval runs/demo sampler.solver=unipc sampler.num_steps=5
    diffpolicy eval runs/demo rti.t_start=0.4 rti.num_steps=3 n_action_steps=1
    diffpolicy eval runs/demo latency_ms=140 replan=always
    diffpolicy eval runs/pusht evaluation.seed=100000   # Diffusion Policy's own seeds
    diffpolicy eval runs/demo report=true               # and a page with a clip of every task
    diffpolicy eval compare runs/plain runs/wide output=runs/comparison
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpolicy.commands.lineage import recorded
from diffpolicy.commands.options import groups_help, helped, indented
from diffpolicy.commands.own_pairs import check_judge
from diffpolicy.commands.runs import print_result
from diffpolicy.commands.stores import d4rl_score
from diffpolicy.config import EnvConfig, EvalConfig, load_eval
from diffpolicy.config_compose import config_dir, is_setting, keys_given, quoted
from diffpolicy.settings import ConfigError, check_known, check_range
from diffpolicy.settings import from_values as build

if TYPE_CHECKING:
    from diffpolicy.api import DiffusionPolicy


def help_text() -> str:
    """This module's own text."""
    settings = (config_dir() / "eval.yaml").read_text().split("_self_\n")[1]
    evaluation = (config_dir() / "evaluation" / "default.yaml").read_text()
    return helped(
        __doc__,
        settings=indented(settings),
        evaluation=indented(evaluation),
        groups=groups_help(("evaluation",)),
    )


def run(arguments: Sequence[str]) -> int:
    """Compose the configuration, evaluate, report."""
    if arguments and arguments[0] == "compare":
        return compare(arguments[1:])
    from diffpolicy.api import DiffusionPolicy
    from diffpolicy.commands.preflight import check_writable, choose_rendering, pick_device
    from diffpolicy.commands.train import evaluate_policy, summary
    from diffpolicy.rollout.env_spec import EnvSpec
    from diffpolicy.rollout.latency import DelayedPolicy
    from diffpolicy.rollout.video import can_film

    began = time.perf_counter()
    config = load_eval(_named(arguments))
    if config.evaluation.episodes == 0:
        raise ConfigError("evaluation.episodes=0 leaves nothing to evaluate")
    output = output_of(config)
    check_writable(output)
    device = pick_device(config.device, config.threads)
    choose_rendering(config.evaluation.video_episodes or int(config.report and can_film()))
    policy = DiffusionPolicy.from_pretrained(config.checkpoint, device=device, **_of_policy(config))
    if config.plain:
        policy = policy.with_settings(rti=None, truncated=None)
    rank_candidates(policy, config)
    env = _environment(config, policy.spec.env_id)
    spec = EnvSpec(env.id, env.kwargs, env.max_episode_steps)
    acting = acting_policy(policy, config)
    result = evaluate_policy(
        acting,
        spec,
        config.evaluation,
        output,
        env.success_threshold,
        deterministic=config.deterministic,
        page=f"{env.name}: {config.checkpoint}" if config.report else None,
    )
    report: dict[str, Any] = {"task": env.name, **summary(result)}
    report |= d4rl_score(*_data_attrs(config.checkpoint), spec, result, output)
    if isinstance(acting, DelayedPolicy):
        report["latency"] = {"control_ms": config.control_ms, **_latency_settings(config)}
    report["output"] = str(output)
    print_result(report, began)
    return 0


def compare(arguments: Sequence[str]) -> int:
    """`compare RUN RUN... output=DIR`: evaluations paired by episode, task by task.

    Raises:
        ConfigError: too few runs, or options of something else.
        ValueError: evaluations that cannot be compared.
    """
    from diffpolicy.report.tasks import compare_evaluations

    runs = [a for a in arguments if not is_setting(a)]
    options = keys_given(arguments)
    if len(runs) < 2 or not {"output"} <= set(options) <= {"output", "score"}:
        raise ConfigError(
            "usage: diffpolicy eval compare RUN RUN [RUN ...] output=DIR [score=SCORE]"
        )
    print(compare_evaluations(runs, **options).read_text())
    return 0


def output_of(config: EvalConfig) -> Path:
    """Where the results go: never where those of an earlier evaluation are.

    Raises:
        ConfigError: the given ``output`` holds some.
    """
    if config.output:
        output = Path(config.output)
        if (output / "eval.json").exists():
            raise ConfigError(
                f"{output} holds the results of another evaluation (eval.json); give another "
                "output, or remove them"
            )
        return output
    first = Path(config.checkpoint) / "eval"
    later = (first.with_name(f"eval_{number}") for number in itertools.count(2))
    places = itertools.chain([first], later)
    return next(place for place in places if not (place / "eval.json").exists())


def _named(arguments: Sequence[str]) -> list[str]:
    """``RUN`` alone means ``checkpoint=RUN``."""
    plain = [a for a in arguments if not is_setting(a) and not a.startswith("-")]
    rest = [a for a in arguments if a not in plain[:1]]
    return [*(f"checkpoint={quoted(run)}" for run in plain[:1]), *rest]


def _of_policy(config: EvalConfig) -> dict[str, Any]:
    """The entries of the spec that were given; a judge takes the selection for itself."""
    values = config.of_policy()
    if config.judge:
        values.pop("selection", None)
    return values


def rank_candidates(policy: DiffusionPolicy, config: EvalConfig) -> None:
    """Let a learned value of plans choose among a policy's candidates, if one is given.

    Raises:
        ConfigError: settings without a value, one of other plans, or a way to act that makes no
            candidates.
        ValueError: no value of plans at the path, or settings out of range.
    """
    from diffpolicy.learn.values import PlanValue
    from diffpolicy.policies.best_of_n import Selection, Selector

    if not config.judge:
        return
    check_known(config.judge, ("path", "pessimism"), "judge")
    path, pessimism = config.judge.get("path"), config.judge.get("pessimism", 1.0)
    check_range("[0, inf)", **{"judge.pessimism": pessimism})
    if path is None:
        raise ConfigError("judge is a value of plans: give judge.path=RUN/value")
    if "verifier" in config.selection:
        raise ConfigError("judge is the verifier of plans: leave out selection.verifier")
    other = policy.spec.layout != "action" or policy.spec.observations or policy.spec.representation
    if config.streaming or other:
        raise ConfigError(
            "judge chooses among plans of actions that are made at once, for one vector observed; "
            "it does not go with streaming, action groups, plans that hold observations, or those "
            "by name"
        )
    value = PlanValue.from_pretrained(path, device=policy.device)
    value.pessimism = float(pessimism)
    check_judge(value, policy, path)
    chosen = build(Selection, config.selection, "selection.")
    policy.selector = Selector(chosen, value.ranking(policy.normalizer))


def acting_policy(policy: DiffusionPolicy, config: EvalConfig) -> Any:
    """The policy as it acts: streaming, chunking, ensembling and latency where asked for."""
    from diffpolicy.policies.chunking import Chunking
    from diffpolicy.policies.ensemble import TemporalEnsemble
    from diffpolicy.policies.streaming import Streaming
    from diffpolicy.rollout.latency import DelayedPolicy, LinearLatency

    streaming, chunking = config.streaming, config.chunking
    if streaming and chunking:
        raise ConfigError("streaming and chunking exclude each other; give one of them")
    if chunking and config.backend != "eager":
        raise ConfigError("chunking guides the network at every step and runs on backend=eager")
    if config.deterministic and config.backend != "eager":
        raise ConfigError("backend=... compiles the stochastic loops; leave deterministic out")
    acting: Any = (
        policy.streaming(build(Streaming, streaming, "streaming.")) if streaming else policy
    )
    if config.backend != "eager":
        from diffpolicy.runtime.compile import compile_planner

        rows = config.evaluation.num_envs
        acting = compile_planner(
            acting, backend=config.backend, batch_size=rows, threads=config.threads
        )
    if chunking:
        acting = acting.chunked(build(Chunking, chunking, "chunking."))
    if config.ensemble is not None:
        acting = TemporalEnsemble(acting, config.ensemble)
    if not _latency_settings(config):
        return acting
    latency = LinearLatency(config.latency_ms or 0.0, config.latency_ms_per_nfe or 0.0)
    options: dict[str, Any] = {"replan": config.replan, "arrival": config.arrival}
    options |= {"hold_ticks": config.hold_ticks, "safe_action": config.safe_action or None}
    return DelayedPolicy(acting, latency, config.control_ms, **options)


def _latency_settings(config: EvalConfig) -> dict[str, float]:
    both = {"ms": config.latency_ms, "ms_per_nfe": config.latency_ms_per_nfe}
    return {name: value for name, value in both.items() if value is not None}


def _data_attrs(checkpoint: str) -> tuple[dict[str, Any], int | None]:
    """What the run's data say of themselves: attributes and rows of their store, if it is there."""
    from diffpolicy.data.store import EpisodeStore

    data: Mapping[str, Any] = {}
    with contextlib.suppress(ConfigError):  # the run that it was tuned from is gone
        data = recorded(checkpoint, "data") or {}
    with contextlib.suppress(ValueError, OSError):
        store = EpisodeStore.open(str(data.get("path")))
        return dict(store.attrs), store.num_steps
    if data.get("d4rl") is None:
        return {}, None
    return {"dataset": data["d4rl"], "transforms": data.get("transforms", [])}, None


def _environment(config: EvalConfig, trained_for: str | None) -> EnvConfig:
    """The run's environment (from its config.yaml, else the policy's id) with overrides."""
    from diffpolicy.rollout.env_spec import stored_env_id

    own = {k: v for k, v in config.env.items() if v is not None}
    values: dict[str, Any] = {} if trained_for is None else {"id": trained_for}
    with contextlib.suppress(*([ConfigError] if "id" in own else [])):
        values = dict(recorded(config.checkpoint, "env") or values)
    values.update(own)
    if "id" in values and "id" not in own:
        stored_env_id(str(values["id"]), config.checkpoint)
    if "id" not in values:
        raise ConfigError("the policy does not say which environment it is for; give env.id=...")
    return build(EnvConfig, values, "env.")
