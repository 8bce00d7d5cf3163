"""What truncated sampling does to a Gaussian mode, in closed form."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffpolicy.core.noise import GaussianProcess
from diffpolicy.policies.choose_level import ddim_contraction


class TruncatedLaw(NamedTuple):
    """The law of a truncated sample of one coordinate: ``N(mode mean + bias, std^2)``."""

    bias: float
    std: float


def truncated_law(
    process: GaussianProcess,
    t_start: float,
    *,
    mode_std: float,
    guess_error: float = 0.0,
    grid: Tensor | None = None,
) -> TruncatedLaw:
    """What truncated sampling returns for a mode ``N(mean, mode_std^2)`` and its exact denoiser.

    The start is ``alpha (mean + guess_error) + sigma noise``. With ``V = alpha^2 s^2 + sigma^2``, a
    step of deterministic DDIM from ``t`` to ``t'`` multiplies the distance to ``alpha mean`` by
    ``(alpha alpha' s^2 + sigma sigma') / V``, and the exact flow by ``sqrt(V' / V)``, which is
    ``s / sqrt(V(t_start))`` down to clean data. Both the error of the guess and the noise shrink by
    that factor.

    Args:
        process: the noise process.
        t_start: level of the start, in (0, 1].
        mode_std: standard deviation s >= 0 of the mode.
        guess_error: guess minus mean.
        grid: levels ``[K + 1, ...]`` from ``t_start`` down that DDIM steps along; None: the limit
            of many steps, to clean data.

    Returns:
        Bias and standard deviation of the result at the last level (clean data).
    """
    ends = torch.tensor([t_start, 0.0], dtype=torch.float64)
    t = ends if grid is None else grid.double().reshape(len(grid), -1)[:, 0]
    alpha, sigma = process.alpha(t[0]), process.sigma(t[0])
    std = torch.tensor(mode_std, dtype=torch.float64)
    if grid is None:
        variance = (process.alpha(t) * std).square() + process.sigma(t).square()
        factor = (variance[-1] / variance[0]).sqrt()
    else:
        factor = ddim_contraction(process, grid, std) / alpha
    return TruncatedLaw(float(factor * alpha * guess_error), float(factor * sigma))
