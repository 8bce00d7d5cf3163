"""HDF5 files, read so that nothing outside of them is reached: the one opener of every reader.

An HDF5 file may point elsewhere: a link into another file, an array whose numbers lie in another
file (external storage), an array put together of others (a virtual dataset). Whoever opens such a
file copies what it points to, which may be any file of this machine. Here they are refused.

Chunks that were never written read as zeros; :func:`unwritten_rows` says which rows those are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffpolicy.extras import need

# Soft links may lead to soft links, and in a circle.
_MOST_LINKS = 16
_CACHE = 2**25  # bytes of an array's chunks that are kept, for the next episode's rows


def open_hdf5(path: Path) -> Hdf5Group:
    """Open a file for reading.

    Args:
        path: The file.

    Returns:
        Its root.

    Raises:
        ImportError: h5py is not installed.
        FileNotFoundError: Nothing is there.
        ValueError: It is no whole HDF5 file.
    """
    h5py = need("h5py")
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    try:
        return Hdf5Group(h5py.File(path, "r", rdcc_nbytes=_CACHE), path)
    except OSError as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is not a whole HDF5 file: {error}; copy or "
            "download it again"
        ) from error


class Hdf5Group(Mapping[str, Any]):
    """A group of an open file: a mapping of names to groups and datasets, all of this file.

    Members are asked for by paths of names below the group. One that lies in another file, or in
    several, is refused (``ValueError``); a link that leads nowhere counts as missing.

    Args:
        group: h5py's group.
        path: The file.
    """

    def __init__(self, group: Any, path: Path) -> None:
        self._group = group
        self._path = path
        self.name = str(group.name)
        self.attrs = group.attrs

    def __iter__(self) -> Iterator[str]:
        return iter(self._group)

    def __len__(self) -> int:
        return len(self._group)

    def __getitem__(self, name: str) -> Any:
        found = self._follow(self._group, name, 0)
        if found is None:
            raise KeyError(f"{self._path}: {self.name} has no {name!r}; it has {list(self)[:20]}")
        if hasattr(found, "keys"):
            return Hdf5Group(found, self._path)
        elsewhere = [file for file, *_ in found.external or ()]
        if found.is_virtual:
            elsewhere += [s.file_name for s in found.virtual_sources() if s.file_name != "."]
        if elsewhere:
            self._refuse(found.name, elsewhere[0])
        return found

    def datasets(self, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
        """Yield the paths and datasets below."""
        if depth > _MOST_LINKS:
            raise ValueError(f"{self._path}: {self.name} is nested more than {_MOST_LINKS} deep")
        for name in self:
            member = self.get(name)
            if isinstance(member, Hdf5Group):
                yield from member.datasets(f"{prefix}{name}/", depth + 1)
            elif member is not None:
                yield prefix + name, member

    def close(self) -> None:
        """Close the file."""
        self._group.file.close()

    def _follow(self, group: Any, name: str, links: int) -> Any:
        h5py = need("h5py")
        node = group.file["/"] if name.startswith("/") else group
        for part in (p for p in name.split("/") if p and p != "."):
            link = node.get(part, getlink=True) if hasattr(node, "keys") else None
            if link is None:
                return None
            if isinstance(link, h5py.SoftLink):
                if links >= _MOST_LINKS:
                    raise ValueError(f"{self._path}: the link {name!r} leads in a circle")
                node = self._follow(node, link.path, links + 1)
            elif isinstance(link, h5py.HardLink):
                node = node[part]
            else:
                place = f"{node.name.rstrip('/')}/{part}"
                self._refuse(place, getattr(link, "filename", "?"))
        return node

    def _refuse(self, name: str, elsewhere: str) -> None:
        raise ValueError(
            f"{self._path}: {name} lies in another file, {elsewhere!r}, which is not read: a file "
            "of data must not reach for others. If it is yours, write one whole file"
        )


def read_rows(dataset: Any, where: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
    """Return rows ``start..stop-1`` (default all) of a dataset.

    Raises:
        ValueError: The file is damaged there; ``where`` names the array in the message.
    """
    try:
        return np.asarray(dataset[start:stop] if dataset.ndim else dataset[()])
    except OSError as error:
        raise ValueError(
            f"{where} cannot be read ({error}): the file is damaged; copy or download it again"
        ) from error


def unwritten_rows(dataset: Any) -> list[tuple[int, int]]:
    """Return ranges (first, one past the last) of rows that were never written: read as zeros."""
    if not dataset.ndim or not dataset.size:
        return []
    if dataset.chunks is None:
        stored = dataset.id.get_storage_size() > 0 or dataset.is_virtual
        return [] if stored else [(0, len(dataset))]
    count, chunk, total = dataset.id.get_num_chunks(), dataset.chunks[0], len(dataset)
    grid = [-(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True)]
    if count == np.prod(grid):
        return []
    offsets = [dataset.id.get_chunk_info(i).chunk_offset[0] for i in range(count)]
    written = np.bincount(np.array(offsets, int) // chunk, minlength=grid[0])
    lost = (np.flatnonzero(written < np.prod(grid[1:])) * chunk).tolist()
    return [(first, min(first + chunk, total)) for first in lost]
