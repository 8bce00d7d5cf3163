"""The arrays of a D4RL file, checked when it is opened and read only where asked."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffpolicy.data.hdf5 import open_hdf5, read_rows, unwritten_rows

REQUIRED = ("observations", "actions", "rewards", "terminals")
FLAT = ("rewards", "terminals", "timeouts")
"""Arrays of one number a row, which files also hold as ``[N, 1]``."""
# Weights of the behaviour policy may be under metadata/; they are no description.
_LONGEST_NOTE = 64


class RawFile:
    """Open HDF5 file with D4RL's members: ``observations, actions, rewards, terminals``.

    Optional are ``timeouts``, ``next_observations``, ``infos/*`` with a row a step, and
    ``metadata/*``.

    Args:
        path: The file.

    Attributes:
        num_rows: N.
        names: The arrays with one row of numbers a step, as they are called in the file.
        odd_names: The others, ``metadata/`` apart.

    Raises:
        ImportError: h5py is not installed.
        FileNotFoundError: Nothing is there.
        ValueError: It is no whole HDF5 file, or lacks a member, or their lengths differ.
    """

    def __init__(self, path: Path) -> None:
        self._file = open_hdf5(path)
        self.path = path
        try:
            self._members = dict(self._file.datasets())
            self._check()
        except ValueError:
            self._file.close()
            raise
        rest = [n for n in self._members if not n.startswith(("metadata/", "virtual/"))]
        self.names = [n for n in rest if self._is_column(self._members[n])]
        self.odd_names = sorted(set(rest) - set(self.names))

    def _check(self) -> None:
        missing = [name for name in REQUIRED if name not in self._members]
        if missing:
            there = f"no {', '.join(missing)}; at its top there is {sorted(self._file)}"
            raise ValueError(f"{self.path} is no D4RL file: it has {there}")
        rewards = self._members["rewards"]
        self.num_rows = n = len(rewards) if rewards.ndim else 0
        if n == 0:
            raise ValueError(f"{self.path} holds no steps")
        optional = [k for k in ("timeouts", "next_observations") if k in self._members]
        for name in (*REQUIRED, *optional):
            member = self._members[name]
            shapes = [(n,), (n, 1)] if name in FLAT else [(n, *member.shape[1:])]
            if name == "next_observations":
                shapes = [self._members["observations"].shape]
            if member.dtype.kind not in "fiub" or member.shape not in shapes:
                wanted = " or ".join(str(list(shape)) for shape in shapes)
                raise ValueError(
                    f"{self.path}: {name} must be numbers {wanted}, one row a step; got "
                    f"{member.dtype} {list(member.shape)}"
                )

    def _is_column(self, member: Any) -> bool:
        return member.shape[:1] == (self.num_rows,) and member.dtype.kind in "fiub"

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def unwritten(self, names: Iterable[str]) -> list[tuple[str, int, int]]:
        """Name, first row and one past the last of what was never written and reads as zeros."""
        there = [name for name in names if name in self._members]
        return [(n, *rows) for n in there for rows in unwritten_rows(self._members[n])]

    def row_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one row."""
        return () if name in FLAT else tuple(self._members[name].shape[1:])

    def dtype(self, name: str) -> np.dtype[Any]:
        """Return the type in the file."""
        found: np.dtype[Any] = self._members[name].dtype
        return found

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Read the rows ``start..stop-1`` (default all) of one array, in the file's own type.

        Raises:
            ValueError: The file is damaged there.
        """
        return squeezed(name, read_rows(self._members[name], f"{self.path}: {name}", start, stop))

    def notes(self) -> dict[str, Any]:
        """Return the file's root attributes, and short values under ``metadata/``."""
        said = {
            name.removeprefix("metadata/"): member[()]
            for name, member in self._members.items()
            if name.startswith("metadata/") and member.size == 1
        }
        said |= {k: v for k, v in self._file.attrs.items() if np.size(v) <= _LONGEST_NOTE}
        plain = {name: _plain(value) for name, value in said.items()}
        return {name: value for name, value in plain.items() if value is not None}

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def squeezed(name: str, values: NDArray[Any]) -> NDArray[Any]:
    """``[N]`` of an array of one number a row, which may be ``[N, 1]``; others as they are."""
    return values[:, 0] if name in FLAT and values.ndim == 2 else values


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
