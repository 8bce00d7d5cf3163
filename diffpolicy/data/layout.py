"""How a store lies on disk: fields, zarr arrays, crash-safe appending to them."""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import LocalStore, ZipStore

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from diffpolicy.data.fields import FieldSpec

FORMAT = "diffpolicy-episodes"
VERSION = 1
UNPUBLISHED = -1
_CHUNK_BYTES = 2**18
_MAX_CHUNK_ROWS = 4096
_ENDS_CHUNK = 1024
_ATTRS_CHUNK = 2**14

ZarrArray = zarr.Array[Any]


class StoreDamagedError(ValueError):
    """Rows that were published cannot be read back: a chunk is missing, cut short or altered."""


class Tail:
    """Appends rows to an array whose last chunk is kept in memory.

    The array grows by whole chunks and each chunk is written whole, so that an append costs one
    file an array and never reads; the file is replaced atomically, so its old rows are safe.
    """

    PIECE = 16  # chunks written at once, which bounds the memory

    def __init__(self, array: ZarrArray, length: int) -> None:
        self._array = array
        self._length = length
        self._chunk = int(array.chunks[0])
        used = length % self._chunk
        try:
            self._buffer = np.asarray(array[length - used : length])
        except (ValueError, RuntimeError, OSError) as error:
            raise StoreDamagedError(
                f"the last chunk of {array.store_path} cannot be read ({error}), so nothing can be "
                "appended behind it; `diffpolicy data check` lists the damage"
            ) from error

    def append(self, rows: NDArray[Any]) -> None:
        """Write `rows` behind the last one."""
        self._resize(-(-(self._length + len(rows)) // self._chunk) * self._chunk)
        step = self.PIECE * self._chunk
        for start in range(0, len(rows), step):
            self._append_piece(rows[start : start + step])

    def trim(self) -> None:
        """Cut the array to its length."""
        self._resize(self._length)

    def _append_piece(self, rows: NDArray[Any]) -> None:
        kept = len(self._buffer)
        used = kept + len(rows)
        size = -(-used // self._chunk) * self._chunk
        block = np.empty((size, *self._array.shape[1:]), self._array.dtype)
        block[:kept], block[kept:used] = self._buffer, rows
        block[used:] = self._array.fill_value
        first = self._length - kept
        self._array[first : first + size] = block
        self._length += len(rows)
        self._buffer = block[used - used % self._chunk : used].copy()

    def _resize(self, rows: int) -> None:
        if self._array.shape[0] != rows:
            self._array.resize((rows, *self._array.shape[1:]))


def open_group(path: Path, *, writable: bool = False) -> zarr.Group:
    """Open the zarr group at `path`, a directory or a zip, of either zarr format.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: It is not a zarr group, or a zip to be written.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"no episode store at {path}; make one with `diffpolicy data collect` or "
            "`diffpolicy data convert`"
        )
    if path.is_file() and writable:
        raise ValueError(f"{path} is a file, which is only read; unpack it to append to it")
    backend = ZipStore(path, mode="r") if path.is_file() else LocalStore(path)
    try:
        mode: Literal["r", "r+"] = "r+" if writable else "r"
        return zarr.open_group(backend, mode=mode, use_consolidated=False)
    except Exception as error:  # zarr, zipfile and json each raise their own
        with contextlib.suppress(AttributeError):  # a zip that never opened cannot be closed
            backend.close()
        raise ValueError(
            f"{path} is not an episode store: {str(error) or type(error).__name__}. Expected a "
            "zarr group (a directory, or a zip of one) with data/ and meta/episode_ends"
        ) from error


def create_arrays(
    group: zarr.Group, specs: Mapping[str, FieldSpec], chunk_rows: int | None
) -> None:
    """Create the empty arrays of a store in `group`."""
    for name, spec in specs.items():
        row_bytes = int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize
        rows = chunk_rows or min(_MAX_CHUNK_ROWS, max(1, _CHUNK_BYTES // row_bytes))
        # A float chunk that got lost reads as NaN, never as plausible zeros.
        fill = np.nan if np.dtype(spec.dtype).kind == "f" else 0
        _create_array(group, f"data/{name}", (rows, *spec.shape), spec.dtype, fill)
    _create_array(group, "meta/episode_attrs", (_ATTRS_CHUNK,), "uint8", 0)
    _create_array(group, "meta/episode_ends", (_ENDS_CHUNK,), "int64", UNPUBLISHED)


def _create_array(
    group: zarr.Group, name: str, chunks: tuple[int, ...], dtype: str, fill: float
) -> None:
    group.create_array(
        name,
        shape=(0, *chunks[1:]),
        chunks=chunks,
        dtype=dtype,
        fill_value=fill,
        compressors=[ZstdCodec(level=1), Crc32cCodec()],
    )


def child_array(group: zarr.Group, name: str, where: str) -> ZarrArray:
    """The array `name` of `group`.

    Raises:
        ValueError: There is none; `where` names the store in the message.
    """
    try:
        array = group[name]
    except KeyError:
        array = None
    if not isinstance(array, zarr.Array):
        raise ValueError(
            f"{where} is not an episode store: it has no array {name!r}. Expected data/<field> "
            "arrays and meta/episode_ends"
        )
    return _keeping_empty_chunks(array)


def field_arrays(group: zarr.Group, where: str) -> dict[str, ZarrArray]:
    """The arrays under data/, by name.

    Raises:
        ValueError: There are none.
    """
    try:
        data = group["data"]
    except KeyError:
        data = None
    arrays = dict(data.arrays()) if isinstance(data, zarr.Group) else {}
    if not arrays:
        raise ValueError(
            f"{where} is not an episode store: it has no arrays under data/. Expected data/<field> "
            "arrays and meta/episode_ends"
        )
    return {name: _keeping_empty_chunks(arrays[name]) for name in sorted(arrays)}


def _keeping_empty_chunks(array: ZarrArray) -> ZarrArray:
    # By default zarr leaves out a chunk of fill values, and then a lost one looks the same.
    return array.with_config({"write_empty_chunks": True})


def published_ends(array: ZarrArray, where: str) -> NDArray[np.int64]:
    """The ends of the published episodes.

    Raises:
        StoreDamagedError: They cannot be read, or do not increase strictly from above 0.
    """
    try:
        ends = np.asarray(array[:]).astype(np.int64)
    except (ValueError, RuntimeError, OSError) as error:
        raise StoreDamagedError(f"{where}: meta/episode_ends cannot be read ({error})") from error
    ends = ends[: trailing_unpublished(ends)]
    bad = np.flatnonzero(np.diff(ends, prepend=0) <= 0)
    if len(bad):
        raise StoreDamagedError(
            f"{where}: meta/episode_ends must increase strictly, but episode {bad[0]} ends at row "
            f"{ends[bad[0]]} after {ends[bad[0] - 1] if bad[0] else 0}; run `diffpolicy data check`"
        )
    return ends


def trailing_unpublished(ends: NDArray[np.int64]) -> int:
    """How many entries are left without the unpublished ones at the end."""
    published = np.flatnonzero(ends != UNPUBLISHED)
    return int(published[-1]) + 1 if len(published) else 0


def bytes_of_lines(array: ZarrArray, count: int) -> int:
    """Where line `count` of a byte array of JSON lines ends."""
    raw = np.asarray(array[:])
    newlines = np.flatnonzero(raw == ord("\n"))
    return int(newlines[count - 1]) + 1 if 0 < count <= len(newlines) else 0


def clear_target(target: Path, *, overwrite: bool, remove: bool = True) -> None:
    """Make sure that a store can be made at `target`; with `remove=False` only ask.

    Raises:
        FileExistsError: Something is there which may not be replaced.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(
            f"{target} exists; choose another path, remove it, or give overwrite=True (at the "
            "command line overwrite=true) where there is such an option"
        )
    if not any((target / name).exists() for name in ("zarr.json", ".zgroup")):
        raise FileExistsError(f"{target} exists and is not a store, so it is not overwritten")
    if remove:
        shutil.rmtree(target)


def sync_to_disk(root: Path) -> None:
    """Ask the system to bring every file and directory under `root` to the disk."""
    for path in [root, *root.rglob("*")]:
        if os.name != "posix" and path.is_dir():  # only POSIX opens directories
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
