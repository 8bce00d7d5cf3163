"""A sampling loop as one step that is repeated, for runtimes whose build time grows with a graph.

Traced as it is, a loop of K evaluations becomes K copies of its network, which take minutes to
build at K = 100. Here the step is traced once, its constants are rows of tables, and the graph
holds a loop over it (in ONNX the operator ``Loop``): inputs, outputs and arithmetic stay the same.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from diffpolicy.core.steps import Row
from diffpolicy.data.observation import each, zeros
from diffpolicy.guidance.pinned import PinCond
from diffpolicy.policies.plan_loop import PlanLoop

#: Network evaluations from which a loop is rolled (docs/results.md, "K copies of a network"): with
#: fewer a rolled call of ONNX Runtime is slower and the build is short; OpenVINO's is never slower.
ROLL_FROM = 6


def rolled(loop: nn.Module) -> nn.Module:
    """The loop in its rolled form where that pays, else as it is.

    All but plain loops (a tick of a streaming policy, plans under costs, guidance that is dropped
    on the way) stay as they are.
    """
    if type(loop) is not PlanLoop or loop.nfe < ROLL_FROM or loop.condition.guided:
        return loop
    return RolledLoop(loop) if getattr(loop.grid.denoise, "alike", True) else loop


class RolledLoop(nn.Module):
    """A :class:`~diffpolicy.policies.plan_loop.PlanLoop` whose graph holds its step once.

    Args:
        loop: the loop.
    """

    def __init__(self, loop: PlanLoop) -> None:
        super().__init__()
        self.loop, self.nfe, self.draws = loop, loop.nfe, loop.draws
        self.horizon, self.action_dim = loop.horizon, loop.action_dim
        self.condition, self.takes_encoded = loop.condition, loop.takes_encoded
        self.step, plan = _Step(loop), (2, loop.horizon, loop.action_dim)
        seen = each(torch.from_numpy, zeros(loop.fields, (2, loop.obs_shape[0])))
        with torch.no_grad(), warnings.catch_warnings():
            # Of branches on constants, and of PyTorch's later plans.
            warnings.simplefilter("ignore")
            state, given, _ = self._begin(seen, torch.zeros(plan), torch.zeros(loop.draws, *plan))
            step = (torch.zeros((), dtype=torch.int64), *state, *given)
            traced = torch.jit.trace(self.step, step, check_trace=False)  # type: ignore[no-untyped-call]
            self.repeated: Any = torch.jit.script(_Repeated(traced))

    def forward(self, history: Any, guess: Tensor, noise: Tensor) -> Tensor:
        """As the loop's own: plans ``[n, H, A]``, the same to within rounding."""
        state, given, told = self._begin(history, guess, noise)
        # A number of steps that is no constant for PyTorch, which would unroll the loop again.
        steps = torch.arange(self.nfe) + torch.zeros_like(state[0][0, 0, :1], dtype=torch.int64)
        x: Tensor = self.repeated(steps, *state, *given)
        return self.loop.condition.settled(x, told)

    def _begin(
        self, history: Any, guess: Tensor, noise: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Any]:
        """The state before the first step, what every step is given (empty: not used), and cond."""
        loop, empty = self.loop, noise.new_zeros(0)
        noise = loop.tempered(noise)
        x = loop.begin(guess, noise).x
        told = loop.condition(history)
        modulations = getattr(loop.grid.denoise, "modulations", None)
        films = None if modulations is None else modulations(x, told)
        self.step.has_film = films is not None
        values, cond = (told.values, told.cond) if isinstance(told, PinCond) else (empty, told)
        given = (
            values,
            empty if cond is None else cond,
            empty if films is None else torch.stack(list(films)),
            noise[self.draws - self.nfe :] if loop.grid.stochastic else empty,
        )
        return (x, x, torch.stack([torch.zeros_like(x)] * self.step.depth)), given, told


class _Repeated(nn.Module):
    """K calls of a traced step, in the language that keeps them a loop.

    Args:
        step: what is repeated, once for each entry of ``steps``.
    """

    def __init__(self, step: Any) -> None:
        super().__init__()
        self.step = step

    def forward(
        self,
        steps: Tensor,
        x: Tensor,
        y: Tensor,
        memory: Tensor,
        values: Tensor,
        cond: Tensor,
        films: Tensor,
        noise: Tensor,
    ) -> Tensor:
        for k in range(steps.size(0)):
            x, y, memory = self.step(steps[k], x, y, memory, values, cond, films, noise)
        return x


class _Step(nn.Module):
    """Evaluation ``k`` and the update after it, its constants taken from tables ``[K, ...]``."""

    def __init__(self, loop: PlanLoop) -> None:
        super().__init__()
        self.denoiser, grid = loop.denoiser, loop.grid
        self.evaluate, self.stochastic, rows = grid.denoise, grid.stochastic, grid.rows
        self.has_film, self.pinned = False, loop.condition.pinned
        self.depth = max(max(len(row.b), len(row.d)) for row in rows)
        self.corrects = any(row.c is not None for row in rows)
        self.converts = any(row.to_eps is not None for row in rows)
        columns = zip(*(_uniform(row, self.depth) for row in rows), strict=True)
        self.tables = [torch.stack(column) for column in columns]

    def forward(
        self,
        k: Tensor,
        x: Tensor,
        y: Tensor,
        memory: Tensor,
        values: Tensor,
        cond: Tensor,
        films: Tensor,
        noise: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """State, corrected state and old estimates ``[J, n, H, A]`` after evaluation ``k``."""
        a, g, keep, c, p, q, *weights = (table[k] for table in self.tables)
        told = cond if cond.dim() > 1 else None
        given = PinCond(told, values) if self.pinned else told
        film = (films[k],) if self.has_film else ()
        m = self.evaluate(k, x, given, *film).x0_hat
        if self.converts:
            m = torch.addcmul(p * x, q, m)
        memory = torch.cat([m[None], memory[: self.depth - 1]])
        y = self._combined(keep * x + c * y, weights[self.depth :], memory) if self.corrects else x
        moved = self._combined(a * y, weights[: self.depth], memory)
        return torch.addcmul(moved, g, noise[k]) if self.stochastic else moved, y, memory

    def _combined(self, total: Tensor, weights: list[Tensor], memory: Tensor) -> Tensor:
        for j, weight in enumerate(weights):
            total = torch.addcmul(total, weight, memory[j])
        return total


def _uniform(row: Row, depth: int) -> list[Tensor]:
    """All constants of a row, in the same places as those of any other row."""
    zero, one = torch.zeros_like(row.a), torch.ones_like(row.a)
    p, q = (zero, one) if row.to_eps is None else row.to_eps
    keep, c = (one, zero) if row.c is None else (zero, row.c)
    b, d = ([*values, *[zero] * (depth - len(values))] for values in (row.b, row.d))
    return [row.a, zero if row.g is None else row.g, keep, c, p, q, *b, *d]
