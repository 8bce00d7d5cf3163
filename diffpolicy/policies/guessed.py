"""Truncated sampling: many guesses solved at once, and what it does to a Gaussian mode."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffpolicy.core.denoiser import BaseDenoiser
from diffpolicy.core.noise import GaussianProcess
from diffpolicy.core.sampling import Grid, Trajectory, sample
from diffpolicy.core.solvers import Solver
from diffpolicy.core.starts import levels, truncated_start


class ScoredPlans(NamedTuple):
    """Candidate plans with scores.

    Attributes:
        plans: ``[n, M, H, A]`` normalised.
        scores: ``[n, M]``; the higher the better, comparable within a row only.
        nfe: network evaluations, each of all ``n * M`` plans.
        gumbel: ``[n, M]`` draws of the Gumbel law, where one plan is drawn with probability
            proportional to ``exp(score)``; ``None`` where the best is taken.
    """

    plans: Tensor
    scores: Tensor
    nfe: int
    gumbel: Tensor | None = None

    def best(self) -> Tensor:
        """The plan with the highest score, ``[n, H, A]``."""
        return self._at(self.scores)

    def chosen(self) -> Tensor:
        """The plan that is executed, ``[n, H, A]``: the best, or the one that was drawn.

        The argmax of scores plus Gumbel noise is a draw from their softmax.
        """
        return self._at(self.scores if self.gumbel is None else self.scores + self.gumbel)

    def _at(self, keys: Tensor) -> Tensor:
        rows = torch.arange(len(self.plans), device=self.plans.device)
        return self.plans[rows, keys.argmax(1)]


def gumbel_noise(noise: Tensor, count: int) -> Tensor:
    """``count`` Gumbel draws ``[n, count]`` made of standard normal ones ``[n, 2 count or more]``.

    Half the sum of two squares is an exponential variable, and minus its logarithm a Gumbel one:
    plain arithmetic, which also goes into an exported file.
    """
    pairs = noise[:, : 2 * count].reshape(-1, count, 2)
    exponential = 0.5 * pairs.square().sum(2)
    return -exponential.clamp_min(torch.finfo(noise.dtype).tiny).log()


def solve_guesses(
    denoise: BaseDenoiser,
    solver: Solver,
    guess: Tensor,
    noise: Tensor,
    *,
    t_start: float,
    num_steps: int | Grid,
    cond: Tensor | None = None,
    log_prob: Tensor | None = None,
) -> ScoredPlans:
    """Noise every guess to ``t_start`` and solve the rest, all in one batch.

    The grid begins at the level that the guesses were noised to and strides to clean data, unlike
    DiffusionDrive's published sampler (noise of level 8, network levels 10 and 0, steps of one).
    For a denoiser with a confidence head (:mod:`diffpolicy.networks.anchored`) the scores are its
    logits at the last evaluation; otherwise they are ``log_prob``.

    Args:
        denoise: any denoiser.
        solver: a deterministic one; a stochastic one draws its noise from the global generator.
        guess: ``[n, M, H, A]`` normalised (anchors, last plans, drafts of a policy).
        noise: standard normal, the shape of ``guess``.
        t_start: level to start at, in (0, 1].
        num_steps: network evaluations, or the grid prepared for them.
        cond: ``[n, C]``.
        log_prob: ``[n, M]`` scores where the denoiser has none; default 0.

    Returns:
        The plans and their scores.

    Raises:
        ValueError: shapes that do not fit, or ``t_start`` out of range.
    """
    if guess.dim() != 4 or noise.shape != guess.shape:
        raise ValueError(
            f"guess must be [n, M, H, A] and noise the same, got {list(guess.shape)} and "
            f"{list(noise.shape)}"
        )
    count, many = guess.shape[:2]
    start = truncated_start(denoise.process, guess.flatten(0, 1), t_start, noise.flatten(0, 1))
    grid = (
        levels(start, num_steps, process=denoise.process)
        if isinstance(num_steps, int)
        else num_steps
    )
    rows = None if cond is None else cond.repeat_interleave(many, dim=0)
    result = sample(denoise, solver, start, grid, cond=rows, record=True)
    assert isinstance(result, Trajectory)  # what record=True returns
    confidence = result.transitions[-1].denoised.aux.get("confidence")
    scores = guess.new_zeros(count, many) if log_prob is None else log_prob
    if confidence is not None:
        scores = confidence.view(count, many)
    return ScoredPlans(result.x0.view(guess.shape), scores, len(result.transitions))


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

    Raises:
        ValueError: a negative ``mode_std``, or a grid that does not begin at ``t_start``.
    """
    if mode_std < 0:
        raise ValueError(f"mode_std must not be negative, got {mode_std}")
    ends = torch.tensor([t_start, 0.0], dtype=torch.float64)
    t = ends if grid is None else grid.double().reshape(len(grid), -1)[:, 0]
    if abs(float(t[0]) - t_start) > 1e-9:
        raise ValueError(f"the grid begins at {float(t[0])}, the start is at t_start={t_start}")
    alpha, sigma = process.alpha(t[0]), process.sigma(t[0])
    std = torch.tensor(mode_std, dtype=torch.float64)
    if grid is None:
        variance = (process.alpha(t) * std).square() + process.sigma(t).square()
        factor = (variance[-1] / variance[0]).sqrt()
    else:
        factor = _ddim_factor(process, t, std)
    return TruncatedLaw(float(factor * alpha * guess_error), float(factor * sigma))


def ddim_contraction(process: GaussianProcess, grid: Tensor, std: Tensor) -> Tensor:
    """The part of a guess's error that survives noising and DDIM, coordinate by coordinate.

    Args:
        process: the noise process.
        grid: levels from the start down that DDIM steps along, ``[K + 1, ...]`` with one entry
            each.
        std: standard deviation of every coordinate around its mode, any shape.

    Returns:
        ``alpha(t_start) prod_k (alpha alpha' s^2 + sigma sigma') / V``, the shape of ``std``.
    """
    t = grid.double().reshape(len(grid), -1)[:, 0]
    return process.alpha(t[0]) * _ddim_factor(process, t, std)


def _ddim_factor(process: GaussianProcess, t: Tensor, std: Tensor) -> Tensor:
    alpha, sigma = process.alpha(t), process.sigma(t)
    factor = torch.ones_like(std, dtype=torch.float64)
    for k in range(len(t) - 1):
        inner = alpha[k] * alpha[k + 1] * std.square() + sigma[k] * sigma[k + 1]
        factor = factor * inner / ((alpha[k] * std).square() + sigma[k].square())
    return factor
