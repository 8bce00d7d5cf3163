"""A D4RL file as a source of whole episodes."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from diffpolicy.data.d4rl.catalogue import SOURCE
from diffpolicy.data.d4rl.episodes import Episodes, find_episodes
from diffpolicy.data.d4rl.inspection import UNBOUNDED, Inspection
from diffpolicy.data.d4rl.location import find_dataset, identify
from diffpolicy.data.d4rl.raw import RawFile
from diffpolicy.data.d4rl.transforms import (
    RewardMap,
    Trips,
    parse_transforms,
    reward_map,
    split_at_goals,
)
from diffpolicy.data.fields import FieldSpec

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from diffpolicy.data.issue import Issue
    from diffpolicy.data.store import EpisodeStore

_BLOCK_BYTES = 2**25
_GOAL = "infos/goal"


def load_d4rl(
    id_or_path: str | os.PathLike[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    dataset: str | None = None,
    transforms: Sequence[str] = (),
    keep_partial: bool = True,
) -> D4RLFile:
    """Open a dataset of D4RL, by its id or by its file; the d4rl package is not needed.

    Args:
        id_or_path: Such as `"hopper-medium-v2"`, or the path of a file in D4RL's layout.
        data_dir: Where to look for an id; default `$D4RL_DATASET_DIR`, else `~/.d4rl/datasets`.
        dataset: The id of a file that was renamed; others are recognised by their base name.
        transforms: Names of changes to make, see `diffpolicy.data.d4rl.transforms`.
        keep_partial: Keep the unfinished trajectory at the end of a file, marked `partial: true`.

    Returns:
        The open file. Nothing but its structure was read.

    Raises:
        ImportError: h5py is not installed.
        FileNotFoundError: The file is not there; the message says what to put where.
        ValueError: An unknown id or transform, or no whole D4RL file.
    """
    found = find_dataset(id_or_path, data_dir)
    return D4RLFile(found.path, dataset=dataset, transforms=transforms, keep_partial=keep_partial)


class D4RLFile:
    """An open D4RL file: whole episodes, read when asked for.

    Fields: `obs` `[T, ...]` and `action` `[T, A]` and `reward` `[T]`, all float32; `terminated` and
    `truncated` `[T]` bool, true at most in the last row; `next_obs` if the file has it; and
    `infos/<name>` in their own types (float64 as float32). See `load_d4rl` for the arguments.

    Attributes:
        raw: the arrays as they are in the file.
        info: what the catalogue says of the dataset; None for a file of another name.
        transforms: names of the transforms, as they were given.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        dataset: str | None = None,
        transforms: Sequence[str] = (),
        keep_partial: bool = True,
    ) -> None:
        self._transforms = parse_transforms(transforms)
        self.transforms = list(transforms)
        self._keep_partial = keep_partial
        self.raw = RawFile(Path(path))
        try:
            # A file that says it is not D4RL's own may still have the name of one that is.
            foreign = dataset is None and "not comparable" in str(self.raw.notes().get("note"))
            self.info = None if foreign else identify(Path(path).name, dataset)
            self._check()
        except ValueError:
            self.raw.close()
            raise

    def _check(self) -> None:
        if "timeouts" not in self.raw and self.info is None:
            raise ValueError(
                f"{self.name} has no timeouts, and its name is none of D4RL's, so the step limit "
                'is unknown; say which dataset it is, such as dataset="hopper-medium-v0" '
                "(`diffpolicy data d4rl` lists them)"
            )
        goal = self.raw.row_shape(_GOAL) if _GOAL in self.raw.names else ()
        if self._splits and (len(goal) != 1 or goal[0] > self._obs_shape[0]):
            raise ValueError(
                f"split_goals needs {_GOAL} [N, G], a goal position for each row; {self.name} has "
                f"{sorted(self.raw.names)}"
            )

    # -- what it is ----------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The path."""
        return str(self.raw.path)

    @property
    def num_episodes(self) -> int:
        """How many episodes there are, the partial one included if it is kept."""
        return len(self.episodes.ends)

    @property
    def num_steps(self) -> int:
        """How many steps they have in all."""
        return int(self.episodes.ends[-1]) if self.num_episodes else 0

    @property
    def fields(self) -> dict[str, FieldSpec]:
        """Name -> row shape and dtype."""
        shape = self._obs_shape
        if self._splits:
            shape = (shape[0] + self.raw.row_shape(_GOAL)[0],)
        found = {
            "obs": FieldSpec(shape),
            "action": FieldSpec(self.raw.row_shape("actions") or (1,)),
            "reward": FieldSpec(()),
            "terminated": FieldSpec((), "bool"),
            "truncated": FieldSpec((), "bool"),
        }
        if "next_observations" in self.raw:
            found["next_obs"] = FieldSpec(shape)
        for name in self.raw.names:
            if name.startswith("infos/"):
                found[name] = FieldSpec(self.raw.row_shape(name), _kept(self.raw.dtype(name)).name)
        return found

    @property
    def attrs(self) -> dict[str, Any]:
        """What belongs beside every score: dataset, transforms, references, notes of the file.

        `dataset` is the id, or for a file that is none of D4RL's its name without `.hdf5`.
        """
        references = (self.info.ref_min, self.info.ref_max) if self.info else (None, None)
        said = self.raw.notes()
        known = {"env_id": said["env_id"]} if isinstance(said.get("env_id"), str) else {}
        return known | {
            "origin": "d4rl",
            "dataset": self.info.id if self.info else self.raw.path.stem,
            "file": self.raw.path.name,
            "file_bytes": self.raw.path.stat().st_size,
            "transforms": list(self.transforms),
            "reward_scale": self.reward_map.scale,
            "reward_shift": self.reward_map.shift,
            "goal_radius": self._goal_radius,
            "references": {"min": references[0], "max": references[1], "source": SOURCE},
            "max_episode_steps": self.info.max_episode_steps if self.info else None,
            "notes": self.notes,
            "metadata": said,
        }

    @property
    def episode_attrs(self) -> list[dict[str, Any]]:
        """`{"partial": True}` for an unfinished last episode, `{}` for the others."""
        found: list[dict[str, Any]] = [{} for _ in self.episodes.ends]
        if self.episodes.partial:
            found[-1] = {"partial": True}
        return found

    @property
    def notes(self) -> list[str]:
        """What was decided while reading, in words."""
        found = []
        if "timeouts" not in self.raw and self.info is not None:
            found.append(
                f"the file has no timeouts: episodes were cut every {self.info.max_episode_steps} "
                f"steps, the limit of {self.info.id}"
            )
        if self._whole.episodes.partial:
            what = "kept, marked partial" if self._keep_partial else "left out"
            found.append(f"the file ends within an episode, which was {what}")
        if self.raw.odd_names:
            found.append(f"left out, for want of a row for each step: {self.raw.odd_names}")
        return found

    @property
    def returns(self) -> NDArray[np.float64]:
        """`[E]` undiscounted returns of the episodes, of untransformed rewards."""
        return self.episodes.sums(self._raw_rewards)

    # -- episodes ------------------------------------------------------------------------------

    @property
    def episodes(self) -> Episodes:
        """Where the episodes end, and how."""
        whole = self._whole.episodes
        keep = self._keep_partial or not whole.partial
        return whole if keep else whole.first(len(whole.ends) - 1)

    @cached_property
    def reward_map(self) -> RewardMap:
        """What `transforms` make of a reward (after `split_goals` has computed it anew)."""
        lengths = np.diff(self.episodes.ends, prepend=0)
        return reward_map(self._transforms, self.episodes.sums(self._base_rewards), lengths)

    def episode(self, index: int, fields: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
        """One episode.

        Args:
            index: Its place in the file.
            fields: Which fields; default all.

        Returns:
            `[T, *shape]` of each field.

        Raises:
            IndexError: There is no such episode.
            ValueError: No such field, or the file is damaged there.
        """
        if not 0 <= index < self.num_episodes:
            raise IndexError(
                f"{self.name} has the episodes 0..{self.num_episodes - 1}; got {index}"
            )
        return self._rows(index, index + 1, list(self.fields) if fields is None else list(fields))

    def check(self) -> list[Issue]:
        """Look at every value: finite, actions within [-1, 1], no episode twice.

        Returns:
            What was found; errors are what training cannot use.
        """
        inspection = self._inspection()
        for first, last in self._blocks(0, self.num_episodes):
            columns = self._rows(first, last, self._main_fields)
            inspection.add(columns, self._block_ends(first, last))
        return inspection.issues()

    def to_store(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        max_episodes: int | None = None,
        extras: Sequence[str] = (),
        attrs: dict[str, Any] | None = None,
        overwrite: bool = False,
    ) -> EpisodeStore:
        """Make an episode store with statistics; every value is checked on the way.

        On disk the store appears at `path` when it is complete, not before; after an interruption
        the same call goes on where it stopped.

        Args:
            path: Where to write it; None keeps it in memory.
            max_episodes: Stop after so many.
            extras: Further fields, such as `["infos/qpos"]`, stored as `infos.qpos`.
            attrs: JSON values to keep with the store, besides those of `attrs`.
            overwrite: Replace the store that is at `path`.

        Returns:
            The store. Its fields are obs, action, reward, terminated, truncated and, where the file
            has it, next_obs. Its attributes are those of the file, and `warnings` (what
            `check` found) and `constant_obs_columns`.

        Raises:
            FileExistsError: Something is at `path`.
            ValueError: Values that are not finite, or no such extra field.
        """
        from diffpolicy.data.d4rl.writing import write_store

        return write_store(
            self,
            None if path is None else Path(path),
            max_episodes=max_episodes,
            extras=extras,
            attrs=attrs or {},
            overwrite=overwrite,
        )

    def close(self) -> None:
        """Close the file."""
        self.raw.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- inside --------------------------------------------------------------------------------

    @property
    def _goal_radius(self) -> float | None:
        return next((t.value for t in self._transforms if t.name == "split_goals"), None)

    @property
    def _splits(self) -> bool:
        return self._goal_radius is not None

    @property
    def _obs_shape(self) -> tuple[int, ...]:
        return self.raw.row_shape("observations") or (1,)

    @property
    def _main_fields(self) -> list[str]:
        return [name for name in self.fields if not name.startswith("infos/")]

    def _inspection(self) -> Inspection:
        family = self.info.id.split("-")[0] if self.info else ""
        return Inspection(self.name, bounded=family not in UNBOUNDED)

    @cached_property
    def _raw_rewards(self) -> NDArray[Any]:
        return self.raw.read("rewards")

    @cached_property
    def _whole(self) -> Trips:
        """The episodes, the partial one included; and where goals were reached."""
        timeouts = self.raw.read("timeouts") if "timeouts" in self.raw else None
        limit = self.info.max_episode_steps if self.info else None
        episodes = find_episodes(self.raw.read("terminals"), timeouts, limit)
        radius = self._goal_radius
        if radius is None:
            return Trips(episodes, np.zeros(0, bool))
        goals = self.raw.read(_GOAL)
        size = goals.shape[1]
        positions = self.raw.read("observations")[:, :size]
        return split_at_goals(episodes, positions, goals, radius)

    @property
    def _base_rewards(self) -> NDArray[Any]:
        """`[N]` rewards before they are scaled or shifted."""
        return self._whole.reached.astype(np.float32) if self._splits else self._raw_rewards

    def _blocks(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """Ranges of episodes that together are of moderate size."""
        row_bytes = 4 * sum(int(np.prod(s.shape)) for s in self.fields.values())
        limit = max(_BLOCK_BYTES // row_bytes, 1)
        ends, starts = self.episodes.ends, self.episodes.starts
        while first < stop:
            last = int(np.searchsorted(ends, starts[first] + limit, "right"))
            last = min(max(last, first + 1), stop)
            yield first, last
            first = last

    def _block_ends(self, first: int, last: int) -> NDArray[np.int64]:
        ends: NDArray[np.int64] = self.episodes.ends[first:last] - self.episodes.starts[first]
        return ends

    def _rows(self, first: int, last: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """The fields of the episodes `first..last-1`, back to back."""
        unknown = sorted(set(names) - set(self.fields))
        if unknown:
            raise ValueError(f"{self.name} has no field {unknown}; it has {sorted(self.fields)}")
        start, stop = int(self.episodes.starts[first]), int(self.episodes.ends[last - 1])
        return {name: self._field(name, start, stop) for name in names}

    def _field(self, name: str, start: int, stop: int) -> NDArray[Any]:
        if name == "reward":
            return self.reward_map(self._base_rewards[start:stop]).astype(np.float32)
        if name in ("terminated", "truncated"):
            flags: NDArray[np.bool_] = getattr(self.episodes, name)
            rows = self.episodes.ends[flags] - 1
            found: NDArray[np.bool_] = np.zeros(stop - start, bool)
            found[rows[(rows >= start) & (rows < stop)] - start] = True
            return found
        source = {"obs": "observations", "action": "actions", "next_obs": "next_observations"}
        values = self.raw.read(source.get(name, name), start, stop)
        if name not in source:
            return values.astype(_kept(values.dtype), copy=False)
        if self._splits and name != "action":
            values = np.concatenate([values, self.raw.read(_GOAL, start, stop)], 1)
        with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is reported
            column = values.astype(np.float32)
        return column if column.ndim > 1 else column[:, None]


def _kept(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(np.float32) if dtype == np.float64 else dtype
