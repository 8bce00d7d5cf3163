"""Per-field statistics of a store, in one streaming pass."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffpolicy.data.blocks import row_blocks
from diffpolicy.data.fields import FieldSpec

if TYPE_CHECKING:
    from diffpolicy.data.store import EpisodeStore

PARTS = ("min", "max", "mean", "std", "q01", "q99")

# An image's pixels are not normalised one by one, and their statistics would dwarf the metadata.
MAX_VALUES_PER_ROW = 4096
# Quantiles come from at most this many values of a field, so that memory stays bounded.
MAX_SAMPLED_VALUES = 2**23


class RunningStatistics:
    """Minimum, maximum, mean, standard deviation and quantiles of rows that arrive in blocks.

    Mean and variance are merged block by block (Chan, Golub & LeVeque 1979, eq. 2.1) in float64.
    The 1 % and 99 % quantiles are exact as long as a field has at most ``MAX_SAMPLED_VALUES``
    values, and beyond that those of every k-th row.

    Args:
        name: The field, for error messages.
        shape: The shape of one row.
        total_rows: How many rows will come.
    """

    def __init__(self, name: str, shape: tuple[int, ...], total_rows: int) -> None:
        self._name = name
        self.count = 0
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
            rows: ``[n, *shape]``.

        Raises:
            ValueError: A value is not finite.
        """
        if len(rows) == 0:
            return
        block = rows.astype(np.float64)
        finite = np.isfinite(block).reshape(len(block), -1).all(axis=1)
        if not finite.all():
            row = self.count + int(np.argmin(finite))
            check = "`diffpolicy data check` lists every such row"
            raise ValueError(f"field {self._name!r} is not finite at row {row}; {check}")
        n, mean = len(block), block.mean(axis=0)
        total = self.count + n
        delta = mean - self._mean
        self._square += ((block - mean) ** 2).sum(axis=0) + delta**2 * (self.count * n / total)
        self._mean += delta * (n / total)
        self._min = np.minimum(self._min, block.min(axis=0))
        self._max = np.maximum(self._max, block.max(axis=0))
        self._sample.append(rows[-self.count % self._stride :: self._stride].copy())
        self.count = total

    def result(self) -> dict[str, Any]:
        """Return the statistics as JSON values: lists of the row's shape, and ``count``.

        Raises:
            ValueError: No row came.
        """
        if self.count == 0:
            raise ValueError(f"field {self._name!r} has no rows, so it has no statistics")
        low, high = np.quantile(
            np.concatenate(self._sample).astype(np.float64), [0.01, 0.99], axis=0
        )
        return {
            "min": self._min.tolist(),
            "max": self._max.tolist(),
            "mean": self._mean.tolist(),
            "std": np.sqrt(self._square / self.count).tolist(),
            "q01": low.tolist(),
            "q99": high.tolist(),
            "count": self.count,
        }


def has_statistics(spec: FieldSpec) -> bool:
    """Return whether a field's values are worth statistics: images' are not."""
    return spec.size <= MAX_VALUES_PER_ROW and not spec.is_image


def compute_statistics(
    store: EpisodeStore, fields: Iterable[str] | None = None
) -> dict[str, dict[str, Any]]:
    """Compute statistics of each field over all published rows.

    Args:
        store: Any open store, also a Diffusion Policy replay buffer.
        fields: Which fields; default all but images and rows of thousands of numbers.

    Returns:
        For each field ``min``, ``max``, ``mean``, ``std``, ``q01``, ``q99`` (nested lists of the
        row's shape) and ``count``.

    Raises:
        ValueError: A value is not finite, or the store is empty.
    """
    names = [n for n, s in store.fields.items() if has_statistics(s)] if fields is None else fields
    result = {}
    for name in names:
        running = RunningStatistics(name, store.fields[name].shape, store.num_steps)
        for start, stop in row_blocks(store, name):
            running.update(store.read(name, start, stop))
        result[name] = running.result()
    return result


def action_statistics(store: EpisodeStore) -> dict[str, Any]:
    """Return the statistics of ``action`` over the episodes that have actions.

    Raises:
        ValueError: No episode has, or the store has no statistics.
    """
    if store.has_actions.all():
        return store.statistics["action"]
    episodes = np.flatnonzero(store.has_actions)
    total = int(store.episode_lengths[episodes].sum())
    running = RunningStatistics("action", store.fields["action"].shape, total)
    for episode in episodes:
        running.update(store.episode(int(episode), ["action"])["action"])
    return running.result()


def usual_step(store: EpisodeStore, field: str = "obs") -> NDArray[np.float32]:
    """Return the usual largest change of each entry of a field between two steps of an episode.

    The 0.999 quantile over the steps, and at least a thousandth of the entry's range. Of a field
    with more than ``MAX_SAMPLED_VALUES`` values it is that of evenly spaced blocks of rows, so that
    neither memory nor time grows with the store.

    Args:
        store: The store.
        field: A field whose rows are vectors.

    Returns:
        float32 ``[D]``; the largest float32 where an entry never changes.
    """
    width = store.fields[field].size
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
    """Return a digest of statistics, by which a changed digit is noticed."""
    return f"{zlib.crc32(json.dumps(statistics, sort_keys=True).encode()):08x}"


def statistics_problem(
    attrs: Mapping[str, Any], fields: Mapping[str, FieldSpec], steps: int
) -> str | None:
    """Return what is wrong with a store's statistics, if anything is.

    Args:
        attrs: The attributes that they and their checksum stand in.
        fields: The store's fields.
        steps: The rows that the store has.
    """
    stored, digest = attrs.get("statistics"), attrs.get("statistics_crc32")
    if not stored:
        return "there are no statistics, which normalisers need"
    if not isinstance(stored, dict) or not all(isinstance(v, dict) for v in stored.values()):
        return "the statistics are damaged: they must be an object of one object a field"
    for name, values in stored.items():
        if problem := _damage(values, fields.get(name)):
            return f"the statistics of {name!r} are damaged: {problem}"
    if digest is not None and digest != checksum(stored):
        return "the statistics were altered: they do not match their checksum"
    for name, values in stored.items():
        if values["count"] != steps:
            return f"the statistics of {name!r} cover {values['count']} steps of {steps}"
    return None


def _damage(values: Mapping[str, Any], spec: FieldSpec | None) -> str | None:
    if spec is None:
        return "the store has no such field"
    if not isinstance(values.get("count"), int):
        return f"'count' must be a whole number; got {values.get('count')!r:.40}"
    try:
        parts = [np.asarray(values[k], np.float64) for k in PARTS]
    except (KeyError, TypeError, ValueError) as error:
        return f"expected numbers {list(PARTS)} ({error})"
    if any(part.shape != spec.shape or not np.isfinite(part).all() for part in parts):
        return f"expected finite numbers of shape {list(spec.shape)}"
    low, high, mean, std, q01, q99 = parts
    slack = 1e-6 * np.maximum(np.abs(low), np.abs(high)) + 1e-12
    ordered = (low <= q01 + slack) & (q01 <= q99 + slack) & (q99 <= high + slack)
    ordered &= (low <= mean + slack) & (mean <= high + slack) & (std >= 0)
    return None if ordered.all() else "min <= q01 <= q99 <= max does not hold, or mean lies outside"
