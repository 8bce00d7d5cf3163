"""The arrays of a D4RL file, checked when it is opened and read only where asked."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from diffpolicy.data.hdf5 import open_hdf5, read_rows, unwritten_rows

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from numpy.typing import NDArray

REQUIRED = ("observations", "actions", "rewards", "terminals")
_FLAT = ("rewards", "terminals", "timeouts")
# Weights of the behaviour policy may be under metadata/; they are no description.
_LONGEST_NOTE = 64


class RawFile:
    """Open HDF5 file with D4RL's members: `observations`, `actions`, `rewards`, `terminals`.

    Optional are `timeouts`, `next_observations`, `infos/*` with a row a step, and `metadata/*`.
    Arrays `[N, 1]` of rewards, terminals and timeouts are read as `[N]`.

    Args:
        path: The file.

    Raises:
        ImportError: h5py is not installed.
        FileNotFoundError: Nothing is there.
        ValueError: It is no whole HDF5 file, or lacks a member, or their lengths differ.
    """

    def __init__(self, path: Path) -> None:
        self._file = open_hdf5(path, "reading D4RL files")
        self.path = path
        try:
            self._members = dict(self._file.datasets())
            self._check()
        except ValueError:
            self._file.close()
            raise

    def _check(self) -> None:
        missing = [name for name in REQUIRED if name not in self._members]
        if missing:
            raise ValueError(
                f"{self.path} is no D4RL file: it has no {', '.join(missing)}; at its top there is "
                f"{sorted(self._file)}"
            )
        n = len(self._members["rewards"]) if self._members["rewards"].ndim else 0
        if n == 0:
            raise ValueError(f"{self.path} holds no steps")
        for name in (*REQUIRED, "timeouts", "next_observations"):
            member = self._members.get(name)
            if member is not None:
                self._check_member(name, member, n)
        self.num_rows = n

    def _check_member(self, name: str, member: Any, n: int) -> None:
        if member.dtype.kind not in "fiub":
            raise ValueError(f"{self.path}: {name} holds {member.dtype}, not numbers")
        if member.ndim == 0 or len(member) != n:
            raise ValueError(
                f"{self.path}: {name} has the shape {list(member.shape)}, but rewards has {n} "
                "rows; every array needs one row a step"
            )
        if name in _FLAT and member.shape not in ((n,), (n, 1)):
            raise ValueError(
                f"{self.path}: {name} must be [N] or [N, 1] = [{n}, 1]; got {list(member.shape)}"
            )
        wanted = self._members["observations"].shape
        if name == "next_observations" and member.shape != wanted:
            raise ValueError(
                f"{self.path}: next_observations has the shape {list(member.shape)}, observations "
                f"{list(wanted)}"
            )

    @property
    def names(self) -> list[str]:
        """The arrays with one row a step, as they are called in the file."""
        return [
            name
            for name, member in self._members.items()
            if not name.startswith(("metadata/", "virtual/"))
            and member.ndim
            and len(member) == self.num_rows
            and member.dtype.kind in "fiub"
        ]

    def unwritten(self, names: Iterable[str]) -> list[tuple[str, int, int]]:
        """Name, first row and one past the last of what was never written and reads as zeros."""
        there = [name for name in names if name in self._members]
        return [(n, *rows) for n in there for rows in unwritten_rows(self._members[n])]

    @property
    def odd_names(self) -> list[str]:
        """The arrays that have no row of numbers for each step, `metadata/` apart."""
        rest = {n for n in self._members if not n.startswith(("metadata/", "virtual/"))}
        return sorted(rest - set(self.names))

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def row_shape(self, name: str) -> tuple[int, ...]:
        """The shape of one row."""
        return () if name in _FLAT else tuple(self._members[name].shape[1:])

    def dtype(self, name: str) -> np.dtype[Any]:
        """The type in the file."""
        found: np.dtype[Any] = self._members[name].dtype
        return found

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows `start..stop-1` (default all) of one array, in the file's own type.

        Raises:
            ValueError: The file is damaged there.
        """
        values = read_rows(self._members[name], f"{self.path}: {name}", start, stop)
        return values[:, 0] if name in _FLAT and values.ndim == 2 else values

    def notes(self) -> dict[str, Any]:
        """What the file says of itself: root attributes, and short values under `metadata/`."""
        found: dict[str, Any] = {}
        for name, member in self._members.items():
            if name.startswith("metadata/") and member.size == 1:
                found[name.removeprefix("metadata/")] = _plain(member[()])
        for name, value in self._file.attrs.items():
            if np.size(value) <= _LONGEST_NOTE:
                found[name] = _plain(value)
        return {name: value for name, value in found.items() if value is not None}

    def metadata(self, name: str) -> Any:
        """One value under `metadata/`, such as an array of the behaviour policy's weights.

        Raises:
            KeyError: There is none of that name.
        """
        if f"metadata/{name}" not in self._members:
            there = [n for n in self._members if n.startswith("metadata/")]
            raise KeyError(f"{self.path} has no metadata/{name}; it has {there}")
        return self._members[f"metadata/{name}"][()]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _plain(value: Any) -> Any:
    """A JSON value, or None for what is none."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if isinstance(value, str) and value.startswith(("{", "[")):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return None
