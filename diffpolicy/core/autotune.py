"""Search for a sampler: levels and weights of a few steps that come closest to many steps.

A sampler of K steps is K - 1 levels between its ends and the weights of its steps
(:class:`~diffpolicy.core.bespoke.Bespoke`), a handful of numbers. They are fitted to a teacher's
samples from the same noise: Liu et al. 2024, Unified Sampling Framework (arXiv 2312.07243), search
order, history and corrector of each step; here these are weights, found by least squares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diffpolicy.core.bespoke import bespoke_weights
from diffpolicy.core.noise import GaussianProcess
from diffpolicy.core.sampler import PriorSampler, Teleport
from diffpolicy.core.solvers import SOLVERS
from diffpolicy.core.starts import SPACINGS
from diffpolicy.core.steps import HISTORY
from diffpolicy.settings import check_range

Plans = Callable[[PriorSampler], Tensor]
Rows = tuple[tuple[float, ...], ...]

BEGINNINGS = 3
SWEEPS, FIRST_ROUNDS, ROUNDS = 4, 3, 16
_STEP = 0.05  # of finite differences, in half log SNR and in weights
_DAMPINGS = (1e-4, 1e-2, 1e-1, 1.0, 10.0, 100.0)


def distances(plans: Tensor, target: Tensor) -> Tensor:
    """Root mean square difference ``[B]`` of samples ``[B, H, D]``."""
    return (plans - target).flatten(1).square().mean(1).sqrt()


def named_samplers(nfe: int) -> list[PriorSampler]:
    """Every deterministic solver with a name, on every kind of grid, with ``nfe`` evaluations."""
    check_range("[1, inf)", nfe=nfe)
    further: list[tuple[str, dict[str, Any]]] = [
        ("dpmpp_2m", {"midpoint": False}),
        ("dpmpp_3m", {"damped": True}),
        ("deis", {"order": 2}),
        ("ipndm", {"order": 2}),
        ("unipc", {"variant": "bh1"}),
        ("unipc", {"order": 3}),
    ]
    found = []
    plain: list[tuple[str, dict[str, Any]]]
    plain = [(name, {}) for name in SOLVERS if name not in ("euler", "bespoke")]  # euler is ddim
    for name, options in [*plain, *further]:
        sampler = PriorSampler(solver=name, options=options)
        steps = [k for k in range(1, nfe + 1) if sampler.make().nfe(k) == nfe]
        if not sampler.make().stochastic and steps:
            found += [replace(sampler, spacing=one, num_steps=steps[0]) for one in SPACINGS]
    return found


@dataclass(frozen=True)
class Space:
    """Samplers of ``num_steps`` steps from pure noise, as points: levels, then weights.

    A level is said by its half log SNR, ``lambda = log(alpha / sigma)``.

    Args:
        process: the noise process.
        num_steps: K.
        moments: mean and variance ``[H][D]`` of samples. With them the first evaluation is below
            pure noise, where a teleport leads, and its level is part of a point.
    """

    process: GaussianProcess
    num_steps: int
    moments: tuple[Rows, Rows] | None = None

    @property
    def inner(self) -> int:
        """Levels of a point."""
        return self.num_steps - (self.moments is None)

    def sizes(self) -> list[int]:
        """Weights of each step."""
        return [min(i, HISTORY) for i in range(self.num_steps)]

    def point(self, sampler: PriorSampler) -> Tensor:
        """The point of a sampler; where there are moments, of one that begins just below level 1.

        Raises:
            ValueError: it is outside the space.
        """
        grid = sampler.grid(self.process)
        given = bespoke_weights(sampler.make(), self.process, grid)
        weights = [(*w, *[0.0] * (n - len(w))) for w, n in zip(given, self.sizes(), strict=True)]
        levels = grid[-1 - self.inner : -1].flatten(1)[:, 0]
        if self.moments is not None:
            levels = torch.cat([levels[:1].clamp(max=0.99), levels[1:]])
        flat = torch.tensor([v for step in weights for v in step], dtype=torch.float64)
        return torch.cat([0.5 * self.process.log_snr(levels), flat])

    def sampler(self, point: Tensor) -> PriorSampler | None:
        """The sampler of a point; None where its levels do not descend."""
        levels = [*self.process.t_from_log_snr(2 * point[: self.inner]).tolist(), 0.0]
        if any(a <= b for a, b in pairwise([1.0, *levels])):
            return None
        parts = torch.split(point[self.inner :], self.sizes())
        teleport = None
        if self.moments is not None:
            teleport = Teleport(levels.pop(0), *self.moments)
        options = {"weights": [part.tolist() for part in parts]}
        how: dict[str, Any] = {"solver": "bespoke", "options": options, "teleport": teleport}
        return PriorSampler(levels=tuple(levels), **how)


def search(
    plans: Plans, target: Tensor, space: Space, begin: Sequence[PriorSampler]
) -> PriorSampler:
    """The sampler of a space whose samples are nearest to the teacher's.

    Args:
        plans: the samples ``[B, H, D]`` of a sampler, from the same noise every time.
        target: the teacher's, from that noise.
        space: where to search.
        begin: samplers to begin at, the most promising first: the first three in the space are.

    Returns:
        The best found: by coordinate descent over the levels, then least squares over levels and
        weights, and by the latter alone, from every beginning; the best goes on.

    Raises:
        ValueError: no beginning is in the space.

    Example:
        >>> plans = lambda sampler: sampler.draw(denoiser, sampler.start(process, noise))
        >>> search(plans, plans(many), Space(process, 4), named_samplers(4))
    """
    fit, ends = _Fit(space, plans, target), list[tuple[Tensor, float]]()
    for sampler in begin:
        try:
            point = space.point(sampler)
        except ValueError:  # Heun, or a grid that this process does not have
            continue
        if len(ends) == 2 * BEGINNINGS or (cost := fit.cost(point)) == float("inf"):
            continue
        for first in ((point, cost), fit.coordinates(point, cost)):
            ends.append(fit.least_squares(*first, FIRST_ROUNDS))
    if not ends:
        raise ValueError(f"none of the samplers is one of {space.num_steps} steps to begin at")
    point, _ = fit.least_squares(*min(ends, key=lambda end: end[1]), ROUNDS)
    best = space.sampler(point)
    assert best is not None  # points outside the space cost more than any within
    return best


@dataclass
class _Fit:
    """Mean distance to the teacher as a function of a point, and how it is made less."""

    space: Space
    plans: Plans
    target: Tensor

    def residuals(self, point: Tensor) -> Tensor | None:
        """Differences ``[B, H D]`` to the teacher's samples; None outside the space."""
        sampler = self.space.sampler(point)
        if sampler is None:
            return None
        return (self.plans(sampler) - self.target).flatten(1).double()

    def cost(self, point: Tensor) -> float:
        found = self.residuals(point)
        cost = float("inf") if found is None else float(found.square().mean(1).sqrt().mean())
        return cost if cost == cost else float("inf")  # weights that overflow

    def coordinates(self, point: Tensor, cost: float) -> tuple[Tensor, float]:
        """Coordinate descent over the levels, by steps that shrink."""
        step = 0.6
        for _ in range(SWEEPS):
            for i in range(self.space.inner):
                for way in (step, -step):
                    moved = point.clone()
                    moved[i] += way
                    if (new := self.cost(moved)) < cost:
                        point, cost = moved, new
                        break
            step *= 0.6
        return point, cost

    def least_squares(self, point: Tensor, cost: float, rounds: int) -> tuple[Tensor, float]:
        """Levenberg and Marquardt's method on all numbers.

        Squares are divided by their pair's distance (iteratively reweighted), so that what falls is
        the mean distance: a pair that ends in another mode would else decide alone.
        """
        for _ in range(rounds if len(point) else 0):
            here = self.residuals(point)
            assert here is not None
            share = 1 / here.square().mean(1).sqrt().clamp_min(0.1 * cost)
            jacobian = self._jacobian(point, here)
            normal = torch.einsum("bni,bnj,b->ij", jacobian, jacobian, share)
            slope = torch.einsum("bni,bn,b->i", jacobian, here, share)
            scale = torch.diag(normal.diagonal().clamp_min(1e-12))
            steps = [torch.linalg.solve(normal + by * scale, slope) for by in _DAMPINGS]
            tried = [(self.cost(point - step), point - step) for step in steps]
            new, moved = min(tried, key=lambda one: one[0])
            if new < cost:
                point = moved
            if new > 0.995 * cost:
                return point, min(new, cost)
            cost = new
        return point, cost

    def _jacobian(self, point: Tensor, here: Tensor) -> Tensor:
        """Finite differences ``[B, H D, P]``, downwards where a level has no room above."""
        columns = []
        for i in range(len(point)):
            moved = point.clone()
            for way in (_STEP, -_STEP, 0.1 * _STEP):
                moved[i] = point[i] + way
                if (there := self.residuals(moved)) is not None:
                    columns.append((there - here) / way)
                    break
            else:
                columns.append(torch.zeros_like(here))
        return torch.stack(columns, -1)
