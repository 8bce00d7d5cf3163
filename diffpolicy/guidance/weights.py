"""Weights of groups of particles ``[B, N]``, in float64 logs: their size, mean and resampling.

Nothing here reads the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BELOW_ONE = 1 - 2**-53


def normalised(log_weights: Tensor) -> Tensor:
    """Weights that sum to one in each group ``[B, N]``; even where all are zero."""
    top = log_weights.amax(1, keepdim=True)
    alive = top > -torch.inf
    weights = (log_weights - torch.where(alive, top, 0.0)).exp()
    weights = torch.where(alive, weights, 1.0)
    return weights / weights.sum(1, keepdim=True)


def log_mean(log_weights: Tensor) -> Tensor:
    """``log(mean(exp(log_weights)))`` of each group ``[B]``."""
    return log_weights.logsumexp(1) - math.log(log_weights.shape[1])


def effective_size(weights: Tensor) -> Tensor:
    """``1 / sum w^2`` of each group ``[B]``, between 1 and N."""
    return 1 / weights.square().sum(1)


def systematic(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Systematic resampling: the particle that each new one copies, ``[B, N]``, ascending.

    One uniform number per group places N evenly spaced points in the cumulative weights, so that a
    particle of weight w is copied ``floor(N w)`` or ``ceil(N w)`` times, ``N w`` on average, and
    one without weight never.
    """
    batch, count = weights.shape
    u = torch.rand((batch, 1), generator=generator, device=weights.device, dtype=torch.float64)
    steps = torch.arange(count, device=weights.device, dtype=torch.float64)
    return _under(weights, (steps + u) / count)


def choose(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One particle of each group, drawn by weight, ``[B]``."""
    u = torch.rand(
        (len(weights), 1), generator=generator, device=weights.device, dtype=torch.float64
    )
    return _under(weights, u)[:, 0]


def _under(weights: Tensor, points: Tensor) -> Tensor:
    """The particles whose shares of the cumulative weights hold ``points`` in [0, 1)."""
    cumulative = weights.double().cumsum(1)
    cumulative = cumulative / cumulative[:, -1:]  # exactly 1 from the last particle with weight on
    return torch.searchsorted(cumulative, points.clamp(max=BELOW_ONE), right=True)
