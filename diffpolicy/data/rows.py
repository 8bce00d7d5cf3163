"""Rows of a store's episodes, loaded into tables that windows and transitions index.

A table holds every row once: vectors as float32, normalised; images in their own type. It lies in
memory, or in a temporary file that the system maps into memory as needed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffpolicy.data.blocks import Ints, read_blocks
from diffpolicy.data.fields import FieldSpec
from diffpolicy.data.normalize import Normalizer
from diffpolicy.data.observation import is_obs
from diffpolicy.data.store import EpisodeStore


def is_raw(name: str, spec: FieldSpec, normalizer: Normalizer | None) -> bool:
    """Return whether a field's rows stay as they are: images, and what ``obs.NAME`` counts."""
    if normalizer is not None and name in normalizer.fields:
        return False
    whole_numbers = name != "obs" and is_obs(name) and not spec.dtype.startswith("float")
    return len(spec.shape) >= 2 or whole_numbers


def checked_episodes(
    store: EpisodeStore, episodes: Sequence[int] | NDArray[np.integer] | None
) -> Ints:
    """Return the indices of the episodes to use, ascending; all of the store's unless given.

    Raises:
        ValueError: An index out of range, or one that comes twice.
    """
    if episodes is None:
        return np.arange(store.num_episodes)
    chosen = np.unique(np.asarray(episodes, dtype=np.int64))
    if len(chosen) != len(episodes) or not np.isin(chosen, np.arange(store.num_episodes)).all():
        raise ValueError(
            f"episodes must be different, each in 0..{store.num_episodes - 1}; got {episodes}"
        )
    return chosen


def load_rows(
    store: EpisodeStore,
    parts: dict[str, Ints],
    normalizer: Normalizer | None,
    *,
    in_memory: bool = True,
) -> Tensor:
    """Read rows of a field, and of others that are laid out like it, into one table.

    Args:
        store: The episodes.
        parts: Per field the rows to read of it, ascending. The first one's name says how all of
            them are normalised.
        normalizer: Applied if it knows that name.
        in_memory: Otherwise the table lies in a temporary file.

    Returns:
        float32 ``[n, D]``, or of images ``[n, *shape]`` in their own type.

    Raises:
        ValueError: A value is not finite; the message says where.
    """
    field = next(iter(parts))
    spec = store.fields[field]
    raw = is_raw(field, spec, normalizer)
    shape = (sum(map(len, parts.values())), *(spec.shape if raw else (spec.size,)))
    dtype = np.dtype(spec.dtype if raw else np.float32)
    table = torch.from_numpy(np.empty(shape, dtype) if in_memory else _on_disk(shape, dtype))
    place = 0
    for name, rows in parts.items():
        for start, stop, values in read_blocks(store, name, rows):
            block = torch.from_numpy(values.astype(dtype, copy=False))
            if normalizer is not None and field in normalizer.fields:
                block = normalizer.normalize(field, block)
            check_finite(store, name, rows[start:stop], block)
            table[place : place + stop - start] = block.reshape(-1, *shape[1:])
            place += stop - start
    return table


def check_finite(store: EpisodeStore, field: str, rows: Ints, values: Tensor) -> None:
    """Raise ``ValueError`` unless the values of some rows of a field are finite; names the row."""
    if not values.is_floating_point():
        return
    finite = torch.isfinite(values.reshape(len(values), -1)).all(1)
    if not bool(finite.all()):
        row = int(rows[int(finite.int().argmin())])
        episode = int(np.searchsorted(store.episode_ends, row, side="right"))
        raise ValueError(
            f"{store.name}: field {field!r} is not finite at row {row} (episode {episode}); "
            f"`diffpolicy data check {store.name}` lists every such row"
        )


def _on_disk(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Map a temporary file, which has no name any more and goes when the array does.

    Its place on the disk is taken at once: where a file has holes and the disk fills, the system
    kills the process (SIGBUS) at whatever row it is.

    Raises:
        OSError: The disk is full, with the file's name.
    """
    size = int(np.prod(shape)) * dtype.itemsize
    with tempfile.NamedTemporaryFile(prefix="diffpolicy-windows-") as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            return np.memmap(file, dtype, "r+", shape=shape)
        except OSError as error:
            text = (
                f"{os.strerror(error.errno or 0)}: windows streamed from the disk need "
                f"{size / 2**20:.0f} MiB there. Set TMPDIR to a folder of a disk with more room, "
                "or train on fewer episodes"
            )
            raise OSError(error.errno, text, file.name) from error


def free_memory() -> int:
    """Return the bytes of memory that are free, as far as the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 2**33
