"""Rows that know nothing of each other: their own randomness, and batches of constant size.

The kernels of a matrix product or a convolution are chosen by its size, and some treat the edge of
a batch otherwise than its middle; with them changes the order of sums. So one row comes out
different in its last bits when it is alone, among eight, or first instead of third. In
:func:`in_batches` every call has the same size, and a row always stands in the same place.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from diffpolicy.policies.base import PolicyState

Array = npt.NDArray[Any]
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
    places = (state.seed % size).tolist()
    for row, (kind, place) in enumerate(zip(kinds.tolist(), places, strict=True)):
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
    return _joined(parts, order)


def kind_by_kind(
    plan: Callable[[Any, PolicyState], tuple[Array, ...]], state: PolicyState, kinds: Array
) -> tuple[Array, ...]:
    """``plan(kind, rows)``, called once for all rows of a kind; the answers are in their order.

    Args:
        plan: of a kind and the state of n rows to arrays of n rows.
        state: of N rows.
        kinds: of each row, ``[N]``.
    """
    found = sorted(set(kinds.tolist()))
    if len(found) == 1:
        return plan(found[0], state)
    rows = [np.flatnonzero(kinds == kind) for kind in found]
    parts = [plan(kind, state.take(own)) for kind, own in zip(found, rows, strict=True)]
    return _joined(parts, np.concatenate(rows))


def _joined(parts: list[tuple[Array, ...]], order: Array | list[int]) -> tuple[Array, ...]:
    """Arrays of parts of the rows, by the rows' order."""
    back = np.argsort(order)
    return tuple(np.concatenate(arrays)[back] for arrays in zip(*parts, strict=True))


def usual_batch(policy: Any) -> int:
    """Rows of a batch that cost little more than one, on the device that a policy plans on.

    Compiled loops have a size of their own.
    """
    inner = policy
    while not hasattr(inner, "device"):
        inner = getattr(inner, "policy", None)
        if inner is None:
            return ON_CPU
    loops = getattr(inner, "_loops", {}).values()
    compiled = [loop.batch_size for loop in loops if hasattr(loop, "batch_size")]
    if compiled:
        return int(max(compiled))
    return ON_CPU if str(inner.device) == "cpu" else ON_ACCELERATOR


def row_generator(seed: int, counter: int, stream: int = 0) -> np.random.Generator:
    """Randomness that is a pure function of three numbers (Philox counters)."""
    # As a list, a seed below 0 would make floats of them, and equal keys of many seeds.
    key = np.array([seed % 2**64, stream], np.uint64)
    bits = np.random.Philox(key=key, counter=[0, 0, 0, counter])
    return np.random.Generator(bits)


def row_noise(
    seeds: Array, counters: Array, shape: tuple[int, ...], streams: Array | None = None
) -> Array:
    """Standard normal ``[n, *shape]``; row i is a pure function of its seed, counter and stream.

    Args:
        seeds: ``[n]``.
        counters: ``[n]``.
        shape: of each row.
        streams: ``[n]``, told apart for one seed and counter (candidates of a plan); default 0.
            Or ``[n, L]``, lines of streams (-1: ended) in which every one is a neighbour of the
            noise before it: see :func:`neighbour`.
    """
    if streams is not None and streams.ndim == 2:
        out = row_noise(seeds, counters, shape, streams[:, 0])
        for step in streams.T[1:]:
            going = np.flatnonzero(step >= 0)
            if len(going):
                fresh = row_noise(seeds[going], counters[going], shape, step[going])
                out[going] = neighbour(out[going], fresh)
        return out
    out = np.empty((len(seeds), *shape), np.float32)
    kinds = [0] * len(seeds) if streams is None else streams.tolist()
    for i, key in enumerate(zip(seeds.tolist(), counters.tolist(), kinds, strict=True)):
        _REUSED.at(*key).standard_normal(out=out[i], dtype=np.float32)
    return out


def neighbour(pivot: Array, fresh: Array, cosine: float = 0.95) -> Array:
    """Noise ``[n, ...]`` at a fixed angle from ``pivot``, in a direction that ``fresh`` gives.

    ``|pivot| (cosine u + sqrt(1 - cosine^2) w)`` with u the direction of the pivot and w that of
    ``fresh`` orthogonal to it (zero-order search of Ma et al. 2025, arXiv 2501.09732). If both are
    standard normal, so is the neighbour.
    """
    flat, other = pivot.reshape(len(pivot), -1), fresh.reshape(len(fresh), -1)
    norm = np.linalg.norm(flat, axis=1, keepdims=True)
    unit = flat / norm
    side = other - (other * unit).sum(1, keepdims=True) * unit
    side /= np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-12)
    out: Array = (norm * (cosine * unit + (1 - cosine**2) ** 0.5 * side)).reshape(pivot.shape)
    return out.astype(pivot.dtype)


class _Reused(threading.local):
    """What :func:`row_generator` returns, in one generator a thread: moving it costs a third."""

    def __init__(self) -> None:
        self._bits = np.random.Philox(key=[0, 0])
        self._generator = np.random.Generator(self._bits)
        self._state: Any = self._bits.state

    def at(self, seed: int, counter: int, stream: int) -> np.random.Generator:
        """The thread's generator at the beginning of a stream; the next call moves it."""
        inner, state = self._state["state"], self._state
        inner["key"][:] = seed % 2**64, stream
        inner["counter"][:] = 0, 0, 0, counter
        state.update(buffer_pos=4, has_uint32=0, uinteger=0)  # nothing is left over
        self._bits.state = state
        return self._generator


_REUSED = _Reused()
