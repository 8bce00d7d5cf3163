"""LeRobot datasets, versions 2.0, 2.1 and 3.0: the low-dimensional columns of their Parquet files.

``meta/info.json`` describes the features. In versions 2.x every episode has a file
(``data/chunk-000/episode_000000.parquet``) and a line in ``meta/episodes.jsonl``; in 3.0 files hold
many episodes (``data/chunk-000/file-000.parquet``), and ``meta/episodes/`` lists them. Either way
every row says in ``episode_index`` which episode it is of.

LeRobot keeps as many observations as actions: nothing is known after the last action, and so there
is no ``next_obs``. ``next.done`` says that an episode ended, by termination or by time-out alike
(its recorders write ``terminated or truncated``). Two fields are made of it:

- ``terminated``: ``next.done`` where ``next.truncated`` is False; without that column, where
  ``next.success`` is True (LeRobot's environments terminate on success); without both,
  ``next.done`` itself, as LeRobot's own learner takes it.
- ``truncated``: the last step, where it is not terminated.

Choose otherwise with ``fields={"terminated": "next.done"}``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffpolicy.data.fields import FieldSpec
from diffpolicy.data.formats import EpisodeSource
from diffpolicy.extras import need

_INFO = "meta/info.json"
# They number rows and are no data of their own.
_INDICES = ("index", "episode_index", "frame_index")
_ENDS = ("next.done", "next.truncated", "next.success")
_MADE = ("terminated", "truncated")  # of the ends, by this module
_AGAIN = "Download the dataset again (a clone needs `git lfs pull`)"


class LeRobotDirectory(EpisodeSource):
    """A dataset's directory, its episodes in numerical order.

    Fields are the numeric columns, as ``[T]`` where a row has one number, and ``terminated`` and
    ``truncated`` (see the module). Images, videos and text are not read; ``unread`` names them. A
    column is read as a whole when it is first asked for.

    Args:
        path: The directory, or an id such as ``lerobot/pusht`` that is looked up in LeRobot's
            folder, ``$HF_LEROBOT_HOME``.

    Raises:
        ImportError: pyarrow is not installed.
        FileNotFoundError: Nothing is there.
        ValueError: Another version, or damaged metadata or files.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._arrow = need("pyarrow.dataset")
        self._root = locate(path)
        self.name = str(self._root)
        self._info = self._read_info()
        self._lengths = self._list()
        with self._reading("the data"):
            self._table = self._arrow.dataset(self._root / "data", format="parquet")
        self._loaded: dict[str, NDArray[Any]] = {}
        self._look()

    @staticmethod
    def matches(path: Path) -> bool:
        """Tell whether ``path`` is a directory with ``meta/info.json``."""
        return (path / _INFO).is_file()

    def default_fields(self) -> dict[str, str | list[str]]:
        """Name state before environment state, as LeRobot; action; with rewards also the ends."""
        states = ("observation.state", "observation.environment_state")
        obs = [n for n in states if n in self.fields]
        chosen: dict[str, str | list[str]] = {"obs": obs} if obs else {}
        if "action" in self.fields:
            chosen["action"] = "action"
        if "next.reward" in self.fields:
            chosen |= {"reward": "next.reward", "terminated": "terminated"}
            chosen |= {"truncated": "truncated"}
        return chosen

    @cached_property
    def attrs(self) -> dict[str, Any]:
        """Version, rate in Hz, robot, tasks, and the names of the columns' entries."""
        features = self._info["features"]
        return {
            "dataset": _id_of(self._root),
            "lerobot_version": self._info["codebase_version"],
            "fps": self._info.get("fps"),
            "robot_type": self._info.get("robot_type"),
            "tasks": sorted({task for known in self.episode_attrs for task in known["tasks"]}),
            "names": {
                name: features[name]["names"]
                for name in self.fields
                if features.get(name, {}).get("names")
            },
        }

    @cached_property
    def masks(self) -> dict[str, list[int]]:
        """The splits that ``meta/info.json`` names, such as ``{"train": "0:50"}``."""
        found = {}
        for name, text in dict(self._info.get("splits") or {}).items():
            first, _, stop = str(text).partition(":")
            if first.isdecimal() and stop.isdecimal():
                said = range(int(first), int(stop))
                numbers = (known["episode_index"] for known in self.episode_attrs)
                found[str(name)] = [i for i, number in enumerate(numbers) if number in said]
        return found

    def episode(self, index: int, fields: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
        """Read ``[T, *shape]`` of each of the ``fields`` (default all) of one episode.

        Raises:
            ValueError: No such field, or the files are damaged or contradict the metadata.
        """
        names, length = self._names(fields), self._lengths[index]
        number = self.episode_attrs[index]["episode_index"]
        rows = np.flatnonzero(self._column("episode_index") == number)
        if len(rows) != length or not length or rows[-1] - rows[0] != length - 1:
            raise ValueError(
                f"{self.name}: episode {number} has {len(rows)} rows; the list of episodes says "
                f"{length}, back to back. {_AGAIN}"
            )
        columns = {n for n in names if n not in _MADE}
        ends = {n for n in _ENDS if n in self.fields and set(_MADE) & set(names)}
        part = {n: self._column(n)[rows[0] : rows[-1] + 1] for n in columns | ends}
        made = part | _ends(part, length)
        return {n: made[n] for n in names}

    # -- inside -------------------------------------------------------------------------------

    def _read_info(self) -> dict[str, Any]:
        with self._reading(_INFO):
            info = dict(json.loads((self._root / _INFO).read_text(encoding="utf-8")))
            version, _ = info["codebase_version"], dict(info["features"])
        if _major(info) not in (2, 3):
            raise ValueError(
                f"{self.name} has LeRobot's version {version!r}; this reads v2.0, v2.1 and v3.0. "
                "Convert it with LeRobot's own scripts"
            )
        return info

    def _list(self) -> list[int]:
        """Read the list of episodes into ``episode_attrs``; return their lengths."""
        with self._reading("the list of episodes"):
            if _major(self._info) == 2:
                text = (self._root / "meta/episodes.jsonl").read_text(encoding="utf-8")
                rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            else:
                found = self._arrow.dataset(self._root / "meta/episodes", format="parquet")
                columns = {"episode_index", "length", "tasks"} & set(found.schema.names)
                rows = found.to_table(columns=sorted(columns)).to_pylist()
            known = sorted(
                (int(row["episode_index"]), int(row["length"]), row.get("tasks") or [])
                for row in rows
            )
        count, said = len({number for number, *_ in known}), self._info.get("total_episodes")
        if not known or said not in (None, len(known)) or count != len(known):
            raise ValueError(
                f"{self.name}: the list of episodes has {len(known)} entries for {count} episodes; "
                f"{_INFO} says {said}. {_AGAIN}"
            )
        self.episode_attrs = [
            {"episode_index": number, "tasks": list(tasks)} for number, _, tasks in known
        ]
        return [length for _, length, _ in known]

    def _look(self) -> None:
        """Tell which features are fields, and which are not read."""
        fields: dict[str, FieldSpec] = {}
        unread: dict[str, str] = {}
        for name, feature in self._info["features"].items():
            if name in (*_INDICES, *_MADE):
                continue
            if not _is_number(feature.get("dtype")):
                unread[name] = f"{feature.get('dtype')}: only columns of numbers are read"
                continue
            shape = tuple(feature.get("shape") or ())
            fields[name] = FieldSpec(() if shape == (1,) else shape, feature["dtype"])
        there = self._table.schema.names
        if lacks := sorted({"episode_index", *fields} - set(there)):
            raise ValueError(
                f"{self.name}: the data lack the columns {lacks} of {_INFO}; they have {there}"
            )
        self.fields = fields | dict.fromkeys(_MADE, FieldSpec((), "bool"))
        self.unread = unread

    def _column(self, name: str) -> NDArray[Any]:
        """``[rows, *shape]`` of a column of numbers, or of (nested) lists of them."""
        if name not in self._loaded:
            spec = self.fields.get(name, FieldSpec((), "int64"))
            with self._reading("the data"):
                column = self._table.to_table(columns=[name]).column(name).combine_chunks()
            try:
                self._loaded[name] = _array(column, spec)
            except ValueError as error:
                raise ValueError(
                    f"{self.name}, column {name!r}: expected numbers of shape {list(spec.shape)} "
                    f"in every row, as {_INFO} says; got {column.type} {error}"
                ) from None
        return self._loaded[name]


def datasets_root() -> Path:
    """Return LeRobot's folder: ``$HF_LEROBOT_HOME``, else ``lerobot`` in ``$HF_HOME``."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    home = Path(os.environ.get("HF_HOME") or cache) / "lerobot"
    return Path(os.environ.get("HF_LEROBOT_HOME") or home).expanduser()


def locate(source: str | os.PathLike[str]) -> Path:
    """Find the directory of a dataset.

    Args:
        source: The directory, or an id such as ``"lerobot/pusht"``: the folder of that name in
            ``datasets_root()``, or else the newest snapshot of it in the folder's ``hub/``.

    Returns:
        The directory that holds ``meta/info.json``.

    Raises:
        FileNotFoundError: There is none; the message says where it was looked for.
    """
    path = Path(source).expanduser()
    if (path / _INFO).is_file():
        return path
    if path.exists() or path.is_absolute():
        raise FileNotFoundError(f"no LeRobot dataset at {path}: there is no {_INFO}")
    name, place = path.as_posix(), datasets_root() / path
    if (place / _INFO).is_file():
        return place
    snapshots = datasets_root() / "hub" / f"datasets--{name.replace('/', '--')}" / "snapshots"
    if found := list(snapshots.glob(f"*/{_INFO}")):
        return max(found, key=lambda info: info.stat().st_mtime).parents[1]
    raise FileNotFoundError(
        f"no LeRobot dataset {name!r}: looked for {place / _INFO} ($HF_LEROBOT_HOME names the "
        f"folder) and in {snapshots}. Get it with `pip install huggingface_hub` and `hf download "
        f"{name} --repo-type dataset --local-dir {place}`, or give its directory"
    )


def _id_of(root: Path) -> str:
    home = datasets_root()
    if home in root.parents and "hub" not in root.relative_to(home).parts[:1]:
        return root.relative_to(home).as_posix()
    hub = (part for part in root.parts if part.startswith("datasets--"))
    return next(hub, root.name).removeprefix("datasets--").replace("--", "/")


def _major(info: Mapping[str, Any]) -> int:
    major = str(info["codebase_version"]).removeprefix("v").partition(".")[0]
    return int(major) if major.isdecimal() else 0


def _array(column: Any, spec: FieldSpec) -> NDArray[Any]:
    """A column as an array of a shape; ``ValueError`` if rows differ in size or are missing."""
    count = len(column)
    column = getattr(column, "storage", column)  # of an extension type, such as Array2D
    sizes = list(spec.shape)
    while hasattr(column, "value_lengths"):
        size = sizes.pop(0) if sizes else 1
        lengths = np.unique(column.value_lengths().to_numpy(zero_copy_only=False))
        if column.null_count or (lengths != size).any():
            raise ValueError(f"with other sizes or gaps: {lengths.tolist()}")
        column = column.flatten()
    values = np.asarray(column.to_numpy(zero_copy_only=False))
    if sizes or column.null_count or values.dtype.kind not in "fiub":
        raise ValueError("with gaps, or not of numbers")
    return values.reshape(count, *spec.shape).astype(spec.dtype, copy=False)


def _is_number(dtype: Any) -> bool:
    try:
        return isinstance(dtype, str) and np.dtype(dtype).kind in "fiub"
    except TypeError:
        return False


def _ends(columns: Mapping[str, NDArray[Any]], length: int) -> dict[str, NDArray[Any]]:
    """``terminated`` and ``truncated`` of one episode; the module says how."""
    done = columns.get("next.done", np.zeros(length, bool)).astype(bool)
    if "next.truncated" in columns:
        terminated = done & ~columns["next.truncated"].astype(bool)
    elif "next.success" in columns:
        terminated = done & columns["next.success"].astype(bool)
    else:
        terminated = done
    truncated = np.zeros(length, bool)
    truncated[-1] = not terminated[-1]
    return {"terminated": terminated, "truncated": truncated}
