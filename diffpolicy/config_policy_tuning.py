"""Configuration of policies that are tuned by preferences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from diffpolicy.config import ConfigError, EvaluationConfig, build, compose
from diffpolicy.config_sequences import experiment_kind

KEYS = ("preference", "preferences", "collect", "judge", "windows", "rounds", "adapters", "nfe")


@dataclass
class PolicyTuningConfig:
    """One tuning, as composed from ``configs/finetune_policy.yaml``."""

    preference: dict[str, Any]
    trainer: dict[str, Any]
    evaluation: EvaluationConfig
    pretrained: str
    method: str | None = None
    preferences: str | None = None
    collect: dict[str, Any] | None = None
    judge: dict[str, Any] | None = None
    windows: int | None = None
    rounds: int = 1
    demonstrations: str | None = None
    adapters: dict[str, Any] | None = None
    nfe: list[Any] = field(default_factory=lambda: [10])
    name: str = "preferred"
    run_dir: str = "runs/preferred"
    overwrite: bool = False
    seed: int = 0
    device: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ConfigError(f"rounds must be at least 1, got {self.rounds}")
        if not self.nfe or not all(type(n) is int and n >= 1 for n in self.nfe):
            raise ConfigError(f"nfe must be a list of numbers of steps, got {self.nfe}")
        if self.preferences is not None and self.collect is not None:
            raise ConfigError("give preferences=FILE or collect=..., not both")
        if self.judge is not None and self.collect is None:
            raise ConfigError("judge learns from the policy's rollouts: it needs collect=...")
        if self.rounds > 1 and self.collect is None:
            raise ConfigError("rounds collect anew: they need collect=...")


def is_policy_tuning(overrides: Sequence[str]) -> bool:
    """Whether these arguments of `diffpolicy finetune` are about a policy.

    They choose a preference method, or an experiment that does.
    """
    given = dict(o.removeprefix("--").lstrip("+").split("=", 1) for o in overrides if "=" in o)
    if experiment_kind(given.get("experiment")) == "preference":
        return True
    return any(key.split(".")[0] in KEYS for key in given)


def load_policy_tuning(overrides: Sequence[str]) -> PolicyTuningConfig:
    """The tuning that ``overrides`` ask for.

    Raises:
        ConfigError: settings that cannot be used, or an experiment of another command.
    """
    given = dict(o.removeprefix("--").split("=", 1) for o in overrides if "=" in o)
    name = given.get("experiment")
    if name is not None and experiment_kind(name) not in ("preference", "policy"):
        raise ConfigError(f"{name} is an experiment of sequences, which has no preference=...")
    config = build(PolicyTuningConfig, compose("finetune_policy", overrides))
    config.evaluation.check_protocol()
    return config
