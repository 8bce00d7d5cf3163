"""A D4RL file as a source of whole episodes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffpolicy.data.d4rl.catalogue import SOURCE
from diffpolicy.data.d4rl.episodes import Episodes, read_episodes
from diffpolicy.data.d4rl.location import find_dataset, identify
from diffpolicy.data.d4rl.raw import REQUIRED, RawFile
from diffpolicy.data.d4rl.transforms import RewardMap, parse_transforms, reward_map, split_at_goals
from diffpolicy.data.fields import FieldSpec
from diffpolicy.data.formats import EpisodeSource, Gap, hdf5_names
from diffpolicy.data.store import EpisodeStore
from diffpolicy.settings import check_range

_GOAL = "infos/goal"  # the goal that was pursued in each row, in the maze files
# The array that each field is made of.
_SOURCES = {
    "obs": "observations",
    "action": "actions",
    "reward": "rewards",
    "next_obs": "next_observations",
}
_VECTORS = ("obs", "action", "next_obs")
_ENDS = ("terminated", "truncated")
# D4RL's continuous actions lie in [-1, 1], apart from these families.
_UNBOUNDED = ("flow", "minigrid")
_SLACK = 1e-5


def load_d4rl(
    id_or_path: str | os.PathLike[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    **options: Any,
) -> D4RLFile:
    """Open a dataset of D4RL, by its id or by its file; the d4rl package is not needed.

    Args:
        id_or_path: Such as ``"hopper-medium-v2"``, or the path of a file in D4RL's layout.
        data_dir: Where to look for an id; default ``$D4RL_DATASET_DIR``, else
            ``~/.d4rl/datasets``.
        options: ``dataset``, ``transforms``, ``keep_partial`` and ``max_episode_steps`` of
            ``D4RLFile``.

    Returns:
        The open file. Nothing but its structure was read.

    Raises:
        ImportError: h5py is not installed.
        FileNotFoundError: The file is not there; the message says what to put where.
        ValueError: An unknown id or transform, or no whole D4RL file.

    Example:
        >>> with load_d4rl("hopper-medium-v2") as file:
        ...     store = file.to_store("hopper.zarr")
    """
    return D4RLFile(find_dataset(id_or_path, data_dir), **options)


class D4RLFile(EpisodeSource):
    """An open D4RL file: whole episodes, read when asked for.

    Fields: ``obs`` ``[T, ...]`` and ``action`` ``[T, A]`` and ``reward`` ``[T]``, all float32;
    ``terminated`` and ``truncated`` ``[T]`` bool, true at most in the last row; ``next_obs`` if the
    file has it; and ``infos/<name>`` in their own types (float64 as float32).

    Args:
        path: The file.
        dataset: The id of a file that was renamed; others are recognised by their base name.
        transforms: Names of changes to make, see ``diffpolicy.data.d4rl.transforms``.
        keep_partial: Keep the unfinished trajectory at the end of a file, marked ``partial: true``.
        max_episode_steps: The step limit of the environment, where the file has no timeouts. A file
            of your own needs it only if it has no ``next_observations`` either, which show where
            the next row does not follow on.

    Attributes:
        raw: The arrays as they are in the file.
        info: What the catalogue says of the dataset; None for a file of another name.
        transforms: Names of the transforms, as they were given.
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
        check_range("[1, inf)", max_episode_steps=max_episode_steps)
        self._changes = parse_transforms(transforms)
        self.transforms = list(transforms)
        self._keep_partial = keep_partial
        self._asked_limit = max_episode_steps
        self.raw = self._file = RawFile(Path(path))
        self.name = str(self.raw.path)
        try:
            self.info, self._foreign = identify(self.raw, dataset)
            self._check()
        except ValueError:
            self.raw.close()
            raise
        self.fields, self.unread = self._fields(), self._left_over()

    def _check(self) -> None:
        known = "timeouts" in self.raw or "next_observations" in self.raw
        if not known and self.step_limit is None:
            raise ValueError(
                f"{self.name} has neither timeouts nor next_observations, which say where its "
                f"episodes end; say the step limit: max_episode_steps=N. {self._foreign}"
            )
        if self.splits:
            goal = self.raw.row_shape(_GOAL) if _GOAL in self.raw.names else ()
            if len(goal) != 1 or goal[0] > self.raw.row_shape("observations")[0]:
                has = f"{self.name} has {sorted(self.raw.names)}"
                raise ValueError(f"split_goals needs {_GOAL} [N, G], a goal for each row; {has}")

    def _fields(self) -> dict[str, FieldSpec]:
        shape = self.raw.row_shape("observations") or (1,)
        if self.splits:
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
                found[name] = FieldSpec(self.raw.row_shape(name), _kept_type(self.raw.dtype(name)))
        return found

    @staticmethod
    def matches(path: Path) -> bool:
        """Tell whether ``path`` is an HDF5 file with D4RL's arrays at its top."""
        return set(REQUIRED) <= set(hdf5_names(path) or ())

    # -- what it is ----------------------------------------------------------------------------

    def default_fields(self) -> dict[str, str | list[str]]:
        """Name all that a step consists of, without further ``infos/``, as a store calls it."""
        return {name: name for name in self.fields if not name.startswith("infos/")}

    @property
    def step_limit(self) -> int | None:
        """The step limit that the user gave, or that of the dataset."""
        return self._asked_limit or (self.info.max_episode_steps if self.info else None)

    @property
    def num_steps(self) -> int:
        """How many steps the episodes have in all."""
        return int(self.episodes.ends[-1]) if self.num_episodes else 0

    @cached_property
    def attrs(self) -> dict[str, Any]:
        """What belongs beside every score: dataset, transforms, references, notes of the file.

        ``dataset`` is the id, or for a file that is none of D4RL's its name without ``.hdf5``.
        """
        info, said = self.info, self.raw.notes()
        low, high = (info.ref_min, info.ref_max) if info else (None, None)
        known = {"env_id": said["env_id"]} if isinstance(said.get("env_id"), str) else {}
        return known | {
            "origin": "d4rl",
            "dataset": info.id if info else self.raw.path.stem,
            "file": self.raw.path.name,
            "file_bytes": self.raw.path.stat().st_size,
            "file_sha256": self.digest,
            "transforms": list(self.transforms),
            "reward_scale": self.reward_map.scale,
            "reward_shift": self.reward_map.shift,
            "goal_radius": self._goal_radius,
            "references": {"min": low, "max": high, "source": SOURCE},
            "max_episode_steps": self.step_limit,
            "notes": self.notes,
            "metadata": said,
        }

    @cached_property
    def episode_attrs(self) -> list[dict[str, Any]]:
        """``{"partial": True}`` for an unfinished last episode, ``{}`` for the others."""
        last = len(self.episodes.ends) - 1 if self.episodes.partial else None
        return [{"partial": True} if i == last else {} for i in range(len(self.episodes.ends))]

    @property
    def notes(self) -> list[str]:
        """What was decided while reading, in words."""
        how = self._found[1]
        if how and self.info is not None and self._asked_limit is None:
            how += f", the limit of {self.info.id}"
        found = [text for text in (how, self._foreign) if text]
        if self._whole[0].partial:
            what = "kept, marked partial" if self._keep_partial else "left out"
            found.append(f"the file ends within an episode, which was {what}")
        return found

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file, in hexadecimal; all of it is read."""
        with self.raw.path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def _left_over(self) -> dict[str, str]:
        """The arrays that are no field, with the reason; ``metadata/`` is in ``attrs``."""
        layout = {*_SOURCES.values(), "terminals", "timeouts"}
        others = [n for n in self.raw.names if n not in layout and not n.startswith("infos/")]
        return {
            **dict.fromkeys(self.raw.odd_names, "no row of numbers for each step"),
            **dict.fromkeys(others, "not of D4RL's layout; as infos/NAME it can be an extra field"),
        }

    def gaps(self, fields: Sequence[str]) -> list[Gap]:
        """List the rows that were never written, as ranges of episodes."""
        names = {_SOURCES.get(name, name) for name in fields} | {"terminals", "timeouts"}
        ends, found = self.episodes.ends, []
        for name, start, stop in self.raw.unwritten(sorted(names)):
            first, last = np.searchsorted(ends, [start, stop - 1], side="right").tolist()
            if first < len(ends):
                reason = f"{name}: rows {start}..{stop - 1} were never written, and read as zeros"
                found.append(Gap(first, min(last, len(ends) - 1), reason))
        return found

    # -- episodes ------------------------------------------------------------------------------

    @property
    def episodes(self) -> Episodes:
        """Where the episodes end, and how."""
        return self._whole[0] if self._keep_partial else self._whole[0].complete()

    @property
    def returns(self) -> NDArray[np.float64]:
        """``[E]`` undiscounted returns of the episodes, of untransformed rewards."""
        return self.episodes.sums(self._raw_rewards)

    @cached_property
    def reward_map(self) -> RewardMap:
        """What ``transforms`` make of a reward (after ``split_goals`` has computed it anew)."""
        lengths = np.diff(self.episodes.ends, prepend=0)
        return reward_map(self._changes, self.episodes.sums(self._whole[1]), lengths)

    def episode(self, index: int, fields: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
        """Read ``[T, *shape]`` of each of the ``fields`` (default all) of one episode.

        Raises:
            IndexError: There is no such episode.
            ValueError: No such field, or the file is damaged there.
        """
        if not 0 <= index < self.num_episodes:
            raise IndexError(f"episode {index} of {self.name}, which has {self.num_episodes}")
        return {name: self._column(name, index) for name in self._names(fields)}

    def remarks(self, store: EpisodeStore) -> dict[str, Any]:
        """Name observed entries that never change, and warn of actions outside of D4RL's bounds."""
        known = store.statistics
        largest = np.abs([known["action"]["min"], known["action"]["max"]]).max()
        family = self.info.id.split("-")[0] if self.info else ""
        far = family not in _UNBOUNDED and largest > 1 + _SLACK
        where = f"{self.name}: actions lie outside [-1, 1], up to {largest:.6g}"
        warnings = [f"{where}: clip them, or learn in their own units"] if far else []
        obs = known.get("obs")
        constant = np.equal(obs["min"], obs["max"]) if obs else []
        return {"constant_obs_columns": np.flatnonzero(constant).tolist(), "warnings": warnings}

    def to_store(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        extras: Sequence[str] = (),
        **options: Any,
    ) -> EpisodeStore:
        """Make an episode store with statistics; every value is checked on the way.

        Args:
            path: Where to write it; None keeps it in memory.
            extras: Further fields, such as ``["infos/qpos"]``, stored as ``infos.qpos``.
            options: ``max_episodes``, ``exclude``, ``keep``, ``allow_missing``, ``attrs`` and
                ``overwrite`` of :func:`~diffpolicy.data.conversion.convert`.

        Returns:
            The store. Its fields are obs, action, reward, terminated, truncated and, where the file
            has it, next_obs. Its attributes are those of the file, and ``warnings`` (what is
            doubtful about the values) and ``constant_obs_columns``.

        Raises:
            FileExistsError: Something is at ``path``.
            ValueError: Values that are not finite, or no such extra field.
        """
        from diffpolicy.data.conversion import convert

        fields = {name.replace("/", "."): name for name in extras}
        return convert(self, path, fields=fields, **options)

    # -- inside --------------------------------------------------------------------------------

    @property
    def _goal_radius(self) -> float | None:
        return next((t.value for t in self._changes if t.name == "split_goals"), None)

    @property
    def splits(self) -> bool:
        """Whether trajectories were split at their goals."""
        return self._goal_radius is not None

    @cached_property
    def _raw_rewards(self) -> NDArray[Any]:
        return self.raw.read("rewards")

    @cached_property
    def _found(self) -> tuple[Episodes, str]:
        """The trajectories, and how they were found."""
        of_dataset = self.info.max_episode_steps if self.info else None
        return read_episodes(self.raw, of_dataset, self._asked_limit)

    @cached_property
    def _whole(self) -> tuple[Episodes, NDArray[Any]]:
        """The episodes, the partial one included; ``[N]`` rewards, not scaled or shifted yet."""
        radius = self._goal_radius
        if radius is None:
            return self._found[0], self._raw_rewards
        goals = self.raw.read(_GOAL)
        positions = self.raw.read("observations")[:, : goals.shape[1]]
        trips, reached = split_at_goals(self._found[0], positions, goals, radius)
        return trips, reached.astype(np.float32)

    def _column(self, name: str, index: int) -> NDArray[Any]:
        """One field of one episode."""
        ends = self.episodes.ends
        start, stop = int(ends[index - 1]) if index else 0, int(ends[index])
        if name == "reward":
            return self.reward_map(self._whole[1][start:stop]).astype(np.float32)
        if name in _ENDS:  # true in last rows alone
            return np.append(np.zeros(stop - start - 1, bool), getattr(self.episodes, name)[index])
        values = self.raw.read(_SOURCES.get(name, name), start, stop)
        if name not in _VECTORS:
            return values.astype(_kept_type(values.dtype), copy=False)
        if self.splits and name != "action":
            values = np.concatenate([values, self.raw.read(_GOAL, start, stop)], 1)
        with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is reported
            column = values.astype(np.float32)
        return column if column.ndim > 1 else column[:, None]


def _kept_type(dtype: np.dtype[Any]) -> str:
    """The type in which further fields are kept: float64 as float32."""
    return "float32" if dtype == np.float64 else dtype.name
