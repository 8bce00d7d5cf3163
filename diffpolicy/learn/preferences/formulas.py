"""Preference losses as functions of scores alone: what is scored, and how, they do not know."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from diffpolicy.learn.cloning.denoising import LossOutput
from diffpolicy.learn.preferences.few_step import Moves
from diffpolicy.settings import check_settings, one_of, ranged

if TYPE_CHECKING:
    from diffpolicy.learn.preferences.pso import PSO

SATURATED = 0.01  # the slope of a loss below which an example no longer counts


@dataclass(frozen=True, kw_only=True)
class Anchoring:
    """What is cloned beside a preference loss.

    Args:
        anchor_weight: of the behaviour-cloning error that is added.
        anchor: whose error that is, ``"demonstrations"``, ``"chosen"`` or ``"both"``.
    """

    anchor_weight: float = ranged("[0, inf)", 0.0)
    anchor: str = one_of("demonstrations", "chosen", "both")

    @property
    def clones_demonstrations(self) -> bool:
        """Whether demonstrations are cloned beside, where there are some."""
        return self.anchor_weight > 0 and self.anchor != "chosen"


@dataclass(frozen=True)
class Preference(Anchoring):
    """Which preference loss, and its settings.

    With scores ``s`` in sum units (see
    :class:`diffpolicy.learn.preferences.scores.DenoisingScore`) or nats, ``gap = (s -
    s_ref)(chosen) - (s - s_ref)(rejected)``, and items labelled by a Bradley-Terry model of a
    reward r, the losses and where they lead are

    - ``"dpo"``: ``-log sigmoid(kl_beta gap)`` (Rafailov et al. 2023; of diffusion, Wallace et al.
      2024). Optimum ``p_ref exp(r / kl_beta)``. ``label_smoothing = e`` (conservative DPO)
      supposes that a share e of labels is wrong: ``kl_beta gap = logit((1 - 2e) P + e)`` at the
      optimum, P the share of answers for the chosen one.
    - ``"ipo"``: ``(kl_beta gap - 1/2)^2`` (Azar et al. 2024, times the square of their tau, which
      is ``kl_beta``). Optimum ``p_ref exp(w / kl_beta)``, w the chance to win against another item
      of the data: bounded, so that certain labels do not drive the gap to infinity.
    - ``"kto"``, of single items that are good or bad: ``weight (1 - sigmoid(+-(h - z)))`` with ``h
      = kl_beta (s - s_ref)``, + for good ones, and z the batch's mean of h, not below 0 and without
      gradient (Diffusion-KTO, Li et al. 2024). Its optimum is a choice, not a tilt: h rises without
      end where ``good_weight P(good) > bad_weight P(bad)`` and falls elsewhere, ever more slowly.
    - ``"margin"``, without a reference: ``-log sigmoid(kl_beta (s(chosen) - s(rejected)) -
      margin)`` (SimPO, Meng et al. 2024; of diffusion, MaPO). With margin 0 the optimum is
      ``exp(r / kl_beta)``: nothing is left of the pre-trained law, so give it an anchor.

    Args:
        loss: one of the above.
        kl_beta: how much the tuned law is held to the reference, positive. Published values of
            mean-squared errors over D entries are to be divided by D (5000 of Diffusion-DPO is
            0.305).
        label_smoothing: of ``dpo``, in [0, 0.5).
        margin: of ``margin``, in units of the logit, not negative.
        good_weight: of ``kto``: of good items, positive.
        bad_weight: of ``kto``: of bad items, positive.
        anchor_weight: of the behaviour-cloning error that is added: mean squared error per entry,
            or nats per entry with scores in nats (lambda of FKPD, arXiv 2409.05622).
        anchor: what it is the error of: ``"demonstrations"`` (the chosen or good items where a
            batch has none), ``"chosen"`` (those items alone), or ``"both"``, the sum of what is
            there.

    Raises:
        ValueError: an unknown loss, or a value out of range.
    """

    loss: str = one_of("dpo", "ipo", "kto", "margin")
    kl_beta: float = ranged("(0, inf)", 0.3)
    label_smoothing: float = ranged("[0, 0.5)", 0.0)
    margin: float = ranged("[0, inf)", 0.0)
    good_weight: float = ranged("(0, inf)", 1.0)
    bad_weight: float = ranged("(0, inf)", 1.0)

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def paired(self) -> bool:
        """Whether the loss compares two items, rather than judging one."""
        return self.loss != "kto"

    @property
    def needs_reference(self) -> bool:
        """Whether the loss looks at the reference's scores."""
        return self.loss != "margin"


def preference_loss(
    settings: Preference,
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor | None = None,
    reference_rejected: Tensor | None = None,
) -> LossOutput:
    """The loss of pairs, per pair, from four scores ``[B]`` each.

    Scores may be any log-probabilities or stand-ins for them; the anchor is not part of this.

    Args:
        settings: which loss.
        policy_chosen: scores of the better items under what is tuned.
        policy_rejected: of the worse ones.
        reference_chosen: scores under the reference; ``"margin"`` takes none.
        reference_rejected: likewise.

    Returns:
        ``loss [B]``, and metrics ``accuracy`` (share of pairs whose gap is positive; one half for
        equal scores), ``gap`` (mean, in units of scores) and ``saturated`` (share of pairs at which
        the slope of the loss in its logit is below 0.01).

    Raises:
        ValueError: ``"kto"``, or reference scores that are missing or not wanted.
    """
    if not settings.paired:
        raise ValueError("loss='kto' judges single items; use feedback_loss")
    given = (reference_chosen is not None) + (reference_rejected is not None)
    if given != (2 if settings.needs_reference else 0):
        wanted = "both scores" if settings.needs_reference else "no score"
        raise ValueError(f"loss={settings.loss!r} takes {wanted} of the reference, got {given}")
    gap = policy_chosen - policy_rejected
    if reference_chosen is not None and reference_rejected is not None:
        gap = gap - (reference_chosen - reference_rejected)
    logit = settings.kl_beta * gap
    if settings.loss == "ipo":
        loss, slope = (logit - 0.5).square(), 2 * (logit - 0.5)
    else:
        logit, wrong = logit - settings.margin, settings.label_smoothing
        loss = -(1 - wrong) * F.logsigmoid(logit) - wrong * F.logsigmoid(-logit)
        slope = logit.sigmoid() - (1 - wrong)
    return LossOutput(loss, _metrics(gap, slope) | {"gap": gap.detach().mean()})


def feedback_loss(
    settings: Preference, policy: Tensor, reference: Tensor, good: Tensor
) -> LossOutput:
    """The loss of single items that are good or bad, per item.

    Args:
        settings: with ``loss="kto"``.
        policy: scores ``[B]`` under what is tuned.
        reference: scores ``[B]`` under the reference.
        good: bool ``[B]``.

    Returns:
        ``loss [B]``, and metrics as :func:`preference_loss` has: ``accuracy`` is the share of items
        on their side of the reference point, ``gap`` the mean of ``policy - reference`` of good
        items less that of bad ones (0 if the batch lacks one kind).

    Raises:
        ValueError: a loss of pairs.
    """
    if settings.paired:
        raise ValueError(f"loss={settings.loss!r} compares pairs; use preference_loss")
    ratio = policy - reference
    implicit = settings.kl_beta * ratio
    point = implicit.detach().mean().clamp_min(0)
    side = torch.where(good, 1.0, -1.0) * (implicit - point)
    weight = torch.where(good, settings.good_weight, settings.bad_weight).to(side.dtype)
    chance = side.sigmoid()
    metrics = _metrics(side, weight * chance * (1 - chance))
    ratio, goods, bads = ratio.detach(), good.sum(), (~good).sum()
    gap = (ratio * good).sum() / goods.clamp_min(1) - (ratio * ~good).sum() / bads.clamp_min(1)
    both = (goods > 0) & (bads > 0)
    return LossOutput(weight * (1 - chance), metrics | {"gap": torch.where(both, gap, 0.0)})


def _metrics(side: Tensor, slope: Tensor) -> dict[str, Tensor]:
    right = 0.5 + 0.5 * side.detach().sign()
    return {
        "accuracy": right.mean(),
        "saturated": (slope.detach().abs() < SATURATED).to(right.dtype).mean(),
    }


def pso_loss(
    settings: PSO, policy: Moves, reference: Moves, chance: Tensor | None = None
) -> LossOutput:
    """The loss of pairs from log-probabilities of their moves.

    Args:
        settings: which loss.
        policy: of what is tuned, ``[2 B, K]``: the chosen chains, then the rejected ones.
        reference: the same of the reference.
        chance: that the chosen one is the better, ``[B]``; None: 1.

    Returns:
        ``loss [B]`` and the metrics that do not need rewards; see
        :class:`~diffpolicy.learn.preferences.pso.PSOLoss`.
    """
    ratio, entries = policy.log_p - reference.log_p, policy.entries
    if settings.compare == "path":
        ratio, entries = ratio.sum(1, keepdim=True), entries.sum(1, keepdim=True)
    clamped = ratio
    if settings.clip is not None:
        low, high = (entries * math.log(1 + side * settings.clip) for side in (-1, 1))
        clamped = ratio.clamp(low, high)
    chosen, rejected = clamped.chunk(2)
    logit = settings.kl_beta * (chosen - rejected)
    chance = logit.new_ones(len(logit)) if chance is None else chance.to(logit)
    each = F.softplus(-logit) + (1 - chance).unsqueeze(1) * logit
    counts = (entries.chunk(2)[0] > 0) & (entries.chunk(2)[1] > 0)
    loss = (each * counts).sum(1) / counts.sum(1).clamp_min(1)
    metrics = _pso_metrics(policy, reference, logit.detach(), counts & (chance != 0.5).unsqueeze(1))
    moved = entries > 0
    beyond = (ratio.detach() != clamped.detach()) & moved
    metrics["saturated"] = beyond.sum() / moved.sum().clamp_min(1)
    return LossOutput(loss, metrics)


def _pso_metrics(
    policy: Moves, reference: Moves, logit: Tensor, counts: Tensor
) -> dict[str, Tensor]:
    log_p = policy.log_p.detach()
    ratio = (log_p - reference.log_p).sum(1)
    chosen, rejected = ratio.chunk(2)
    right = (0.5 + 0.5 * logit.sign()) * counts
    metrics = {
        "accuracy": right.sum() / counts.sum().clamp_min(1),
        "gap": (chosen - rejected).mean(),
        "log_ratio": ratio.mean(),
    }
    entries = policy.entries.sum(1).clamp_min(1)
    for values, suffix in ((log_p, ""), (reference.log_p, "_reference")):
        errors = (-values.sum(1) / entries).chunk(2)
        metrics |= named_errors(("chosen", "rejected"), errors, suffix)
    return metrics


def named_errors(
    sides: tuple[str, str], errors: Sequence[Tensor], suffix: str = ""
) -> dict[str, Tensor]:
    """Mean errors of the two sides, by the names of their metrics."""
    named = zip(sides, errors, strict=True)
    return {f"error_{side}{suffix}": error.detach().mean() for side, error in named}
