"""`diffpolicy finetune` of a policy: comparisons in, a tuned policy and a report out."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpolicy.commands.stores import env_spec
from diffpolicy.commands.train import make_workers, pick_device, validator
from diffpolicy.commands.train_sequences import check_new, trainer_settings, write_config
from diffpolicy.config import ConfigError, TrainConfig, build
from diffpolicy.config_policy_tuning import PolicyTuningConfig, load_policy_tuning

if TYPE_CHECKING:
    from diffpolicy.api import DiffusionPolicy
    from diffpolicy.data.preferences import PreferenceSet
    from diffpolicy.data.store import EpisodeStore
    from diffpolicy.rollout.branches import Branching, Repeats
    from diffpolicy.rollout.results import EvalResult


JUDGE_TRAINER = {"steps": 2500, "batch_size": 512, "lr": 1e-3, "weight_decay": 1e-2}


def run_policy(arguments: Sequence[str]) -> int:
    """Compose the configuration and tune."""
    overrides = [a for a in arguments if a != "--print-config"]
    config = load_policy_tuning(overrides)
    if len(overrides) < len(arguments):
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
        return 0
    return finetune_policy(config)


def finetune_policy(config: PolicyTuningConfig, *, resume: bool = False) -> int:
    """Run one tuning, from the pre-trained policy to a report."""
    from diffpolicy.rollout.tuning_report import write_tuning_report

    began = time.perf_counter()
    run_dir = Path(config.run_dir)
    check_new(run_dir, overwrite=config.overwrite, resume=resume)
    base = pretraining(config.pretrained)
    device = pick_device(config.device, config.threads)
    demonstrations = _demonstrations(config, base)
    policy = _load(config.pretrained, device)
    _check(config, policy)
    write_config(run_dir, config)
    trained = []
    with ExitStack() as stack:
        validate = validator(_evaluated(config, base), stack, device)
        for number in range(config.rounds):
            folder = run_dir if config.rounds == 1 else run_dir / f"round_{number}"
            preferences = _preferences(config, base, policy, folder, number)
            finished = _tune(config, policy, preferences, demonstrations, folder, validate, resume)
            if finished is None:
                print(f"stopped; continue with `diffpolicy resume {run_dir}`")
                return 130
            policy, training = finished
            trained.append(training)
    policy.save(run_dir / "policy")
    scores = {
        "before": _scores(config, base, config.pretrained, device),
        "after": _scores(config, base, str(run_dir / "policy"), device),
    }
    report = write_tuning_report(
        run_dir,
        method=config.method or str(config.preference.get("name", config.preference["type"])),
        task=base.env.name,
        seed=config.seed,
        score=base.env.score,
        scores=scores,
        training={"rounds": trained, "train_s": sum(t["train_s"] for t in trained)},
        settings=asdict(config),
    )
    short = {
        "task": config.name,
        "method": report["method"],
        "train_s": round(report["training"]["train_s"], 1),
        "before": {n: round(s["value"], 4) for n, s in report["before"].items()},
        "after": {n: round(s["value"], 4) for n, s in report["after"].items()},
        "difference_95": {
            n: [None if d[k] is None else round(d[k], 4) for k in ("value", "low", "high")]
            for n, d in report["difference"].items()
        },
        "total_s": round(time.perf_counter() - began, 1),
    }
    print("RESULT " + json.dumps(short))
    return 0


def of_policies(run: str) -> bool:
    """Whether the report of a run is of a policy's tuning."""
    from diffpolicy.rollout.tuning_report import FORMAT

    file = Path(run) / "report.json" if Path(run).is_dir() else Path(run)
    return file.is_file() and json.loads(file.read_text()).get("format") == FORMAT


def pretraining(run_dir: str) -> TrainConfig:
    """The configuration that a policy's run was made with.

    Raises:
        ConfigError: no run of a policy.
    """
    from omegaconf import OmegaConf

    file = Path(run_dir) / "config.yaml"
    if not file.is_file():
        raise ConfigError(
            f"no trained policy in {run_dir}: make it with `diffpolicy train "
            f"experiment={Path(run_dir).name}`, or set pretrained=RUN"
        )
    values = OmegaConf.to_container(OmegaConf.load(file))
    if not isinstance(values, dict) or "env" not in values:
        raise ConfigError(f"{run_dir} is no run of a policy; set pretrained=RUN")
    return build(TrainConfig, {str(k): v for k, v in values.items()})


def _load(path: str, device: Any) -> DiffusionPolicy:
    from diffpolicy.api import DiffusionPolicy

    return DiffusionPolicy.from_pretrained(path, device=device)


def _check(config: PolicyTuningConfig, policy: DiffusionPolicy) -> None:
    """Find what is wrong with the settings before anything runs."""
    import copy

    from diffpolicy.finetune.adapters import add_adapters
    from diffpolicy.finetune.preference_methods import check_method, is_online

    trainer_settings(config.trainer, config.seed)
    check_method(config.preference, policy.denoiser)
    if config.collect is not None:
        _collection(config)
    if is_online(config.preference) != (config.judge is not None):
        raise ConfigError(
            "preference.online compares own plans by judge=..., and judge serves nothing else: "
            "give both or neither"
        )
    if config.adapters is not None:
        add_adapters(copy.deepcopy(policy.denoiser), config.adapters)


def _collection(config: PolicyTuningConfig) -> Branching | Repeats:
    """How pairs are made: its settings and those of the scoring, side by side."""
    from diffpolicy.policies.base import settings_from
    from diffpolicy.rollout.branches import Branching, Repeats
    from diffpolicy.rollout.pairing import Scoring

    kinds: dict[str, Any] = {"branches": Branching, "episodes": Repeats}
    values = {k: v for k, v in (config.collect or {}).items() if k not in ("seed", "seeds")}
    kind = values.pop("type", "branches")
    if kind not in kinds:
        raise ConfigError(f"collect.type must be one of {sorted(kinds)}, got {kind!r}")
    names = {f.name for f in fields(Scoring)}
    scoring = settings_from(Scoring, {k: values.pop(k) for k in names & set(values)}, "collect")
    values |= {"seed": config.seed, "scoring": scoring}
    made: Branching | Repeats = settings_from(kinds[kind], values, "collect")
    return made


def _demonstrations(config: PolicyTuningConfig, base: TrainConfig) -> EpisodeStore | None:
    from diffpolicy.data.store import EpisodeStore

    path = Path(config.demonstrations or base.data.path)
    if path.exists():
        return EpisodeStore.open(path)
    if config.demonstrations is not None:
        raise ConfigError(f"no episode store at {path}; give demonstrations=STORE")
    return None


def _preferences(
    config: PolicyTuningConfig,
    base: TrainConfig,
    policy: DiffusionPolicy,
    folder: Path,
    number: int,
) -> PreferenceSet | None:
    """The comparisons of a round: a file, or pairs from rollouts of the newest policy."""
    from diffpolicy.data.preferences import PreferenceSet
    from diffpolicy.rollout.branches import Branching, collect_branches, collect_episodes

    if config.preferences is not None:
        return PreferenceSet.open(config.preferences)
    if config.collect is None:
        return None
    settings = _collection(config)
    count = int(config.collect.get("seeds", 50))
    first = int(config.collect.get("seed", 50_000)) + (config.rounds * config.seed + number) * count
    seeds = range(first, first + count)
    if seeds.stop > 100_000 or first < 0:
        raise ConfigError(f"rollouts to learn from use environment seeds below 100,000: {seeds}")
    folder.mkdir(parents=True, exist_ok=True)
    where: dict[str, Any] = {
        "store_path": folder / "rollouts.zarr",
        "prefs_path": folder / "preferences.jsonl",
        "workers": make_workers(config.evaluation, 1_000_000),
    }
    if isinstance(settings, Branching):
        return collect_branches(policy, env_spec(base), seeds, settings=settings, **where)
    return collect_episodes(policy, env_spec(base), seeds, settings=settings, **where)


def _tune(
    config: PolicyTuningConfig,
    policy: DiffusionPolicy,
    preferences: PreferenceSet | None,
    demonstrations: EpisodeStore | None,
    folder: Path,
    validate: Any,
    resume: bool,
) -> tuple[DiffusionPolicy, dict[str, Any]] | None:
    """One round: the best checkpoint by the validation score; ``None`` if it was stopped."""
    from diffpolicy.preference_tuning import PreferenceData

    base = pretraining(config.pretrained)
    data = PreferenceData(
        preferences,
        demonstrations,
        base.data.max_episodes,
        windows=config.windows,
        **_judged(config, policy, preferences, folder),
    )
    policy.prefer(
        data,
        config.preference,
        trainer_settings(config.trainer, config.seed),
        folder,
        adapters=config.adapters,
        evaluate=validate,
        resume=resume and (folder / "checkpoints").exists(),
        overwrite=config.overwrite,
    )
    training = policy.last_training
    assert training is not None
    if training.interrupted:
        return None
    summary: dict[str, Any] = {
        "steps": training.step,
        "train_s": training.train_s,
        "score": training.best_score,
    }
    if preferences is not None:
        summary["preferences"] = preferences.summary()
    return _load(str(folder), policy.device), summary


def _judged(
    config: PolicyTuningConfig,
    policy: DiffusionPolicy,
    preferences: PreferenceSet | None,
    folder: Path,
) -> dict[str, Any]:
    """What methods with ``online`` compare by: a value of plans, learned from the rollouts."""
    if config.judge is None or preferences is None:
        return {}
    from diffpolicy.reward_model import PlanValue

    rollouts, values = preferences.store, dict(config.judge)
    trainer = {**JUDGE_TRAINER, **(values.pop("trainer", None) or {})}
    pessimism = float(values.pop("pessimism", 1.0))
    value = PlanValue.for_policy(policy, seed=config.seed, **values)
    settings = trainer_settings(trainer, config.seed, "judge.trainer.")
    value.learn(None, rollouts, settings, folder / "value", overwrite=True)
    value.pessimism = pessimism
    return {"reward": value, "observations": rollouts}


def _evaluated(config: PolicyTuningConfig, base: TrainConfig) -> TrainConfig:
    """The pre-trained run's configuration with this tuning's rollouts."""
    base.evaluation = config.evaluation
    return base


def _scores(
    config: PolicyTuningConfig, base: TrainConfig, path: str, device: Any
) -> dict[str, EvalResult]:
    """The policy scored on the test seeds, by number of sampling steps."""
    from diffpolicy.api import DiffusionPolicy
    from diffpolicy.rollout.evaluate import evaluate

    settings = config.evaluation
    found = {}
    for num_steps in config.nfe if settings.episodes else ():
        policy = DiffusionPolicy.from_pretrained(
            path, device=device, sampler={"num_steps": num_steps}
        )
        found[str(num_steps)] = evaluate(
            policy,
            env_spec(base),
            range(settings.seed, settings.seed + settings.episodes),
            workers=make_workers(settings, settings.episodes),
            success_threshold=base.env.success_threshold,
        )
    return found


__all__ = ["finetune_policy", "of_policies", "pretraining", "run_policy"]
