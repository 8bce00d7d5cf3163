"""Self-normalised importance weights: limits, effective sample size, resampling."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def settle(
    log_weight: Tensor,
    *,
    group_size: int | None = None,
    max_weight: float | None = None,
    min_ess: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights of mean 1 over each group's entries of a step, and the power they were raised to.

    Args:
        log_weight: ``[N, K]``, unnormalised; ``-inf`` for no entry.
        group_size: rows compared with each other; None: all.
        max_weight: most that a weight can be.
        min_ess: least :func:`effective_fraction`; weights are raised to the largest power up to 1
            that has it.

    Returns:
        ``[N, K]``, 0 where there is no entry, and a 0-dim tensor in (0, 1].
    """
    rows = len(log_weight) if group_size is None else group_size
    groups = log_weight.view(-1, rows, log_weight.shape[1])
    power = log_weight.new_ones(())
    if min_ess is not None and effective_fraction(_relative(groups), groups) < min_ess:
        low, high = torch.zeros_like(power), power
        for _ in range(20):  # the effective sample size falls as the power rises
            middle = (low + high) / 2
            enough = _ess(groups * middle) >= min_ess
            low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
        power = low.clamp_min(1e-6)
        groups = groups * power
    weights = _relative(groups)
    if max_weight is not None:
        weights = weights.clamp(max=max_weight)
        entries = (groups > -math.inf).sum(1, keepdim=True)
        weights = weights * (entries / weights.sum(1, keepdim=True).clamp_min(1e-30))
    return weights.flatten(0, 1), power


def _relative(groups: Tensor) -> Tensor:
    """``[G, N, K]`` log-weights to weights of mean 1 over entries of the middle dimension."""
    entries = (groups > -math.inf).sum(1, keepdim=True)
    return groups.softmax(1).nan_to_num(0.0) * entries


def effective_fraction(weights: Tensor, log_weight: Tensor) -> Tensor:
    """Effective sample size ``(sum w)^2 / sum w^2`` as a fraction of the entries, ``[G, N, K]``.

    The mean over groups and steps; 1 where all weights are equal.
    """
    entries = (log_weight > -math.inf).sum(1)
    ess = weights.sum(1).square() / weights.square().sum(1).clamp_min(1e-30)
    some = entries > 0
    return (ess[some] / entries[some]).mean()


def _ess(groups: Tensor) -> Tensor:
    return effective_fraction(_relative(groups), groups)


def resample(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` indices drawn in proportion to ``weights [N]``, in random order.

    Systematic: an entry comes up ``count w`` times, rounded up or down. One of a batch is then
    like any other, as an objective whose losses are averaged needs it.
    """
    device = generator.device
    u = torch.arange(count, device=device) + torch.rand(1, generator=generator, device=device)
    edges = weights.double().cumsum(0)
    at = (u / count).to(edges) * edges[-1]
    drawn = torch.searchsorted(edges, at, right=True).clamp(max=len(weights) - 1)
    return drawn[torch.randperm(count, generator=generator, device=device).to(drawn.device)]


__all__ = ["effective_fraction", "resample", "settle"]
