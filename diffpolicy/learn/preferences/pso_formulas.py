"""The loss of PSO as a function of log-probabilities of moves, whoever made them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from diffpolicy.learn.cloning.denoising import LossOutput
from diffpolicy.learn.preferences.few_step import Moves

if TYPE_CHECKING:
    from diffpolicy.learn.preferences.pso import PSO


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
    metrics = _metrics(policy, reference, logit.detach(), counts & (chance != 0.5).unsqueeze(1))
    moved = entries > 0
    beyond = (ratio.detach() != clamped.detach()) & moved
    metrics["saturated"] = beyond.sum() / moved.sum().clamp_min(1)
    return LossOutput(loss, metrics)


def _metrics(policy: Moves, reference: Moves, logit: Tensor, counts: Tensor) -> dict[str, Tensor]:
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
        for name, error in zip(("chosen", "rejected"), errors, strict=True):
            metrics[f"error_{name}{suffix}"] = error.mean()
    return metrics


__all__ = ["pso_loss"]
