"""Configuration of sequence models: their training and their tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from diffpolicy.config import (
    ConfigError,
    build,
    choice_files,
    compose,
    keys_given,
    read_yaml,
    seeded_run_dir,
)


@dataclass
class TaskConfig:
    """A sequence task beside the environments."""

    id: str
    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class OracleConfig:
    """Rewards learned from measurements, where a task has no truth of its own."""

    surrogate: bool = False
    seed: int = 0
    network: dict[str, Any] = field(default_factory=lambda: {"type": "sequence_regressor"})
    trainer: dict[str, Any] = field(default_factory=dict)


@dataclass
class SequenceTrainConfig:
    """One pre-training, as composed from ``configs/train_sequences.yaml``."""

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
    name: str = "run"
    run_dir: str = "runs/run"
    overwrite: bool = False
    seed: int = 0
    device: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.draws < 2:
            raise ConfigError(f"draws must be at least 2, got {self.draws}")


@dataclass
class FinetuneConfig:
    """One tuning, as composed from ``configs/finetune.yaml``."""

    finetune: dict[str, Any]
    guidance: dict[str, Any]
    trainer: dict[str, Any]
    pretrained: str
    method: str | None = None
    kl_weight: float = 0.1
    draws: int = 640
    num_steps: int | None = None
    eval_draws: int = 256
    name: str = "tuned"
    run_dir: str = "runs/tuned"
    overwrite: bool = False
    seed: int = 0
    device: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.kl_weight < 0:
            raise ConfigError(f"kl_weight must not be negative, got {self.kl_weight}")
        if self.draws < 2 or self.eval_draws < 2:
            raise ConfigError(
                f"draws and eval_draws must be at least 2, got {self.draws}, {self.eval_draws}"
            )


def experiment_kind(name: str | None) -> str:
    """What an experiment is of.

    ``"policy"``, ``"sequences"``, ``"finetune"`` (of sequences) or ``"preference"`` (of policies).
    """
    file = choice_files()["experiment"].get(str(name))
    if file is None:
        return "policy"
    values = read_yaml(file)
    defaults = values.get("defaults", [])
    bases = [e for e in defaults if isinstance(e, str) and e != "_self_"]
    keys = [str(key) for entry in defaults if isinstance(entry, dict) for key in entry]
    for kind in ("preference", "finetune"):
        if any(kind in key for key in keys):
            return kind
    if any("task" in key for key in keys):
        return "sequences"
    return experiment_kind(bases[0].rpartition("/")[2]) if bases else "policy"


def is_sequences(overrides: Sequence[str]) -> bool:
    """Whether these arguments of `diffpolicy train` are about a sequence task.

    They name a task, or an experiment that does.

    Raises:
        ConfigError: an experiment of `diffpolicy finetune`.
    """
    given = keys_given(overrides)
    kind = experiment_kind(given.get("experiment"))
    if kind in ("finetune", "preference"):
        name = given["experiment"]
        raise ConfigError(f"{name} tunes a model: run `diffpolicy finetune experiment={name}`")
    return kind == "sequences" or any(k == "task" or k.startswith("task.") for k in given)


def load_sequence_train(overrides: Sequence[str]) -> SequenceTrainConfig:
    """The pre-training that ``overrides`` ask for."""
    config = build(SequenceTrainConfig, compose("train_sequences", overrides))
    config.run_dir = seeded_run_dir(config.run_dir, config.seed, overrides)
    return config


def load_finetune(overrides: Sequence[str]) -> FinetuneConfig:
    """The tuning that ``overrides`` ask for.

    Raises:
        ConfigError: settings that cannot be used, or an experiment of `diffpolicy train`.
    """
    name = keys_given(overrides).get("experiment")
    if name in choice_files()["experiment"] and experiment_kind(name) != "finetune":
        raise ConfigError(f"{name} trains a model: run `diffpolicy train experiment={name}`")
    config = build(FinetuneConfig, compose("finetune", overrides))
    config.run_dir = seeded_run_dir(config.run_dir, config.seed, overrides)
    return config
