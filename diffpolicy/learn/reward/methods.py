"""Reward tuning of masked sequences by name: the closed list that configs choose from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from diffpolicy.core.masked_denoiser import MaskedDenoiser
from diffpolicy.core.reveal import Relaxation
from diffpolicy.learn.preferences.online_sequences import Labelled, LabelledLoss
from diffpolicy.learn.preferences.pso import PairwiseLoss
from diffpolicy.learn.preferences.pso_formulas import Pairwise
from diffpolicy.learn.preferences.scores import check_no_dropout
from diffpolicy.learn.reward.advantages import PolicyGradient
from diffpolicy.learn.reward.masked_chain import MaskedChain
from diffpolicy.learn.reward.pathwise import Reward, RewardLoss
from diffpolicy.learn.reward.policy_gradient import PolicyGradientLoss
from diffpolicy.learn.reward.stepwise import Stepwise, StepwiseLoss
from diffpolicy.learn.reward.weighted import WeightedDenoising, WeightedDenoisingLoss
from diffpolicy.settings import settings_of

METHODS = ("pathwise", "policy_gradient", "weighted", "stepwise", "preference", "pso")


def make_tuning(
    config: Mapping[str, Any],
    denoiser: MaskedDenoiser,
    reward: Reward,
    *,
    batch_size: int,
    reference: MaskedDenoiser | None = None,
) -> nn.Module:
    """The objective of a method, from plain values.

    Args:
        config: ``type`` (one of ``METHODS``), a ``name`` that is not looked at, ``kl_weight`` and
            the settings of
            :class:`~diffpolicy.learn.reward.masked_chain.MaskedChain` (and ``kl_warmup``),
            :class:`~diffpolicy.learn.reward.advantages.PolicyGradient`,
            :class:`~diffpolicy.learn.reward.weighted.WeightedDenoising`,
            :class:`~diffpolicy.learn.reward.stepwise.Stepwise`,
            :class:`~diffpolicy.learn.preferences.online_sequences.Labelled` or
            :class:`~diffpolicy.learn.preferences.pso_formulas.Pairwise`.
        denoiser: what is tuned.
        reward: ``[B, L, V] -> [B]``; differentiable for ``pathwise``.
        batch_size: rows of an update.
        reference: frozen; ``None``: a copy of ``denoiser`` as it is now.

    Raises:
        ValueError: an unknown method or setting, with the valid ones.
    """
    values = dict(config)
    kind = values.pop("type", None)
    values.pop("name", None)
    check_no_dropout(denoiser)
    if kind == "pathwise":
        return _pathwise(values, denoiser, reward, reference)
    if kind == "policy_gradient":
        if values.get("epochs", 1) > 1:
            values = {"rows": batch_size, **values}
        settings = settings_of(PolicyGradient, values, kind)
        return PolicyGradientLoss(denoiser, reference, reward, settings)
    if kind == "weighted":
        weighted = settings_of(WeightedDenoising, values, kind)
        return WeightedDenoisingLoss(denoiser, reference, reward, weighted)
    if kind == "stepwise":
        return StepwiseLoss(denoiser, reference, reward, settings_of(Stepwise, values, kind))
    if kind == "preference":
        return LabelledLoss(denoiser, reference, reward, Labelled.from_config(values))
    if kind == "pso":
        return _pairwise(values, denoiser, reward, reference)
    raise ValueError(f"unknown finetune type {kind!r}; expected one of {METHODS}")


def _pairwise(
    values: dict[str, Any],
    denoiser: MaskedDenoiser,
    reward: Reward,
    reference: MaskedDenoiser | None,
) -> PairwiseLoss:
    """Online PSO whose labels make ``p_ref exp(r / kl_weight)`` the optimum of whole chains."""
    weight = values.pop("kl_weight", 0.1)
    scale = weight / values.get("kl_beta", Pairwise.kl_beta)
    settings = settings_of(Pairwise, {"online": True, "label_scale": scale, **values}, "pso")
    return PairwiseLoss(denoiser, settings, reward=reward, reference=reference)


def _pathwise(
    values: dict[str, Any],
    denoiser: MaskedDenoiser,
    reward: Reward,
    reference: MaskedDenoiser | None,
) -> RewardLoss:
    weight, warmup = values.pop("kl_weight", 0.1), values.pop("kl_warmup", 0)
    relaxation = settings_of(Relaxation, values.pop("relaxation", None) or {}, "relaxation")
    chain = settings_of(MaskedChain, {**values, "relaxation": relaxation}, "pathwise")
    return RewardLoss(
        denoiser, reward, chain, kl_weight=weight, kl_warmup=warmup, reference=reference
    )
