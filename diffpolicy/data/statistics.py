"""Per-field statistics of a store, in one streaming pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from diffpolicy.data.store import EpisodeStore

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


def row_blocks(store: EpisodeStore, field: str) -> Iterator[tuple[int, int]]:
    """Ranges of rows that are whole chunks, a few megabytes each.

    Args:
        store: The store.
        field: One of its fields.

    Yields:
        `(start, stop)` row ranges, in order.
    """
    spec = store.fields[field]
    row_bytes = max(1, int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize)
    chunk = store.chunk_rows(field)
    step = chunk * max(1, 2**22 // (row_bytes * chunk))
    for start in range(0, store.num_steps, step):
        yield start, min(start + step, store.num_steps)


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
