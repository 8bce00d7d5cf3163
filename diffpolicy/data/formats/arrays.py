"""Npz files of named arrays: one row a step, and `episode_ends`. Nothing is unpickled.

An array whose first size is the number of steps is a field; one whose first size is the number of
episodes (`init_qpos`, `success`) becomes an attribute of each episode, and a single number or text
an attribute of the whole. Attributes are JSON: arrays of more than 1,000 numbers an episode are
left out, and so is what fits nowhere.
"""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np

from diffpolicy.data.fields import FieldSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from diffpolicy.data.formats import EpisodeSource, Gap

_ENDS = "episode_ends"
_MOST = 1000  # numbers in an attribute of an episode
# What a step's parts are usually called.
_ALIASES = {
    "obs": ("obs", "observations", "observation", "state", "states"),
    "action": ("action", "actions"),
    "reward": ("reward", "rewards"),
    "terminated": ("terminated", "terminals"),
    "truncated": ("truncated", "truncations", "timeouts"),
}


class ArraysFile:
    """An open file. Its fields are the arrays with one row a step.

    Args:
        path: The npz file.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: It is no npz file, holds Python objects, lacks `episode_ends`, or the ends do
            not increase strictly up to the number of rows of some array.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"no file at {path}")
        self._path = path
        try:
            # An npz file is a zip of npy files; each is read when it is asked for.
            self._headers = _headers(path)
            self._file = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not a whole npz file of plain arrays: {error}") from error
        self._loaded: dict[str, NDArray[Any]] = {}
        try:
            self._ends = self._checked_ends()
        except ValueError:
            self._file.close()
            raise

    @property
    def name(self) -> str:
        """The path."""
        return str(self._path)

    @property
    def num_episodes(self) -> int:
        """How many there are."""
        return len(self._ends)

    @property
    def fields(self) -> dict[str, FieldSpec]:
        """The arrays with one row a step."""
        return {
            name: FieldSpec(shape[1:], dtype.name)
            for name, (shape, dtype) in self._headers.items()
            if name != _ENDS and self._is_field(shape, dtype)
        }

    @property
    def attrs(self) -> dict[str, Any]:
        """The single numbers and texts."""
        return {
            name: self._array(name).item()
            for name, (shape, dtype) in self._headers.items()
            if shape == () and dtype.kind in "fiubU" and _finite(self._array(name))
        }

    @property
    def episode_attrs(self) -> list[dict[str, Any]]:
        """Row i of every array with one row an episode."""
        names = self._episode_names()
        count = self.num_episodes
        return [{name: self._array(name)[i].tolist() for name in names} for i in range(count)]

    def _episode_names(self) -> list[str]:
        return [
            name
            for name, (shape, dtype) in self._headers.items()
            if name != _ENDS
            and name not in self.fields
            and shape[:1] == (self.num_episodes,)
            and dtype.kind in "fiubU"
            and np.prod(shape[1:]) <= _MOST
            and _finite(self._array(name))
        ]

    @property
    def unread(self) -> dict[str, str]:
        """The arrays that have no row a step, and are no attribute of an episode or of all."""
        kept = {_ENDS, *self.fields, *self._episode_names(), *self.attrs}
        return {
            name: f"{dtype} {list(shape)}: no row a step; too large or not finite for an attribute"
            for name, (shape, dtype) in self._headers.items()
            if name not in kept
        }

    @property
    def masks(self) -> Mapping[str, Sequence[int]]:
        """None; an array of truth values, one an episode, is found in `episode_attrs`."""
        return {}

    def gaps(self, fields: Sequence[str]) -> list[Gap]:
        """None: a zip has a checksum of every array."""
        return []

    def episode(self, index: int, fields: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
        """One episode.

        Args:
            index: Which.
            fields: Which fields; default all.

        Returns:
            `[T, *shape]` of each field.
        """
        first = int(self._ends[index - 1]) if index else 0
        names = self.fields if fields is None else fields
        return {name: self._array(name)[first : int(self._ends[index])] for name in names}

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _array(self, name: str) -> NDArray[Any]:
        if name not in self._loaded:
            self._loaded[name] = self._file[name]
        return self._loaded[name]

    def _is_field(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
        return shape[:1] == (int(self._ends[-1]),) and dtype.kind in "fiub" and 0 not in shape

    def _checked_ends(self) -> NDArray[np.int64]:
        objects = [name for name, (_, dtype) in self._headers.items() if dtype.hasobject]
        if objects:
            raise ValueError(
                f"{self._path}: {objects} are pickled Python objects, which are not read; save "
                "them as plain numbers"
            )
        if _ENDS not in self._headers:
            raise ValueError(
                f"{self._path} has no array {_ENDS!r} (the cumulative ends of the episodes, the "
                f"last one the number of steps); it has {sorted(self._headers)}"
            )
        ends = self._array(_ENDS)
        if ends.ndim != 1 or len(ends) == 0 or ends.dtype.kind not in "iu":
            raise ValueError(
                f"{self._path}: {_ENDS} must be a vector of whole numbers; got shape "
                f"{list(ends.shape)}, dtype {ends.dtype}"
            )
        ends = ends.astype(np.int64)
        if (np.diff(ends, prepend=0) <= 0).any():
            raise ValueError(f"{self._path}: {_ENDS} must increase strictly from above 0")
        if not any(s[:1] == (int(ends[-1]),) for n, (s, _) in self._headers.items() if n != _ENDS):
            shapes = {name: list(shape) for name, (shape, _) in self._headers.items()}
            last = (int(ends[-1]) + 1,)
            hint = ""
            if any(s[:1] == last for n, (s, _) in self._headers.items() if n != _ENDS):
                hint = ". They look like the indices of the last rows: save one more than each"
            raise ValueError(
                f"{self._path}: {_ENDS} says {ends[-1]} steps, but no array has as many rows: "
                f"{shapes}{hint}"
            )
        return ends


def matches(path: Path) -> bool:
    """Whether `path` is called an npz file."""
    return path.suffix == ".npz" and path.is_file()


def open_source(path: Path) -> ArraysFile:
    """Open a file; see `ArraysFile`."""
    return ArraysFile(path)


def default_fields(source: EpisodeSource) -> dict[str, str | list[str]]:
    """Observation, action, reward and ends, under the usual names."""
    found = {
        field: next((name for name in names if name in source.fields), None)
        for field, names in _ALIASES.items()
    }
    return {field: name for field, name in found.items() if name is not None}


def _headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and dtype of every array, without reading it."""
    headers = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0
                if version != (1, 0):
                    read = np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
                headers[member.removesuffix(".npy")] = (shape, dtype)
    return headers


def _finite(values: NDArray[Any]) -> bool:
    return values.dtype.kind != "f" or bool(np.isfinite(values).all())
