"""Configuration of sequence models: their training and their tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from diffpolicy.config import ConfigError, build, compose, config_dir


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


def is_sequences(overrides: Sequence[str]) -> bool:
    """Whether these arguments of `diffpolicy train` are about a sequence task.

    They name a task, or an experiment that does.
    """
    from omegaconf import OmegaConf

    given = dict(o.removeprefix("--").split("=", 1) for o in overrides if "=" in o)
    if any(key == "task" or key.startswith("task.") for key in given):
        return True
    file = config_dir() / "experiment" / f"{given.get('experiment')}.yaml"
    if not file.is_file():
        return False
    defaults = OmegaConf.to_container(OmegaConf.load(file)).get("defaults", [])  # type: ignore[union-attr]
    return any("task" in str(key) for entry in defaults if isinstance(entry, dict) for key in entry)


def load_sequence_train(overrides: Sequence[str]) -> SequenceTrainConfig:
    """The pre-training that ``overrides`` ask for."""
    return build(SequenceTrainConfig, compose("train_sequences", overrides))


def load_finetune(overrides: Sequence[str]) -> FinetuneConfig:
    """The tuning that ``overrides`` ask for."""
    return build(FinetuneConfig, compose("finetune", overrides))
