"""LeRobot datasets, versions 2.0, 2.1 and 3.0: columns of Parquet files, and films.

``meta/info.json`` describes the features. In versions 2.x every episode has a file
(``data/chunk-000/episode_000000.parquet``) and a line in ``meta/episodes.jsonl``; in 3.0 files hold
many episodes (``data/chunk-000/file-000.parquet``), and ``meta/episodes/`` lists them. Either way
every row says in ``episode_index`` which episode it is of, and in ``timestamp`` which picture of
its films it saw: in 3.0 seconds from where the episode begins in a film of many.

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
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffpolicy.data.fields import FieldSpec
from diffpolicy.data.formats import EpisodeSource
from diffpolicy.data.formats.images import decoded, hwc
from diffpolicy.data.formats.lerobot_store import FILE, read_notes
from diffpolicy.data.formats.video import read_frames
from diffpolicy.data.tasks import FIELD as OBSERVED
from diffpolicy.extras import need

_INFO = "meta/info.json"
# They number rows and are no data of their own.
_INDICES = ("index", "episode_index", "frame_index")
_ENDS = ("next.done", "next.truncated", "next.success")
_MADE = ("terminated", "truncated")  # of the ends, by this module
_AGAIN = "Download the dataset again (a clone needs `git lfs pull`)"
_STATES = ("observation.state", "observation.environment_state")
_CAMERAS = ("video", "image")  # dtypes of features; the second is a column of PNG files
_TASK = "task_index"
_FRACTION = 1e-4  # seconds that a picture may be off, as LeRobot's own reader


class _Episode(NamedTuple):
    """What the list of episodes says of one."""

    number: int
    length: int
    tasks: list[str]
    row: Mapping[str, Any]  # all of it, for where its films are


class LeRobotDirectory(EpisodeSource):
    """A dataset's directory, its episodes in numerical order.

    Fields are the numeric columns, as ``[T]`` where a row has one number, ``terminated`` and
    ``truncated`` (see the module), and the cameras, uint8 ``[T, H, W, C]``, of films or columns of
    pictures. Texts and depths are not read; ``unread`` names them. A column of numbers is read as a
    whole when it is first asked for, pictures by the episode.

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
        self._episodes = self._list()
        with self._reading("the data"):
            self._table = self._arrow.dataset(self._root / "data", format="parquet")
        self._loaded: dict[str, NDArray[Any]] = {}
        self.masks = self._splits()
        self._look()
        with self._reading(FILE):
            there = [*self.fields, _TASK]
            self._notes, why = read_notes(self._root, there, len(self._episodes))
        self.unread = {**self.unread, **({FILE: why} if why else {})}
        noted = zip(self._episodes, self._notes.episodes or [{}] * len(self._episodes), strict=True)
        told = [({"episode_index": e.number, "tasks": e.tasks}, own) for e, own in noted]
        self.episode_attrs = [{**own, **known} for known, own in told]

    @staticmethod
    def matches(path: Path) -> bool:
        """Tell whether ``path`` is a directory with ``meta/info.json``."""
        return (path / _INFO).is_file()

    def default_fields(self) -> dict[str, str | list[str]]:
        """Name cameras, state, environment state; action; with rewards also the ends.

        Of a store that was written all that was; without a state all vectors that are observed.
        """
        if self._notes.fields:
            return dict(self._notes.fields)
        vectors = [n for n, spec in self.fields.items() if len(spec.shape) < 2]
        states = [n for n in _STATES if n in vectors]
        obs = self.with_cameras(states or [n for n in vectors if n.startswith("observation.")])
        chosen: dict[str, str | list[str]] = {"obs": obs} if obs else {}
        if "action" in self.fields:
            chosen["action"] = "action"
        if "next.reward" in self.fields:
            chosen |= {"reward": "next.reward"} | {name: name for name in _MADE}
        return chosen

    @cached_property
    def tasks(self) -> list[str]:
        """The instructions in the order of their ids; none where they are not listed."""
        try:
            with self._reading("the list of tasks"):
                rows = self._rows("tasks.jsonl", "tasks.parquet")
                # Written by pandas, of which the text is the index.
                texts = {r[_TASK]: r.get("task", r.get("__index_level_0__")) for r in rows}
        except FileNotFoundError:
            return []
        return [str(texts.get(i, i)) for i in range(max(texts, default=-1) + 1)]

    @property
    def task_field(self) -> str | None:
        """``task_index``, where there is more than one task to tell apart, or a store has ids."""
        own = self._notes.fields
        several = own.get(OBSERVED) == _TASK if own else len(self.tasks) > 1
        return _TASK if several and _TASK in self.fields else None

    @cached_property
    def attrs(self) -> dict[str, Any]:
        """Version, rate in Hz, robot, tasks by their ids, and the names of the columns' entries."""
        features = self._info["features"]
        return {
            **self._notes.attrs,
            "dataset": _id_of(self._root),
            "lerobot_version": self._info["codebase_version"],
            "fps": self._info.get("fps"),
            "robot_type": self._info.get("robot_type"),
            "tasks": self.tasks or sorted({t for e in self._episodes for t in e.tasks}),
            "names": {
                name: features[name]["names"]
                for name in self.fields
                if name not in self._cameras and features.get(name, {}).get("names")
            },
        }

    def _splits(self) -> dict[str, list[int]]:
        """The splits that ``meta/info.json`` names, such as ``{"train": "0:50"}``."""
        found = {}
        for name, text in dict(self._info.get("splits") or {}).items():
            if span := re.fullmatch(r"(\d+):(\d+)", str(text)):
                said = range(int(span[1]), int(span[2]))
                found[str(name)] = [i for i, e in enumerate(self._episodes) if e.number in said]
        return found

    def episode(self, index: int, fields: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
        """Read ``[T, *shape]`` of each of the ``fields`` (default all) of one episode.

        Raises:
            ValueError: No such field, or the files are damaged or contradict the metadata.
        """
        names, known = self._names(fields), self._episodes[index]
        rows = np.flatnonzero(self._column("episode_index") == known.number)
        if len(rows) != known.length or not len(rows) or rows[-1] - rows[0] != known.length - 1:
            raise ValueError(
                f"{self.name}: episode {known.number} has {len(rows)} rows; the list of episodes "
                f"says {known.length}, back to back. {_AGAIN}"
            )
        span = slice(int(rows[0]), int(rows[-1]) + 1)
        films = {n: self._pictures(n, known, span) for n in names if n in self._cameras}
        columns = {n for n in names if n not in (*_MADE, *films)}
        ends = {n for n in _ENDS if n in self.fields and set(_MADE) & set(names)}
        part = {n: self._column(n)[span] for n in columns | ends}
        made = films | part | _ends(part, known.length)
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

    def _rows(self, old: str, new: str) -> list[dict[str, Any]]:
        """Rows of the metadata: lines of JSON in version 2, a table (or several) in 3."""
        if _major(self._info) == 2:
            lines = (self._root / "meta" / old).read_text(encoding="utf-8").splitlines()
            return [dict(json.loads(line)) for line in lines if line.strip()]
        table = self._arrow.dataset(self._root / "meta" / new, format="parquet")
        names = [n for n in table.schema.names if not n.startswith("stats/")]
        return list(table.to_table(columns=names).to_pylist())

    def _list(self) -> list[_Episode]:
        """Read the list of episodes."""
        with self._reading("the list of episodes"):
            rows = self._rows("episodes.jsonl", "episodes")
            known = [
                _Episode(int(r["episode_index"]), int(r["length"]), list(r.get("tasks") or []), r)
                for r in rows
            ]
        count, said = len({one.number for one in known}), self._info.get("total_episodes")
        if not known or said not in (None, len(known)) or count != len(known):
            raise ValueError(
                f"{self.name}: the list of episodes has {len(known)} entries for {count} episodes; "
                f"{_INFO} says {said}. {_AGAIN}"
            )
        return sorted(known, key=lambda one: one.number)

    def _look(self) -> None:
        """Tell which features are fields, and which are not read."""
        fields: dict[str, FieldSpec] = {}
        unread: dict[str, str] = {}
        self._cameras: set[str] = set()
        for name, feature in self._info["features"].items():
            kind, shape = feature.get("dtype"), tuple(feature.get("shape") or ())
            if name in (*_INDICES, *_MADE):
                continue
            if kind in _CAMERAS and len(shape) == 3 and not _is_depth(feature):
                self._cameras.add(name)
                fields[name] = FieldSpec(hwc(shape), "uint8")
            elif _is_number(kind):
                fields[name] = FieldSpec(() if shape == (1,) else shape, kind)
            else:
                what = "a map of depths" if _is_depth(feature) else kind
                unread[name] = f"{what}: only numbers and colours are read"
        there = self._table.schema.names
        films = {n for n in self._cameras if self._info["features"][n]["dtype"] == "video"}
        if films and "timestamp" not in fields:
            raise ValueError(f"{self.name}: {_INFO} has films, but no timestamps of rows. {_AGAIN}")
        if lacks := sorted({"episode_index", *fields} - films - set(there)):
            raise ValueError(
                f"{self.name}: the data lack the columns {lacks} of {_INFO}; they have {there}"
            )
        self.fields = fields | dict.fromkeys(_MADE, FieldSpec((), "bool"))
        self.unread = unread

    def _pictures(self, name: str, known: _Episode, span: slice) -> NDArray[Any]:
        """``[T, H, W, C]`` of one camera in one episode."""
        spec = self.fields[name]
        if self._info["features"][name]["dtype"] == "video":
            file, start = self._film(name, known)
            times = self._column("timestamp")[span]
            # As float32 they are rounded, in long episodes by more than the fraction.
            tolerance = _FRACTION + float(np.spacing(np.abs(times).max()))
            found = read_frames(self._root / file, start + times.astype(np.float64), tolerance)
        else:
            mine = self._arrow.field("episode_index") == known.number
            with self._reading(f"the pictures {name!r} of episode {known.number}"):
                column = self._table.to_table(columns=[name], filter=mine).column(name)
                found = decoded([one["bytes"] for one in column.to_pylist()], spec.shape)
        if found.shape[1:] != spec.shape:
            raise ValueError(
                f"{self.name}: {name!r} shows {list(found.shape[1:])} in episode {known.number}; "
                f"{_INFO} says {list(spec.shape)}"
            )
        return found

    def _film(self, name: str, known: _Episode) -> tuple[PurePosixPath, float]:
        """The film of a camera's view of an episode, and when the episode begins in it.

        Raises:
            ValueError: The metadata do not say, or point out of the dataset.
        """
        with self._reading(f"where the film {name!r} of episode {known.number} is"):
            size = int(self._info.get("chunks_size") or 1000)
            place = {k: known.row.get(f"videos/{name}/{k}") for k in ("chunk_index", "file_index")}
            place |= {"episode_index": known.number, "episode_chunk": known.number // size}
            file = PurePosixPath(str(self._info["video_path"]).format(video_key=name, **place))
            start = float(known.row.get(f"videos/{name}/from_timestamp") or 0.0)
            if file.is_absolute() or ".." in file.parts:
                raise ValueError(f"{file} lies outside of the dataset")
        return file, start

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
    found = re.match(r"v?(\d+)", str(info["codebase_version"]))
    return int(found[1]) if found else 0


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


def _is_depth(feature: Mapping[str, Any]) -> bool:
    known = {**(feature.get("video_info") or {}), **(feature.get("info") or {})}
    return bool(known.get("is_depth_map") or known.get("video.is_depth_map"))


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
