"""Preference tuning by name: the closed list that configs choose from."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from diffpolicy.core.denoiser import BaseDenoiser
from diffpolicy.learn.preferences.dpo import PreferenceLoss
from diffpolicy.learn.preferences.dro import Ranking, RankingLoss
from diffpolicy.learn.preferences.formulas import Preference
from diffpolicy.learn.preferences.online import OwnPlans, OwnPlansLoss
from diffpolicy.learn.preferences.pso import PairwiseLoss
from diffpolicy.learn.preferences.pso_formulas import Pairwise
from diffpolicy.learn.preferences.scores import make_score
from diffpolicy.settings import setting_names, settings_of

TYPES = ("preference", "pso", "dro")


def make_preference(
    config: Mapping[str, Any], denoiser: BaseDenoiser, *, reference: BaseDenoiser | None = None
) -> nn.Module:
    """The objective of a method, from plain values.

    Args:
        config: ``type`` (one of ``TYPES``), a ``name`` that is not looked at, and the settings of
            :class:`~diffpolicy.learn.preferences.formulas.Preference` (and ``score``, see
            :func:`~diffpolicy.learn.preferences.scores.make_score`; with ``online``, the settings
            of :class:`~diffpolicy.learn.preferences.online.OwnPlans`, ``reward`` and ``steps``, of
            :class:`~diffpolicy.learn.preferences.online.OwnPlansLoss`),
            :class:`~diffpolicy.learn.preferences.pso.Pairwise` (and ``reward``, a callable, for the
            online form) or :class:`~diffpolicy.learn.preferences.dro.Ranking`.
        denoiser: what is tuned.
        reference: ``None``: the denoiser with its adapters off if it has some, else a frozen copy.

    Raises:
        ValueError: an unknown method or setting, with the valid ones.
    """
    values = dict(config)
    kind = values.pop("type", None)
    values.pop("name", None)
    _check_online(config)
    if kind == "preference":
        return _preference(values, denoiser, reference)
    if kind == "pso":
        reward = values.pop("reward", None)
        values = {k: v for k, v in values.items() if k != "online" or v}
        settings = Pairwise.from_config(values)
        return PairwiseLoss(denoiser, settings, reward=reward, reference=reference)
    if kind == "dro":
        return RankingLoss(denoiser, Ranking.from_config(values), reference=reference)
    raise ValueError(f"unknown preference type {kind!r}; expected one of {TYPES}")


def _preference(
    values: dict[str, Any], denoiser: BaseDenoiser, reference: BaseDenoiser | None
) -> nn.Module:
    score = make_score(values.pop("score", None), denoiser)
    online, reward, steps = (values.pop(n, None) for n in ("online", "reward", "steps"))
    settings = Preference.from_config(values)
    if online in (None, False):
        return PreferenceLoss(denoiser, settings, score, reference=reference)
    if reward is None:
        raise ValueError(
            "online=... compares own plans by a reward: give one (PreferenceData.reward), or "
            "online=None for given pairs"
        )
    return OwnPlansLoss(
        denoiser,
        settings,
        score,
        reward=reward,
        settings=settings_of(OwnPlans, online, "online"),
        steps=steps,
        reference=reference,
    )


def _check_online(config: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless ``online`` is what the method takes."""
    online, kind = config.get("online"), config.get("type")
    if kind == "preference" and not (online in (None, False) or isinstance(online, Mapping)):
        known = ", ".join(setting_names(OwnPlans))
        raise ValueError(
            f"online of a {config.get('loss', 'dpo')} must be a group of settings ({known}; {{}}: "
            f"all as they are) or null, got {online!r}"
        )
    if kind == "pso" and not isinstance(online, bool | None):
        raise ValueError(f"online of PSO must be true or false, got {online!r}")


def is_online(config: Mapping[str, Any]) -> bool:
    """Whether a method compares the policy's own items by a reward."""
    online = config.get("online") not in (None, False)
    return config.get("type") in ("preference", "pso") and online


def reads(config: Mapping[str, Any]) -> str:
    """What a method learns from.

    ``"pairs"``, ``"labels"``, ``"observations"`` or ``"demonstrations"``.
    """
    if is_online(config):
        return "observations"
    if config.get("type") == "preference":
        return "labels" if config.get("loss") == "kto" else "pairs"
    return "pairs" if config.get("type") == "pso" else "demonstrations"


def needs(config: Mapping[str, Any]) -> set[str]:
    """Everything that a method cannot do without: what it learns from, and perhaps an anchor.

    Args:
        config: see :func:`make_preference`; or ``{"type": "cloning", "data": "demonstrations" |
            "chosen" | "both"}``.

    Returns:
        Some of ``"pairs"``, ``"labels"``, ``"observations"`` and ``"demonstrations"``.
    """
    if config.get("type") == "cloning":
        kinds = {"chosen": {"pairs"}, "both": {"pairs", "demonstrations"}}
        return kinds.get(str(config.get("data")), {"demonstrations"})
    # The anchor of PSO would be the policy's own rollouts; own plans have the better ones.
    anchored = has_anchor(config) and config.get("type") == "pso" and is_online(config)
    return {reads(config)} | ({"demonstrations"} if anchored else set())


def has_anchor(config: Mapping[str, Any]) -> bool:
    """Whether behaviour cloning of demonstrations is added, where there are some."""
    return _weight(config) > 0 and config.get("anchor", "demonstrations") != "chosen"


def _weight(config: Mapping[str, Any]) -> float:
    weight = config.get("anchor_weight", 0)
    return float(weight) if isinstance(weight, int | float) else 0.0


def check_method(config: Mapping[str, Any], denoiser: BaseDenoiser) -> None:
    """Raise ``ValueError`` if a method is unknown or does not fit the denoiser."""
    if config.get("type") != "cloning":
        _check_online(config)
        stand_in = {"reward": lambda x, *_: x.flatten(1).sum(1)} if is_online(config) else {}
        make_preference({**config, **stand_in}, copy.deepcopy(denoiser))


__all__ = [
    "TYPES",
    "check_method",
    "has_anchor",
    "is_online",
    "make_preference",
    "needs",
    "reads",
]
