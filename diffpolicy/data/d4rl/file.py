"""A D4RL file as a source of whole episodes."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from diffpolicy.data.d4rl.description import describe, gaps_of, notes_of
from diffpolicy.data.d4rl.episodes import Episodes, check_ends, read_episodes
from diffpolicy.data.d4rl.inspection import UNBOUNDED, Inspection
from diffpolicy.data.d4rl.location import find_dataset, identify
from diffpolicy.data.d4rl.raw import RawFile
from diffpolicy.data.d4rl.rows import GOAL, SOURCES, block_ends, blocks, kept_type, read_field
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
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from diffpolicy.data.check import Issue
    from diffpolicy.data.formats import Gap
    from diffpolicy.data.selection import Choice
    from diffpolicy.data.store import EpisodeStore


def load_d4rl(
    id_or_path: str | os.PathLike[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    dataset: str | None = None,
    transforms: Sequence[str] = (),
    keep_partial: bool = True,
    max_episode_steps: int | None = None,
) -> D4RLFile:
    """Open a dataset of D4RL, by its id or by its file; the d4rl package is not needed.

    Args:
        id_or_path: Such as `"hopper-medium-v2"`, or the path of a file in D4RL's layout.
        data_dir: Where to look for an id; default `$D4RL_DATASET_DIR`, else `~/.d4rl/datasets`.
        dataset: The id of a file that was renamed; others are recognised by their base name.
        transforms: Names of changes to make, see `diffpolicy.data.d4rl.transforms`.
        keep_partial: Keep the unfinished trajectory at the end of a file, marked `partial: true`.
        max_episode_steps: The step limit of the environment, where the file has no timeouts. A file
            of your own needs it only if it has no `next_observations` either, which show where
            the next row does not follow on.

    Returns:
        The open file. Nothing but its structure was read.

    Raises:
        ImportError: h5py is not installed.
        FileNotFoundError: The file is not there; the message says what to put where.
        ValueError: An unknown id or transform, or no whole D4RL file.
    """
    found = find_dataset(id_or_path, data_dir)
    return D4RLFile(
        found.path,
        dataset=dataset,
        transforms=transforms,
        keep_partial=keep_partial,
        max_episode_steps=max_episode_steps,
    )


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
        max_episode_steps: int | None = None,
    ) -> None:
        self._transforms = parse_transforms(transforms)
        self.transforms = list(transforms)
        self._keep_partial = keep_partial
        self.raw = RawFile(Path(path))
        try:
            self.info, self._foreign = identify(self.raw, dataset)
            self._limit = max_episode_steps
            self._check()
        except ValueError:
            self.raw.close()
            raise

    def _check(self) -> None:
        try:
            check_ends(self.raw, self._dataset_limit, self._limit)
        except ValueError as error:
            raise ValueError(f"{error}{self._foreign and f' ({self._foreign})'}") from error
        goal = self.raw.row_shape(GOAL) if GOAL in self.raw.names else ()
        if self._splits and (len(goal) != 1 or goal[0] > self._obs_shape[0]):
            raise ValueError(
                f"split_goals needs {GOAL} [N, G], a goal position for each row; {self.name} has "
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
            shape = (shape[0] + self.raw.row_shape(GOAL)[0],)
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
                found[name] = FieldSpec(
                    self.raw.row_shape(name), kept_type(self.raw.dtype(name)).name
                )
        return found

    @property
    def attrs(self) -> dict[str, Any]:
        """What belongs beside every score: dataset, transforms, references, notes of the file.

        `dataset` is the id, or for a file that is none of D4RL's its name without `.hdf5`.
        """
        return describe(self)

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
        return notes_of(self)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file, in hexadecimal; all of it is read."""
        with self.raw.path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    @property
    def unread(self) -> dict[str, str]:
        """The arrays that are no field, with the reason; `metadata/` is in `attrs`."""
        layout = {*SOURCES.values(), "terminals", "timeouts"}
        others = [n for n in self.raw.names if n not in layout and not n.startswith("infos/")]
        return {
            **dict.fromkeys(self.raw.odd_names, "no row of numbers for each step"),
            **dict.fromkeys(others, "not of D4RL's layout; as infos/NAME it can be an extra field"),
        }

    @property
    def masks(self) -> dict[str, list[int]]:
        """None; see `episode_attrs`."""
        return {}

    def gaps(self, fields: Sequence[str]) -> list[Gap]:
        """Chunks that were never written."""
        names = {SOURCES.get(name, name) for name in fields} | {"terminals", "timeouts"}
        return gaps_of(self, sorted(names))

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
        return self._inspected.issues()

    def failed_episodes(self) -> dict[int, str]:
        """Number and fault of each episode that cannot be used, or is a copy of an earlier one."""
        return dict(self._inspected.failed)

    def to_store(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        max_episodes: int | None = None,
        exclude: Choice | None = None,
        keep: Choice | None = None,
        allow_missing: bool = False,
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
            exclude: Episodes to leave out, see `diffpolicy.data.selection`.
            keep: Episodes to store; default all.
            allow_missing: Read chunks that were never written as zeros.
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
        from diffpolicy.data.selection import announce, checked_gaps, select

        chosen = select(self, exclude, keep, max_episodes)
        used = [*self._main_fields, *extras]
        chosen, found = checked_gaps(self, used, chosen, allow_missing=allow_missing)
        part = {} if max_episodes is None else {"max_episodes": max_episodes}
        made = write_store(
            self,
            None if path is None else Path(path),
            chosen,
            extras=extras,
            attrs={**part, **(attrs or {})},
            doubts=found,
            overwrite=overwrite,
        )
        announce(made.name, made.attrs)
        return made

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

    @cached_property
    def _inspected(self) -> Inspection:
        inspection = self._inspection()
        for first, last in blocks(self, 0, self.num_episodes):
            columns = self._rows(first, last, self._main_fields)
            start = int(self.episodes.starts[first])
            inspection.add(columns, block_ends(self, first, last), first, start)
        return inspection

    def _inspection(self) -> Inspection:
        family = self.info.id.split("-")[0] if self.info else ""
        return Inspection(self.name, bounded=family not in UNBOUNDED)

    @cached_property
    def _raw_rewards(self) -> NDArray[Any]:
        return self.raw.read("rewards")

    @property
    def _dataset_limit(self) -> int | None:
        return self.info.max_episode_steps if self.info else None

    @cached_property
    def _found(self) -> tuple[Episodes, str]:
        """The trajectories, and how they were found."""
        return read_episodes(self.raw, self._dataset_limit, self._limit)

    @cached_property
    def _whole(self) -> Trips:
        """The episodes, the partial one included; and where goals were reached."""
        episodes, _ = self._found
        radius = self._goal_radius
        if radius is None:
            return Trips(episodes, np.zeros(0, bool))
        goals = self.raw.read(GOAL)
        size = goals.shape[1]
        positions = self.raw.read("observations")[:, :size]
        return split_at_goals(episodes, positions, goals, radius)

    @property
    def _base_rewards(self) -> NDArray[Any]:
        """`[N]` rewards before they are scaled or shifted."""
        return self._whole.reached.astype(np.float32) if self._splits else self._raw_rewards

    def _rows(self, first: int, last: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """The fields of the episodes `first..last-1`, back to back."""
        unknown = sorted(set(names) - set(self.fields))
        if unknown:
            raise ValueError(f"{self.name} has no field {unknown}; it has {sorted(self.fields)}")
        start, stop = int(self.episodes.starts[first]), int(self.episodes.ends[last - 1])
        return {name: read_field(self, name, start, stop) for name in names}
