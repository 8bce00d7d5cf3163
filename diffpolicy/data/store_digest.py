"""One SHA-256 of all that a store holds, by which anybody can tell that two are the same set."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np

from diffpolicy.data.blocks import row_blocks

if TYPE_CHECKING:
    from diffpolicy.data.reader import EpisodeReader


def store_digest(store: EpisodeReader) -> str:
    """Digest the fields, every value, the ends of the episodes and their attributes.

    What is the store's alone is left out: how it is compressed and cut into chunks, its statistics
    and its own attributes, such as the versions that it was made with.

    Args:
        store: The store; it is read once.

    Returns:
        SHA-256 in hexadecimal.

    Raises:
        StoreDamagedError: Something in it cannot be read.

    Example:
        >>> store_digest(EpisodeStore.open("data/fetch/push.zarr"))
    """
    state = hashlib.sha256(b"diffpolicy-store")
    for name, spec in sorted(store.fields.items()):
        state.update(json.dumps([name, list(spec.shape), spec.dtype]).encode())
        little = np.dtype(spec.dtype).newbyteorder("<")
        for start, stop in row_blocks(store, name):
            values = store.read(name, start, stop)
            state.update(np.ascontiguousarray(values, little).tobytes())
    state.update(store.episode_ends.astype("<i8").tobytes())
    for attrs in store.episode_attrs:
        state.update(json.dumps(attrs, sort_keys=True).encode())
    return state.hexdigest()
