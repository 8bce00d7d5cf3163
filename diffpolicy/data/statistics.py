"""Per-field statistics of a store, in one streaming pass."""

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from diffpolicy.data.blocks import row_blocks

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from diffpolicy.data.fields import FieldSpec
    from diffpolicy.data.store import EpisodeStore

__all__ = [
    "RunningStatistics",
    "checksum",
    "compute_statistics",
    "damaged_statistics",
    "usual_step",
]

PARTS = ("min", "max", "mean", "std", "q01", "q99")

# An image's pixels are not normalised one by one, and their statistics would dwarf the metadata.
MAX_VALUES_PER_ROW = 4096
# Quantiles come from at most this many values of a field, so that memory stays bounded.
MAX_SAMPLED_VALUES = 2**23


class RunningStatistics:
    """Minimum, maximum, mean, standard deviation and quantiles of rows that arrive in blocks.

    Mean and variance are merged block by block (Chan, Golub & LeVeque 1979, eq. 2.1) in float64.
    The 1 % and 99 % quantiles are exact as long as a field has at most `MAX_SAMPLED_VALUES`
    values, and beyond that those of every k-th row.

    Args:
        name: The field, for error messages.
        shape: The shape of one row.
        total_rows: How many rows will come.
    """

    def __init__(self, name: str, shape: tuple[int, ...], total_rows: int) -> None:
        self._name = name
        self._count = 0
        self._min = np.full(shape, np.inf)
        self._max = np.full(shape, -np.inf)
        self._mean = np.zeros(shape)
        self._square = np.zeros(shape)
        rows_kept = max(1, MAX_SAMPLED_VALUES // max(1, int(np.prod(shape))))
        self._stride = -(-total_rows // rows_kept) or 1
        self._sample: list[NDArray[Any]] = []

    def update(self, rows: NDArray[Any]) -> None:
        """Take the next rows.

        Args:
            rows: `[n, *shape]`.

        Raises:
            ValueError: A value is not finite.
        """
        if len(rows) == 0:
            return
        block = rows.astype(np.float64)
        finite = np.isfinite(block).reshape(len(block), -1).all(axis=1)
        if not finite.all():
            row = self._count + int(np.argmin(finite))
            raise ValueError(
                f"field {self._name!r} is not finite at row {row}, so it has no statistics; "
                "`diffpolicy data check` lists every such row"
            )
        n, mean = len(block), block.mean(axis=0)
        total = self._count + n
        delta = mean - self._mean
        self._square += ((block - mean) ** 2).sum(axis=0) + delta**2 * (self._count * n / total)
        self._mean += delta * (n / total)
        self._min = np.minimum(self._min, block.min(axis=0))
        self._max = np.maximum(self._max, block.max(axis=0))
        self._sample.append(rows[-self._count % self._stride :: self._stride].copy())
        self._count = total

    def result(self) -> dict[str, Any]:
        """The statistics as JSON values: lists of the row's shape, and `count`.

        Raises:
            ValueError: No row came.
        """
        if self._count == 0:
            raise ValueError(f"field {self._name!r} has no rows, so it has no statistics")
        low, high = np.quantile(
            np.concatenate(self._sample).astype(np.float64), [0.01, 0.99], axis=0
        )
        return {
            "min": self._min.tolist(),
            "max": self._max.tolist(),
            "mean": self._mean.tolist(),
            "std": np.sqrt(self._square / self._count).tolist(),
            "q01": low.tolist(),
            "q99": high.tolist(),
            "count": self._count,
        }


def compute_statistics(
    store: EpisodeStore, fields: Iterable[str] | None = None
) -> dict[str, dict[str, Any]]:
    """Statistics of each field over all published rows.

    Args:
        store: Any open store, also a Diffusion Policy replay buffer.
        fields: Which fields; default all whose rows have at most `MAX_VALUES_PER_ROW` numbers
            (images have none).

    Returns:
        For each field `min`, `max`, `mean`, `std`, `q01`, `q99` (nested lists of the row's shape)
        and `count`.

    Raises:
        ValueError: A value is not finite, or the store is empty.
    """
    names = list(store.fields) if fields is None else list(fields)
    result = {}
    for name in names:
        spec = store.fields[name]
        if fields is None and int(np.prod(spec.shape)) > MAX_VALUES_PER_ROW:
            continue
        running = RunningStatistics(name, spec.shape, store.num_steps)
        for start, stop in row_blocks(store, name):
            running.update(store.read(name, start, stop))
        result[name] = running.result()
    return result


def usual_step(store: EpisodeStore, field: str = "obs") -> NDArray[np.float32]:
    """The usual largest change of each entry of a field between two steps of an episode.

    The 0.999 quantile over the steps, and at least a thousandth of the entry's range. Of a field
    with more than `MAX_SAMPLED_VALUES` values it is that of evenly spaced blocks of rows, so that
    neither memory nor time grows with the store.

    Args:
        store: The store.
        field: A field whose rows are vectors.

    Returns:
        float32 `[D]`; the largest float32 where an entry never changes.
    """
    width = int(np.prod(store.fields[field].shape))
    stride = -(-store.num_steps * width // MAX_SAMPLED_VALUES) or 1
    ends, steps = store.episode_ends, [np.zeros((0, width), np.float32)]
    low, high = np.full((2, width), [[np.inf], [-np.inf]], np.float32)
    last = np.zeros((0, width), np.float32)
    for start, stop in list(row_blocks(store, field))[::stride]:
        rows = store.read(field, start, stop).astype(np.float32, copy=False)
        low, high = np.minimum(low, rows.min(axis=0)), np.maximum(high, rows.max(axis=0))
        rows = np.concatenate([last, rows])
        inside = ~np.isin(np.arange(stop - len(rows) + 1, stop), ends)
        steps.append(np.abs(np.diff(rows, axis=0))[inside])
        last = rows[-1:] if stride == 1 else last
    found = np.concatenate(steps)
    largest = np.finfo(np.float32).max  # JSON knows no infinity
    if len(found) == 0:  # all episodes have one step
        return np.full(width, largest, np.float32)
    usual = np.maximum(np.quantile(found, 0.999, axis=0), 1e-3 * (high - low))
    return np.asarray(np.where(usual > 0, usual, largest), np.float32)


def checksum(statistics: Mapping[str, Any]) -> str:
    """A digest of statistics, by which a changed digit is noticed."""
    return f"{zlib.crc32(json.dumps(statistics, sort_keys=True).encode()):08x}"


def damaged_statistics(
    stored: Any, fields: Mapping[str, FieldSpec], digest: Any = None
) -> str | None:
    """What is wrong with statistics as they are stored, if anything is.

    Args:
        stored: What stands in the attributes.
        fields: The store's fields.
        digest: Their checksum, where the store has one.
    """
    if not isinstance(stored, dict) or not all(isinstance(v, dict) for v in stored.values()):
        return "the statistics are damaged: they must be an object of one object a field"
    for name, values in stored.items():
        shape = fields[name].shape if name in fields else None
        if problem := _problem(values, shape):
            return f"the statistics of {name!r} are damaged: {problem}"
    if digest is not None and digest != checksum(stored):
        return "the statistics were altered: they do not match their checksum"
    return None


def _problem(values: Mapping[str, Any], shape: tuple[int, ...] | None) -> str | None:
    if shape is None:
        return "the store has no such field"
    if not isinstance(values.get("count"), int):
        return f"'count' must be a whole number; got {values.get('count')!r:.40}"
    try:
        low, high, mean, std, q01, q99 = (np.asarray(values[k], np.float64) for k in PARTS)
    except (KeyError, TypeError, ValueError) as error:
        return f"expected numbers {list(PARTS)} ({error})"
    parts = (low, high, mean, std, q01, q99)
    if any(part.shape != shape or not np.isfinite(part).all() for part in parts):
        return f"expected finite numbers of shape {list(shape)}"
    slack = 1e-6 * np.maximum(np.abs(low), np.abs(high)) + 1e-12
    ordered = (low <= q01 + slack) & (q01 <= q99 + slack) & (q99 <= high + slack)
    ordered &= (low <= mean + slack) & (mean <= high + slack) & (std >= 0)
    return None if ordered.all() else "min <= q01 <= q99 <= max does not hold, or mean lies outside"
