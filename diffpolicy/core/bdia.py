"""BDIA: exact inversion of sampling, by bi-directional integration.

Zhang et al. 2023, Exact Diffusion Inversion via Bi-directional Integration Approximation (arXiv
2307.10829). A step of DDIM forgets where it came from; here each step also takes back what a step
in the other direction would have done, so that the chain can be run both ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from diffpolicy.core.denoiser import BaseDenoiser, Denoised
from diffpolicy.core.noise import GaussianProcess
from diffpolicy.core.sampling import Trajectory, prepare, sample
from diffpolicy.core.starts import Start
from diffpolicy.core.steps import Memory, Row, Solver, Step, steps_of
from diffpolicy.settings import check_range


@dataclass(frozen=True)
class _LeapRow(Row):
    """A row that also takes the state before the present one: ``x <- a x + b m + back y``."""

    back: Tensor = field(kw_only=True)

    def constants(self) -> list[Tensor]:
        return [self.back, *super().constants()]

    def with_constants(self, values: Sequence[Tensor]) -> Row:
        return replace(super().with_constants(values[1:]), back=values[0])  # type: ignore[call-arg]

    def advance(
        self, memory: Memory, out: Denoised, noise: Tensor | None
    ) -> tuple[Memory, Tensor, Tensor | None]:
        mean = self.a * memory.x + self.b[0] * out.x0_hat + self.back * memory.y
        return Memory(mean, memory.x, ()), mean, None


@dataclass(frozen=True)
class BDIA(Solver):
    """DDIM for the first step, then ``z_next = g z_before - g P(back) + P(on)``.

    ``P(on)`` and ``P(back)`` are the steps of DDIM from the present level to the next and to the
    one before. With ``g = 1`` it is of order two. On a grid upside down, with ``1 / g``, it is its
    own inverse.

    Args:
        gamma: g, above 0. Inverting multiplies rounding errors by ``1 / g`` a step.

    Raises:
        ValueError: g not above 0.
    """

    gamma: float = 1.0
    name: ClassVar[str] = "bdia"

    def __post_init__(self) -> None:
        check_range("(0, inf)", gamma=self.gamma)

    def rows(self, process: GaussianProcess, levels: Tensor) -> list[Row]:
        steps = steps_of(process, levels)
        rows = [Row(step.t, *_ddim(step)) for step in steps]
        for i in range(1, len(steps)):
            back = _ddim(Step.between(process, levels[i], levels[i - 1]))
            ahead, g = _ddim(steps[i]), torch.full_like(levels[i], self.gamma)
            a, b = ahead[0] - g * back[0], (ahead[1][0] - g * back[1][0],)
            rows[i] = _LeapRow(steps[i].t, a, b, back=g)
        return rows


def _ddim(step: Step) -> tuple[Tensor, tuple[Tensor]]:
    ratio = step.sigma_s / step.sigma_t
    return ratio, (step.alpha_s - step.alpha_t * ratio,)


class Inverted(NamedTuple):
    """Where a sample comes from: the first two states of its chain.

    Attributes:
        noise: ``[B, H, D]`` at ``levels[0]``.
        second: ``[B, H, D]`` at ``levels[1]``; without it the way back is not exact.
    """

    noise: Tensor
    second: Tensor


def invert(
    denoise: BaseDenoiser,
    x0: Tensor,
    levels: Tensor,
    *,
    cond: Tensor | None = None,
    gamma: float = 1.0,
) -> Inverted:
    """The noise that leads to ``x0`` ``[B, H, D]``, in K evaluations.

    Args:
        denoise: whose samples.
        x0: what it is to lead to, as a state at ``levels[-1]``.
        levels: host grid ``[K + 1, ...]`` from noise to nearly clean, K at least 2. The last one is
            above 0, where noise cannot be told of a state.
        cond: ``[B, C]``.
        gamma: see :class:`BDIA`.

    Raises:
        ValueError: fewer than two steps, or a grid that ends at 0.

    Example:
        >>> back = restore(denoiser, invert(denoiser, plan, levels), levels)  # plan, to rounding
    """
    if len(levels) < 3 or bool((levels[-1] <= 0).any()):
        raise ValueError(
            f"inversion needs at least two steps, down to a level above 0; got {levels.flatten()}"
        )
    up = levels.flip(0)
    path = sample(denoise, BDIA(1 / gamma), Start(x0, up[0]), up, cond=cond, record=True)
    assert isinstance(path, Trajectory)
    return Inverted(path.x0, path.transitions[-1].x)


def restore(
    denoise: BaseDenoiser,
    start: Inverted,
    levels: Tensor,
    *,
    cond: Tensor | None = None,
    gamma: float = 1.0,
) -> Tensor:
    """The sample ``[B, H, D]`` at ``levels[-1]`` that :func:`invert` began with.

    With another ``cond`` it is that sample edited. Arguments are those of :func:`invert`.
    """
    grid = prepare(denoise, BDIA(gamma), levels, start.second).part(1, len(levels) - 1)
    first = Start(start.second, levels[1])
    x = sample(denoise, BDIA(gamma), first, grid, cond=cond, before=start.noise)
    assert isinstance(x, Tensor)
    return x
