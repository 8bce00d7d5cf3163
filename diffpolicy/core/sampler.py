"""How a state is led from noise to clean data, as one value: the solver, its steps, their grid.

Whatever samples holds a :class:`Sampler` or is one (a policy's full solve, warm starts, truncated
plans, few-step preference losses, reward chains, actors), so that these settings have the same
names, defaults and checks everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diffpolicy.core.denoiser import BaseDenoiser
from diffpolicy.core.noise import GaussianProcess
from diffpolicy.core.sampling import sample
from diffpolicy.core.solvers import make_solver
from diffpolicy.core.starts import (
    SPACINGS,
    Start,
    explicit_levels,
    level,
    levels,
    prior_start,
    trained_level,
)
from diffpolicy.core.steps import Solver
from diffpolicy.settings import check_range, check_settings, named_settings, one_of, ranged


@named_settings
@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A solver and the grid of levels that it steps along.

    Args:
        solver: name from :data:`diffpolicy.core.SOLVERS`.
        num_steps: steps K of the grid.
        spacing: of the grid, ``"t"``, ``"log_snr"`` or ``"karras"``.
        options: options of the solver, e.g. ``{"eta": 0.5}``.
        t_min: of these grids but ``"t"``, see :func:`diffpolicy.core.starts.levels`.
        levels: the levels after the start by hand, strictly descending to 0, in place of such a
            grid; they say ``num_steps``.

    Raises:
        ValueError: an unknown solver, option or spacing, or a value out of range.

    Example:
        >>> sampler = Sampler(solver="dpmpp_2m", num_steps=4)
        >>> sampler.draw(denoiser, prior_start(denoiser.process, noise), cond=cond)
    """

    solver: str = "ddim"
    num_steps: int = 10
    spacing: str = one_of(*SPACINGS, default="t")
    options: Mapping[str, Any] = field(default_factory=dict)
    t_min: float | None = ranged("(0, 1)", None)
    levels: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        check_range("[1, inf)", num_steps=self.num_steps)  # whatever default a subclass gives it
        if self.levels is not None:
            down = tuple(float(v) for v in self.levels)
            if not down or down[-1] != 0 or any(a <= b for a, b in pairwise(down)):
                raise ValueError(f"levels must be strictly descending to 0, got {self.levels}")
            usual = type(self).__dataclass_fields__["num_steps"].default
            if self.num_steps not in (usual, len(down)):
                raise ValueError(
                    f"levels say the steps, {len(down)}, and num_steps={self.num_steps} another "
                    "number; give one of the two (levels=None for a grid)"
                )
            object.__setattr__(self, "levels", down)
            object.__setattr__(self, "num_steps", len(down))
        self.make()

    def make(self, *, deterministic: bool = False) -> Solver:
        """The solver; ``deterministic`` takes its noise-free form, if it has one."""
        solver = make_solver(self.solver, **self.options)
        return solver.quiet if deterministic else solver

    def grid(
        self,
        process: GaussianProcess,
        start: Start | float | Sequence[float] = 1.0,
        *,
        num_steps: int | None = None,
    ) -> Tensor:
        """Host levels ``[K + 1, ...]`` from where sampling begins to clean data.

        Args:
            process: the noise process of the denoiser.
            start: a start; or a level, or one per dimension, for which the nearest is taken that
                networks are trained on: ``[K + 1, 1, 1, 1 or D]``.
            num_steps: other than the sampler's.

        Raises:
            ValueError: levels that the process does not have.
        """
        if not isinstance(start, Start):
            t = torch.as_tensor(start, dtype=torch.float64).view(1, 1, -1)
            t = trained_level(process, t)
            start = Start(t, t)
        count = self.num_steps if num_steps is None else num_steps
        if self.levels is not None and count == self.num_steps:
            if self.levels[0] >= float(start.t.min()):
                raise ValueError(
                    f"levels follow the start, which is at {float(start.t.min()):.4g}; they begin "
                    f"at {self.levels[0]:.4g}"
                )
            return explicit_levels(start, self.levels)
        return levels(start, count, spacing=self.spacing, process=process, t_min=self.t_min)

    def draw(
        self,
        denoiser: BaseDenoiser,
        start: Start,
        *,
        cond: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Clean samples ``[B, H, D]`` from ``start``; see :func:`diffpolicy.core.sampling.sample`.

        Args:
            denoiser: whose samples.
            start: states and their level, as :mod:`diffpolicy.core.starts` makes them.
            cond: ``[B, C]``.
            noise: of a stochastic solver, ``[R, B, H, D]``; drawn from ``generator`` when absent.
            generator: source of that noise.
        """
        grid = self.grid(denoiser.process, start)
        x0 = sample(denoiser, self.make(), start, grid, cond=cond, noise=noise, generator=generator)
        assert isinstance(x0, Tensor)  # a trajectory comes with record=True alone
        return x0


@dataclass(frozen=True)
class Teleport:
    """A start below pure noise that costs no evaluation, exact for independent Gaussians.

    At high noise a sample's path is that of a Gaussian with the samples' mean m and variance C,
    which the probability-flow ODE moves in closed form (Wang and Vastola 2023, arXiv 2303.02490):
    ``(x - alpha m) / sqrt(alpha^2 C + sigma^2)`` stays the same from level 1 to t.

    Args:
        t_start: level t in (0, 1) that it leads to, where the network is first asked.
        mean: m of each entry of a sample, ``[H][D]``.
        variance: C, ``[H][D]``.

    Raises:
        ValueError: a level out of range, sizes that differ, or a variance below 0.
    """

    t_start: float
    mean: tuple[tuple[float, ...], ...]
    variance: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        check_range("(0, 1)", t_start=self.t_start)
        sizes = [[len(row) for row in rows] for rows in (self.mean, self.variance)]
        if sizes[0] != sizes[1] or len(set(sizes[0])) != 1:
            raise ValueError(f"mean and variance must both be [H][D]; got rows of {sizes}")
        if min(min(row) for row in self.variance) < 0:
            raise ValueError("a variance must not be below 0")

    def map(self, process: GaussianProcess) -> tuple[Tensor, Tensor]:
        """Factor and shift ``[H, D]``, float64, that make ``x_t`` of standard normal noise."""
        m, c = (torch.tensor(v, dtype=torch.float64) for v in (self.mean, self.variance))
        t = torch.tensor([self.t_start, 1.0], dtype=torch.float64)
        alpha, sigma = process.alpha(t), process.sigma(t)
        total = alpha.square().view(2, 1, 1) * c + sigma.square().view(2, 1, 1)
        factor = (total[0] / total[1]).sqrt()
        return sigma[1] * factor, (alpha[0] - alpha[1] * factor) * m


@named_settings
@dataclass(frozen=True, kw_only=True)
class PriorSampler(Sampler):
    """A :class:`Sampler` that begins at pure noise.

    Args:
        teleport: begin below it, at no cost; ``None``: at level 1.
    """

    teleport: Teleport | None = None

    def grid(
        self,
        process: GaussianProcess,
        start: Start | float | Sequence[float] | None = None,
        *,
        num_steps: int | None = None,
    ) -> Tensor:
        """As :meth:`Sampler.grid`; without a start from where :meth:`start` leads."""
        if start is None and self.teleport is not None:
            t = torch.full((1, 1, 1), self.teleport.t_start, dtype=torch.float64)
            start = Start(t, t)  # as it is: the nearest training level would be another start
        return super().grid(process, 1.0 if start is None else start, num_steps=num_steps)

    def start(self, process: GaussianProcess, noise: Tensor) -> Start:
        """Where standard normal ``noise`` ``[B, H, D]`` leads before the first evaluation."""
        if self.teleport is None:
            return prior_start(process, noise)
        factor, shift = (v.to(noise) for v in self.teleport.map(process))
        return Start(shift + factor * noise, level(self.teleport.t_start, noise))
