"""Configuration of sequence models: their training and their tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from diffpolicy.config import ConfigError, build, compose, config_dir, group_choices


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
    from omegaconf import OmegaConf

    file = config_dir() / "experiment" / f"{name}.yaml"
    if not file.is_file():
        return "policy"
    defaults = OmegaConf.to_container(OmegaConf.load(file)).get("defaults", [])  # type: ignore[union-attr]
    keys = [str(key) for entry in defaults if isinstance(entry, dict) for key in entry]
    for kind in ("preference", "finetune"):
        if any(kind in key for key in keys):
            return kind
    return "sequences" if any("task" in key for key in keys) else "policy"


def is_sequences(overrides: Sequence[str]) -> bool:
    """Whether these arguments of `diffpolicy train` are about a sequence task.

    They name a task, or an experiment that does.

    Raises:
        ConfigError: an experiment of `diffpolicy finetune`.
    """
    given = dict(o.removeprefix("--").split("=", 1) for o in overrides if "=" in o)
    kind = experiment_kind(given.get("experiment"))
    if kind in ("finetune", "preference"):
        name = given["experiment"]
        raise ConfigError(f"{name} tunes a model: run `diffpolicy finetune experiment={name}`")
    return kind == "sequences" or any(k == "task" or k.startswith("task.") for k in given)


def load_sequence_train(overrides: Sequence[str]) -> SequenceTrainConfig:
    """The pre-training that ``overrides`` ask for."""
    return build(SequenceTrainConfig, compose("train_sequences", overrides))


def load_finetune(overrides: Sequence[str]) -> FinetuneConfig:
    """The tuning that ``overrides`` ask for.

    Raises:
        ConfigError: settings that cannot be used, or an experiment of `diffpolicy train`.
    """
    given = dict(o.removeprefix("--").split("=", 1) for o in overrides if "=" in o)
    name = given.get("experiment")
    if name in group_choices().get("experiment", {}) and experiment_kind(name) != "finetune":
        raise ConfigError(f"{name} trains a model: run `diffpolicy train experiment={name}`")
    return build(FinetuneConfig, compose("finetune", overrides))
