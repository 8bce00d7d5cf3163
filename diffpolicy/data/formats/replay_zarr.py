"""Diffusion Policy replay buffers: ``data/<field>`` and ``meta/episode_ends`` in a zarr group.

Zarr format 2 or 3, a directory or a zip; our own stores have the same layout and are read too.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from diffpolicy.data.formats import EpisodeSource, Gap
from diffpolicy.data.opening import StrictStore, ZarrArray
from diffpolicy.data.store import EpisodeStore

_OWN = ("episode_ends", "episode_attrs")


class ReplayBuffer(EpisodeSource):
    """An open replay buffer.

    Args:
        path: The directory or zip.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: It is not a replay buffer, is damaged, or its ends are last indices.
    """

    def __init__(self, path: Path) -> None:
        self._store = store = EpisodeStore.open(path)
        self._path = path
        self._files: set[str] | None = None
        if path.is_file():
            with zipfile.ZipFile(path) as archive:
                self._files = set(archive.namelist())
        self.name, self.fields, self.attrs = store.name, store.fields, store.attrs
        self.episode_attrs, self.episode_lengths = store.episode_attrs, store.episode_lengths
        try:
            self.unread = self._left_over()
        except ValueError:
            store.close()
            raise

    @staticmethod
    def matches(path: Path) -> bool:
        """Tell whether ``path`` is a zarr directory or a zip."""
        if path.is_dir():
            return any((path / name).exists() for name in (".zgroup", ".zattrs", "zarr.json"))
        return path.suffix == ".zip"

    def default_fields(self) -> dict[str, str | list[str]]:
        """Name all fields of a store of ours; else images with ``obs`` or ``state``; ``action``."""
        if self._store.is_native:
            return {name: name for name in self.fields}
        states = [n for n in ("obs", "state") if n in self.fields]
        obs: dict[str, str | list[str]] = {"obs": self.with_cameras(states[:1])} if states else {}
        return obs | ({"action": "action"} if "action" in self.fields else {})

    def gaps(self, fields: Sequence[str]) -> list[Gap]:
        """List the chunks whose file is missing."""
        ends, steps = self._store.episode_ends, self._store.num_steps
        found = []
        for name in fields:
            for start, stop, place in _chunks(name, self._store._arrays[name], steps):
                if not self._exists(place):
                    first, last = np.searchsorted(ends, [start, stop - 1], side="right")
                    reason = f"{place} is missing, so rows {start}..{stop - 1} would be made up"
                    found.append(Gap(int(first), int(last), reason))
        return found

    def fill_gaps(self) -> None:
        """Read what is missing as zarr does by itself from now on: as fill values."""
        files = self._store._group.store
        assert isinstance(files, StrictStore)
        files.strict = False

    def episode(self, index: int, fields: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
        """Read ``[T, *shape]`` of each of the ``fields`` (default all) of one episode."""
        return self._store.episode(index, fields)

    def close(self) -> None:
        """Let go of the files."""
        self._store.close()

    def _exists(self, place: str) -> bool:
        return place in self._files if self._files is not None else (self._path / place).exists()

    def _left_over(self) -> dict[str, str]:
        """Arrays that do not hold numbers, groups, and rows behind the last episode."""
        found = {}
        for folder in ("data", "meta"):
            group = self._store._group.get(folder)
            for name, member in group.members() if isinstance(group, zarr.Group) else ():
                if not isinstance(member, zarr.Array):
                    found[f"{folder}/{name}"] = "a group, not an array"
                elif folder == "meta" and name not in _OWN:
                    found[f"meta/{name}"] = f"{member.dtype} {list(member.shape)}"
                elif folder == "data" and name not in self.fields:
                    found[f"data/{name}"] = f"{member.dtype}, not numbers"
        for name, rows in self._surplus().items():
            found[f"the last {rows} rows of {name}"] = "they belong to no episode"
        return found

    def _surplus(self) -> dict[str, int]:
        """How many rows follow the last episode, where there are any (a writer was killed)."""
        if self._store.is_native:
            return {}
        total = self._store.num_steps
        surplus = {k: int(a.shape[0]) - total for k, a in self._store._arrays.items()}
        if surplus and set(surplus.values()) == {1}:
            raise ValueError(
                f"{self.name}: every field has {total + 1} rows: episode_ends look like the "
                "indices of the last rows. They must be one past them: "
                "g = zarr.open_group(PATH, mode='r+'); e = g['meta/episode_ends']; e[:] = e[:] + 1"
            )
        return {name: rows for name, rows in surplus.items() if rows}


def _chunks(name: str, array: ZarrArray, rows: int) -> Iterator[tuple[int, int, str]]:
    """First row, one past the last row, and file of each chunk that holds one of the rows."""
    sizes = array.shards or array.chunks
    inner = [range(-(-n // c)) for n, c in zip(array.shape[1:], sizes[1:], strict=True)]
    for index in range(-(-rows // sizes[0])):
        start = index * sizes[0]
        for rest in product(*inner):
            key = array.metadata.encode_chunk_key((index, *rest))
            yield start, min(start + sizes[0], rows), f"data/{name}/{key}"
