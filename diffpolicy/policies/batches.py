"""Plans in batches of constant size, so that no row depends on the rows that plan beside it.

The kernels of a matrix product or a convolution are chosen by its size, and some treat the edge of
a batch otherwise than its middle; with them changes the order of sums. So one row comes out
different in its last bits when it is alone, among eight, or first instead of third. Here every
call has the same size, and a row always stands in the same place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from diffpolicy.policies.base import Array, PolicyState

ON_CPU, ON_ACCELERATOR = 8, 64


def in_batches(
    plan: Callable[[PolicyState], tuple[Array, ...]], state: PolicyState, kinds: Array, size: int
) -> tuple[Array, ...]:
    """``plan(state)``, called with exactly ``size`` rows of one kind each time.

    A row stands at the place ``seed % size``, so that its plan is a function of its own memory
    alone. Rows that want one place go into different batches; empty places are filled with copies.

    Args:
        plan: from memory of n rows to arrays of n rows.
        state: memory of the rows to plan for, at least one.
        kinds: ``[n]``; rows of one kind go through the same networks.
        size: rows of a batch.
    """
    batches: dict[tuple[int, int], dict[int, int]] = {}  # (kind, number): place -> row
    taken: dict[tuple[int, int], int] = {}
    for row, (kind, place) in enumerate(
        zip(kinds.tolist(), (state.seed % size).tolist(), strict=True)
    ):
        number = taken.get((kind, place), 0)
        taken[kind, place] = number + 1
        batches.setdefault((kind, number), {})[place] = row
    order: list[int] = []
    parts: list[tuple[Array, ...]] = []
    for batch in batches.values():
        filler = next(iter(batch.values()))
        rows = [batch.get(place, filler) for place in range(size)]
        done = plan(state.take(np.array(rows)))
        order += batch.values()
        parts.append(tuple(array[list(batch)] for array in done))
    back = np.argsort(order)
    joined: list[Any] = [np.concatenate(arrays)[back] for arrays in zip(*parts, strict=True)]
    return tuple(joined)


def usual_batch(policy: Any) -> int:
    """Rows of a batch that cost little more than one, on the device that a policy plans on.

    Compiled loops have a size of their own.
    """
    inner = policy
    while not hasattr(inner, "device"):
        following = getattr(inner, "policy", getattr(inner, "planner", None))
        if following is None:
            return ON_CPU
        inner = following
    loops = getattr(inner, "_loops", {}).values()
    compiled = [loop.batch_size for loop in loops if hasattr(loop, "batch_size")]
    if compiled:
        return int(max(compiled))
    return ON_CPU if str(inner.device) == "cpu" else ON_ACCELERATOR
