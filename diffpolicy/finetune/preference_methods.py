"""Preference tuning by name: the closed list that configs choose from."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from diffpolicy.core.denoiser import BaseDenoiser
from diffpolicy.finetune.pairwise import PairwiseLoss
from diffpolicy.finetune.pairwise_losses import Pairwise
from diffpolicy.finetune.preference import PreferenceLoss
from diffpolicy.finetune.preference_losses import Preference
from diffpolicy.finetune.ranking import Ranking, RankingLoss
from diffpolicy.finetune.scores import make_score

TYPES = ("preference", "pso", "dro")


def make_preference(
    config: Mapping[str, Any], denoiser: BaseDenoiser, *, reference: BaseDenoiser | None = None
) -> nn.Module:
    """The objective of a method, from plain values.

    Args:
        config: ``type`` (one of ``TYPES``), a ``name`` that is not looked at, and the settings of
            :class:`~diffpolicy.finetune.preference_losses.Preference` (and ``score``, see
            :func:`~diffpolicy.finetune.scores.make_score`),
            :class:`~diffpolicy.finetune.pairwise.Pairwise` (and ``reward``, a callable, for the
            online form) or :class:`~diffpolicy.finetune.ranking.Ranking`.
        denoiser: what is tuned.
        reference: ``None``: the denoiser with its adapters off if it has some, else a frozen copy.

    Raises:
        ValueError: an unknown method or setting, with the valid ones.
    """
    values = dict(config)
    kind = values.pop("type", None)
    values.pop("name", None)
    if kind == "preference":
        score = make_score(values.pop("score", None), denoiser)
        return PreferenceLoss(denoiser, Preference.from_config(values), score, reference=reference)
    if kind == "pso":
        reward = values.pop("reward", None)
        settings = Pairwise.from_config(values)
        return PairwiseLoss(denoiser, settings, reward=reward, reference=reference)
    if kind == "dro":
        return RankingLoss(denoiser, Ranking.from_config(values), reference=reference)
    raise ValueError(f"unknown preference type {kind!r}; expected one of {TYPES}")


def reads(config: Mapping[str, Any]) -> str:
    """What a method's batches hold: ``"pairs"``, ``"labels"`` or ``"demonstrations"``."""
    if config.get("type") == "preference":
        return "labels" if config.get("loss") == "kto" else "pairs"
    if config.get("type") == "pso":
        return "demonstrations" if config.get("online", False) else "pairs"
    return "demonstrations"


def check_method(config: Mapping[str, Any], denoiser: BaseDenoiser) -> None:
    """Raise ``ValueError`` if a method is unknown or does not fit the denoiser."""
    if config.get("type") != "cloning":
        online = config.get("type") == "pso" and config.get("online", False)
        stand_in = {"reward": lambda x, *_: x.flatten(1).sum(1)} if online else {}
        make_preference({**config, **stand_in}, copy.deepcopy(denoiser))


__all__ = ["TYPES", "check_method", "make_preference", "reads"]
