"""Robomimic HDF5 demonstrations: `data/demo_<i>/{obs/<key>, actions, rewards, dones}`.

Filter keys, `mask/<name>` with names of demonstrations, are masks: `keep="mask:train"`.
"""

from __future__ import annotations

import json
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from diffpolicy.data.fields import FieldSpec
from diffpolicy.data.formats import Gap
from diffpolicy.data.hdf5 import Hdf5Group, open_hdf5, read_rows, unwritten_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from diffpolicy.data.formats import EpisodeSource

# The low-dimensional observation of the robomimic benchmark, in the order Diffusion Policy uses.
LOW_DIM_KEYS = ("object", "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
_TOP_LEVEL = ("actions", "rewards", "dones", "states")


class RobomimicFile:
    """An open file.

    Its fields are the keys under `obs/` by their names, `next_obs/<key>`, and actions, rewards,
    dones, states and other arrays of a demonstration.

    Demonstrations are in numerical order (`demo_2` before `demo_10`).

    Args:
        path: The HDF5 file.

    Raises:
        ImportError: h5py is not installed.
        FileNotFoundError: Nothing is there.
        ValueError: It is not a robomimic file.
    """

    def __init__(self, path: Path) -> None:
        self._file = open_hdf5(path, "reading robomimic files")
        self._path = path
        data = self._file.get("data")
        names = [n for n in data if _number(n) is not None] if isinstance(data, Hdf5Group) else []
        if not names:
            self._file.close()
            raise ValueError(f"{path} is not a robomimic file: it has no data/demo_<i> groups")
        self._data = data
        self._demos = sorted(names, key=lambda n: _number(n) or 0)

    @property
    def name(self) -> str:
        """The path."""
        return str(self._path)

    @property
    def num_episodes(self) -> int:
        """How many demonstrations there are."""
        return len(self._demos)

    @cached_property
    def fields(self) -> dict[str, FieldSpec]:
        """The numeric fields of the first demonstration."""
        return {
            _field(place): FieldSpec(tuple(m.shape[1:]), str(m.dtype))
            for place, m in self._data[self._demos[0]].datasets()
            if m.dtype.kind in "fiub" and m.ndim
        }

    @property
    def unread(self) -> dict[str, str]:
        """What of the first demonstration is not made of numbers; and the filter keys."""
        found = {
            place: f"{m.dtype}, not a row of numbers a step"
            for place, m in self._data[self._demos[0]].datasets()
            if m.dtype.kind not in "fiub" or not m.ndim
        }
        keys = {f"mask/{n}": f"a filter key, to choose by: keep=mask:{n}" for n in self.masks}
        return found | keys

    @cached_property
    def masks(self) -> dict[str, list[int]]:
        """The demonstrations of each filter key."""
        group = self._file.get("mask")
        place = {name: i for i, name in enumerate(self._demos)}
        found = {}
        for key, names in group.items() if isinstance(group, Hdf5Group) else ():
            said = [
                n.decode() if isinstance(n, bytes) else str(n) for n in np.atleast_1d(names[()])
            ]
            if lacking := [n for n in said if n not in place]:
                raise ValueError(
                    f"{self._path}: mask/{key} names {lacking[0]!r}, which is not there"
                )
            found[key] = sorted(place[n] for n in said)
        return found

    def gaps(self, fields: Sequence[str]) -> list[Gap]:
        """Chunks that were never written."""
        return [
            Gap(index, index, f"{demo}/{place}: rows {rows} were never written, and read as zeros")
            for index, demo in enumerate(self._demos)
            for place, member in (_find(self._data[demo], name) for name in fields)
            if member is not None
            for rows in [unwritten_rows(member)]
            if rows
        ]

    @property
    def attrs(self) -> dict[str, Any]:
        """The environment the demonstrations were recorded in, where the file says it."""
        text = self._data.attrs.get("env_args")
        try:
            return {"env_args": json.loads(text)} if text else {}
        except (TypeError, ValueError):
            return {"env_args": str(text)}

    @property
    def episode_attrs(self) -> list[dict[str, Any]]:
        """The name of each demonstration in the file."""
        return [{"demo": name} for name in self._demos]

    def episode(self, index: int, fields: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
        """One demonstration.

        Args:
            index: Its place in numerical order.
            fields: Which fields; default all of the first demonstration.

        Returns:
            `[T, *shape]` of each field.

        Raises:
            ValueError: The demonstration lacks a field.
        """
        demo = self._data[self._demos[index]]
        said = demo.attrs.get("num_samples")
        result = {}
        for name in self.fields if fields is None else fields:
            place, member = _find(demo, name)
            if member is None:
                raise ValueError(
                    f"{self._path}: {self._demos[index]} has no {place!r}; under obs/ it has "
                    f"{sorted(demo.get('obs') or ())}"
                )
            result[name] = read_rows(member, f"{self._path}: {self._demos[index]}/{place}")
            if said is not None and len(result[name]) != int(said):
                raise ValueError(
                    f"{self._path}: {self._demos[index]}/{place} has {len(result[name])} "
                    f"rows, but its num_samples says {said}"
                )
        return result

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def matches(path: Path) -> bool:
    """Whether `path` is an HDF5 file with a group `data`, or one that `open_source` refuses."""
    if not path.is_file() or path.suffix not in (".hdf5", ".h5"):
        return False
    try:
        file = open_hdf5(path, "reading robomimic files")
    except (ImportError, ValueError):
        return True  # opening it says what is wrong
    try:
        return isinstance(file.get("data"), Hdf5Group)
    except ValueError:
        return True
    finally:
        file.close()


def open_source(path: Path) -> RobomimicFile:
    """Open a file; see `RobomimicFile`."""
    return RobomimicFile(path)


def default_fields(source: EpisodeSource) -> dict[str, str | list[str]]:
    """The benchmark's low-dimensional observation, if all of it is there; and `actions`."""
    has_all = all(key in source.fields for key in LOW_DIM_KEYS)
    obs: dict[str, str | list[str]] = {"obs": list(LOW_DIM_KEYS)} if has_all else {}
    return obs | ({"action": "actions"} if "actions" in source.fields else {})


def _number(name: str) -> int | None:
    prefix, _, number = name.rpartition("_")
    return int(number) if prefix == "demo" and number.isdecimal() else None


def _find(demo: Hdf5Group, field: str) -> tuple[str, Any]:
    """Where a field is in a demonstration, and the array; None where it is missing."""
    plain = field in _TOP_LEVEL or "/" in field
    places = (field,) if plain else (f"obs/{field}", field)
    for place in places:
        if (member := demo.get(place)) is not None:
            return place, member
    return places[0], None


def _field(place: str) -> str:
    """What a place in a demonstration is called as a field: the keys under `obs/` by themselves."""
    key = place.removeprefix("obs/")
    return place if "/" in key or key in _TOP_LEVEL else key
