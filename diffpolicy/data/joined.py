"""Several stores read as one: for training on a mixture of them, and for merging them.

A :class:`Joined` store holds the episodes of its first part, then those of the next, and so on. It
has the fields that they share, reads as a store does, and its statistics are those of all rows
together. How often each part is drawn in training is its weight's business, not its length's.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from diffpolicy.data.blocks import Ints
from diffpolicy.data.observation import is_obs
from diffpolicy.data.reader import EpisodeReader
from diffpolicy.data.statistics import compute_statistics
from diffpolicy.data.store import EpisodeStore
from diffpolicy.data.tasks import FIELD as TASK
from diffpolicy.settings import check_range, named_settings, settings_of

Place = str | os.PathLike[str]
Stored = EpisodeStore | Place | Sequence[Place | Mapping[str, Any]]
"""A store, its path, or several: what :func:`open_store` opens."""

TASKS = "tasks"  # the attribute whose places ``obs.task`` counts, where it is whole numbers
_MEANT = ("action_groups",)  # attributes that say what rows mean

_log = logging.getLogger("diffpolicy.data")


@named_settings
@dataclass(frozen=True)
class Part:
    """A store of a mixture.

    Args:
        path: Where it is.
        weight: How often its windows are drawn, beside the other parts' weights; above 0.
        name: What reports call it; default the path's last part, without ``.zarr``.

    Raises:
        ValueError: A weight that is not positive.
    """

    path: str
    weight: float = 1.0
    name: str | None = None

    def __post_init__(self) -> None:
        check_range("(0, inf)", weight=self.weight)


class Joined(EpisodeReader):
    """Stores that read as one; see the module.

    Args:
        parts: The stores by name, in the order of their episodes.
        weights: How often each is drawn; default as often as the others.
        fields: Only these; default all.
        strict: Refuse a field that one part has and another has not; otherwise such a field, if it
            is no observation and no action, is left out, and that is said.

    Raises:
        ValueError: No parts, another number of weights, or fields that differ: names what differs,
            and says how to mend it.

    Example:
        >>> both = Joined({"a": EpisodeStore.open("a.zarr"), "b": EpisodeStore.open("b.zarr")})
        >>> both.num_episodes, both.statistics["action"]["max"]
    """

    def __init__(
        self,
        parts: Mapping[str, EpisodeReader],
        weights: Sequence[float] | None = None,
        *,
        fields: Sequence[str] | None = None,
        strict: bool = False,
    ) -> None:
        if not parts:
            raise ValueError("give one store at least")
        self.parts = dict(parts)
        self.weights = tuple(float(w) for w in weights or [1.0] * len(parts))
        check_range("(0, inf)", **dict(zip(parts, self.weights, strict=True)))
        stores = list(self.parts.values())
        self.path, self.is_native = None, all(store.is_native for store in stores)
        self.name = " + ".join(store.name for store in stores)
        self._fields = _shared_fields(stores, fields, strict=strict)
        lengths = np.concatenate([store.episode_lengths for store in stores])
        self._ends = np.cumsum(lengths)
        self._episode_attrs = [known for store in stores for known in store.episode_attrs]
        counted = TASK in self._fields and not self._fields[TASK].dtype.startswith("float")
        self._numbers, self._attrs = _shared_attrs(stores, counted=counted)

    @property
    def attrs(self) -> dict[str, Any]:
        """The attributes that all parts have alike, and the instructions of any (``tasks``)."""
        return dict(self._attrs)

    @cached_property
    def statistics(self) -> dict[str, dict[str, Any]]:
        """Statistics of all rows together, computed when they are first asked for.

        Raises:
            ValueError: A value is not finite.
        """
        return compute_statistics(cast("EpisodeStore", self))

    def chunk_rows(self, field: str) -> int:
        """Return the rows in one chunk of ``field``, in the part that has the largest."""
        return max(store.chunk_rows(field) for store in self.parts.values())

    def read(self, field: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Read rows of one field, counted over all parts; see :meth:`EpisodeReader.read`."""
        if field not in self._fields:
            raise KeyError(f"{self.name} has no field {field!r}; it has {sorted(self._fields)}")
        first, last, _ = slice(start, stop).indices(self.num_steps)
        found, begin = [], 0
        for number, store in enumerate(self.parts.values()):
            low, high = max(first - begin, 0), min(last - begin, store.num_steps)
            begin += store.num_steps
            if low < high:
                rows = store.read(field, low, high)
                if field == TASK and self._numbers:
                    rows = self._numbers[number][rows].astype(rows.dtype)
                found.append(rows)
        spec = self._fields[field]
        none = [np.zeros((0, *spec.shape), spec.dtype)]
        return found[0] if len(found) == 1 else np.concatenate(found or none)

    def close(self) -> None:
        """Let go of the files."""
        for store in self.parts.values():
            cast("EpisodeStore", store).close()


def open_store(given: Any) -> EpisodeStore:
    """Open a store, or several as one.

    Args:
        given: An open store; a path; or a list of parts, each a path or the settings of
            :class:`Part`: ``[{"path": "a.zarr", "weight": 3}, {"path": "b.zarr"}]``.

    Returns:
        The store, or a :class:`Joined` one, which reads like it.

    Raises:
        ConfigError: A part without a path, or with a setting that there is not.
        ValueError: Two parts of one name, or stores whose fields differ.
    """
    if isinstance(given, EpisodeReader):
        return cast("EpisodeStore", given)
    if isinstance(given, str | os.PathLike):
        return EpisodeStore.open(given)
    return cast("EpisodeStore", mixture(given))


def mixture(given: Sequence[Any]) -> Joined:
    """Open several stores as one; parts and errors are those of :func:`open_store`."""
    entries = [one if isinstance(one, Mapping) else {"path": str(one)} for one in given]
    settings = [settings_of(Part, one, f"part {i} of the data") for i, one in enumerate(entries)]
    names = [one.name or Path(one.path).name.removesuffix(".zarr") for one in settings]
    if len(set(names)) < len(names):
        raise ValueError(
            f"two stores of one name, {names}: give each its own, {{path: ..., name: ...}}"
        )
    places = [Path(one.path).expanduser() for one in settings]
    parts = {n: EpisodeStore.open(place) for n, place in zip(names, places, strict=True)}
    return Joined(parts, [one.weight for one in settings])


def each_part(store: EpisodeReader, choose: Callable[[int], Any]) -> Ints:
    """Return episodes of a store: what ``choose`` takes of as many as each part has, in order.

    Example:
        >>> each_part(store, lambda count: range(min(count, 10)))  # the first ten of every part
    """
    parts = store.parts.values() if isinstance(store, Joined) else [store]
    chosen, first = [], 0
    for part in parts:
        chosen.append(first + np.asarray(choose(part.num_episodes), np.int64))
        first += part.num_episodes
    return np.concatenate(chosen)


def apart(store: EpisodeReader, episodes: Sequence[int] | Ints) -> dict[str, Ints]:
    """Return some episodes' numbers by the part that they are of; that of a plain store is ``""``.

    Example:
        >>> apart(store, [0, 1, 7])  # of a store of 5 episodes, and one of 4
        {'a': array([0, 1]), 'b': array([7])}
    """
    chosen = np.asarray(episodes, np.int64)
    if not isinstance(store, Joined):
        return {"": chosen}
    ends = np.cumsum([part.num_episodes for part in store.parts.values()])
    of = np.searchsorted(ends, chosen, side="right")
    return {name: chosen[of == i] for i, name in enumerate(store.parts)}


def _shared_fields(
    stores: Sequence[EpisodeReader], wanted: Sequence[str] | None, *, strict: bool
) -> dict[str, Any]:
    """The fields of all stores; refuses what differs."""
    every = {name for store in stores for name in store.fields}
    names = sorted(every if wanted is None else wanted)
    shared: dict[str, Any] = {}
    differ: list[str] = []
    alone: list[str] = []
    for name in names:
        specs = [store.fields.get(name) for store in stores]
        if all(spec is not None and spec == specs[0] for spec in specs):
            shared[name] = specs[0]
            continue
        text = f"{name} is " + ", ".join(
            f"{'absent' if spec is None else f'{list(spec.shape)} {spec.dtype}'} in {store.name}"
            for store, spec in zip(stores, specs, strict=True)
        )
        partly = None in specs and not (strict or is_obs(name) or name == "action")
        (alone if partly else differ).append(text)
    if differ:
        trains = "action" in shared and any(map(is_obs, shared))
        keep = f"; or merge what they share, fields=[{','.join(shared)}]" if trains else ""
        raise ValueError(
            f"the stores' fields differ: {'; '.join(differ)}. Make them alike by `diffpolicy data "
            "convert STORE OTHER.zarr` with obs=[...], action=[...] or fields={NAME: [...]}" + keep
        )
    for text in alone:
        _log.warning("left out, as not all stores have it: %s", text)
    return shared


def _shared_attrs(
    stores: Sequence[EpisodeReader], *, counted: bool
) -> tuple[list[Ints], dict[str, Any]]:
    """New numbers of each store's tasks (none: as they are), and the attributes of all stores."""
    attrs = [store.attrs for store in stores]
    shared = {k: v for k, v in attrs[0].items() if all(k in o and o[k] == v for o in attrs)}
    for name in _MEANT:
        said = [known.get(name) for known in attrs]
        if name not in shared and any(said):
            texts = [f"{one} in {s.name}" for one, s in zip(said, stores, strict=True)]
            raise ValueError(
                f"the attribute {name!r} is {'; '.join(texts)}: they do not go together"
            )
    told: list[Any] = [known.get(TASKS) for known in attrs]
    if not counted or TASKS in shared or not any(told):
        return [], shared
    if None in told:
        silent = stores[told.index(None)].name
        raise ValueError(f"{silent} has no attribute {TASKS!r}: what its {TASK} counts is unknown")
    every = list(dict.fromkeys(text for tasks in told for text in tasks))
    numbers = [np.array([every.index(text) for text in tasks]) for tasks in told]
    return numbers, {**shared, TASKS: every}
