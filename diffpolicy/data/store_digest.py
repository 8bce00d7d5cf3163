"""A digest of what a store holds, episode by episode, so that a file can say what it was made for.

The digest of the first n episodes is SHA-256 over that of the first n - 1 and the values of the
n-th, so a store that grows keeps the digests of its beginning, and only what is new is read. It
covers the fields of which segments are made, where the store has them; not images.
"""

from __future__ import annotations

import hashlib
import weakref
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from diffpolicy.data.store import EpisodeStore

COVERED = ("obs", "action", "reward", "terminated", "truncated")
_BLOCK_BYTES = 2**25
_known: weakref.WeakKeyDictionary[EpisodeStore, list[bytes]] = weakref.WeakKeyDictionary()


def content_digest(store: EpisodeStore, episodes: int | None = None) -> str:
    """The digest of a store's first episodes, or of all.

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
    names = [name for name in COVERED if name in store.fields]
    ends = np.concatenate([[0], store.episode_ends])
    specs = [store.fields[name] for name in names]
    row = max(1, sum(int(np.prod(s.shape)) * np.dtype(s.dtype).itemsize for s in specs))
    while len(chain) <= count:
        first = len(chain) - 1
        stop = int(np.searchsorted(ends, ends[first] + _BLOCK_BYTES // row, "right")) - 1
        stop = min(max(stop, first + 1), count)
        start = int(ends[first])
        columns = [np.ascontiguousarray(store.read(n, start, int(ends[stop]))) for n in names]
        for index in range(first, stop):
            state = hashlib.sha256(chain[-1])
            for name, column in zip(names, columns, strict=True):
                part = column[int(ends[index]) - start : int(ends[index + 1]) - start]
                state.update(f"{name}{part.dtype.str}{part.shape}".encode())
                state.update(part.data if part.size else b"")
            chain.append(state.digest())
    return chain[count].hex()
