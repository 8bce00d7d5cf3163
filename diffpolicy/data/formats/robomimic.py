"""Robomimic HDF5 demonstrations: ``data/demo_<i>/{obs/<key>, actions, rewards, dones}``.

Filter keys, ``mask/<name>`` with names of demonstrations, are masks: ``keep="mask:train"``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffpolicy.data.fields import FieldSpec, check_has
from diffpolicy.data.formats import EpisodeSource, Gap, hdf5_names
from diffpolicy.data.hdf5 import Hdf5Group, open_hdf5, read_rows, unwritten_rows

# The low-dimensional observation of the robomimic benchmark, in the order Diffusion Policy uses.
LOW_DIM_KEYS = ("object", "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
_TOP_LEVEL = ("actions", "rewards", "dones", "states")


class RobomimicFile(EpisodeSource):
    """An open file, its demonstrations in numerical order (``demo_2`` before ``demo_10``).

    Its fields are those of the first demonstration: the keys under ``obs/`` by their names,
    ``next_obs/<key>``, and actions, rewards, dones, states and other arrays.

    Args:
        path: The HDF5 file.

    Raises:
        ImportError: h5py is not installed.
        FileNotFoundError: Nothing is there.
        ValueError: It is not a robomimic file.
    """

    def __init__(self, path: Path) -> None:
        self._file = open_hdf5(path)
        self.name = str(path)
        try:
            self._look()
        except ValueError:
            self._file.close()
            raise

    def _look(self) -> None:
        """Tell what there is: demonstrations, filter keys, and the fields of the first one."""
        self._data = data = self._file.get("data")
        names = [n for n in data if _number(n) is not None] if isinstance(data, Hdf5Group) else []
        if not names:
            raise ValueError(f"{self.name} is not a robomimic file: it has no data/demo_<i> groups")
        self._demos = sorted(names, key=lambda n: _number(n) or 0)
        self.attrs = _described(data)
        self.episode_attrs = [{"demo": name} for name in self._demos]
        first = dict(data[self._demos[0]].datasets())
        rows = {place: array for place, array in first.items() if _is_rows(array)}
        self.fields = {_field(place): FieldSpec.of(array) for place, array in rows.items()}
        self.masks = self._filter_keys()
        odd = {n: f"{first[n].dtype}, not a row of numbers a step" for n in first if n not in rows}
        keys = {f"mask/{n}": f"a filter key, to choose by: keep=mask:{n}" for n in self.masks}
        self.unread = odd | keys

    @staticmethod
    def matches(path: Path) -> bool:
        """Tell whether it is an HDF5 file with a group ``data``, or one that cannot be opened."""
        names = hdf5_names(path)
        return names is None or "data" in names  # opening it says what is wrong

    def default_fields(self) -> dict[str, str | list[str]]:
        """Name cameras with the robot's own state, or the low-dimensional observation; ``actions``.

        Nothing is chosen unless all parts of the state are there. Beside cameras the objects' poses
        are none of them: a robot does not have these.
        """
        state = LOW_DIM_KEYS[1:] if self.cameras() else LOW_DIM_KEYS
        has_all = all(key in self.fields for key in state)
        obs: dict[str, str | list[str]] = {"obs": self.with_cameras(state)} if has_all else {}
        return obs | ({"action": "actions"} if "actions" in self.fields else {})

    def _filter_keys(self) -> dict[str, list[int]]:
        """The demonstrations of each filter key."""
        group = self._file.get("mask")
        place = {name: i for i, name in enumerate(self._demos)}
        found = {}
        for key, names in group.items() if isinstance(group, Hdf5Group) else ():
            said = [n.decode() if isinstance(n, bytes) else n for n in np.atleast_1d(names[()])]
            check_has(f"{self.name}: of mask/{key}", said, place)
            found[key] = sorted(place[n] for n in said)
        return found

    def gaps(self, fields: Sequence[str]) -> list[Gap]:
        """List the chunks that were never written."""
        found = []
        for index, demo in enumerate(self._demos):
            for place, array in (_find(self._data[demo], name) for name in fields):
                if array is not None and (rows := unwritten_rows(array)):
                    reason = f"{demo}/{place}: rows {rows} were never written, and read as zeros"
                    found.append(Gap(index, index, reason))
        return found

    def episode(self, index: int, fields: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
        """Read ``[T, *shape]`` of each field (default all) of one demonstration.

        Raises:
            ValueError: The demonstration lacks a field, or has other rows than it says.
        """
        demo, name = self._data[self._demos[index]], self._demos[index]
        said = demo.attrs.get("num_samples")
        result = {}
        for field in self.fields if fields is None else fields:
            place, array = _find(demo, field)
            if array is None:
                there = f"under obs/ it has {sorted(demo.get('obs') or ())}"
                raise ValueError(f"{self.name}: {name} has no {place!r}; {there}")
            rows = read_rows(array, f"{self.name}: {name}/{place}")
            if said is not None and len(rows) != int(said):
                sizes = f"{len(rows)} rows, but its num_samples says {said}"
                raise ValueError(f"{self.name}: {name}/{place} has {sizes}")
            result[field] = rows
        return result


def _described(data: Hdf5Group) -> dict[str, Any]:
    """The environment that the demonstrations were recorded in, where the file says it."""
    text = data.attrs.get("env_args")
    try:
        return {"env_args": json.loads(text)} if text else {}
    except (TypeError, ValueError):
        return {"env_args": str(text)}


def _is_rows(array: Any) -> bool:
    return array.ndim > 0 and array.dtype.kind in "fiub"


def _number(name: str) -> int | None:
    prefix, _, number = name.rpartition("_")
    return int(number) if prefix == "demo" and number.isdecimal() else None


def _find(demo: Hdf5Group, field: str) -> tuple[str, Any]:
    """Where a field is in a demonstration, and the array; None where it is missing."""
    plain = field in _TOP_LEVEL or "/" in field
    places = (field,) if plain else (f"obs/{field}", field)
    for place in places:
        if (array := demo.get(place)) is not None:
            return place, array
    return places[0], None


def _field(place: str) -> str:
    """What a place in a demonstration is called as a field: keys under ``obs/`` by themselves."""
    key = place.removeprefix("obs/")
    return place if "/" in key or key in _TOP_LEVEL else key
