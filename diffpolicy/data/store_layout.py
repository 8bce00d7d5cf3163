"""How a store lies on disk: its arrays, and crash-safe appending to them."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store
from zarr.codecs import Crc32cCodec, ZstdCodec

from diffpolicy.data import opening
from diffpolicy.data.fields import FieldSpec
from diffpolicy.files import (
    ForeignFilesError,
    check_owned,
    naming,
    remove_owned,
    replaced_directory,
    sync,
)
from diffpolicy.locks import WriterLock

_CHUNK_BYTES = 2**18
# Of images, a file for every few frames costs more than compressing them: docs/results.md, Images.
_IMAGE_CHUNK_BYTES = 2**20
_LEVEL, _IMAGE_LEVEL = 1, 3  # of zstd
_MAX_CHUNK_ROWS = 4096
_ENDS_CHUNK = 1024
_ATTRS_CHUNK = 2**14
_PIECE = 16  # chunks written at once, which bounds the memory


class Tail:
    """Appends rows to an array whose last chunk is kept in memory.

    The array grows by whole chunks and each chunk is written whole, so that an append costs one
    file an array and never reads; the file is replaced atomically, so its old rows are safe.
    """

    def __init__(self, array: opening.ZarrArray, length: int) -> None:
        self._array = array
        self._length = length
        self._chunk = int(array.chunks[0])
        used = length % self._chunk
        try:
            self._buffer = np.asarray(array[length - used : length])
        except Exception as error:  # zarr, codecs and the system each raise their own
            raise opening.StoreDamagedError(
                f"the last chunk of {array.store_path} cannot be read ({opening.reason(error)}), "
                "so nothing can be appended behind it; `diffpolicy data check` lists the damage"
            ) from error

    def append(self, rows: NDArray[Any]) -> None:
        """Write ``rows`` behind the last one."""
        self._resize(-(-(self._length + len(rows)) // self._chunk) * self._chunk)
        step = _PIECE * self._chunk
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
        with _naming(self._array.store_path):
            self._array[first : first + size] = block
        self._length += len(rows)
        self._buffer = block[used - used % self._chunk : used].copy()

    def _resize(self, rows: int) -> None:
        if self._array.shape[0] != rows:
            with _naming(self._array.store_path):
                self._array.resize((rows, *self._array.shape[1:]))


def create_group(
    backend: Store, specs: Mapping[str, FieldSpec], attrs: Mapping[str, Any], chunk_rows: int | None
) -> zarr.Group:
    """Create a store of no episodes: its group, its empty arrays, and its attributes."""
    group = zarr.create_group(opening.StrictStore(backend), zarr_format=3)
    arrays: dict[str, tuple[int, FieldSpec, float]] = {}  # rows of a chunk, rows, fill value
    for name, spec in specs.items():
        most = _IMAGE_CHUNK_BYTES if spec.is_image else _CHUNK_BYTES
        rows = chunk_rows or min(_MAX_CHUNK_ROWS, max(1, most // spec.row_bytes))
        # A float chunk that got lost reads as NaN, never as plausible zeros.
        arrays[f"data/{name}"] = rows, spec, np.nan if spec.dtype.startswith("float") else 0
    arrays["meta/episode_attrs"] = _ATTRS_CHUNK, FieldSpec((), "uint8"), 0
    arrays["meta/episode_ends"] = _ENDS_CHUNK, FieldSpec((), "int64"), opening.UNPUBLISHED
    for name, (rows, spec, fill) in arrays.items():
        with _naming(group.store_path / name):
            group.create_array(
                name,
                shape=(0, *spec.shape),
                chunks=(rows, *spec.shape),
                dtype=spec.dtype,
                fill_value=fill,
                compressors=[
                    ZstdCodec(level=_IMAGE_LEVEL if spec.is_image else _LEVEL),
                    Crc32cCodec(),
                ],
            )
    fields: Any = {k: {"shape": list(s.shape), "dtype": s.dtype} for k, s in specs.items()}
    group.attrs.update(
        {"format": opening.FORMAT, "version": opening.VERSION, "fields": fields, **attrs}
    )
    return group


def _naming(place: object) -> contextlib.AbstractContextManager[None]:
    return naming(str(place).removeprefix("file://"))


def clear_target(target: Path, *, overwrite: bool, remove: bool = True) -> None:
    """Make sure that a store can be made at ``target``; with ``remove=False`` only ask.

    Raises:
        FileExistsError: Something is there which may not be replaced.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(
            f"{target} exists; choose another path, remove it, or give overwrite=True if there is "
            "such an option"
        )
    if not (target / "zarr.json").exists():
        raise FileExistsError(f"{target} exists and is not a store of ours, so it stays")
    try:
        with WriterLock(target, "replacing it"):
            (remove_owned if remove else check_owned)(target, _owned(target))
    except ForeignFilesError as error:
        raise FileExistsError(str(error)) from None


def replaced(target: Path) -> contextlib.AbstractContextManager[Path]:
    """Yield a directory for a new store, which then replaces one of ours at ``target``."""
    return replaced_directory(target, owned=_owned(target))


def _owned(target: Path) -> Callable[[str], bool]:
    """Which files of a store are ours: those of the arrays that its attributes name."""
    try:
        attributes = json.loads((target / "zarr.json").read_bytes())["attributes"]
        fields = list(attributes["fields"]) if attributes["format"] == opening.FORMAT else []
    except (OSError, ValueError, KeyError, TypeError):  # nothing there, or damaged
        fields = []
    if not fields:
        return lambda name: False
    arrays = [f"data/{name}" for name in fields] + ["meta/episode_ends", "meta/episode_attrs"]
    names = "|".join(re.escape(name) for name in arrays)
    half = r"\.[0-9a-f]{32}\.partial"
    ours = re.compile(
        rf"((data|meta|{names})/)?zarr(\.json|{half})|({names})/c(/\d+)+({half})?"
        rf"|(data|meta|{names})(/c(/\d+)*)?/"
    )
    return lambda name: ours.fullmatch(name) is not None


def partial_files(target: Path) -> list[Path]:
    """Return the half-written files of a store, which zarr names by 32 hexadecimal digits."""
    found = target.rglob("*.partial")
    return [path for path in found if re.fullmatch(r".+\.[0-9a-f]{32}\.partial", path.name)]


def sync_to_disk(root: Path) -> None:
    """Ask the system to bring every file and directory under ``root`` to the disk."""
    for path in [root, *root.rglob("*")]:
        with naming(path):
            sync(path)
