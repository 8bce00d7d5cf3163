"""The read-only half of an episode store."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
import zarr
from numpy.typing import NDArray

from diffpolicy.data import opening
from diffpolicy.data.fields import RESERVED_ATTRS, FieldSpec
from diffpolicy.data.opening import StoreDamagedError, reading
from diffpolicy.data.statistics import statistics_problem


class EpisodeReader:
    """What a store holds, of our own layout or of Diffusion Policy's.

    Use it through :class:`~diffpolicy.data.store.EpisodeStore`.

    Attributes:
        path: Where it is; None in memory.
        name: The path, or a stand-in, for messages.
        is_native: Whether it is ours, and not a Diffusion Policy replay buffer.
    """

    def __init__(self, group: zarr.Group, path: Path | None) -> None:
        self._group, self.path = group, path
        self.name = "<episodes in memory>" if path is None else str(path)
        self.is_native = native = opening.is_native(group, self.name)
        self._arrays = opening.field_arrays(group, path, self.name, native=native)
        self._fields = {k: FieldSpec.of(a) for k, a in self._arrays.items()}
        self._ends = opening.published_ends(group, self.name, native=native)
        for name, array in self._arrays.items():
            if array.shape[0] < self.num_steps:
                raise StoreDamagedError(
                    f"{self.name}: field {name!r} has {array.shape[0]} rows but episode_ends says "
                    f"{self.num_steps}; `diffpolicy data check` lists the damage"
                )
        self._episode_attrs: list[dict[str, Any]] | None = None
        # A zip keeps its file open; close it with the last reference, as a file object does.
        self._finalizer = weakref.finalize(self, group.store.close)

    @property
    def num_episodes(self) -> int:
        """Published episodes."""
        return len(self._ends)

    @property
    def num_steps(self) -> int:
        """Rows of all published episodes together."""
        return int(self._ends.max(initial=0))

    @property
    def episode_ends(self) -> NDArray[np.int64]:
        """``[E]`` cumulative ends (a copy)."""
        return self._ends.copy()

    @property
    def episode_lengths(self) -> NDArray[np.int64]:
        """``[E]`` numbers of steps."""
        return np.diff(self._ends, prepend=0)

    @property
    def fields(self) -> dict[str, FieldSpec]:
        """Name -> row shape and dtype (a copy), in the order of the names."""
        return dict(self._fields)

    @property
    def attrs(self) -> dict[str, Any]:
        """The user's attributes (a copy)."""
        return {k: v for k, v in self._group.attrs.items() if k not in RESERVED_ATTRS}

    @property
    def statistics(self) -> dict[str, dict[str, Any]]:
        """Per field ``min``, ``max``, ``mean``, ``std``, ``q01``, ``q99`` (lists) and ``count``.

        Raises:
            ValueError: There are none, or episodes were appended since.
        """
        if problem := statistics_problem(self._group.attrs, self._fields, self.num_steps):
            fix = f"run `diffpolicy data info --update-statistics {self.name}`"
            if not self.is_native:
                fix = f"run `diffpolicy data convert {self.name} TARGET.zarr` and use that"
            raise ValueError(f"{self.name}/zarr.json: {problem}; {fix}")
        return cast("dict[str, dict[str, Any]]", self._group.attrs["statistics"])

    @property
    def episode_attrs(self) -> list[dict[str, Any]]:
        """What ``append`` was told of each episode (seed, success, ...); ``{}`` where nothing."""
        if self._episode_attrs is None:
            count, known = self.num_episodes, []
            if self.is_native:
                known = opening.episode_lines(self._group, count, self.name)
            self._episode_attrs = known + [{}] * (count - len(known))
        return [dict(a) for a in self._episode_attrs]

    @property
    def has_actions(self) -> NDArray[np.bool_]:
        """``[E]`` whether each episode has actions: not those appended with ``actions=False``."""
        return np.array([a.get("actions") is not False for a in self.episode_attrs], bool)

    def chunk_rows(self, field: str) -> int:
        """Return the rows in one chunk of ``field``."""
        return int(self._array(field).chunks[0])

    def read(self, field: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Read rows of one field.

        Args:
            field: The field.
            start: First row, counted over all episodes.
            stop: One past the last row; default all published ones.

        Returns:
            ``[n, *shape]``; the range is cut to what is published, as Python slices are.

        Raises:
            KeyError: No such field.
            StoreDamagedError: A chunk is damaged.
        """
        array = self._array(field)
        first, last, _ = slice(start, stop).indices(self.num_steps)
        with reading(f"{self.name}: field {field!r}, rows {first}..{last - 1}", self.name):
            return np.asarray(array[first : max(first, last)])

    def episode(self, index: int, fields: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
        """Read one episode.

        Args:
            index: Which, 0..num_episodes-1.
            fields: Which fields; default all.

        Returns:
            ``[T, *shape]`` of each field.

        Raises:
            IndexError: No such episode.
            KeyError: No such field.
        """
        if not 0 <= index < self.num_episodes:
            raise IndexError(f"episode {index} of {self.name}, which has {self.num_episodes}")
        stop = int(self._ends[index])
        start = int(self._ends[index - 1]) if index else 0
        names = self._fields if fields is None else fields
        return {name: self.read(name, start, stop) for name in names}

    def __len__(self) -> int:
        return self.num_episodes

    def __repr__(self) -> str:
        fields = ", ".join(f"{k} {list(s.shape)} {s.dtype}" for k, s in self._fields.items())
        size = f"{self.num_episodes} episodes, {self.num_steps} steps"
        return f"EpisodeStore({self.name}: {size}; {fields})"

    def _array(self, field: str) -> opening.ZarrArray:
        if field not in self._arrays:
            raise KeyError(f"{self.name} has no field {field!r}; it has {sorted(self._arrays)}")
        return self._arrays[field]


def info(store: EpisodeReader) -> dict[str, Any]:
    """Return a store in figures, as JSON values.

    Args:
        store: An open store.

    Returns:
        ``path``, ``format`` (``diffpolicy`` or ``replay_zarr``), ``episodes``, ``steps``,
        ``length`` (``min``, ``mean``, ``max``), ``fields`` (name -> ``shape``, ``dtype``),
        ``bytes_on_disk``, ``attrs``, ``episode_attrs`` (the number of episodes that have each, and
        the mean of flags and numbers), ``has_statistics``.
    """
    lengths = store.episode_lengths if len(store) else np.zeros(1, np.int64)
    files: Iterable[Path] = ()
    if store.path is not None:
        files = [store.path] if store.path.is_file() else store.path.rglob("*")
    try:
        has_statistics = bool(store.statistics)
    except ValueError:
        has_statistics = False
    return {
        "path": store.name,
        "format": "diffpolicy" if store.is_native else "replay_zarr",
        "episodes": store.num_episodes,
        "steps": store.num_steps,
        "length": {
            "min": int(lengths.min()),
            "mean": float(lengths.mean()),
            "max": int(lengths.max()),
        },
        "fields": {k: {"shape": list(s.shape), "dtype": s.dtype} for k, s in store.fields.items()},
        "bytes_on_disk": sum(f.stat().st_size for f in files if f.is_file()),
        "attrs": store.attrs,
        "episode_attrs": _summary(store.episode_attrs),
        "has_statistics": has_statistics,
    }


def _summary(attrs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    result: dict[str, dict[str, Any]] = {}
    for key in dict.fromkeys(k for a in attrs for k in a):
        values = [a[key] for a in attrs if key in a]
        result[key] = {"count": len(values)}
        if all(isinstance(v, bool | int | float) for v in values):
            result[key]["mean"] = float(np.mean(values))
    return result
