"""Reading a store piece by piece, so that each chunk is decompressed once; and digests of it."""

from __future__ import annotations

import hashlib
import itertools
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffpolicy.data.observation import obs_fields

if TYPE_CHECKING:
    from diffpolicy.data.reader import EpisodeReader
    from diffpolicy.data.store import EpisodeStore

BLOCK_BYTES = 2**22
_DIGEST_BYTES = 2**25
Ints = NDArray[np.int64]
_known: weakref.WeakKeyDictionary[EpisodeStore, list[bytes]] = weakref.WeakKeyDictionary()


def ranges(counts: Ints) -> Ints:
    """Return 0..n-1 for each n of ``counts``, one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def episode_rows(store: EpisodeReader, episodes: Ints) -> Ints:
    """Return the store's rows of some episodes, one episode after the other."""
    lengths = store.episode_lengths[episodes]
    return np.repeat(store.episode_ends[episodes] - lengths, lengths) + ranges(lengths)


def spans(ends: Ints) -> list[tuple[int, int]]:
    """Return the first row of each episode, and one past its last, of cumulative ends."""
    return list(itertools.pairwise([0, *ends.tolist()]))


def by_episode(rows: Ints, ends: Ints) -> Iterator[tuple[int, Ints]]:
    """Yield the episodes, of cumulative ends, that have some of these rows; each with its rows."""
    place = np.searchsorted(ends, rows, side="right")
    for index in np.unique(place).tolist():
        yield index, rows[place == index]


def block_rows(chunk: int, row_bytes: int) -> int:
    """Return the rows of a block: whole chunks, a few megabytes together."""
    return chunk * max(1, BLOCK_BYTES // (row_bytes * chunk))


def row_blocks(store: EpisodeReader, field: str) -> Iterator[tuple[int, int]]:
    """Yield ranges ``(start, stop)`` of a field's rows that are whole blocks, in order."""
    step = block_rows(store.chunk_rows(field), store.fields[field].row_bytes)
    for start in range(0, store.num_steps, step):
        yield start, min(start + step, store.num_steps)


def read_blocks(
    store: EpisodeReader, field: str, rows: Ints
) -> Iterator[tuple[int, int, NDArray[Any]]]:
    """Read some rows of a field, each chunk that holds any of them once and no other.

    Args:
        store: The store.
        field: One of its fields.
        rows: ``[n]``, counted over all episodes, in ascending order; a row may come again.

    Yields:
        ``(start, stop, values)`` in order: ``values`` are those of ``rows[start:stop]``.
    """
    chunk = store.chunk_rows(field)
    most = block_rows(chunk, store.fields[field].row_bytes)
    place = 0
    while place < len(rows):
        # Up to the first chunk that is not needed, and a block at most.
        first = int(rows[place]) // chunk
        limit = int(np.searchsorted(rows, first * chunk + most))
        gaps = np.flatnonzero(np.diff(rows[place:limit] // chunk) > 1)
        stop = place + int(gaps[0]) + 1 if len(gaps) else limit
        low, high = int(rows[place]), int(rows[stop - 1]) + 1
        yield place, stop, store.read(field, low, high)[rows[place:stop] - low]
        place = stop


def read_rows(store: EpisodeReader, field: str, rows: Ints) -> NDArray[Any]:
    """Read any rows of a field, in any order.

    Args:
        store: The store.
        field: One of its fields.
        rows: ``[...]``, counted over all episodes.

    Returns:
        ``[..., *shape]``, in the store's type.

    Raises:
        StoreDamagedError: A chunk is damaged or missing.
    """
    wanted, place = np.unique(np.asarray(rows, np.int64), return_inverse=True)
    spec = store.fields[field]
    values = np.empty((len(wanted), *spec.shape), spec.dtype)
    for start, stop, block in read_blocks(store, field, wanted):
        values[start:stop] = block
    return values[place.reshape(np.shape(rows))]


def content_digest(store: EpisodeStore, episodes: int | None = None) -> str:
    """Return a digest of a store's first episodes, so that a file can say what it was made for.

    The digest of n episodes is SHA-256 over that of the first n - 1 and the values of the n-th, so
    a store that grows keeps the digests of its beginning, and only what is new is read. It covers
    the fields of which segments are made, where the store has them; not images.

    Args:
        store: The store; it is read once, and later calls continue where the last one stopped.
        episodes: How many; default all.

    Returns:
        SHA-256 in hexadecimal.

    Raises:
        StoreDamagedError: Something in it cannot be read.
    """
    count = store.num_episodes if episodes is None else episodes
    chain = _known.setdefault(store, [hashlib.sha256(b"diffpolicy-episodes").digest()])
    covered = (*obs_fields(store), "action", "reward", "terminated", "truncated")
    specs = {n: store.fields[n] for n in covered if n in store.fields}
    names = [name for name, spec in specs.items() if not spec.is_image]
    ends = np.concatenate([[0], store.episode_ends])
    row_bytes = max(1, sum(specs[name].row_bytes for name in names))
    while len(chain) <= count:
        first = len(chain) - 1
        stop = int(np.searchsorted(ends, ends[first] + _DIGEST_BYTES // row_bytes, "right")) - 1
        stop = min(max(stop, first + 1), count)
        start = int(ends[first])
        columns = {n: np.ascontiguousarray(store.read(n, start, int(ends[stop]))) for n in names}
        for index in range(first, stop):
            state = hashlib.sha256(chain[-1])
            for name, column in columns.items():
                part = column[int(ends[index]) - start : int(ends[index + 1]) - start]
                state.update(f"{name}{part.dtype.str}{part.shape}".encode())
                state.update(part.data if part.size else b"")
            chain.append(state.digest())
    return chain[count].hex()
