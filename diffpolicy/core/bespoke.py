"""Bespoke solvers: every deterministic solver of one evaluation a step, as a few plain numbers.

Shaul et al. 2024, Bespoke Non-Stationary Solvers (arXiv 2403.01329), learn the coefficients of each
step; here they are those of a step that stays exact where the clean estimate does not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffpolicy.core.denoiser import Denoised
from diffpolicy.core.noise import GaussianProcess
from diffpolicy.core.steps import HISTORY, Memory, Row, Solver, steps_of


@dataclass(frozen=True)
class Bespoke(Solver):
    """A multistep solver in data form whose weights are given, step by step.

    From level t to s, with the newest clean estimate ``m_0`` and earlier ones ``m_1, m_2, ...``::

        x_s = sigma_s / sigma_t x_t + gain (m_0 + sum_j w_j (m_j - m_0)),
        gain = alpha_s - alpha_t sigma_s / sigma_t

    Whatever the weights, it is exact where the estimate is constant. Without weights a step is
    DDIM; DPM-Solver++, UniPC with its corrector, DEIS and iPNDM are such weights too, see
    :func:`bespoke_weights`: of the second order of DPM-Solver++ they are ``(-h / (2 h_before),)``.

    Args:
        weights: ``w_1, w_2, ...`` of each step; at most seven, and no more than there are earlier
            estimates.

    Raises:
        ValueError: a step with more weights than earlier estimates, or a grid of another number of
            steps.

    Example:
        >>> make_solver("bespoke", weights=[[], [-0.5]])  # two steps, the second of order two
    """

    weights: tuple[tuple[float, ...], ...]
    name: ClassVar[str] = "bespoke"

    def __post_init__(self) -> None:
        try:
            steps = tuple(tuple(float(w) for w in step) for step in self.weights)
        except (TypeError, ValueError):
            raise ValueError(
                f"weights is a list of numbers for each step, such as [[], [-0.5]]; got "
                f"{self.weights!r}"
            ) from None
        for i, step in enumerate(steps):
            if len(step) > min(i, HISTORY):
                raise ValueError(
                    f"step {i} of a bespoke solver has {min(i, HISTORY)} earlier estimates, but "
                    f"{len(step)} weights: {step}"
                )
        object.__setattr__(self, "weights", steps)

    def rows(self, process: GaussianProcess, levels: Tensor) -> list[Row]:
        steps = steps_of(process, levels)
        if len(steps) != len(self.weights):
            raise ValueError(
                f"this bespoke solver is one of {len(self.weights)} steps, its grid has "
                f"{len(steps)}: for another number of steps name another solver"
            )
        rows = []
        for step, weights in zip(steps, self.weights, strict=True):
            ratio = step.sigma_s / step.sigma_t
            gain = step.alpha_s - step.alpha_t * ratio
            shares = [1 - sum(weights), *weights]
            a, b = step.freeze(ratio, [gain * share for share in shares])
            rows.append(Row(step.t, a, b))
        return rows


def bespoke_weights(
    solver: Solver, process: GaussianProcess, levels: Tensor
) -> tuple[tuple[float, ...], ...]:
    """The weights with which :class:`Bespoke` is ``solver`` on a grid.

    The solver's own rows are run on symbols: a state is its coefficients of the first state and of
    every estimate. A corrected state, and one that a noise estimate was made of, is a combination
    of the present one and of what is remembered.

    Args:
        solver: a deterministic one of one evaluation a step.
        process: the noise process.
        levels: host grid ``[K + 1, ...]``, the same level in all entries.

    Raises:
        ValueError: a solver that is none of these, or that remembers more than the loop does.
    """
    rows, steps = solver.rows(process, levels), steps_of(process, levels)
    if len(rows) != len(steps) or any(row.stochastic for row in rows):
        raise ValueError(f"{solver} is not a deterministic solver of one evaluation a step")
    symbols = torch.eye(len(rows) + 1, dtype=torch.float64)  # the first state, then the estimates
    memory, found = Memory(symbols[0], symbols[0], ()), []
    for i, (row, step) in enumerate(zip(rows, steps, strict=True)):
        row = row.with_constants([value.flatten()[0] for value in row.constants()])
        before = memory.x
        memory, _, _ = row.advance(memory, Denoised(symbols[i + 1]), None)
        ratio, alpha_s, alpha_t = (
            float(v.flatten()[0]) for v in (step.sigma_s / step.sigma_t, step.alpha_s, step.alpha_t)
        )
        share = (memory.x - ratio * before) / (alpha_s - alpha_t * ratio)
        if float(share[: max(1, i + 1 - HISTORY)].abs().max()) > 1e-6:
            raise ValueError(f"{solver} remembers more than {HISTORY} earlier estimates")
        found.append(_trimmed(share[max(1, i + 1 - HISTORY) : i + 1].flip(0).tolist()))
    return tuple(found)


def _trimmed(weights: Sequence[float]) -> tuple[float, ...]:
    """Weights without the zeros at their end."""
    kept = list(weights)
    while kept and abs(kept[-1]) < 1e-12:
        kept.pop()
    return tuple(kept)
