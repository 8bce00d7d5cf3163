"""Configuration: YAML groups and ``key=value`` overrides in, plain checked dataclasses out.

Config objects stop here and in the commands; everything below takes plain arguments. A config names
choices from closed registries: nothing in it is imported, evaluated or executed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffpolicy.config_compose import (
    check_data_path,
    choice_files,
    compose,
    config_dir,
    experiment_values,
    given_text,
    keys_given,
    read_yaml,
    seeded_run_dir,
)
from diffpolicy.config_tasks import of_file, of_task, with_kwargs
from diffpolicy.settings import ConfigError, check_choice, check_range
from diffpolicy.settings import from_values as build


@dataclass
class EnvConfig:
    """Environment and what counts as its score."""

    id: str
    name: str = "env"
    kwargs: dict[str, Any] = field(default_factory=dict)
    max_episode_steps: int | None = None
    success_threshold: float | None = None
    score: str = "success"


@dataclass
class CollectConfig:
    """Demonstrations by the environment's scripted expert."""

    episodes: int = 200
    seed: int = 0
    noise: float = 0.0


_ONE_STORE = ("path", "collect", "d4rl", "transforms")


@dataclass
class DataConfig:
    """Episode store (or several, ``mix``), split and normalisation."""

    path: str | None
    collect: CollectConfig | None = None
    d4rl: str | None = None
    transforms: list[Any] = field(default_factory=list)
    val_fraction: float = 0.02
    max_episodes: int | None = None
    normalize: dict[str, str] = field(default_factory=dict)
    mix: list[Any] = field(default_factory=list)
    normalizer: str = "shared"
    goals: Any = None

    def __post_init__(self) -> None:
        beside = [name for name in _ONE_STORE if getattr(self, name)]
        if self.mix and beside:
            raise ConfigError(f"data.mix names its stores itself; leave out data.{beside[0]}")
        check_choice("data.normalizer", self.normalizer, ("shared", "per_store"))
        if self.normalizer == "per_store" and not self.mix:
            raise ConfigError("data.normalizer=per_store is of several stores: give data.mix")
        if not self.mix and self.path is None:
            raise ConfigError("give data.path=STORE, or data.mix=[{path: STORE, weight: 1}, ...]")


@dataclass
class EvaluationConfig:
    """Rollouts while training (validation seeds) and at the end (test seeds)."""

    val_episodes: int = 20
    val_seed: int = 200_000
    episodes: int = 50
    seed: int = 300_000
    num_envs: int = 10
    num_workers: int | None = None
    timeout: float = 60.0
    plan_batch: int | None = None
    video_episodes: int = 0
    video_cameras: bool = False

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("val_episodes", "episodes", "video_episodes", "num_workers"), 0)
        for name, least in (counts | {"num_envs": 1, "plan_batch": 1}).items():
            check_range(f"[{least}, inf)", **{f"evaluation.{name}": getattr(self, name)})
        check_range("(0, inf)", **{"evaluation.timeout": self.timeout})
        if self.val_seed < 100_000 or self.seed < 100_000:
            raise ConfigError(f"evaluation seeds start at 100,000: {self.val_seed}, {self.seed}")

    def check_protocol(self) -> None:
        """Raise unless choices and final scores use seeds of their own."""
        val, test = (
            range(first, first + count)
            for first, count in ((self.val_seed, self.val_episodes), (self.seed, self.episodes))
        )
        if val and not (val.start >= 200_000 and val.stop <= 300_000):
            raise ConfigError(f"validation seeds lie in 200,000..299,999, got {val}")
        published = test.start >= 100_000 and test.stop <= 100_050
        if test and not published and test.start < 300_000:
            published_ones = "Push-T's published 100,000..100,049"
            raise ConfigError(f"test seeds start at 300,000 (or are {published_ones}), got {test}")


@dataclass(kw_only=True)
class RunConfig:
    """What every command has that leaves a run directory; ``run`` is a key of :data:`KINDS`."""

    run: str
    name: str = "run"
    run_dir: str = "runs/run"
    overwrite: bool = False
    seed: int = 0
    device: str = "auto"
    threads: int | None = None


@dataclass(kw_only=True)
class TrainConfig(RunConfig):
    """One training of a policy, as composed from ``configs/train.yaml``; see :meth:`spec`."""

    env: EnvConfig
    data: DataConfig
    policy: dict[str, Any]
    network: dict[str, Any]
    process: dict[str, Any]
    sampler: dict[str, Any]
    trainer: dict[str, Any]
    evaluation: EvaluationConfig
    learning: dict[str, Any] = field(default_factory=dict)
    run: str = "train"

    def spec(self) -> dict[str, Any]:
        """Entries of the policy's :class:`~diffpolicy.PolicySpec`, as plain values."""
        drawn = {"network": self.network, "process": self.process, "sampler": self.sampler}
        # ``type`` was "diffusion" in every run of earlier versions.
        beside = ("anchors", "type")
        return {**{k: v for k, v in self.policy.items() if k not in beside}, **drawn}


@dataclass
class TaskConfig:
    """A sequence task behind an environment's id; without one, ``kwargs`` are a ``FileTask``'s."""

    id: str | None = None
    name: str = "custom"
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class OracleConfig:
    """Rewards learned from measurements, where a task has no truth of its own."""

    surrogate: bool = False
    seed: int = 0
    network: dict[str, Any] = field(default_factory=lambda: {"type": "sequence_regressor"})
    trainer: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class SequenceTrainConfig(RunConfig):
    """One training of a sequence model, as composed from ``configs/train_sequences.yaml``."""

    task: TaskConfig
    network: dict[str, Any]
    process: dict[str, Any]
    trainer: dict[str, Any]
    oracles: OracleConfig
    time_free: bool = True
    label_quantiles: list[Any] = field(default_factory=list)
    cond_dropout: float = 0.0
    val_fraction: float = 0.02
    draws: int = 640
    report: dict[str, Any] = field(default_factory=dict)
    run: str = "train sequences"

    def __post_init__(self) -> None:
        check_range("[2, inf)", draws=self.draws)


@dataclass(kw_only=True)
class SequenceTuningConfig(RunConfig):
    """One tuning of a sequence model, as composed from ``configs/tune_sequences.yaml``."""

    method: dict[str, Any]
    guidance: dict[str, Any]
    trainer: dict[str, Any]
    pretrained: str
    task: TaskConfig | None = None
    pretrain: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=lambda: {"type": "none"})
    label: str | None = None
    kl_weight: float = 0.1
    draws: int = 640
    num_steps: int | None = None
    eval_draws: int = 256
    hacking: str = "warn"

    def __post_init__(self) -> None:
        check_choice("hacking", self.hacking, ("warn", "stop"))
        check_range("[0, inf)", kl_weight=self.kl_weight)
        check_range("[2, inf)", draws=self.draws, eval_draws=self.eval_draws)


@dataclass(kw_only=True)
class PolicyTuningConfig(RunConfig):
    """One tuning of a policy, as composed from ``configs/tune.yaml`` or ``configs/prefer.yaml``."""

    method: dict[str, Any]
    trainer: dict[str, Any]
    evaluation: EvaluationConfig
    pretrained: str
    label: str | None = None
    preferences: str | None = None
    collect: dict[str, Any] | None = None
    judge: dict[str, Any] | None = None
    plans: dict[str, Any] | None = None
    windows: int | None = None
    rounds: int = 1
    demonstrations: str | None = None
    adapters: dict[str, Any] | None = None
    nfe: list[Any] | None = None

    def __post_init__(self) -> None:
        check_range("[1, inf)", rounds=self.rounds)
        given = (1,) if self.nfe is None else self.nfe
        if not given or not all(type(n) is int and n >= 1 for n in given):
            raise ConfigError(f"nfe must be a list of numbers of steps, got {self.nfe}")

    @property
    def method_name(self) -> str:
        """What comparisons call the method unless they are told another name."""
        return self.label or str(self.method.get("name", self.method.get("type")))


@dataclass
class EvalConfig:
    """One evaluation, as composed from ``configs/eval.yaml``.

    ``sampler`` to ``n_action_steps`` replace entries of the stored
    :class:`diffpolicy.PolicySpec`; what is not given stays as it is.
    """

    checkpoint: str
    evaluation: EvaluationConfig
    env: dict[str, Any] = field(default_factory=dict)
    sampler: dict[str, Any] = field(default_factory=dict)
    rti: dict[str, Any] = field(default_factory=dict)
    truncated: dict[str, Any] = field(default_factory=dict)
    selection: dict[str, Any] = field(default_factory=dict)
    returns: dict[str, Any] = field(default_factory=dict)
    imagined: dict[str, Any] = field(default_factory=dict)
    guidance: dict[str, Any] = field(default_factory=dict)
    temperature: float | None = None
    value_scale: float | None = None
    n_action_steps: int | None = None
    normalizer: str | None = None
    judge: dict[str, Any] = field(default_factory=dict)
    plain: bool = False
    streaming: dict[str, Any] = field(default_factory=dict)
    chunking: dict[str, Any] = field(default_factory=dict)
    ensemble: float | None = None
    backend: str = "eager"
    latency_ms: float | None = None
    latency_ms_per_nfe: float | None = None
    control_ms: float = 50.0
    replan: str = "due"
    arrival: str = "aligned"
    hold_ticks: int | None = None
    safe_action: list[float] = field(default_factory=list)
    output: str | None = None
    report: bool = False
    deterministic: bool = False
    device: str = "auto"
    threads: int | None = None

    def of_policy(self) -> dict[str, Any]:
        """The entries of the spec that were given."""
        names = "sampler rti truncated selection returns imagined guidance temperature value_scale"
        given = {
            name: getattr(self, name) for name in [*names.split(), "n_action_steps", "normalizer"]
        }
        return {name: value for name, value in given.items() if value not in (None, {})}


KINDS: dict[str, type[RunConfig]] = {
    "train": TrainConfig,
    "train sequences": SequenceTrainConfig,
    **dict.fromkeys(("tune", "prefer", "distill"), PolicyTuningConfig),
    **dict.fromkeys(("tune sequences", "prefer sequences"), SequenceTuningConfig),
}
"""The configuration of every kind of run."""


def run_kind(command: str, overrides: Sequence[str]) -> str:
    """The kind of run that is asked for: a key of :data:`KINDS`.

    An experiment says it itself (``run: tune sequences``). Without one, ``task=...`` is of
    sequences, and so is tuning of a run of those.

    Raises:
        ConfigError: an experiment of another command.
    """
    given = keys_given(overrides)
    if "run" in given:
        raise ConfigError("the kind of a run is said by its command and experiment; leave out run=")
    name = given.get("experiment", "null")
    if name != "null":
        ours = choice_files()["experiment"].get(name, Path()).is_relative_to(config_dir())
        kind = str(experiment_values(name).get("run", "train" if ours else command))
        check_choice("kind of run", kind, KINDS)
        if kind.split()[0] != command:
            raise ConfigError(
                f"{name} is an experiment of another command: run `diffpolicy {kind.split()[0]} "
                f"experiment={name}`"
            )
        return kind
    sequences = of_task(given) or (command != "train" and _of_sequences(given))
    return f"{command} sequences" if sequences else command


def _of_sequences(given: Mapping[str, str]) -> bool:
    """Whether a tuning without experiment is of sequences: its run says so, or its method."""
    if "pretrained" in given:
        before = Path(given_text(given["pretrained"])).expanduser() / "config.yaml"
        return before.is_file() and read_run(before)["run"].endswith("sequences")
    from diffpolicy.learn.methods import method_class

    file = choice_files()["method"].get(given.get("method", ""))
    kind = None if file is None else read_yaml(file).get("type")
    return kind == "none" or (kind is not None and method_class(kind).items == "sequences")


def load_run(command: str, overrides: Sequence[str]) -> RunConfig:
    """The run that ``overrides`` ask a command for.

    Raises:
        ConfigError: settings that cannot be used, a mistyped path of data, or an experiment of
            another command.
    """
    kind = run_kind(command, overrides)
    values = with_kwargs(compose(kind.replace(" ", "_"), of_file(kind, overrides)))
    if values.get("preferences") is not None and "preferences" in keys_given(overrides):
        _compared_already(values, overrides)
    if (values.get("data") or {}).get("mix"):  # in place of what a group says of one store
        single = [name for name in _ONE_STORE if f"data.{name}" not in keys_given(overrides)]
        values["data"] |= {name: [] if name == "transforms" else None for name in single}
    config = build(KINDS[kind], {**values, "run": kind})
    evaluation = getattr(config, "evaluation", None)
    if evaluation is not None:
        evaluation.check_protocol()
    config.run_dir = seeded_run_dir(config.run_dir, config.seed, overrides)
    if isinstance(config, TrainConfig):
        check_data_path(config.data, keys_given(overrides))
    return config


def load_train(overrides: Sequence[str]) -> TrainConfig:
    """The training of a policy that ``overrides`` ask for, see :func:`load_run`."""
    config = load_run("train", overrides)
    if not isinstance(config, TrainConfig):
        raise ConfigError("this trains a sequence model; a policy is wanted")
    return config


def read_run(file: Path) -> dict[str, Any]:
    """The plain values of a run's configuration; an older run's kind is known by its sections."""
    values = read_yaml(file)
    if {"preference", "finetune"} & set(values):
        values["run"] = "tune sequences" if "finetune" in values else "prefer"
    values.setdefault("run", "train sequences" if "task" in values else "train")
    check_choice(f"run in {file}:", values["run"], KINDS)
    return values


def _compared_already(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Let a preference file stand in place of what an experiment says of making comparisons."""
    given = {key.split(".")[0] for key in keys_given(overrides)}
    stands = {"collect": None, "rounds": 1}
    if not given & {"judge", "plans"}:  # with either, own plans are compared
        stands["plans"] = None
    values |= {name: value for name, value in stands.items() if name not in given}


def load_eval(overrides: Sequence[str]) -> EvalConfig:
    """The evaluation that ``overrides`` ask for."""
    return build(EvalConfig, compose("eval", overrides))
