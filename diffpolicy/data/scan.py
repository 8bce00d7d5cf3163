"""One pass over a field's rows, damaged or not, for the checker."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffpolicy.data.blocks import block_rows
from diffpolicy.data.fields import FieldSpec
from diffpolicy.data.frames import Frames
from diffpolicy.data.opening import MissingChunkError, ZarrArray, reason
from diffpolicy.data.statistics import RunningStatistics, has_statistics

Bounds = tuple[NDArray[Any], NDArray[Any]]


class Damage(NamedTuple):
    """Rows ``start..stop-1`` that cannot be read, why, and the chunk that is ``missing``."""

    start: int
    stop: int
    reason: str
    missing: str | None = None


@dataclass
class FieldScan:
    """What one pass over a field found.

    Attributes:
        changed: ``[E]`` whether the field changes within the episode.
        whole: ``[E]`` whether all of the episode could be read.
        damage: Ranges of rows that cannot be read.
        not_finite: ``[K]`` rows with a value that is not finite.
        outside: ``[M]`` rows with a value outside the bounds.
        digests: Per episode, a hash of its rows.
        statistics: Of all rows that can be read and are finite, as a store keeps them; None if
            there are none, or the rows are images.
        frames: Notes on the images; None if the rows are none.
    """

    changed: NDArray[np.bool_]
    whole: NDArray[np.bool_]
    damage: list[Damage] = field(default_factory=list)
    not_finite: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    outside: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    digests: list[bytes] = field(default_factory=list)
    statistics: dict[str, Any] | None = None
    frames: Frames | None = None

    @property
    def sound(self) -> bool:
        """Whether all of it could be read and is finite."""
        return not self.damage and not len(self.not_finite)


def scan_field(
    array: ZarrArray, ends: NDArray[np.int64], bounds: Bounds | None = None
) -> FieldScan:
    """Read a numeric field from front to back.

    Args:
        array: ``[T, *shape]``.
        ends: ``[E]`` cumulative ends, strictly increasing.
        bounds: Lower and upper limits that broadcast to a row, if its values have any.

    Returns:
        What was found.
    """
    rows = min(int(array.shape[0]), int(ends.max(initial=0)))
    result = FieldScan(np.zeros(len(ends), np.bool_), np.ones(len(ends), np.bool_))
    result.whole[ends > array.shape[0]] = False
    hashes = [hashlib.blake2b(digest_size=16) for _ in ends]
    first_rows: dict[int, NDArray[Any]] = {}
    spec = FieldSpec.of(array)
    running = RunningStatistics(array.name, spec.shape, rows)
    result.frames = Frames(spec, ends) if Frames.fit(spec) else None
    for start, block in _blocks(array, rows, spec.row_bytes):
        stop = block.stop if isinstance(block, Damage) else start + len(block)
        first, final = np.searchsorted(ends, [start, stop - 1], side="right").tolist()
        if isinstance(block, Damage):
            result.damage.append(block)
            result.whole[first : final + 1] = False
            continue
        good = _look_at_values(result, start, block, bounds)
        if has_statistics(spec):
            running.update(good)
        if result.frames is not None:
            result.frames.note(start, block)
        flat = np.ascontiguousarray(block).reshape(len(block), -1)
        cuts = np.clip(ends[first:final] - start, 0, None)
        for index, part in enumerate(np.split(flat, cuts), first):
            hashes[index].update(part.tobytes())
            begun = first_rows.setdefault(index, part[0].copy())  # a view would keep the block
            result.changed[index] |= bool((part != begun).any())
    result.digests = [h.digest() for h in hashes]
    result.statistics = running.result() if running.count else None
    return result


def _blocks(
    array: ZarrArray, rows: int, row_bytes: int
) -> Iterator[tuple[int, NDArray[Any] | Damage]]:
    """Blocks of whole chunks; where one cannot be read, its chunks one by one."""
    chunk = int((array.shards or array.chunks)[0])
    step = block_rows(chunk, row_bytes)
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
    result: FieldScan, start: int, block: NDArray[Any], bounds: Bounds | None
) -> NDArray[Any]:
    """Note the rows with values that should not be; return those that are finite."""
    finite = np.ones(len(block), np.bool_)
    if block.dtype.kind == "f":
        finite = np.isfinite(block).reshape(len(block), -1).all(axis=1)
    result.not_finite = np.append(result.not_finite, start + np.flatnonzero(~finite))
    if bounds is not None:
        # Bounds and data may have been rounded to float32 on different ways.
        low, high = (b + sign * 1e-5 * np.abs(b) for b, sign in zip(bounds, (-1, 1), strict=True))
        outside = ((block < low) | (block > high)).reshape(len(block), -1).any(axis=1)
        result.outside = np.append(result.outside, start + np.flatnonzero(outside & finite))
    return block if finite.all() else block[finite]
