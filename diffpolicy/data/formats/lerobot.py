"""LeRobot datasets, versions 2.0, 2.1 and 3.0: the low-dimensional columns of their Parquet files.

``meta/info.json`` describes the features. In versions 2.x every episode has a file
(``data/chunk-000/episode_000000.parquet``) and a line in ``meta/episodes.jsonl``; in 3.0 files hold
many episodes (``data/chunk-000/file-000.parquet``) and ``meta/episodes/`` says which.

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
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from diffpolicy.data.fields import FieldSpec
from diffpolicy.data.formats import EpisodeSource, require

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

_INFO = "meta/info.json"
_DATA_PATHS = {
    2: "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    3: "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
}
# They number rows and are no data of their own.
_INDICES = ("index", "episode_index", "frame_index")
_ENDS = ("next.done", "next.truncated", "next.success")
_MADE = ("terminated", "truncated")  # of the ends, by this module
_LISTED = ("episode_index", "length", "tasks", "data/chunk_index", "data/file_index")
_AGAIN = "download the dataset again (a clone needs `git lfs pull`)"


class _Episode(NamedTuple):
    """One line of the list of episodes."""

    number: int
    length: int
    tasks: list[str]
    file: Path


class LeRobotDirectory(EpisodeSource):
    """A dataset's directory, its episodes in numerical order.

    Fields are the numeric columns, as ``[T]`` where a row has one number, and ``terminated`` and
    ``truncated`` (see the module). Images, videos and text are not read; ``unread`` names them. One
    file at a time is held in memory, and of it only the columns asked for.

    Args:
        path: The directory, or an id such as ``lerobot/pusht`` that is looked up in LeRobot's
            folder, ``$HF_LEROBOT_HOME``.

    Raises:
        ImportError: pyarrow is not installed.
        FileNotFoundError: Nothing is there, or data files are missing.
        ValueError: Another version, or damaged metadata.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._parquet = require("pyarrow.parquet", "reading LeRobot datasets")
        self._root = locate(path)
        self.name = str(self._root)
        self._info = _read_info(self._root)
        self._episodes = self._listed()
        self.episode_attrs = [
            {"episode_index": e.number, "tasks": list(e.tasks)} for e in self._episodes
        ]
        files = {e.file for e in self._episodes}
        if missing := sorted(file for file in files if not file.is_file()):
            raise FileNotFoundError(
                f"{path}: {len(missing)} of {len(files)} data files are missing, such as "
                f"{missing[0].relative_to(self._root)}; {_AGAIN}"
            )
        self._look()
        self._cache: tuple[Path, set[str], dict[str, NDArray[Any]]] | None = None

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
            "source": {"name": self._root.name, "format": "lerobot"},
            "dataset": _id_of(self._root),
            "lerobot_version": self._info["codebase_version"],
            "fps": self._info.get("fps"),
            "robot_type": self._info.get("robot_type"),
            "tasks": sorted({task for e in self._episodes for task in e.tasks}),
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
                found[str(name)] = [i for i, e in enumerate(self._episodes) if e.number in said]
        return found

    def episode(self, index: int, fields: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
        """Read ``[T, *shape]`` of each of the ``fields`` (default all) of one episode.

        Raises:
            ValueError: No such field, or the file is damaged or contradicts the metadata.
        """
        names, entry = self._names(fields), self._episodes[index]
        columns = {n for n in names if n not in _MADE}
        ends = {n for n in _ENDS if n in self.fields and set(_MADE) & set(names)}
        table = self._table(entry.file, {"episode_index"} | columns | ends)
        rows = np.flatnonzero(table["episode_index"] == entry.number)
        if len(rows) != entry.length or not len(rows) or rows[-1] - rows[0] != len(rows) - 1:
            raise ValueError(
                f"{entry.file}: episode {entry.number} has {len(rows)} rows; the list of episodes "
                f"says {entry.length}, back to back. The dataset is damaged: {_AGAIN}"
            )
        part = {n: values[rows[0] : rows[-1] + 1] for n, values in table.items()}
        made = part | _ends(part, entry.length)
        return {n: made[n] for n in names}

    # -- metadata -----------------------------------------------------------------------------

    def _listed(self) -> list[_Episode]:
        """The list of episodes, by their numbers."""
        major = _major(self._info)
        rows = _lines(self._root / "meta/episodes.jsonl") if major == 2 else self._list_tables()
        try:
            episodes = sorted(self._entry(row) for row in rows)
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"{self.name}: the list of episodes or data_path lacks {error}"
            ) from None
        count, said = len({e.number for e in episodes}), self._info.get("total_episodes")
        if not episodes or said not in (None, len(episodes)) or count != len(episodes):
            raise ValueError(
                f"{self.name}: the list of episodes has {len(episodes)} entries for {count} "
                f"episodes; {_INFO} says {said}. The dataset is damaged or empty: {_AGAIN}"
            )
        return episodes

    def _list_tables(self) -> list[dict[str, Any]]:
        folder = self._root / "meta/episodes"
        files = sorted(folder.glob("*/*.parquet"))
        if not files:
            raise FileNotFoundError(f"no list of episodes at {folder}; {_AGAIN}")
        return [row for file in files for row in self._read(file, _LISTED).to_pylist()]

    def _entry(self, row: Mapping[str, Any]) -> _Episode:
        major, index = _major(self._info), int(row["episode_index"])
        chunk = index // int(self._info.get("chunks_size", 1000))
        places = {"episode_index": index, "episode_chunk": chunk}
        if major == 3:
            places = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
        inner = Path(str(self._info.get("data_path") or _DATA_PATHS[major]).format(**places))
        if inner.is_absolute() or ".." in inner.parts:
            raise ValueError(f"{self.name}: data_path leads out of the dataset: {str(inner)!r}")
        return _Episode(index, int(row["length"]), list(row.get("tasks") or []), self._root / inner)

    def _look(self) -> None:
        """Tell which features are fields, and which are not read."""
        file = self._episodes[0].file
        present = self._read(file, ()).column_names
        fields: dict[str, FieldSpec] = {}
        unread: dict[str, str] = {}
        for name, feature in self._info["features"].items():
            if name in (*_INDICES, *_MADE):
                continue
            if not _is_number(feature.get("dtype")):
                unread[name] = f"{feature.get('dtype')}: only columns of numbers are read"
                continue
            if name not in present:
                raise ValueError(f"{file} lacks the column {name!r} of {_INFO}; it has {present}")
            shape = tuple(feature.get("shape") or ())
            fields[name] = FieldSpec(() if shape == (1,) else shape, feature["dtype"])
        self.fields = fields | dict.fromkeys(_MADE, FieldSpec((), "bool"))
        self.unread = unread

    # -- Parquet ------------------------------------------------------------------------------

    def _table(self, file: Path, names: set[str]) -> dict[str, NDArray[Any]]:
        """The columns of a file as arrays; the last file is kept, since 3.0 packs episodes."""
        if self._cache is None or self._cache[:2] != (file, names):
            self._cache = None  # before the next one is read
            table = self._read(file, sorted(names))
            if lacks := sorted(names - set(table.column_names)):
                raise ValueError(f"{file} lacks the columns {lacks}")
            specs = {**self.fields, "episode_index": FieldSpec((), "int64")}
            self._cache = (file, names, {n: _array(table, n, specs[n], file) for n in names})
        return self._cache[2]

    def _read(self, file: Path, columns: Sequence[str]) -> Any:
        """Those of the columns that a file has, as a table; none given: all, without rows."""
        try:
            with self._parquet.ParquetFile(file) as opened:
                schema = opened.schema_arrow
                if not columns:
                    return schema.empty_table()
                there = [name for name in columns if name in schema.names]
                return opened.read(columns=there, use_threads=False)
        except (ValueError, OSError) as error:  # pyarrow's own errors are kinds of these
            raise ValueError(f"{file} is not a whole Parquet file ({error}); {_AGAIN}") from error


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


def _read_info(root: Path) -> dict[str, Any]:
    path = root / _INFO
    try:
        info = dict(json.loads(path.read_text(encoding="utf-8")) or {})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); {_AGAIN}") from error
    lacks = [k for k in ("codebase_version", "features") if k not in info]
    if lacks or not isinstance(info["features"], dict):
        raise ValueError(f"{path} is not LeRobot's: it lacks {lacks or 'a table of features'}")
    if _major(info) not in _DATA_PATHS:
        raise ValueError(
            f"{root} has LeRobot's version {info['codebase_version']!r}; this reads v2.0, v2.1 and "
            "v3.0. Convert it with LeRobot's own scripts"
        )
    return info


def _major(info: Mapping[str, Any]) -> int:
    major = str(info["codebase_version"]).removeprefix("v").partition(".")[0]
    return int(major) if major.isdecimal() else 0


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"no list of episodes at {path}; {_AGAIN}")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is damaged ({error}); {_AGAIN}") from error
    return rows


def _array(table: Any, name: str, spec: FieldSpec, file: Path) -> NDArray[Any]:
    """``[rows, *shape]`` of a column of numbers, or of (nested) lists of them."""
    column = table.column(name).combine_chunks()
    column = getattr(column, "storage", column)  # of an extension type, such as Array2D
    wanted, fits = list(spec.shape), True
    while hasattr(column, "value_lengths"):
        lengths = np.unique(column.value_lengths().to_numpy(zero_copy_only=False))
        size = wanted.pop(0) if wanted else 1
        fits = fits and column.null_count == 0 and bool((lengths == size).all())
        column = column.flatten()
    values = np.asarray(column.to_numpy(zero_copy_only=False))
    if not fits or wanted or column.null_count or values.dtype.kind not in "fiub":
        raise ValueError(
            f"{file}, column {name!r}: expected numbers of shape {list(spec.shape)} in every row, "
            f"as {_INFO} says; got {table.column(name).type}, with other sizes or gaps"
        )
    return values.reshape(table.num_rows, *spec.shape).astype(spec.dtype, copy=False)


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
