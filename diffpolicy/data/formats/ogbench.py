"""Npz files of OGBench and OCBench, the published ones or one's own. Nothing is unpickled.

Both mark the last step of every episode in ``terminals``, which says nothing about the task. What
else a step has beside observation and action (``qpos``, ``qvel``, ``button_states``) becomes
``info.NAME``, of which `diffpolicy data make` can make rewards.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffpolicy.data.fields import FieldSpec
from diffpolicy.data.formats.arrays import ArraysFile, Headers, array_headers

_NEEDED = {"observations", "actions", "terminals"}
_OTHERS = {"timeouts", "episode_ends"}  # of other formats of npz files
# OCBench: 0 where the task ended the episode; how many steps lie between two observations.
_MASKS, _INTERVAL = "masks", "observation_interval"


class OGBenchFile(ArraysFile):
    """An open file: ``observations``, ``actions``, ``terminals`` and perhaps others, a row a step.

    OCBench's have one observation more in each episode, ``rewards`` and ``masks``: they become
    ``next_obs``, ``reward``, ``terminated`` and ``truncated``. Elsewhere ``truncated`` is true in
    the last step of an episode.

    Args:
        path: The npz file.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: It is no npz file, holds Python objects, lacks an array, its last episode does
            not end, or it has not an observation for every step.
    """

    @staticmethod
    def matches(path: Path) -> bool:
        """Tell whether ``path`` is an npz file with arrays of these names."""
        if not ArraysFile.matches(path):
            return False
        try:
            found = set(array_headers(path))
        except (OSError, ValueError, zipfile.BadZipFile):
            return False
        return found >= _NEEDED and not found & _OTHERS

    def default_fields(self) -> dict[str, str | list[str]]:
        """Name all fields."""
        known = {"obs": "observations", "next_obs": "next_observations", "action": "actions"}
        known |= {"reward": "rewards", "terminated": "terminated", "truncated": "truncated"}
        rest = {f"info.{n}": n for n in self.fields if n not in known.values()}
        return {name: there for name, there in {**known, **rest}.items() if there in self.fields}

    def _read_ends(self, headers: Headers) -> NDArray[np.int64]:
        if missing := sorted(_NEEDED - set(headers)):
            raise ValueError(f"{self.name} has no {missing}; it has {sorted(headers)}")
        del headers["terminals"]
        over = self._array("terminals").reshape(-1) != 0
        if len(over) == 0 or not over[-1]:
            raise ValueError(
                f"{self.name}: the last of its {len(over)} steps is no end of an episode, so the "
                "file is cut off or 'terminals' means something else; save cumulative ends as an "
                "array 'episode_ends' instead"
            )
        return np.flatnonzero(over).astype(np.int64) + 1

    def _sort(self, headers: Headers) -> None:
        shape, dtype = headers.pop("observations")
        told = _MASKS in headers
        for name in (_MASKS, _INTERVAL):
            headers.pop(name, None)
        super()._sort(headers)
        steps, more = int(self._ends[-1]), len(self._ends) if told else 0
        if shape[0] != steps + more or self._interval() != 1:
            raise ValueError(
                f"{self.name} has {shape[0]} observations, one every {self._interval()} steps, of "
                f"{steps} steps in {len(self._ends)} episodes; every step needs its own"
            )
        observed = FieldSpec(shape[1:], dtype.name)
        made = {"observations": observed} | ({"next_observations": observed} if told else {})
        made |= {"terminated": FieldSpec((), "bool")} if told else {}
        made |= {"truncated": FieldSpec((), "bool")}
        self.fields = {**made, **self.fields}

    def _interval(self) -> int:
        return int(super()._array(_INTERVAL)) if _INTERVAL in self._file else 1

    def _array(self, name: str) -> NDArray[Any]:
        if name in self._loaded:
            return self._loaded[name]
        told = _MASKS in self._file
        if name in ("terminated", "truncated"):
            over = super()._array("terminals").reshape(-1) != 0
            failed = super()._array(_MASKS).reshape(-1) == 0 if told else np.zeros_like(over)
            self._loaded[name] = failed if name == "terminated" else over & ~failed
        elif told and name in ("observations", "next_observations"):
            # Each episode has one more than it has steps: those before it shift the next ones.
            steps = np.arange(int(self._ends[-1]))
            rows = steps + np.searchsorted(self._ends, steps, side="right")
            seen = self._file["observations"]
            self._loaded["observations"] = seen[rows]
            self._loaded["next_observations"] = seen[rows + 1]
        return self._loaded[name] if name in self._loaded else super()._array(name)
