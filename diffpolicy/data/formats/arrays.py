"""Npz files of named arrays: one row a step, and ``episode_ends``. Nothing is unpickled.

An array whose first size is the number of steps is a field; one whose first size is the number of
episodes (``init_qpos``, ``success``) becomes an attribute of each episode, and a single number or
text an attribute of the whole. Attributes are JSON: arrays of more than 1,000 numbers an episode
are left out, and so is what fits nowhere.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffpolicy.data.blocks import spans
from diffpolicy.data.fields import FieldSpec, checked_ends
from diffpolicy.data.formats import EpisodeSource

_ENDS = "episode_ends"
Headers = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]
"""Shape and type of each array, by its name."""
_MOST = 1000  # numbers in an attribute of an episode
# What a step's parts are usually called.
_ALIASES = {
    "obs": ("obs", "observations", "observation", "state", "states"),
    "action": ("action", "actions"),
    "reward": ("reward", "rewards"),
    "terminated": ("terminated", "terminals"),
    "truncated": ("truncated", "truncations", "timeouts"),
}


class ArraysFile(EpisodeSource):
    """An open file. Its fields are the arrays with one row a step.

    Args:
        path: The npz file.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: It is no npz file, holds Python objects, lacks ``episode_ends``, or the ends do
            not increase strictly up to the number of rows of some array.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"no file at {path}")
        self.name = str(path)
        try:
            # An npz file is a zip of npy files; each is read when it is asked for.
            headers = array_headers(path)
            self._file = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not a whole npz file of plain arrays: {error}") from error
        self._loaded: dict[str, NDArray[Any]] = {}
        try:
            self._check_plain(headers)
            self._ends = self._read_ends(headers)
            self._spans = spans(self._ends)
            self._check_steps(headers)
        except ValueError:
            self._file.close()
            raise
        self._sort(headers)

    def _read_ends(self, headers: Headers) -> NDArray[np.int64]:
        """The cumulative ends of the episodes; what says them is taken out of ``headers``."""
        if _ENDS not in headers:
            raise ValueError(
                f"{self.name} has no array {_ENDS!r} (the cumulative ends of the episodes, the "
                f"last one the number of steps); it has {sorted(headers)}"
            )
        del headers[_ENDS]
        return checked_ends(f"{self.name}: {_ENDS}", self._array(_ENDS))

    def _sort(self, headers: Headers) -> None:
        """Tell what each array is: a field, an attribute of an episode or of all, or nothing."""
        steps, episodes = int(self._ends[-1]), len(self._ends)
        fields: dict[str, FieldSpec] = {}
        attrs: dict[str, Any] = {}
        unread: dict[str, str] = {}
        columns: dict[str, list[Any]] = {}
        for name, (shape, dtype) in headers.items():
            plain = dtype.kind in "fiub"
            small = (plain or dtype.kind == "U") and np.prod(shape[1:]) <= _MOST
            if plain and shape[:1] == (steps,) and 0 not in shape:
                fields[name] = FieldSpec(shape[1:], dtype.name)
            elif small and shape == () and _finite(self._array(name)):
                attrs[name] = self._array(name).item()
            elif small and shape[:1] == (episodes,) and _finite(self._array(name)):
                columns[name] = self._array(name).tolist()
            else:
                why = "no row a step; too large or not finite for an attribute"
                unread[name] = f"{dtype} {list(shape)}: {why}"
        self.fields, self.attrs, self.unread = fields, attrs, unread
        self.episode_attrs = [{n: c[i] for n, c in columns.items()} for i in range(episodes)]

    @staticmethod
    def matches(path: Path) -> bool:
        """Tell whether ``path`` is called an npz file."""
        return path.suffix == ".npz" and path.is_file()

    def default_fields(self) -> dict[str, str | list[str]]:
        """Name observation, action, reward and ends, by their usual names; images beside obs."""
        found: dict[str, str | list[str]] = {
            field: there[0]
            for field, names in _ALIASES.items()
            if (there := [name for name in names if name in self.fields])
        }
        return found | ({"obs": self.with_cameras([str(found["obs"])])} if "obs" in found else {})

    def episode(self, index: int, fields: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
        """Read ``[T, *shape]`` of each of the ``fields`` (default all) of one episode."""
        rows = slice(*self._spans[index])
        return {name: self._array(name)[rows] for name in self._names(fields)}

    def _array(self, name: str) -> NDArray[Any]:
        if name not in self._loaded:
            self._loaded[name] = self._file[name]
        return self._loaded[name]

    def _check_plain(self, headers: Headers) -> None:
        if objects := [name for name, (_, dtype) in headers.items() if dtype.hasobject]:
            raise ValueError(
                f"{self.name}: {objects} are pickled Python objects; save them as plain numbers"
            )

    def _check_steps(self, headers: Headers) -> None:
        shapes = {name: list(shape) for name, (shape, _) in headers.items()}
        rows, last = {shape[0] for shape in shapes.values() if shape}, int(self._ends[-1])
        if last not in rows:
            hint = ". They look like the indices of the last rows: save one more than each"
            raise ValueError(
                f"{self.name}: {_ENDS} says {last} steps, but no array has as many rows: "
                f"{shapes}{hint if last + 1 in rows else ''}"
            )


def array_headers(path: Path) -> Headers:
    """Shape and dtype of every array, without reading it."""
    headers = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            with archive.open(member) as file:
                npy = np.lib.format
                first = npy.read_magic(file) == (1, 0)
                read = npy.read_array_header_1_0 if first else npy.read_array_header_2_0
                shape, _, dtype = read(file)
                headers[member.removesuffix(".npy")] = (shape, dtype)
    return headers


def _finite(values: NDArray[Any]) -> bool:
    return values.dtype.kind != "f" or bool(np.isfinite(values).all())
