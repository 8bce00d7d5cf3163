"""Reading a store by blocks of whole chunks, so that each chunk is decompressed once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from diffpolicy.data.store import EpisodeStore

BLOCK_BYTES = 2**22


def block_rows(store: EpisodeStore, field: str) -> int:
    """Rows of a block: whole chunks, a few megabytes together."""
    spec = store.fields[field]
    row_bytes = max(1, int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize)
    chunk = store.chunk_rows(field)
    return chunk * max(1, BLOCK_BYTES // (row_bytes * chunk))


def row_blocks(store: EpisodeStore, field: str) -> Iterator[tuple[int, int]]:
    """Ranges of rows that are whole chunks, a few megabytes each.

    Args:
        store: The store.
        field: One of its fields.

    Yields:
        `(start, stop)` row ranges, in order.
    """
    step = block_rows(store, field)
    for start in range(0, store.num_steps, step):
        yield start, min(start + step, store.num_steps)


def read_blocks(
    store: EpisodeStore, field: str, rows: NDArray[np.int64]
) -> Iterator[tuple[int, int, NDArray[Any]]]:
    """Some rows of a field, each chunk that holds any of them read once and no other.

    Args:
        store: The store.
        field: One of its fields.
        rows: `[n]`, counted over all episodes, in ascending order; a row may come again.

    Yields:
        `(start, stop, values)` in order: `values` are those of `rows[start:stop]`.
    """
    chunk, most = store.chunk_rows(field), block_rows(store, field)
    place = 0
    while place < len(rows):
        # Up to the first chunk that is not needed, and a block at most.
        first = int(rows[place]) // chunk
        limit = int(np.searchsorted(rows, first * chunk + most))
        needed = rows[place:limit] // chunk
        gaps = np.flatnonzero(np.diff(needed) > 1)
        stop = place + int(gaps[0]) + 1 if len(gaps) else limit
        low, high = int(rows[place]), int(rows[stop - 1]) + 1
        yield place, stop, store.read(field, low, high)[rows[place:stop] - low]
        place = stop


def read_rows(store: EpisodeStore, field: str, rows: NDArray[np.int64]) -> NDArray[Any]:
    """Any rows of a field, in any order.

    Args:
        store: The store.
        field: One of its fields.
        rows: `[...]`, counted over all episodes.

    Returns:
        `[..., *shape]`, in the store's type.

    Raises:
        StoreDamagedError: A chunk is damaged or missing.
    """
    wanted, place = np.unique(np.asarray(rows, np.int64), return_inverse=True)
    spec = store.fields[field]
    values = np.empty((len(wanted), *spec.shape), spec.dtype)
    for start, stop, block in read_blocks(store, field, wanted):
        values[start:stop] = block
    return values[place.reshape(np.shape(rows))]
