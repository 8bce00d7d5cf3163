"""Memory that a worker process and the pool both see: where the worker is, and what it observes.

A file in memory is handed to the process when it starts. Its first page says which row is worked
on; the images follow when the environment has said how large they are. An image is written there
by the worker and read there by whoever acts, so that it is copied once on its way to the policy's
batch, and no message carries it.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import tempfile
import time
from collections.abc import Mapping, Sequence

import numpy as np

from diffpolicy.data.observation import ObsFields, by_store_field

Room = Mapping[str, np.ndarray]
"""Where images are put, by the names that they have in stores."""


def memory_file() -> int:
    """A file that only this process and its children have: a descriptor, to be closed."""
    if hasattr(os, "memfd_create"):  # Linux: on no disk, and not bounded by the size of /dev/shm
        file = os.memfd_create("diffpolicy")
    else:
        with tempfile.TemporaryFile(buffering=0) as named:
            file = os.dup(named.fileno())
    _fill(file, Progress.SIZE)
    return file


def _fill(file: int, size: int) -> None:
    """Write zeros: a hole could end the process later, when there is no space to fill it."""
    os.lseek(file, 0, os.SEEK_END)
    while (left := size - os.fstat(file).st_size) > 0:
        os.write(file, bytes(min(left, 2**20)))


class Progress:
    """Which of its rows a process is at and since when.

    A process answers for all rows of a command at once, so this alone tells which of them hangs,
    or was the last before it died. It costs no message.

    Args:
        file: from :func:`memory_file`.
    """

    SIZE = mmap.PAGESIZE
    _LAYOUT = struct.Struct("=qd")

    def __init__(self, file: int) -> None:
        self._memory = mmap.mmap(file, self.SIZE)

    def at(self, place: int) -> None:
        """Note that the row at ``place`` of the command is worked on from now on."""
        self._LAYOUT.pack_into(self._memory, 0, place, time.monotonic())

    def read(self) -> tuple[int, float]:
        """The place, and since when (``time.monotonic()``, which processes share)."""
        place, since = self._LAYOUT.unpack_from(self._memory)
        return int(place), float(since)


def image_rooms(
    file: int, fields: ObsFields, rows: Sequence[int]
) -> dict[int, tuple[Room, Room] | None]:
    """Two rooms per row for the images that it observes, used in turn.

    Thus what a command brought stays as it is until the row's next command but one.

    Args:
        file: from :func:`memory_file`; made longer by whoever comes first.
        fields: what the environment observes.
        rows: in the order that both sides know.

    Returns:
        By row; ``None`` where nothing observed is an image.

    Raises:
        OSError: there is not so much memory.
    """
    images = {k: field.shape for k, field in by_store_field(fields).items() if field.is_image}
    if not images:
        return dict.fromkeys(rows)
    size = 2 * len(rows) * sum(math.prod(shape) for shape in images.values())
    _fill(file, Progress.SIZE + size)
    memory, start = mmap.mmap(file, size, offset=Progress.SIZE), 0
    whole: dict[str, np.ndarray] = {}
    for name, shape in images.items():
        whole[name] = np.ndarray((2, len(rows), *shape), np.uint8, memory, start)
        start += whole[name].nbytes
    first, second = (
        [{k: array[turn, i] for k, array in whole.items()} for i in range(len(rows))]
        for turn in (0, 1)
    )
    return {row: (first[i], second[i]) for i, row in enumerate(rows)}
