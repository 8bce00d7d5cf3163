"""Scores of plans and sequences, at noise that all that is compared has in common.

A score stands for a log-likelihood: minus a denoising error, or minus a masked cross-entropy. Two
items, and two denoisers, are compared at the *same* levels and noise, without which their
difference would drown in the variance of either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffpolicy.core.denoiser import BaseDenoiser, Denoiser
from diffpolicy.core.masked_denoiser import MaskedDenoiser
from diffpolicy.core.masking import MaskingProcess
from diffpolicy.core.noise import GaussianProcess
from diffpolicy.core.processes import DiscreteVP
from diffpolicy.learn.cloning.denoising import standard_normal
from diffpolicy.learn.cloning.masked import masked_cross_entropy
from diffpolicy.learn.preferences.items import Draw, Items
from diffpolicy.learn.reward.replay import remask
from diffpolicy.settings import check_settings, one_of, ranged

LOG_SNR = (-7.0, 7.0)  # of the bound: from all but pure noise to a blur of 0.03


class Score(Protocol):
    """A stand-in for the log-likelihood of items under a denoiser; more is better."""

    def check(self, denoiser: BaseDenoiser) -> None:
        """Raise ``ValueError`` unless such denoisers can be scored."""

    def draw(self, denoiser: BaseDenoiser, items: Items, generator: torch.Generator) -> Draw:
        """Levels and noise for items of this shape, all from ``generator``."""

    def __call__(self, denoiser: BaseDenoiser, items: Items, draw: Draw) -> Tensor:
        """The score ``[B]``: the sum over the rows of an item, the mean over draws."""

    def error(self, items: Items, score: Tensor) -> Tensor:
        """A score ``[B]`` as the error per scored number (or token) that training logs show."""


@dataclass(frozen=True)
class DenoisingScore:
    """``-1/2`` times the squared error, *summed* over the scored entries of an item.

    Published preference losses of images take the mean over all entries instead, so their beta
    depends on the image's size. ``beta_mean mean(e^2) / 2 = (beta_mean / D) sum(e^2) / 2``: the
    published ``beta = 5000`` over 4 x 64 x 64 entries (Diffusion-DPO, arXiv 2311.12908) is
    ``kl_beta = 5000 / 16384 = 0.305`` here, whatever the size of the plan.

    Args:
        weighting: ``"own"``: error of what the network itself predicts (noise, velocity, ...), at
            the levels that the process trains at, as published. ``"elbo"``: error of ``x0_hat``
            times the signal-to-noise ratio, integrated over its logarithm (Kingma et al. 2021): a
            lower bound of the log-likelihood of the plan, in nats and up to a constant, of which a
            denoiser's differences do not depend on what the network predicts. At the default ends
            it is 14 times the mean score of a noise prediction over log SNR, so ``kl_beta`` is to
            be chosen accordingly smaller. Clipping of ``x0_hat`` is left out of both.
        draws: levels and noise per row; of an even number, two at a time share a level and have
            opposite noise, which makes the differences of a bound less noisy (of 8 and more).
            Losses are not linear in the score: more draws lower not only the variance but also a
            bias, so give ``"elbo"`` several.
        levels: of ``"own"``: draw from these alone, in (0, 1]: those of a few-step sampler, which
            errors at other levels make worse. Snapped to what a discrete process was trained at.
        log_snr: of ``"elbo"``: ends of the integral, cut to what the process has; None: (-7, 7).
            It is the likelihood of plans with the noise of the upper end.

    Raises:
        ValueError: a choice that does not exist, or a value out of range.
    """

    weighting: str = one_of("own", "elbo")
    draws: int = ranged("[1, inf)", 1)
    levels: tuple[float, ...] | None = None
    log_snr: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        levels, ends = self.levels, self.log_snr
        if levels is not None and not (levels and all(0 < t <= 1 for t in levels)):
            raise ValueError(f"levels must be in (0, 1], at least one, got {levels}")
        if ends is not None and not (len(ends) == 2 and ends[0] < ends[1]):
            raise ValueError(f"log_snr must be two rising numbers, got {ends}")

    def check(self, denoiser: BaseDenoiser) -> None:
        process = denoiser.process
        if not isinstance(process, GaussianProcess):
            raise ValueError("DenoisingScore is of Gaussian noise; sequences take MaskedScore")
        if self.weighting == "own" and not isinstance(denoiser, Denoiser):
            name = type(denoiser).__name__
            raise ValueError(f"{name} has no prediction of its own to score; use weighting='elbo'")
        if self.weighting == "elbo":
            self._ends(process)

    def draw(self, denoiser: BaseDenoiser, items: Items, generator: torch.Generator) -> Draw:
        x0, pairs = items.x0, self.draws % 2 == 0
        draws = self.draws // 2 if pairs else self.draws
        t, weight = self._levels(denoiser.process, (draws, len(x0), 1, 1), generator)
        noise = standard_normal((draws, *x0.shape), x0, generator)
        if pairs:
            t, noise = torch.cat([t, t]), torch.cat([noise, -noise])
        t = t.to(x0.device, x0.dtype)
        return Draw(t, noise, torch.full_like(t[..., 0, 0], weight))

    def _levels(
        self, process: GaussianProcess, shape: tuple[int, ...], generator: torch.Generator
    ) -> tuple[Tensor, float]:
        """Levels of this shape, and the weight of errors there."""
        if self.weighting == "elbo":
            low, high = self._ends(process)
            u = _stratified(shape, generator).double()
            return process.snap(process.t_from_log_snr(low + (high - low) * u)), high - low
        if self.levels is not None:
            grid = process.snap(torch.tensor(self.levels, dtype=torch.float64))
            index = (_stratified(shape, generator) * len(grid)).long().clamp(max=len(grid) - 1)
            return grid.to(index.device)[index], 1.0
        # A process stratifies along the first dimension: a row's draws, or the rows.
        return process.sample_t(shape if shape[0] > 1 else shape[1:], generator).view(shape), 1.0

    def __call__(self, denoiser: BaseDenoiser, items: Items, draw: Draw) -> Tensor:
        draws = len(draw.t)
        x0, t, noise = items.x0.repeat(draws, 1, 1), draw.t.flatten(0, 1), draw.noise.flatten(0, 1)
        cond = None if items.cond is None else items.cond.repeat(draws, 1)
        error = self._residual(denoiser, x0, t, noise, cond).square().sum(-1)
        error = error.view(draws, *items.x0.shape[:2])
        if items.steps is not None:
            error = torch.where(items.steps, error, 0.0)
        return items.total(-0.5 * (draw.weight * error.sum(-1)).mean(0))

    def error(self, items: Items, score: Tensor) -> Tensor:
        """Mean squared error per scored entry of ``"own"``; nats per entry of ``"elbo"``."""
        scale = 2.0 if self.weighting == "own" else 1.0
        error: Tensor = -scale * score / items.entries().clamp_min(1)
        return error

    def _residual(
        self, denoiser: BaseDenoiser, x0: Tensor, t: Tensor, noise: Tensor, cond: Tensor | None
    ) -> Tensor:
        """What is squared, ``[R N, H, D]``."""
        process = denoiser.process
        x_t = process.add_noise(x0, t, noise)
        root_snr = process.alpha(t) / process.sigma(t)
        if not isinstance(denoiser, Denoiser):
            x0_hat: Tensor = denoiser(x_t, t, cond).x0_hat
            return root_snr * (x0_hat - x0)
        residual: Tensor = denoiser.raw(x_t, t, cond) - denoiser.target(x0, noise, t)
        if self.weighting == "own":
            return residual
        # x0_hat - x0 = c_out residual. Formed so, nothing cancels where alpha is nearly 0.
        scaled: Tensor = denoiser.coefficients(t)[1] * root_snr * residual
        return scaled

    def _ends(self, process: GaussianProcess) -> tuple[float, float]:
        """The interval of log SNR that is integrated over."""
        low, high = self.log_snr or LOG_SNR
        one = torch.ones((), dtype=torch.float64)
        low = max(low, float(process.log_snr(one)))
        if isinstance(process, DiscreteVP):  # nothing was trained below its first knot
            high = min(high, float(process.log_snr(one / len(process.betas))))
        if not low < high:
            least = f"the process trains {low:.3g} (t = 1) and up"
            raise ValueError(f"log_snr={self.log_snr} leaves nothing: {least}; widen it")
        return low, high


@dataclass(frozen=True)
class MaskedScore:
    """The likelihood bound of masked sequences, in nats, at shared masks.

    ``L mean_{i masked} log p(x0_i | x_t)`` with the number of masks uniform in 1..L: the bound of
    MDLM with its integral over levels solved, for denoisers that depend on the level and for those
    that do not. With differences of this score ``kl_beta`` is in nats, as it is with ``"elbo"``.

    Args:
        draws: masks per row, whose numbers are stratified. The loss is not linear in the score, so
            more draws lower not only the variance but also a bias.

    Raises:
        ValueError: fewer than one draw.
    """

    draws: int = ranged("[1, inf)", 1)

    def __post_init__(self) -> None:
        check_settings(self)

    def check(self, denoiser: BaseDenoiser) -> None:
        if not isinstance(denoiser, MaskedDenoiser):
            raise ValueError("MaskedScore is of masked sequences; plans take DenoisingScore")

    def draw(self, denoiser: BaseDenoiser, items: Items, generator: torch.Generator) -> Draw:
        assert isinstance(denoiser, MaskedDenoiser)
        count, place = len(items.x0), items.x0.device
        masked, t, weight = remask(denoiser, count, self.draws, generator)
        shape = (count, self.draws)
        return Draw(
            t.to(place).view(*shape, 1, 1).transpose(0, 1),
            masked.to(place).view(*shape, -1).transpose(0, 1),
            weight.to(place).view(shape).T,
        )

    def __call__(self, denoiser: BaseDenoiser, items: Items, draw: Draw) -> Tensor:
        assert isinstance(denoiser, MaskedDenoiser)
        draws = len(draw.t)
        cond = None if items.cond is None else items.cond.repeat(draws, 1)
        t, masked = draw.t.flatten(0, 1), draw.noise.flatten(0, 1)
        tokens = items.x0.repeat(draws, 1)
        scored = None if items.steps is None else items.steps.repeat(draws, 1)
        error = masked_cross_entropy(denoiser, tokens, t, masked, cond=cond, scored=scored)
        return items.total(-(draw.weight * error.view(draws, -1)).mean(0))

    def error(self, items: Items, score: Tensor) -> Tensor:
        """Nats per scored token."""
        return -score / items.entries().clamp_min(1)


def default_score(denoiser: BaseDenoiser) -> Score:
    """The score of a denoiser's kind, of plans or of sequences, with its default settings."""
    return MaskedScore() if isinstance(denoiser.process, MaskingProcess) else DenoisingScore()


def drawn_error(
    score: Score, denoiser: BaseDenoiser, items: Items, generator: torch.Generator
) -> Tensor:
    """The error ``[B]`` of items at levels and noise of their own, for cloning them."""
    return score.error(items, score(denoiser, items, score.draw(denoiser, items, generator)))


def _stratified(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform in [0, 1): even along the first dimension, or along the second where that is one."""
    along = 0 if shape[0] > 1 else 1
    u = torch.rand(shape, generator=generator, device=generator.device)
    strata = torch.arange(shape[along], device=u.device)
    if along == 1:  # rows of a batch come in an order that means something
        strata = strata[torch.randperm(len(strata), generator=generator, device=u.device)]
    return (u + strata.view([-1 if i == along else 1 for i in range(len(shape))])) / shape[along]
