"""Opening a store: whatever is wrong with its files becomes one clear error that names the file."""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore, WrapperStore, ZipStore

from diffpolicy.data.fields import NUMBERS, FieldSpec, whole_numbers

FORMAT = "diffpolicy-episodes"
VERSION = 1
UNPUBLISHED = -1
_LAYOUT = "Expected data/<field> arrays and meta/episode_ends"
_METADATA = ("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata")

ZarrArray = zarr.Array[Any]


class StoreDamagedError(ValueError):
    """What was published cannot be read back: a file is missing, cut short or altered."""


class MissingChunkError(Exception):
    """A chunk that is not there; zarr would make up its values."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the chunk {key} is missing")
        self.key = key


class StrictStore(WrapperStore[Any]):
    """Files in which a missing chunk is an error, whatever its type.

    By itself zarr reads it as fill values: a ``terminated`` that got lost would say False and
    train. With ``strict`` False it is filled all the same.
    """

    strict = True

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        value: Buffer | None = await self._store.get(key, prototype, byte_range)
        if self.strict and value is None and not key.endswith(_METADATA):
            raise MissingChunkError(key)
        return value

    def __str__(self) -> str:
        return str(self._store)


@contextlib.contextmanager
def reading(what: str, where: str) -> Iterator[None]:
    """Say of any error inside that ``what``, of the store ``where``, is damaged.

    zarr, its codecs, zip files, JSON and the system each raise their own, and none names the file.

    Raises:
        StoreDamagedError: Whatever was raised inside.
    """
    try:
        yield
    except StoreDamagedError:
        raise
    except Exception as error:
        raise StoreDamagedError(
            f"{what} cannot be read ({reason(error)}): copy it again from where the store is whole;"
            f" `diffpolicy data check {where}` names every damaged file and its episodes"
        ) from error


def reason(error: Exception) -> str:
    """Return what an error says, in a few words."""
    text = str(error) or type(error).__name__
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return f"it is no JSON: {text}"
    if isinstance(error, KeyError):
        return f"{text} is missing in it"
    if isinstance(error, MissingChunkError):
        return (
            f"{text}. If its writer leaves out chunks of zeros, as zarr does by default, let it "
            "write them with write_empty_chunks=True"
        )
    return text if len(text) <= 300 else f"{text[:300]}..."


def open_group(path: Path, *, writable: bool = False) -> zarr.Group:
    """Open the zarr group at ``path``, a directory or a zip, of either zarr format.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: It is not a zarr group, or a zip to be written.
    """
    if not path.exists():
        raise FileNotFoundError(f"no episode store at {path}; make one with `diffpolicy data`")
    if path.is_file() and writable:
        raise ValueError(f"{path} is a file, which is only read; unpack it to append to it")
    backend: Store = ZipStore(path, mode="r") if path.is_file() else LocalStore(path)
    try:
        mode: Any = "r+" if writable else "r"
        return zarr.open_group(StrictStore(backend), mode=mode, use_consolidated=False)
    except Exception as error:  # zarr, zipfile and json each raise their own
        with contextlib.suppress(AttributeError):  # a zip that never opened cannot be closed
            backend.close()
        held = [n for n in ("zarr.json", ".zgroup", ".zattrs") if (path / n).is_file()]
        damage = f", or {path / held[0]} is damaged" if held else ""
        raise ValueError(
            f"{path} is not an episode store{damage}: {reason(error)}. Expected a zarr group (a "
            "directory, or a zip of one) with data/ and meta/episode_ends"
        ) from error


def is_native(group: zarr.Group, where: str) -> bool:
    """Return whether the group is a store of ours, and not a Diffusion Policy replay buffer.

    Raises:
        StoreDamagedError: It was one of ours, but no longer says so.
        ValueError: It is of a later version.
    """
    for name in ("data", "meta"):  # of which other programs need the metadata, if we do not
        if not isinstance(_member(group, name, where), zarr.Group):
            raise StoreDamagedError(
                f"{where} is not an episode store: {where}/{name} is no zarr group. {_LAYOUT}"
            )
    form, version = group.attrs.get("format"), group.attrs.get("version")
    if form == FORMAT and isinstance(version, int) and version > VERSION:
        raise ValueError(
            f"{where} is of version {version}; this diffpolicy reads up to {VERSION}: update it"
        )
    with reading(f"{where}/zarr.json", where):
        if form != FORMAT and "meta/episode_attrs" in group:
            raise ValueError(f"'format' must be {FORMAT!r}; got {form!r}")
        if form == FORMAT and version != VERSION:
            raise ValueError(f"'version' must be {VERSION}; got {version!r}")
    return form == FORMAT


def child_array(group: zarr.Group, name: str, where: str) -> ZarrArray:
    """Return the array ``name`` of ``group``.

    Raises:
        StoreDamagedError: There is none, or its metadata are damaged.
    """
    member = _member(group, name, where)
    if not isinstance(member, zarr.Array):
        raise StoreDamagedError(
            f"{where} is not an episode store: it has no array {name!r}. {_LAYOUT}; copy it again"
        )
    # By default zarr leaves out a chunk of fill values, and then a lost one looks the same.
    return member.with_config({"write_empty_chunks": True})


def _member(group: zarr.Group, name: str, where: str) -> ZarrArray | zarr.Group | None:
    file = "zarr.json" if group.metadata.zarr_format == 3 else ".zarray"
    with reading(f"{where}/{name}/{file}", where):
        try:
            return group[name]
        except KeyError:
            return None


def field_names(group: zarr.Group, path: Path | None, where: str) -> list[str]:
    """Return the names under data/, whatever is there.

    Raises:
        StoreDamagedError: They cannot be listed.
    """
    if path is None:
        return sorted(name for name, _ in group["data"].members())  # type: ignore[union-attr]
    if path.is_file():
        with reading(str(path), where), zipfile.ZipFile(path) as archive:
            parts = [name.split("/") for name in archive.namelist()]
        return sorted({p[1] for p in parts if p[0] == "data" and len(p) > 2})
    return sorted(p.name for p in path.glob("data/[!.]*") if p.is_dir())


def field_arrays(
    group: zarr.Group, path: Path | None, where: str, *, native: bool
) -> dict[str, ZarrArray]:
    """Return the fields' arrays, by name; of a replay buffer those that hold rows of numbers.

    Raises:
        StoreDamagedError: One cannot be opened, or is not what the store was made for.
        ValueError: There are none.
    """
    names = field_names(group, path, where)
    declared = declared_fields(group.attrs, where) if native else {}
    arrays = {}
    for name in sorted({*names, *declared}):
        if not native and isinstance(_member(group, f"data/{name}", where), zarr.Group):
            continue
        array = child_array(group, f"data/{name}", where)
        if name in declared and (problem := misfit(array, declared[name])):
            with reading(f"{where}/data/{name}/zarr.json", where):
                raise ValueError(problem)
        if not unusable(array):
            arrays[name] = array
    if not arrays:
        raise ValueError(
            f"{where} is not an episode store: it has no arrays under data/. {_LAYOUT}"
        )
    return arrays


def declared_fields(attrs: Mapping[str, Any], where: str) -> dict[str, FieldSpec]:
    """Return the fields that a store of ours was made for.

    Raises:
        StoreDamagedError: Its attributes do not say.
    """
    with reading(f"{where}/zarr.json, attribute 'fields',", where):
        return {n: FieldSpec(tuple(v["shape"]), v["dtype"]) for n, v in attrs["fields"].items()}


def misfit(array: ZarrArray, spec: FieldSpec) -> str | None:
    """Return how an array differs from what the store was made for, if it does."""
    if array.ndim and tuple(array.shape[1:]) == spec.shape and str(array.dtype) == spec.dtype:
        return None
    return (
        f"rows are {list(array.shape[1:])} {array.dtype}, but the store was made for "
        f"{list(spec.shape)} {spec.dtype}"
    )


def unusable(array: ZarrArray) -> str | None:
    """Return why an array cannot be a field, if it cannot: one row of plain numbers a step."""
    if array.dtype.kind not in NUMBERS:
        return f"dtype {array.dtype} is not a number type (float, int, uint or bool)"
    if array.ndim == 0:
        return "it is a single number, not one row a step"
    if not all(array.shape[1:]):
        return f"its rows, of shape {list(array.shape[1:])}, hold no numbers"
    return None


def read_growing(array: ZarrArray, file: str, where: str) -> NDArray[Any]:
    """Read all of a vector that grows by whole chunks; the last of them may not be written yet.

    Raises:
        StoreDamagedError: Anything else about it.
    """
    with reading(file, where):
        if array.ndim != 1:
            return np.asarray(array[...])
        stop, chunk = array.shape[0], array.chunks[0]
        while stop and stop % chunk == 0:  # else it was cut to size, and nothing is missing
            try:
                array[stop - chunk : stop]
                break
            except MissingChunkError:
                stop -= chunk
        return np.asarray(array[:stop])


def raw_ends(group: zarr.Group, where: str, *, native: bool) -> NDArray[np.int64]:
    """Return the episodes' ends as they are stored, without what is not published yet.

    Raises:
        StoreDamagedError: They cannot be read, or are no vector of integers.
    """
    file = f"{where}/meta/episode_ends"
    raw = read_growing(child_array(group, "meta/episode_ends", where), file, where)
    with reading(file, where):
        ends = whole_numbers("it", raw)
    published = np.flatnonzero(ends != UNPUBLISHED) if native else np.arange(len(ends))
    return ends[: published.max(initial=-1) + 1]


def published_ends(group: zarr.Group, where: str, *, native: bool) -> NDArray[np.int64]:
    """Return the ends of the published episodes.

    Raises:
        StoreDamagedError: They cannot be read, do not increase strictly from above 0, or some of
            them were lost.
    """
    ends = raw_ends(group, where, native=native)
    bad = np.flatnonzero(np.diff(ends, prepend=0) <= 0)
    if len(bad):
        raise StoreDamagedError(
            f"{where}: meta/episode_ends must increase strictly, but episode {bad[0]} ends at row "
            f"{ends[bad[0]]} after {ends[bad[0] - 1] if bad[0] else 0}; run `diffpolicy data check`"
        )
    total = int(ends.max(initial=0))
    if native and (lost := _known_steps(group.attrs) - total) > 0:
        raise StoreDamagedError(
            f"{where}/meta/episode_ends lost episodes: its {total} steps are {lost} fewer than the "
            "statistics cover. Copy it again from where the store is whole"
        )
    return ends


def _known_steps(attrs: Mapping[str, Any]) -> int:
    """How many steps the store had when its statistics were computed; 0 if that is unknown."""
    stored: Any = attrs.get("statistics")
    values = stored.values() if isinstance(stored, dict) else ()
    counts = {v.get("count") for v in values if isinstance(v, dict)}
    count = counts.pop() if len(counts) == 1 else 0  # else they are damaged themselves
    return count if isinstance(count, int) else 0


def bytes_of_lines(raw: NDArray[Any], count: int) -> int:
    """Return where line ``count`` of JSON lines (bytes) ends."""
    newlines = np.flatnonzero(raw == ord("\n"))
    return int(newlines[count - 1]) + 1 if 0 < count <= len(newlines) else 0


def episode_lines(group: zarr.Group, count: int, where: str) -> list[dict[str, Any]]:
    """Return the attributes of the first ``count`` episodes, as far as there are any.

    Raises:
        StoreDamagedError: They cannot be read.
    """
    file = f"{where}/meta/episode_attrs"
    raw = read_growing(child_array(group, "meta/episode_attrs", where), file, where)
    with reading(file, where):
        lines = raw.tobytes().rstrip(b"\0").split(b"\n")[:count]
        values = [json.loads(line) for line in lines]
        for number, value in enumerate(values):
            if not isinstance(value, dict):
                raise ValueError(f"the line of episode {number} is no JSON object")
    return values
