"""What solvers share: the rows of their tables, both ends of a step, and the running history.

See :mod:`diffpolicy.core.solvers` for the notation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from diffpolicy.core.denoiser import Denoised
from diffpolicy.core.noise import GaussianProcess

HISTORY = 7  # estimates before the newest that a chain remembers


class Memory(NamedTuple):
    """What a chain carries from step to step: its state, UniPC's corrected one, old estimates."""

    x: Tensor
    y: Tensor
    history: tuple[Tensor, ...]


@dataclass(frozen=True)
class Row:
    """Constants of one network evaluation at level ``t``; each broadcasts to the state.

    ``s`` is the level to which a network of steps is to lead (prediction ``mean_velocity``), where
    the update is DDIM's from ``t`` to ``s``; None: the update wants the clean estimate at ``t``.
    """

    t: Tensor
    a: Tensor
    b: tuple[Tensor, ...]
    g: Tensor | None = None
    c: Tensor | None = None
    d: tuple[Tensor, ...] = ()
    to_eps: tuple[Tensor, Tensor] | None = None  # m = p x + q x0_hat
    s: Tensor | None = None

    def constants(self) -> list[Tensor]:
        """Every constant but the levels, in a fixed order."""
        optional = [v for v in (self.g, self.c) if v is not None]
        return [self.a, *self.b, *optional, *self.d, *(self.to_eps or ())]

    def with_constants(self, values: Sequence[Tensor]) -> Row:
        """The same row holding ``values`` (as :meth:`constants` orders them)."""
        it = iter(values)
        return replace(
            self,
            a=next(it),
            b=tuple(next(it) for _ in self.b),
            g=None if self.g is None else next(it),
            c=None if self.c is None else next(it),
            d=tuple(next(it) for _ in self.d),
            to_eps=None if self.to_eps is None else (next(it), next(it)),
        )

    @property
    def stochastic(self) -> bool:
        """Whether the step adds noise."""
        return self.g is not None

    def advance(
        self, memory: Memory, out: Denoised, noise: Tensor | None
    ) -> tuple[Memory, Tensor, Tensor | None]:
        """The next state, with the mean and standard deviation of its law."""
        x, y, history = memory
        m = out.x0_hat
        if self.to_eps is not None:
            m = torch.addcmul(self.to_eps[0] * x, self.to_eps[1], m)
        history = (m, *history[:HISTORY])
        y = x if self.c is None else _combine(self.c, y, self.d, history)
        mean = _combine(self.a, y, self.b, history)
        moved = mean if self.g is None or noise is None else torch.addcmul(mean, self.g, noise)
        return Memory(moved, y, history), mean, self.g


def _combine(
    scale: Tensor, state: Tensor, weights: tuple[Tensor, ...], history: tuple[Tensor, ...]
) -> Tensor:
    total = scale * state
    for weight, m in zip(weights, history, strict=False):
        total = torch.addcmul(total, weight, m)
    return total


@dataclass(frozen=True)
class Step:
    """Both ends of one step, and what is derived from them, in float64.

    ``h`` may be infinite at either end.
    """

    t: Tensor
    s: Tensor
    alpha_t: Tensor
    sigma_t: Tensor
    alpha_s: Tensor
    sigma_s: Tensor
    h: Tensor

    @classmethod
    def between(cls, process: GaussianProcess, t: Tensor, s: Tensor) -> Step:
        alpha_t, sigma_t, alpha_s, sigma_s = (
            f(u) for u in (t, s) for f in (process.alpha, process.sigma)
        )
        h = (alpha_s.log() - sigma_s.log()) - (alpha_t.log() - sigma_t.log())
        h = torch.where(t == s, torch.zeros_like(h), h)
        return cls(t, s, alpha_t, sigma_t, alpha_s, sigma_s, h)

    @property
    def still(self) -> Tensor:
        """Entries that do not move (a position that is already at its last level)."""
        return self.t == self.s

    def freeze(self, a: Tensor, b: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Identity update where the step is empty; there the general formulas divide by zero."""
        still = self.still
        return torch.where(still, 1.0, a), tuple(torch.where(still, 0.0, v) for v in b)


class Solver:
    """Turns a grid of levels ``[K + 1, ...]`` into rows; the same grid gives the same rows."""

    name: ClassVar[str]
    stochastic: bool = False

    @property
    def quiet(self) -> Solver:
        """The noise-free form, where there is one; a solver without draws its noise all the same.

        What acts deterministically gives such a solver the same noise every time.
        """
        return self

    def rows(self, process: GaussianProcess, levels: Tensor) -> list[Row]:
        """One :class:`Row` per network evaluation."""
        raise TypeError(f"{type(self).__name__} must define rows")

    def nfe(self, num_steps: int) -> int:
        """Network evaluations for ``num_steps`` steps."""
        return num_steps


def steps_of(process: GaussianProcess, levels: Tensor) -> list[Step]:
    """The steps of a grid of levels ``[K + 1, ...]``."""
    return [Step.between(process, t, s) for t, s in pairwise(levels)]


def safe_ratio(top: Tensor, bottom: Tensor) -> Tensor:
    """``top / bottom``, and 0 where that is not finite: an infinite step carries no slope."""
    value = top / bottom
    return torch.where(value.isfinite() & (bottom != 0), value, torch.zeros_like(value))


def orders_of(num_steps: int, order: int, lower_order_final: bool) -> list[int]:
    """Order of each step: history is short at first, and the step to clean wants a low order."""
    ends = [num_steps - i if lower_order_final else order for i in range(num_steps)]
    return [min(order, i + 1, ends[i]) for i in range(num_steps)]
