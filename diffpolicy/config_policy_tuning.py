"""Configuration of policies that are tuned by preferences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from diffpolicy.config import (
    ConfigError,
    EvaluationConfig,
    build,
    compose,
    keys_given,
    seeded_run_dir,
)
from diffpolicy.config_sequences import experiment_kind

SOURCES = ("preferences", "collect", "judge", "plans")
KEYS = ("preference", *SOURCES, "windows", "rounds", "adapters", "nfe")  # of policies alone


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
    plans: dict[str, Any] | None = None
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
        if self.judge is not None and self.collect is None and self.preferences is None:
            raise ConfigError(
                "judge learns from the policy's rollouts: it needs collect=..., or preferences=FILE"
                " that `diffpolicy data prefs collect` made"
            )
        if self.rounds > 1 and self.collect is None:
            raise ConfigError("rounds collect anew: they need collect=...")


def is_policy_tuning(overrides: Sequence[str]) -> bool:
    """Whether these arguments of `diffpolicy finetune` are about a policy.

    They choose a preference method, or an experiment that does.
    """
    given = keys_given(overrides)
    if experiment_kind(given.get("experiment")) == "preference":
        return True
    return any(key.split(".")[0] in KEYS for key in given)


def load_policy_tuning(overrides: Sequence[str]) -> PolicyTuningConfig:
    """The tuning that ``overrides`` ask for.

    Raises:
        ConfigError: settings that cannot be used, or an experiment of another command.
    """
    given = keys_given(overrides)
    name = given.get("experiment")
    if name is not None and experiment_kind(name) not in ("preference", "policy"):
        raise ConfigError(f"{name} is an experiment of sequences, which has no preference=...")
    overrides = [*overrides, *_superseded(given)]
    config = build(PolicyTuningConfig, compose("finetune_policy", overrides))
    config.evaluation.check_protocol()
    config.run_dir = seeded_run_dir(config.run_dir, config.seed, overrides)
    return config


def _superseded(given: dict[str, str]) -> list[str]:
    """What an experiment says of making pairs gives way to ``preferences=FILE``."""
    if given.get("preferences", "null") == "null" or not given.get("experiment"):
        return []
    own = {name.lstrip("+").split(".")[0] for name in given}
    unset = {"collect": "null", "rounds": "1"}
    if not own & {"judge", "plans"}:  # with either, own plans are compared
        unset |= {"judge": "null", "plans": "null"}
    return [f"{name}={value}" for name, value in unset.items() if name not in own]


UNREAD: dict[str, Any] = {
    "preferences": None,
    "collect": None,
    "judge": None,
    "plans": None,
    "windows": None,
    "rounds": 1,
    "demonstrations": None,
}
"""What a method may not look at, with the value that says so."""


def unread_settings(config: PolicyTuningConfig) -> list[str]:
    """The settings of ``UNREAD`` that were made and that the method does not look at."""
    from diffpolicy.learn.methods import method_of

    method = method_of(config.preference, "prefer")
    need = method.reads()
    pairs, online = bool(need & {"pairs", "labels"}), "observations" in need
    looked_at = {
        "preferences": pairs or online,
        "collect": pairs or online,
        "judge": online or (pairs and config.plans is not None),
        "plans": pairs,
        "windows": pairs,
        "rounds": pairs or online,
        "demonstrations": "demonstrations" in need or method.clones_demonstrations,
    }
    return [n for n, unset in UNREAD.items() if getattr(config, n) != unset and not looked_at[n]]


def method_name(config: PolicyTuningConfig) -> str:
    """The method of a tuning, as comparisons call it unless they are told another name."""
    return str(config.preference.get("name", config.preference.get("type")))


def leave_out_unread(config: PolicyTuningConfig, overrides: Sequence[str]) -> str:
    """Take out what an experiment sets and another method than its own does not look at.

    So ``experiment=pusht_dpo preference=bc`` is the baseline of ``experiment=pusht_dpo``.

    Args:
        config: changed in place.
        overrides: what was given beside the experiment.

    Returns:
        A line that says what was left out; empty if nothing was.

    Raises:
        ConfigError: something that was given by itself and has no effect.
    """
    unread = unread_settings(config)
    given = {o.removeprefix("--").lstrip("+").split("=", 1)[0].split(".")[0] for o in overrides}
    for name in unread:
        if name in given:
            raise ConfigError(_no_effect(config, name))
        setattr(config, name, UNREAD[name])
    if not unread:
        return ""
    return f"left out of the experiment: {', '.join(unread)}; {method_name(config)} reads none"


def check_read(config: PolicyTuningConfig) -> None:
    """Raise ``ConfigError`` for a setting that the method does not look at."""
    for name in unread_settings(config):
        raise ConfigError(_no_effect(config, name))


def _no_effect(config: PolicyTuningConfig, name: str) -> str:
    if name == "judge":
        return "judge compares own plans, for preference.online or plans: give both or neither"
    if name == "plans":
        return "plans are pairs of own plans, and this method reads no pairs: leave plans out"
    why = {
        "demonstrations": f"{method_name(config)} learns from no demonstrations without "
        "preference.anchor_weight",
    }
    plain = f"{method_name(config)} reads no pairs that are given or collected"
    return f"{name} has no effect: {why.get(name, plain)}. Leave it out, or choose another method"
