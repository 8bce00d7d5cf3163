"""One pass over a field's rows, damaged or not, for the checker."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from diffpolicy.data.damage import MissingChunkError, reason
from diffpolicy.data.statistics import MAX_VALUES_PER_ROW, RunningStatistics

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from diffpolicy.data.opening import ZarrArray

_BLOCK_BYTES = 2**22


@dataclass(frozen=True)
class Damage:
    """Rows `start..stop-1` that cannot be read, why, and the chunk that is `missing`, if one is."""

    start: int
    stop: int
    reason: str
    missing: str | None = None


@dataclass
class FieldScan:
    """What one pass over a field found.

    Attributes:
        damage: Ranges of rows that cannot be read.
        not_finite: `[K]` rows with a value that is not finite.
        outside: `[M]` rows with a value outside the bounds.
        changed: `[E]` whether the field changes within the episode.
        whole: `[E]` whether all of the episode could be read.
        digests: Per episode, a hash of its rows.
        statistics: Of all rows that can be read and are finite, as a store keeps them; None if
            there are none, or the rows are images.
    """

    changed: NDArray[np.bool_]
    whole: NDArray[np.bool_]
    digests: list[bytes] = field(default_factory=list)
    damage: list[Damage] = field(default_factory=list)
    not_finite: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    outside: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    statistics: dict[str, Any] | None = None

    @property
    def sound(self) -> bool:
        """Whether all of it could be read and is finite."""
        return not self.damage and not len(self.not_finite)


def scan_field(
    array: ZarrArray,
    ends: NDArray[np.int64],
    bounds: tuple[NDArray[Any], NDArray[Any]] | None = None,
) -> FieldScan:
    """Read a numeric field from front to back.

    Args:
        array: `[T, *shape]`.
        ends: `[E]` cumulative ends, strictly increasing.
        bounds: Lower and upper limits that broadcast to a row, if its values have any.

    Returns:
        What was found.
    """
    rows = min(int(array.shape[0]), int(ends[-1]) if len(ends) else 0)
    result = FieldScan(np.zeros(len(ends), np.bool_), np.ones(len(ends), np.bool_))
    hashes = [hashlib.blake2b(digest_size=16) for _ in ends]
    last: tuple[int, NDArray[Any]] | None = None
    width = int(np.prod(array.shape[1:]))
    running = RunningStatistics(array.name, tuple(array.shape[1:]), rows)
    for start, block in _blocks(array, rows):
        if isinstance(block, Damage):
            result.damage.append(block)
            first, final = np.searchsorted(ends, [block.start, block.stop - 1], side="right")
            result.whole[first : final + 1] = False
            continue
        flat = block.reshape(len(block), -1)
        good = _look_at_values(result, start, block, bounds)
        if width <= MAX_VALUES_PER_ROW and len(good):
            running.update(good)
            result.statistics = {}
        _hash_episodes(hashes, ends, start, flat)
        before = last[1] if last is not None and last[0] == start - 1 else flat[0]
        _look_for_change(result.changed, ends, start, np.concatenate([before[None], flat]))
        last = (start + len(flat) - 1, flat[-1])
    result.whole[ends > array.shape[0]] = False
    result.digests = [h.digest() for h in hashes]
    if result.statistics is not None:
        result.statistics = running.result()
    return result


def _blocks(array: ZarrArray, rows: int) -> Iterator[tuple[int, NDArray[Any] | Damage]]:
    """Blocks of whole chunks; where one cannot be read, its chunks one by one."""
    chunk = int((array.shards or array.chunks)[0])
    row_bytes = max(1, int(np.prod(array.shape[1:])) * array.dtype.itemsize)
    step = chunk * max(1, _BLOCK_BYTES // (row_bytes * chunk))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        block = _read(array, start, stop)
        if isinstance(block, Damage) and step > chunk:
            for first in range(start, stop, chunk):
                yield first, _read(array, first, min(first + chunk, stop))
        else:
            yield start, block


def _read(array: ZarrArray, start: int, stop: int) -> NDArray[Any] | Damage:
    try:
        return np.asarray(array[start:stop])
    except MissingChunkError as error:
        return Damage(start, stop, str(error), error.key)
    except Exception as error:  # codecs, zip files and the system each raise their own
        return Damage(start, stop, reason(error))


def _look_at_values(
    result: FieldScan,
    start: int,
    block: NDArray[Any],
    bounds: tuple[NDArray[Any], NDArray[Any]] | None,
) -> NDArray[Any]:
    """Note what is not finite or outside the bounds; the finite rows."""
    finite = np.ones(len(block), np.bool_)
    if block.dtype.kind == "f":
        finite = np.isfinite(block).reshape(len(block), -1).all(axis=1)
        bad = start + np.flatnonzero(~finite)
        result.not_finite = np.concatenate([result.not_finite, bad])
    if bounds is not None:
        # Bounds and data may have been rounded to float32 on different ways.
        low, high = (b + sign * 1e-5 * np.abs(b) for b, sign in zip(bounds, (-1, 1), strict=True))
        outside = (block < low) | (block > high)
        rows = start + np.flatnonzero(outside.reshape(len(block), -1).any(axis=1) & finite)
        result.outside = np.concatenate([result.outside, rows])
    return block if finite.all() else block[finite]


def _hash_episodes(
    hashes: list[Any], ends: NDArray[np.int64], start: int, flat: NDArray[Any]
) -> None:
    stop = start + len(flat)
    first, final = np.searchsorted(ends, [start, stop - 1], side="right")
    for index in range(int(first), min(int(final) + 1, len(ends))):
        begin = max(start, int(ends[index - 1]) if index else 0)
        part = flat[begin - start : min(stop, int(ends[index])) - start]
        hashes[index].update(np.ascontiguousarray(part).tobytes())


def _look_for_change(
    changed: NDArray[np.bool_], ends: NDArray[np.int64], start: int, rows: NDArray[Any]
) -> None:
    """Mark episodes that change; `rows` begin with the row before `start`."""
    differs = (rows[1:] != rows[:-1]).any(axis=1)
    episode = np.searchsorted(ends, np.arange(start, start + len(differs)), side="right")
    differs &= ~np.isin(np.arange(start, start + len(differs)), np.append(ends, 0))
    changed[episode[differs]] = True
