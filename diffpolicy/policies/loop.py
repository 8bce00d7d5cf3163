"""The whole sampling loop of a policy as one pure module: observations in, plan out.

Policies call it, runtimes compile it and exporters write it to a file; all of them see the same
arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffpolicy.core.denoiser import BaseDenoiser
from diffpolicy.core.sampling import prepare, sample
from diffpolicy.core.solvers import Solver
from diffpolicy.core.starts import Start, noising_scales
from diffpolicy.data.normalize import Normalizer

STARTS = ("prior", "noised", "given")


class PlanLoop(nn.Module):
    """K steps of one solver over a fixed grid of levels.

    Args:
        denoiser: maps noisy to clean plans (guidance included).
        normalizer: the policy's, with a field ``obs``.
        solver: of :mod:`diffpolicy.core.solvers`.
        levels: host grid ``[K + 1, 1, 1 or H, 1 or A]``, the first entry the start's level.
        start: where sampling begins: ``"prior"`` from noise alone, ``"noised"`` from the guess
            noised to the first level (truncated, warm), ``"given"`` from the guess as it is.
        plan_shape: ``(To, O, H, A)``.

    Attributes:
        nfe: network evaluations K.
        draws: R, slices of noise that :meth:`forward` needs.
        uses_guess: whether the guess matters.

    Raises:
        ValueError: an unknown start, or levels that the network cannot take.
    """

    def __init__(
        self,
        denoiser: BaseDenoiser,
        normalizer: Normalizer,
        solver: Solver,
        levels: Tensor,
        *,
        start: str,
        plan_shape: tuple[int, int, int, int],
    ) -> None:
        super().__init__()
        if start not in STARTS:
            raise ValueError(f"unknown start {start!r}; expected one of {STARTS}")
        n_obs_steps, obs_dim, self.horizon, self.action_dim = plan_shape
        self.obs_shape = (n_obs_steps, obs_dim)
        self.denoiser, self.normalizer, self.solver = denoiser, normalizer, solver
        self.start, self.levels = start, levels
        parameter = next(denoiser.parameters(), torch.zeros(1))
        shape = (1, self.horizon, self.action_dim)
        like = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
        with torch.no_grad():
            self.grid = prepare(denoiser, solver, levels, like)
            self.alpha, self.sigma = noising_scales(denoiser.process, levels[0], like)
        self.nfe = self.grid.nfe
        self.draws = (start != "given") + (self.nfe if self.grid.stochastic else 0)
        self.uses_guess = start != "prior"

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.alpha.device

    def forward(self, history: Tensor, guess: Tensor, noise: Tensor) -> Tensor:
        """One plan per row.

        Args:
            history: raw observations ``[n, To, O]``.
            guess: normalised clean guess ``[n, H, A]`` (ignored by a prior start).
            noise: standard normal ``[R, n, H, A]``.

        Returns:
            Normalised plans ``[n, H, A]``.
        """
        cond = self.normalizer.normalize("obs", history).flatten(1)
        x0 = sample(
            self.denoiser,
            self.solver,
            self.begin(guess, noise),
            self.grid,
            cond=cond,
            noise=noise[self.draws - self.nfe :] if self.grid.stochastic else None,
        )
        assert isinstance(x0, Tensor)
        return x0

    def begin(self, guess: Tensor, noise: Tensor) -> Start:
        """The start made of a guess and the first slice of noise."""
        if self.start == "given":
            return Start(guess, self.levels[0])
        x = self.sigma * noise[0]
        if self.start == "noised":
            x = torch.addcmul(x, self.alpha, guess)
        return Start(x, self.levels[0])
