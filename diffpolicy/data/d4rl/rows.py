"""The rows of a D4RL file's episodes, field by field, in blocks of moderate size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from diffpolicy.data.d4rl.file import D4RLFile

_BLOCK_BYTES = 2**25
GOAL = "infos/goal"
"""The goal that was pursued in each row, in the maze files."""
SOURCES = {
    "obs": "observations",
    "action": "actions",
    "reward": "rewards",
    "next_obs": "next_observations",
}
"""The array that each field is made of."""


def blocks(file: D4RLFile, first: int, stop: int) -> Iterator[tuple[int, int]]:
    """Ranges of episodes that together are of moderate size."""
    row_bytes = 4 * sum(int(np.prod(s.shape)) for s in file.fields.values())
    limit = max(_BLOCK_BYTES // row_bytes, 1)
    ends, starts = file.episodes.ends, file.episodes.starts
    while first < stop:
        last = int(np.searchsorted(ends, starts[first] + limit, "right"))
        last = min(max(last, first + 1), stop)
        yield first, last
        first = last


def block_ends(file: D4RLFile, first: int, last: int) -> NDArray[np.int64]:
    """Ends of the episodes `first..last-1`, counted from their first row."""
    ends: NDArray[np.int64] = file.episodes.ends[first:last] - file.episodes.starts[first]
    return ends


def read_field(file: D4RLFile, name: str, start: int, stop: int) -> NDArray[Any]:
    """Rows `start..stop-1` of one field."""
    if name == "reward":
        return file.reward_map(file._base_rewards[start:stop]).astype(np.float32)
    if name in ("terminated", "truncated"):
        flags: NDArray[np.bool_] = getattr(file.episodes, name)
        rows = file.episodes.ends[flags] - 1
        found: NDArray[np.bool_] = np.zeros(stop - start, bool)
        found[rows[(rows >= start) & (rows < stop)] - start] = True
        return found
    values = file.raw.read(SOURCES.get(name, name), start, stop)
    if name not in ("obs", "action", "next_obs"):
        return values.astype(kept_type(values.dtype), copy=False)
    if file._splits and name != "action":
        values = np.concatenate([values, file.raw.read(GOAL, start, stop)], 1)
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is reported
        column = values.astype(np.float32)
    return column if column.ndim > 1 else column[:, None]


def kept_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type in which further fields are kept: float64 as float32."""
    return np.dtype(np.float32) if dtype == np.float64 else dtype
