"""Robomimic HDF5 demonstrations: `data/demo_<i>/{obs/<key>, actions, rewards, dones}`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from diffpolicy.data.fields import FieldSpec

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from numpy.typing import NDArray

    from diffpolicy.data.formats import EpisodeSource

# The low-dimensional observation of the robomimic benchmark, in the order Diffusion Policy uses.
LOW_DIM_KEYS = ("object", "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
_TOP_LEVEL = ("actions", "rewards", "dones", "states")


class RobomimicFile:
    """An open file. Its fields are the keys under `obs/`, and actions, rewards, dones, states.

    Demonstrations are in numerical order (`demo_2` before `demo_10`).

    Args:
        path: The HDF5 file.

    Raises:
        ImportError: h5py is not installed.
        FileNotFoundError: Nothing is there.
        ValueError: It is not a robomimic file.
    """

    def __init__(self, path: Path) -> None:
        try:
            import h5py
        except ImportError as error:
            raise ImportError(
                'reading robomimic files needs h5py: pip install "diffpolicy[hdf5]"'
            ) from error
        if not path.exists():
            raise FileNotFoundError(f"no file at {path}")
        try:
            self._file = h5py.File(path, "r")
        except OSError as error:
            raise ValueError(f"{path} is not a whole HDF5 file: {error}") from error
        self._path = path
        data = self._file.get("data")
        names = [n for n in data or () if _number(n) is not None]
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

    @property
    def fields(self) -> dict[str, FieldSpec]:
        """The numeric fields of the first demonstration."""
        demo = self._data[self._demos[0]]
        members = {k: demo[k] for k in _TOP_LEVEL if k in demo} | dict(demo.get("obs", {}).items())
        return {
            name: FieldSpec(tuple(m.shape[1:]), str(m.dtype))
            for name, m in members.items()
            if hasattr(m, "dtype") and m.dtype.kind in "fiub" and m.ndim
        }

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
        result = {}
        for name in self.fields if fields is None else fields:
            place = name if name in _TOP_LEVEL else f"obs/{name}"
            if place not in demo:
                raise ValueError(
                    f"{self._path}: {self._demos[index]} has no {place!r}; under obs/ it has "
                    f"{sorted(demo.get('obs', {}))}"
                )
            result[name] = np.asarray(demo[place][()])
        return result

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def matches(path: Path) -> bool:
    """Whether `path` is an HDF5 file with a group `data`, or one that `open_source` refuses."""
    if not path.is_file() or path.suffix not in (".hdf5", ".h5"):
        return False
    try:
        import h5py

        with h5py.File(path, "r") as file:
            return isinstance(file.get("data"), h5py.Group)
    except (ImportError, OSError):
        return True  # opening it says what is wrong


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
