"""`diffpolicy tune` and `diffpolicy prefer` of sequence models: tuned, or guided, and a report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpolicy.commands.lineage import how_to_make
from diffpolicy.commands.own_sequences import typed_over
from diffpolicy.commands.preflight import check_writable, pick_device
from diffpolicy.commands.runs import (
    check_new,
    one_writer,
    print_result,
    stopped,
    trainer_settings,
    write_config,
)
from diffpolicy.commands.train_sequences import configured_oracles, open_configured, summary
from diffpolicy.config import SequenceTrainConfig, SequenceTuningConfig, TaskConfig, read_run
from diffpolicy.settings import ConfigError
from diffpolicy.settings import from_values as build

if TYPE_CHECKING:
    from diffpolicy.report.sequences import TuningResult
    from diffpolicy.sequences.evaluate import Evaluation
    from diffpolicy.sequences.guided import GuidedDraws
    from diffpolicy.sequences.model import SequenceModel
    from diffpolicy.sequences.oracles import Oracles
    from diffpolicy.sequences.task import SequenceTask
    from diffpolicy.sequences.tuning import Tuned


@one_writer
def tune_sequences(config: SequenceTuningConfig, *, resume: bool = False) -> int:
    """Run one tuning, from the pre-trained model to a report."""
    from diffpolicy.report.sequences import write_report

    began = time.perf_counter()
    run_dir = check_new(config, resume=resume)
    check_writable(run_dir)
    device = pick_device(config.device, config.threads)
    base = pretraining(config.pretrained, config.task)
    pretrained = _pretrained(config.pretrained, device)
    task = open_configured(base)
    begin = check(config, pretrained, task, base)
    pretrained = pretrained.pinned(getattr(task, "fixed", ""))
    oracles = configured_oracles(base, task, Path(config.pretrained), device)
    write_config(config)
    model, tuned = pretrained, None
    if config.method["type"] != "none":
        from diffpolicy.sequences.tuning import tune
        from diffpolicy.training.run_files import has_run

        tuned = tune(
            pretrained,
            oracles,
            {**config.method, "kl_weight": config.kl_weight},
            trainer_settings(config.trainer, config.seed),
            run_dir,
            base=begin,
            hacking=config.hacking,
            eval_draws=config.eval_draws,
            num_steps=config.num_steps,
            resume=resume and has_run(run_dir),
            overwrite=config.overwrite,
        )
        if tuned.interrupted:
            return stopped(run_dir)
        model = tuned.model
    with counted(config, (pretrained, model)):
        result = evaluated(config, (pretrained, model), task, oracles, tuned)
    report = write_report(run_dir, result)
    if report["note"]:
        print(f"note: {report['note']}")
    if report["warning"]:
        print(f"warning: since update {report['warning']['step']}: {report['warning']['message']}")
    exact = result.exact or {}
    short = {
        "task": config.name,
        "designs": result.designs,
        "train_s": round(result.cost["train_s"], 1),
        **summary(dict(result.after)),
        **{k: round(v, 4) for k, v in exact.items() if k in ("progress", "objective")},
        **{k: result.cost[k] for k in ("nfe", "reward_calls")},
    }
    print_result(short, began)
    return 0


def pretraining(run_dir: str, task: TaskConfig | None) -> SequenceTrainConfig:
    """The configuration that a pre-trained run was made with, with what was said of its task."""
    file = Path(run_dir) / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"no pre-trained model in {run_dir}: {how_to_make(Path(run_dir))}")
    values = read_run(file)
    if values["run"] != "train sequences":
        raise ConfigError(f"{run_dir} is no run of a sequence task; set pretrained=RUN")
    config = build(SequenceTrainConfig, values)
    config.task = typed_over(config.task, task, file)
    return config


def _pretrained(run_dir: str, device: Any) -> SequenceModel:
    from diffpolicy.sequences.model import SequenceModel

    return SequenceModel.from_pretrained(run_dir, device=device)


def check(
    config: SequenceTuningConfig,
    model: SequenceModel,
    task: SequenceTask,
    pretraining: SequenceTrainConfig,
) -> dict[str, Any] | None:
    """Find what is wrong with the settings before anything runs; the base that tuning starts from.

    ``model`` may be untrained: nothing but its sizes matters.
    """
    from diffpolicy.learn.material import SequenceMaterial
    from diffpolicy.learn.methods import method_of
    from diffpolicy.sequences.guided import check_guidance
    from diffpolicy.sequences.oracles import known_rewards
    from diffpolicy.sequences.tuning import check_hacking

    trainer = trainer_settings(config.trainer, config.seed)
    _evaluation(config)
    check_guidance(config.guidance, model)
    if config.method["type"] != "none":
        values = {**config.method, "kl_weight": config.kl_weight}
        method = method_of(values, config.run.split()[0], items="sequences")
        material = SequenceMaterial(lambda x: x.sum((1, 2)), None, trainer.batch_size)
        method.objective(model.copy().denoiser, material)
    elif config.guidance["type"] == "none":
        raise ConfigError("method=none and guidance=none leave nothing to do; choose one")
    if config.num_steps is None and not model.spec.time_free:
        raise ConfigError("this model sees the noise level: set num_steps=K")
    _check_black_box(config, task)
    rewards = known_rewards(task, surrogate=pretraining.oracles.surrogate)
    check_hacking(config.hacking, rewards.get("held_out", "learned"))
    return tuning_base(config, task, pretraining)


def _check_black_box(config: SequenceTuningConfig, task: SequenceTask) -> None:
    """Raise unless a reward that takes hard sequences alone is asked for nothing else."""
    if task.kind != "black_box":
        return
    tuning, guidance = config.method, config.guidance
    wrong = {
        "method of type pathwise": tuning["type"] == "pathwise",
        "guidance=reward": guidance["type"] == "reward",
        "guidance=tds": guidance["type"] == "tds",
    }
    for name, used in wrong.items():
        if used:
            raise ConfigError(
                f"{task.name} has a reward of hard sequences without gradient, which {name} "
                "cannot use; choose policy_gradient, wdce, vidd, sdpo, dpo or pso, or best_of_n, "
                "smc, svdd or rollover"
            )
    if (
        guidance["type"] in ("smc", "svdd", "rollover")
        and guidance.get("estimate", "soft") != "hard"
    ):
        raise ConfigError(f"{task.name} rewards hard sequences: set guidance.estimate=hard")
    if tuning.get("target") == "soft_value" and tuning.get("value", "mean") == "mean":
        raise ConfigError(f"{task.name} rewards hard sequences: set method.value=mode")


@contextmanager
def counted(
    config: SequenceTuningConfig, models: tuple[SequenceModel, SequenceModel]
) -> Iterator[None]:
    """Show a bar of the sequences that networks look at for the report, and of how many it takes.

    They are counted by the networks themselves; draws under guidance are taken to cost as much as
    others, so that the bar is longer than it says with them.
    """
    from tqdm import tqdm

    spec, how = models[0].spec, _evaluation(config)
    steps = spec.length if config.num_steps is None else config.num_steps
    steps = min(steps, spec.length) if spec.time_free else steps
    total = config.draws * (2 * steps + 3 * how.elbo_draws) + 2 * steps * how.chains
    shown = bool(config.trainer.get("progress", True))
    networks = {id(n): n for n in (model.denoiser.network for model in models)}.values()
    with tqdm(total=total, desc="report", unit="seq", unit_scale=True, disable=not shown) as bar:

        def count(network: Any, inputs: Any, output: Any) -> None:
            bar.update(len(output))  # what a hook returned would replace the output

        hooks = [network.register_forward_hook(count) for network in networks]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _evaluation(config: SequenceTuningConfig, **said: Any) -> Evaluation:
    """How the report judges sequences."""
    from diffpolicy.sequences.evaluate import Evaluation

    values = {"seed": config.seed, "num_steps": config.num_steps, **config.report, **said}
    return build(Evaluation, values, "report.")


def tuning_base(
    config: SequenceTuningConfig, task: SequenceTask, pretraining: SequenceTrainConfig
) -> dict[str, Any] | None:
    """The base that tuning starts from, with how its reward is made again; ``None``: none.

    Raises:
        ConfigError: a base that nothing tunes, of an unknown type, or by a reward without gradient.
    """
    from diffpolicy.sequences.tuning import base_of

    if config.method["type"] == "none":
        if config.base["type"] == "reward_guidance":
            raise ConfigError("a base is tuned from, and method=none tunes not: guidance=reward")
        return None
    settings, known = base_of(config.base, task, config.kl_weight), pretraining.task
    if settings is not None and known.id:
        settings["stored"] = {"type": "task", "id": known.id, "kwargs": dict(known.kwargs)}
    return settings


def evaluated(
    config: SequenceTuningConfig,
    models: tuple[SequenceModel, SequenceModel],
    task: SequenceTask,
    oracles: Oracles,
    training: Tuned | None,
) -> TuningResult:
    """Every figure of the pre-trained model's and the tuned model's sequences."""
    from diffpolicy.report.sequences import TuningResult
    from diffpolicy.sequences.designs import designs, write_designs
    from diffpolicy.sequences.evaluate import can_be_exact, evaluate_sequences, exactly
    from diffpolicy.sequences.guided import STEERED, steered
    from diffpolicy.sequences.oracles import judge_note

    pretrained, model = models
    plain = config.guidance["type"] == "none"
    one_by_one = config.num_steps is None and config.guidance["type"] in STEERED  # a known law
    known = one_by_one and can_be_exact(model, task) and config.kl_weight > 0
    known, exact = known and _evaluation(config).exact, None
    if known:
        guided = steered(model, config.guidance, oracles.reward)
        exact = exactly(model, pretrained, task, config.kl_weight, guided=guided)
    settings = _evaluation(config, **({"exact": False} if known else {}))
    before = _draw(config, pretrained, {"type": "none"}, oracles)
    began = time.perf_counter()
    after = _draw(config, model, config.guidance, oracles)
    draw_s = time.perf_counter() - began
    judged: dict[str, Any] = {"oracles": oracles, "reference": pretrained, "settings": settings}
    rows = [
        evaluate_sequences(owner, task, drawn.tokens.cpu(), **judged)
        for owner, drawn in ((None, before), (model if plain else None, after))
    ]
    if exact is not None:
        rows[1] |= {"kl": exact.scores.kl, "kl_kind": "exact", "kl_standard_error": 0.0}
    trained = config.method["type"] != "none"
    found = designs(after.tokens, task, oracles, pretrained, elbo_draws=settings.elbo_draws)
    write_designs(config.run_dir, found)
    return TuningResult(
        task=task.name,
        method=_method(config),
        seed=config.seed,
        before=rows[0],
        after=rows[1],
        alphabet=task.alphabet,
        profiles=_profiles(task, before.tokens, after.tokens, settings.top_fraction),
        setting=f"kl_weight={config.kl_weight}" if trained else "",
        settings=asdict(config),
        designs=len(found),
        cost={
            "nfe": after.nfe,
            "reward_calls": after.reward_calls,
            "wall_s": draw_s / config.draws,
            "updates": int(config.trainer["steps"]) if trained else 0,
            "train_s": training.train_s if training else 0.0,
            "train_reward_calls": training.reward_calls if training else 0,
        },
        exact=None if exact is None else exact.scores._asdict(),
        best=found[:10],
        note=judge_note(oracles),
        optimum=() if exact is None else exact.front,
    )


def _method(config: SequenceTuningConfig) -> str:
    """The name of the run without its task: what its table calls it."""
    parts = [p for p in (config.method, config.guidance) if p["type"] != "none"]
    return config.label or "+".join(str(p.get("name", p["type"])) for p in parts)


def _draw(
    config: SequenceTuningConfig,
    model: SequenceModel,
    guidance: Mapping[str, Any],
    oracles: Oracles,
) -> GuidedDraws:
    import torch

    from diffpolicy.sequences.guided import draw_guided

    generator = torch.Generator(model.device).manual_seed(config.seed)
    how: dict[str, Any] = {"num_steps": config.num_steps, "generator": generator}
    return draw_guided(model, guidance, oracles.reward, config.draws, **how)


def _profiles(task: SequenceTask, before: Any, after: Any, fraction: float) -> dict[str, Any]:
    from diffpolicy.report.sequences import PRETRAINED, TOP, TUNED
    from diffpolicy.sequences.metrics import profile, top_sequences
    from diffpolicy.sequences.task import measured

    size = len(task.alphabet)
    top = top_sequences(*measured(task), fraction)
    return {
        PRETRAINED: profile(before.cpu().numpy(), size),
        TUNED: profile(after.cpu().numpy(), size),
        TOP: profile(top, size),
    }
