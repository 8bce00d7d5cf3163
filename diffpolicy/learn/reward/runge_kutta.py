"""Explicit Runge-Kutta steps over tuples of tensors: fixed, or sized by an embedded error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

State = tuple[Tensor, ...]


class Tableau(NamedTuple):
    """An explicit Runge-Kutta method; ``error`` gives the difference to its embedded method."""

    nodes: tuple[float, ...]
    matrix: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    error: tuple[float, ...] | None = None


METHODS: dict[str, Tableau] = {
    "euler": Tableau((0.0,), ((),), (1.0,)),
    "midpoint": Tableau((0.0, 0.5), ((), (0.5,)), (0.0, 1.0)),
    "rk4": Tableau(
        (0.0, 0.5, 0.5, 1.0),
        ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
        (1 / 6, 1 / 3, 1 / 3, 1 / 6),
    ),
    "dopri5": Tableau(  # Dormand & Prince 1980
        (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
        (
            (),
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
            (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
        ),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
        (
            35 / 384 - 5179 / 57600,
            0.0,
            500 / 1113 - 7571 / 16695,
            125 / 192 - 393 / 640,
            -2187 / 6784 + 92097 / 339200,
            11 / 84 - 187 / 2100,
            -1 / 40,
        ),
    ),
}
MAX_TRIES = 10_000  # steps, kept or not, that dopri5 may try in one interval of the grid


class Field(Protocol):
    """The right-hand side ``d state / dw`` in one interval."""

    def __call__(self, w: float, state: State, weight: float) -> State:
        """The slope at ``w``; ``weight`` is what the step as a whole will move along it."""

    def settle(self, *, accepted: bool) -> None:
        """Called after each step tried: whether it is kept."""


class Driver:
    """Crosses intervals: one step each, or with an embedded method as many as the error asks.

    Args:
        tableau: the method.
        rtol: with an embedded error, the relative tolerance.
        floors: absolute tolerances, one per tensor of the state, each broadcastable to it. A step
            is kept if in every row (first dimension) of every tensor the root mean square of
            ``error / (floor + rtol size)`` is at most 1.
    """

    def __init__(self, tableau: Tableau, rtol: float, floors: Sequence[float | Tensor]) -> None:
        self.tableau, self.rtol, self.floors = tableau, rtol, floors
        self.size = 1.0  # the next step to try, kept from one interval to the next

    def cross(
        self,
        field: Field,
        state: State,
        ends: tuple[float, float],
        record: Callable[[float, float, State], None] | None = None,
    ) -> State:
        """The state at ``ends[1]``, from the one at ``ends[0]``; both in [0, 1], either order.

        ``record(w, dw, state)`` is told of every step that is kept, and where it begins.

        Raises:
            RuntimeError: no step, or too many, would meet the tolerances.
        """
        w, end = ends
        sign = 1.0 if end > w else -1.0
        for _ in range(MAX_TRIES):
            left = abs(end - w)
            last = self.tableau.error is None or self.size >= left
            dw = sign * (left if last else self.size)
            following, slopes = runge_kutta_step(field, w, dw, state, self.tableau)
            accepted, factor = self._judge(state, following, slopes, dw)
            field.settle(accepted=accepted)
            if accepted:
                if record is not None:
                    record(w, dw, state)
                state, w = following, w + dw
                self.size = max(self.size, abs(dw) * factor) if last else abs(dw) * factor
                self.size = min(self.size, 1.0)
                if last:
                    return state
            else:
                self.size = abs(dw) * factor
            if self.size < 1e-12:
                break
        raise RuntimeError(
            f"dopri5 does not meet rtol={self.rtol:g} in {MAX_TRIES} steps: loosen rtol and atol "
            "(float32 resolves about 1e-6), use float64, or look for infinities in the denoiser"
        )

    @torch.no_grad()
    def _judge(
        self, old: State, new: State, slopes: Sequence[State], dw: float
    ) -> tuple[bool, float]:
        """Whether the step is kept, and by what the next one is longer."""
        if self.tableau.error is None:
            return True, 1.0
        worst = new[0].new_zeros(())
        for i, floor in enumerate(self.floors):
            zero = torch.zeros_like(new[i])
            error = _moved(zero, [s[i] for s in slopes], self.tableau.error, dw)
            allowed = floor + self.rtol * torch.maximum(old[i].abs(), new[i].abs())
            worst = torch.maximum(worst, (error / allowed).square().flatten(1).mean(1).max())
        size = float(worst.sqrt())
        if not size < float("inf"):
            return False, 0.2
        return size <= 1, min(5.0, max(0.2, 0.9 * size**-0.2)) if size > 0 else 5.0


def runge_kutta_step(
    field: Field, w: float, dw: float, state: State, tableau: Tableau
) -> tuple[State, list[State]]:
    """One step, and the slope of each stage."""
    slopes: list[State] = []

    def moved(weights: Sequence[float]) -> State:
        return tuple(_moved(v, [s[i] for s in slopes], weights, dw) for i, v in enumerate(state))

    for node, row, weight in zip(tableau.nodes, tableau.matrix, tableau.weights, strict=True):
        slopes.append(field(w + node * dw, moved(row), weight * dw))
    return moved(tableau.weights), slopes


def _moved(base: Tensor, slopes: Sequence[Tensor], weights: Sequence[float], dw: float) -> Tensor:
    for slope, weight in zip(slopes, weights, strict=False):
        if weight != 0:
            base = torch.add(base, slope, alpha=weight * dw)
    return base
