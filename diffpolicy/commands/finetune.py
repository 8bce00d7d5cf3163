"""`diffpolicy finetune`: sequence models tuned by a reward, or guided; policies by preferences."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpolicy.commands.finetune_policy import of_policies, run_policy
from diffpolicy.commands.lineage import how_to_make
from diffpolicy.commands.one_writer import one_writer
from diffpolicy.commands.options import groups_help
from diffpolicy.commands.preflight import check_writable, pick_device
from diffpolicy.commands.train_sequences import (
    check_new,
    configured_oracles,
    open_configured,
    summary,
    trainer_settings,
    write_config,
)
from diffpolicy.config import ConfigError, build, config_dir, read_yaml
from diffpolicy.config_policy_tuning import is_policy_tuning
from diffpolicy.config_sequences import FinetuneConfig, SequenceTrainConfig, load_finetune

if TYPE_CHECKING:
    from diffpolicy.report.sequences import TuningResult
    from diffpolicy.sequences.guided import GuidedDraws
    from diffpolicy.sequences.model import SequenceModel
    from diffpolicy.sequences.oracles import Oracles
    from diffpolicy.sequences.task import SequenceTask
    from diffpolicy.sequences.tuning import Tuned

GROUPS = ("finetune", "guidance", "preference", "trainer")


def help_text() -> str:
    """The text of `diffpolicy finetune --help`."""
    indented, of_policies = (
        "\n".join(
            "    " + line for line in text.split("experiment: null\n")[1].strip().splitlines()
        )
        for text in (
            (config_dir() / n).read_text() for n in ("finetune.yaml", "finetune_policy.yaml")
        )
    )
    return f"""\
usage: diffpolicy finetune [group=choice] [key=value] ...
       diffpolicy finetune preference=METHOD pretrained=RUN [key=value] ...
       diffpolicy finetune compare RUN [RUN ...] output=DIR [baseline=METHOD]

Tunes a sequence model of `diffpolicy train task=...` so that its sequences have a high reward and
stay probable under it; or, with finetune=none, only draws under guidance. For instance

    diffpolicy train experiment=tfbind8
    diffpolicy finetune experiment=tfbind8_drakes
    diffpolicy finetune experiment=tfbind8_drakes finetune=none guidance=smc run_dir=runs/smc

With preference=..., or an experiment of one, it tunes a policy of `diffpolicy train` (or of an
earlier tuning): by comparisons, which are a preference file (`diffpolicy data prefs`), pairs from
the policy's own rollouts (collect.KEY), judged by the environment's rewards, or pairs of its own
plans (plans.KEY), judged by what they lead to (judge.KEY); or by its demonstrations (bc, dro). The
policy before is the reference, and is scored on the same episodes.

    diffpolicy train experiment=pusht_40
    diffpolicy finetune experiment=pusht_dpo
    diffpolicy finetune experiment=pusht_dro preference=bc run_dir=runs/pusht_bc

{groups_help(GROUPS)}

settings of sequence models (also finetune.KEY, guidance.KEY, trainer.KEY):
{indented}

settings of policies (also preference, collect, judge, plans, trainer and evaluation.KEY):
{of_policies}

collect.KEY: kind, episodes, seed, noise_seed, repeats, points, every, branches, lookahead,
common_noise, score, discount, after_end, pairs, min_gap and span are those of `diffpolicy data
prefs collect`. The collect.episodes=50 starts, from env seed collect.seed=50000 on, are others for
every seed and round; noise_seed is the tuning's seed unless it is given.

judge.KEY: reward=store (what rollouts earned) or dense (the environment's dense_reward);
lookahead=16 steps whose rewards count, discount=1, width=128, depth=2, members=5,
layer_norm=true; pessimism=1 standard deviations over the members are taken off; trainer.KEY.
plans.KEY: every=16 steps of an episode from one observation to the next, candidates=16 plans for
each; num_steps, solver, options and spacing are the policy's sampler's unless they are given.
With preferences=FILE nothing is collected, and judge and plans of an experiment are left out unless
some judge.KEY or plans.KEY is given: the judge then learns from the rollouts of that file.

--print-config shows the composed configuration and stops.
Results: RUN/report.md with pictures, report.json, metrics.csv, checkpoints/; of policies also
policy/, rollouts.zarr and preferences.jsonl (pairs of rollouts) where there were collected, value/
of a judge, and plans.zarr and plans.jsonl (with rounds=N, what is of one round in RUN/round_K).
The last line printed is `RESULT {{json}}`."""


def run(arguments: Sequence[str]) -> int:
    """Compose the configuration and tune."""
    if arguments and arguments[0] == "compare":
        return compare(arguments[1:])
    if is_policy_tuning(arguments):
        return run_policy(arguments)
    overrides = [a for a in arguments if a != "--print-config"]
    config = load_finetune(overrides)
    refuse_idle(config, overrides)
    if len(overrides) < len(arguments):
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
        return 0
    return finetune(config)


def refuse_idle(config: FinetuneConfig, overrides: Sequence[str]) -> None:
    """Raise if a setting was given that would have no effect."""
    if config.finetune.get("type") != "none":
        return
    idle = ["trainer", "eval_draws"]
    idle += [] if config.guidance.get("type") in ("smc", "tds") else ["kl_weight"]
    for override in overrides:
        key = override.removeprefix("--").lstrip("+").split("=", 1)[0]
        if key.split(".")[0] in idle:
            raise ConfigError(f"{key} has no effect with finetune=none; leave it out")


@one_writer
def finetune(config: FinetuneConfig, *, resume: bool = False) -> int:
    """Run one tuning, from the pre-trained model to a report."""
    from diffpolicy.report.sequences import write_report

    began = time.perf_counter()
    run_dir = Path(config.run_dir)
    check_new(run_dir, overwrite=config.overwrite, resume=resume)
    check_writable(run_dir)
    device = pick_device(config.device, config.threads)
    base = pretraining(config.pretrained)
    pretrained = _pretrained(config.pretrained, device)
    _check(config, pretrained)
    task = open_configured(base)
    check_black_box(config, task)
    oracles = configured_oracles(base, task, Path(config.pretrained), device)
    write_config(run_dir, config)
    model, tuned = pretrained, None
    if config.finetune["type"] != "none":
        from diffpolicy.sequences.tuning import tune
        from diffpolicy.training.run_files import has_run

        tuned = tune(
            pretrained,
            oracles,
            {**config.finetune, "kl_weight": config.kl_weight},
            trainer_settings(config.trainer, config.seed),
            run_dir,
            eval_draws=config.eval_draws,
            num_steps=config.num_steps,
            resume=resume and has_run(run_dir),
            overwrite=config.overwrite,
        )
        if tuned.interrupted:
            print(f"stopped; continue with `diffpolicy resume {run_dir}`")
            return 130
        model = tuned.model
    result = evaluated(config, (pretrained, model), task, oracles, tuned)
    report = write_report(run_dir, result)
    if report["warning"]:
        print(f"warning: since update {report['warning']['step']}: {report['warning']['message']}")
    exact = result.exact or {}
    short = {
        "task": config.name,
        "train_s": round(result.cost["train_s"], 1),
        **summary(dict(result.after)),
        **{k: round(v, 4) for k, v in exact.items() if k in ("progress", "objective")},
        **{k: result.cost[k] for k in ("nfe", "reward_calls")},
        "total_s": round(time.perf_counter() - began, 1),
    }
    print("RESULT " + json.dumps(short))
    return 0


def pretraining(run_dir: str) -> SequenceTrainConfig:
    """The configuration that a pre-trained run was made with."""
    from diffpolicy.rollout.trust import stored_env_id

    file = Path(run_dir) / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"no pre-trained model in {run_dir}: {how_to_make(Path(run_dir))}")
    values = read_yaml(file)
    if "task" not in values:
        raise ConfigError(f"{run_dir} is no run of a sequence task; set pretrained=RUN")
    config = build(SequenceTrainConfig, values)
    stored_env_id(config.task.id, file, instead="")
    return config


def _pretrained(run_dir: str, device: Any) -> SequenceModel:
    from diffpolicy.sequences.model import SequenceModel

    return SequenceModel.from_pretrained(run_dir, device=device)


def _check(config: FinetuneConfig, model: SequenceModel) -> None:
    """Find what is wrong with the settings before anything runs."""
    from diffpolicy.learn.reward.methods import METHODS, make_tuning
    from diffpolicy.sequences.guided import check_guidance

    trainer = trainer_settings(config.trainer, config.seed)
    check_guidance(config.guidance, model)
    if config.finetune.get("type") not in ("none", *METHODS):
        raise ConfigError(
            f"unknown finetune.type {config.finetune.get('type')!r}; expected one of "
            f"{('none', *METHODS)}"
        )
    if config.finetune["type"] != "none":
        make_tuning(
            {**config.finetune, "kl_weight": config.kl_weight},
            model.copy().denoiser,
            lambda x: x.sum((1, 2)),
            batch_size=trainer.batch_size,
        )
    elif config.guidance["type"] == "none":
        raise ConfigError("finetune=none and guidance=none leave nothing to do; choose one")
    if config.num_steps is None and not model.spec.time_free:
        raise ConfigError("this model sees the noise level: set num_steps=K")


def check_black_box(config: FinetuneConfig, task: SequenceTask) -> None:
    """Raise unless a reward that takes hard sequences alone is asked for nothing else."""
    if task.kind != "black_box":
        return
    tuning, guidance = config.finetune, config.guidance
    wrong = {
        "finetune of type pathwise": tuning["type"] == "pathwise",
        "guidance=reward": guidance["type"] == "reward",
        "guidance=tds": guidance["type"] == "tds",
    }
    for name, used in wrong.items():
        if used:
            raise ConfigError(
                f"{task.name} has a reward of hard sequences without gradient, which {name} "
                "cannot use; choose policy_gradient, wdce, vidd, sdpo, dpo or pso, or best_of_n, "
                "smc or svdd"
            )
    if guidance["type"] in ("smc", "svdd") and guidance.get("estimate", "soft") != "hard":
        raise ConfigError(f"{task.name} rewards hard sequences: set guidance.estimate=hard")
    if tuning.get("target") == "soft_value" and tuning.get("value", "mean") == "mean":
        raise ConfigError(f"{task.name} rewards hard sequences: set finetune.value=mode")


def evaluated(
    config: FinetuneConfig,
    models: tuple[SequenceModel, SequenceModel],
    task: SequenceTask,
    oracles: Oracles,
    training: Tuned | None,
) -> TuningResult:
    """Every figure of the pre-trained model's and the tuned model's sequences."""
    from diffpolicy.report.sequences import TuningResult, best_sequences
    from diffpolicy.sequences.evaluate import (
        Evaluation,
        can_be_exact,
        evaluate_sequences,
        exactly,
    )

    pretrained, model = models
    plain = config.guidance["type"] == "none"
    one_by_one = config.num_steps is None  # the law that is known
    known = plain and one_by_one and can_be_exact(model, task) and config.kl_weight > 0
    exact = exactly(model, pretrained, task, config.kl_weight) if known else None
    settings = Evaluation(seed=config.seed, num_steps=config.num_steps, exact=not known)
    before = _draw(config, pretrained, {"type": "none"}, oracles)
    began = time.perf_counter()
    after = _draw(config, model, config.guidance, oracles)
    draw_s = time.perf_counter() - began
    rows = [
        evaluate_sequences(
            owner,
            task,
            drawn.tokens.cpu(),
            oracles=oracles,
            reference=pretrained,
            settings=settings,
        )
        for owner, drawn in ((None, before), (model if plain else None, after))
    ]
    if exact is not None:
        rows[1] |= {"kl": exact.scores.kl, "kl_kind": "exact", "kl_standard_error": 0.0}
    updates = 0 if config.finetune["type"] == "none" else int(config.trainer["steps"])
    return TuningResult(
        task=task.name,
        method=_method(config),
        seed=config.seed,
        before=rows[0],
        after=rows[1],
        alphabet=task.alphabet,
        profiles=_profiles(task, before.tokens, after.tokens, settings.top_fraction),
        setting=f"kl_weight={config.kl_weight}" if updates else "",
        settings=asdict(config),
        cost={
            "nfe": after.nfe,
            "reward_calls": after.reward_calls,
            "wall_s": draw_s / config.draws,
            "updates": updates,
            "train_s": training.train_s if training else 0.0,
            "train_reward_calls": training.reward_calls if training else 0,
        },
        exact=None if exact is None else exact.scores._asdict(),
        best=best_sequences(after.tokens, oracles, task.alphabet, valid=task.valid),
        optimum=() if exact is None else exact.front,
    )


def _method(config: FinetuneConfig) -> str:
    """The name of the run without its task: what its table calls it."""
    parts = [p for p in (config.finetune, config.guidance) if p["type"] != "none"]
    return config.method or "+".join(str(p.get("name", p["type"])) for p in parts)


def _draw(
    config: FinetuneConfig, model: SequenceModel, guidance: Mapping[str, Any], oracles: Oracles
) -> GuidedDraws:
    import torch

    from diffpolicy.sequences.guided import draw_guided

    generator = torch.Generator(model.device).manual_seed(config.seed)
    return draw_guided(
        model,
        guidance,
        oracles.reward,
        config.draws,
        num_steps=config.num_steps,
        generator=generator,
    )


def _profiles(task: SequenceTask, before: Any, after: Any, fraction: float) -> dict[str, Any]:
    from diffpolicy.report.sequences import PRETRAINED, TOP, TUNED
    from diffpolicy.sequences.metrics import profile, top_sequences

    size = len(task.alphabet)
    top = top_sequences(*task.measurements(), fraction)
    return {
        PRETRAINED: profile(before.cpu().numpy(), size),
        TUNED: profile(after.cpu().numpy(), size),
        TOP: profile(top, size),
    }


def compare(arguments: Sequence[str]) -> int:
    """`diffpolicy finetune compare RUN... output=DIR`, of sequence models or of policies."""
    from diffpolicy.report.compare import compare_report, compare_tunings

    runs = [a for a in arguments if "=" not in a]
    options = dict(a.split("=", 1) for a in arguments if "=" in a)
    if not runs or not {"output"} <= set(options) <= {"output", "baseline"}:
        raise ConfigError(
            "usage: diffpolicy finetune compare RUN [RUN ...] output=DIR [baseline=METHOD]"
        )
    if of_policies(runs[0]):
        print(compare_tunings(runs, **options).read_text())
        return 0
    if "baseline" in options:
        raise ConfigError("baseline=METHOD is of policies; leave it out")
    print(compare_report(runs, options["output"]).read_text())
    return 0
