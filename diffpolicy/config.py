"""Configuration: YAML groups and ``key=value`` overrides in, plain checked dataclasses out.

Config objects stop here and in the commands; everything below takes plain arguments. A config names
choices from closed registries: nothing in it is imported, evaluated or executed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffpolicy.config_compose import (
    choice_files,
    compose,
    config_dir,
    group_choices,
    keys_given,
    read_yaml,
)
from diffpolicy.settings import ConfigError, near_miss
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


@dataclass
class DataConfig:
    """Episode store, split and normalisation."""

    path: str
    collect: CollectConfig | None = None
    d4rl: str | None = None
    transforms: list[Any] = field(default_factory=list)
    val_fraction: float = 0.02
    max_episodes: int | None = None
    normalize: dict[str, str] = field(default_factory=dict)


@dataclass
class PolicyConfig:
    """Shape and parameterisation of a diffusion policy."""

    type: str = "diffusion"
    horizon: int = 16
    n_obs_steps: int = 2
    n_action_steps: int = 8
    prediction: str = "eps"
    clip: bool = True
    cond_dropout: float = 0.0
    grippers: list[Any] = field(default_factory=list)
    rti: dict[str, Any] | None = None
    truncated: dict[str, Any] | None = None
    anchors: dict[str, Any] | None = None
    level_law: str = "row"
    layout: str = "action"
    goal: list[Any] = field(default_factory=list)
    constant: list[Any] = field(default_factory=list)
    returns: dict[str, Any] | None = None
    value_scale: float = 0.0
    temperature: float = 1.0
    heads: dict[str, Any] = field(default_factory=dict)
    selection: dict[str, Any] | None = None


@dataclass
class SamplerConfig:
    """How plans are drawn."""

    solver: str = "ddim"
    num_steps: int = 10
    spacing: str = "t"
    options: dict[str, Any] = field(default_factory=dict)
    guidance_scale: float = 1.0
    t_min: float | None = None


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

    def __post_init__(self) -> None:
        for name, least in (
            ("val_episodes", 0),
            ("episodes", 0),
            ("video_episodes", 0),
            ("num_envs", 1),
        ):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"evaluation.{name} must be at least {least}, got {getattr(self, name)}"
                )
        if self.plan_batch is not None and self.plan_batch < 1:
            raise ConfigError(
                f"evaluation.plan_batch must be at least 1 or null, got {self.plan_batch}"
            )
        if self.timeout <= 0 or (self.num_workers is not None and self.num_workers < 0):
            raise ConfigError(
                "evaluation.timeout must be positive and num_workers at least 0 (or null), "
                f"got {self.timeout} and {self.num_workers}"
            )
        if self.val_seed < 100_000 or self.seed < 100_000:
            raise ConfigError(
                "evaluation seeds start at 100,000 (below are the demonstrations'); "
                f"got val_seed={self.val_seed}, seed={self.seed}"
            )

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
            raise ConfigError(
                "test seeds start at 300,000 (or are Push-T's published 100,000..100,049), "
                f"got {test}"
            )


@dataclass
class TrainConfig:
    """One training run, as composed from ``configs/train.yaml``."""

    env: EnvConfig
    data: DataConfig
    policy: PolicyConfig
    network: dict[str, Any]
    process: dict[str, Any]
    sampler: SamplerConfig
    trainer: dict[str, Any]
    evaluation: EvaluationConfig
    learning: dict[str, Any] = field(default_factory=dict)
    name: str = "run"
    run_dir: str = "runs/run"
    overwrite: bool = False
    seed: int = 0
    device: str = "auto"
    threads: int | None = None


@dataclass
class EvalConfig:
    """One evaluation, as composed from ``configs/eval.yaml``."""

    checkpoint: str
    evaluation: EvaluationConfig
    env: dict[str, Any] = field(default_factory=dict)
    sampler: dict[str, Any] = field(default_factory=dict)
    rti: dict[str, Any] = field(default_factory=dict)
    truncated: dict[str, Any] = field(default_factory=dict)
    selection: dict[str, Any] = field(default_factory=dict)
    judge: dict[str, Any] = field(default_factory=dict)
    returns: dict[str, Any] = field(default_factory=dict)
    temperature: float | None = None
    value_scale: float | None = None
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
    n_action_steps: int | None = None
    output: str | None = None
    deterministic: bool = False
    device: str = "auto"
    threads: int | None = None


def load_train(overrides: Sequence[str]) -> TrainConfig:
    """The training run that ``overrides`` ask for.

    Raises:
        ConfigError: settings that cannot be used, or a mistyped path of data.
    """
    config = build(TrainConfig, compose("train", overrides))
    config.evaluation.check_protocol()
    config.run_dir = seeded_run_dir(config.run_dir, config.seed, overrides)
    given = keys_given(overrides)
    if "data.path" in given and not any(k.startswith("data.collect") for k in given):
        _check_meant(config.data)
    return config


def _check_meant(data: DataConfig) -> None:
    """Raise for a path that was given, is not there, and looks mistyped: nothing is recorded."""
    path = Path(data.path)
    if data.collect is None or path.exists():
        return
    first = next(p for p in (*reversed(path.parents), path) if not p.exists())
    beside = first.parent.iterdir() if first.parent.is_dir() else ()
    hint = near_miss(first.name, [p.name for p in beside])
    if hint:
        raise ConfigError(
            f"nothing is at {path}{hint} (in {first.parent}). To record demonstrations there, say "
            f"how many: data.collect.episodes={data.collect.episodes}"
        )


def seeded_run_dir(run_dir: str, seed: int, overrides: Sequence[str]) -> str:
    """The run's directory; it ends in the seed where one was given, and no directory.

    So that ``for s in 0 1 2; do diffpolicy train ... seed=$s; done`` makes three runs.
    """
    given = keys_given(overrides)
    return f"{run_dir}_seed{seed}" if "seed" in given and "run_dir" not in given else run_dir


def load_eval(overrides: Sequence[str]) -> EvalConfig:
    """The evaluation that ``overrides`` ask for."""
    return build(EvalConfig, compose("eval", overrides))


__all__ = [
    "CollectConfig",
    "ConfigError",
    "DataConfig",
    "EnvConfig",
    "EvalConfig",
    "EvaluationConfig",
    "PolicyConfig",
    "SamplerConfig",
    "TrainConfig",
    "build",
    "choice_files",
    "compose",
    "config_dir",
    "group_choices",
    "keys_given",
    "load_eval",
    "load_train",
    "read_yaml",
    "seeded_run_dir",
]
