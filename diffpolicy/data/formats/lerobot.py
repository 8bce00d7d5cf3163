"""LeRobot datasets, versions 2.0, 2.1 and 3.0: the low-dimensional columns of their Parquet files.

`meta/info.json` describes the features. In versions 2.x every episode has a file
(`data/chunk-000/episode_000000.parquet`) and a line in `meta/episodes.jsonl`; in 3.0 files hold
many episodes (`data/chunk-000/file-000.parquet`) and `meta/episodes/` says which.

LeRobot keeps as many observations as actions: nothing is known after the last action, and so there
is no `next_obs`. `next.done` says that an episode ended, by termination or by time-out alike (its
recorders write `terminated or truncated`). Two fields are made of it:

- `terminated`: `next.done` where `next.truncated` is False; without that column, where
  `next.success` is True (LeRobot's environments terminate on success); without both, `next.done`
  itself, as LeRobot's own learner takes it.
- `truncated`: the last step, where it is not terminated.

Choose otherwise with `fields={"terminated": "next.done"}`.
"""

from __future__ import annotations

import json
import os
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from diffpolicy.data.fields import FieldSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from diffpolicy.data.formats import EpisodeSource, Gap

_INFO = "meta/info.json"
_DATA_PATHS = {
    2: "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    3: "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
}
# They number rows and are no data of their own.
_INDICES = ("index", "episode_index", "frame_index")
_ENDS = ("next.done", "next.truncated", "next.success")
_AGAIN = "download the dataset again (a clone needs `git lfs pull`)"


class _Episode(NamedTuple):
    """One line of the list of episodes."""

    number: int
    length: int
    tasks: list[str]
    file: Path


class LeRobotDirectory:
    """A dataset's directory, its episodes in numerical order.

    Fields are the numeric columns, as `[T]` where a row has one number, and `terminated` and
    `truncated` (see the module). Images, videos and text are not read; `unread` names them. One
    file at a time is held in memory, and of it only the columns asked for.

    Args:
        source: The directory, or an id such as `lerobot/pusht` that is looked up in LeRobot's
            folder, `$HF_LEROBOT_HOME`.

    Raises:
        ImportError: pyarrow is not installed.
        FileNotFoundError: Nothing is there, or data files are missing.
        ValueError: Another version, or damaged metadata.
    """

    def __init__(self, source: str | os.PathLike[str]) -> None:
        _parquet()
        self._root = locate(source)
        self._info = _info(self._root)
        self._episodes = _episodes(self._root, self._info)
        missing = sorted({e.file for e in self._episodes if not e.file.is_file()})
        if missing:
            count = len({e.file for e in self._episodes})
            raise FileNotFoundError(
                f"{self._root}: {len(missing)} of {count} data files are missing, such as "
                f"{missing[0].relative_to(self._root)}; {_AGAIN}"
            )
        self._fields, self._unread = self._look()
        self._cache: tuple[Path, tuple[str, ...], dict[str, NDArray[Any]]] | None = None

    @property
    def name(self) -> str:
        """The directory."""
        return str(self._root)

    @property
    def num_episodes(self) -> int:
        """How many there are."""
        return len(self._episodes)

    @property
    def fields(self) -> dict[str, FieldSpec]:
        """The numeric columns, `terminated` and `truncated`."""
        return dict(self._fields)

    @property
    def attrs(self) -> dict[str, Any]:
        """Version, rate in Hz, robot, tasks, and the names of the columns' entries."""
        features = self._info["features"]
        named = {k: features[k]["names"] for k in self._fields if features.get(k, {}).get("names")}
        attrs: dict[str, Any] = {
            "source": {"name": self._root.name, "format": "lerobot"},
            "dataset": _id_of(self._root),
            "lerobot_version": self._info["codebase_version"],
            "fps": self._info.get("fps"),
            "robot_type": self._info.get("robot_type"),
            "tasks": sorted({task for e in self._episodes for task in e.tasks}),
            "names": named,
        }
        return attrs

    @property
    def unread(self) -> dict[str, str]:
        """The features that are no columns of numbers, each with its type."""
        return dict(self._unread)

    @cached_property
    def masks(self) -> dict[str, list[int]]:
        """The splits that `meta/info.json` names, such as `{"train": "0:50"}`."""
        numbers = {e.number: index for index, e in enumerate(self._episodes)}
        found = {}
        for name, text in dict(self._info.get("splits") or {}).items():
            first, colon, stop = str(text).partition(":")
            if colon and first.isdecimal() and stop.isdecimal():
                said = range(int(first), int(stop))
                found[str(name)] = [i for number, i in numbers.items() if number in said]
        return found

    def gaps(self, fields: Sequence[str]) -> list[Gap]:
        """None: Parquet files say how many rows they hold, and gaps in a column are refused."""
        return []

    @property
    def episode_attrs(self) -> list[dict[str, Any]]:
        """The number and the tasks of each episode."""
        return [{"episode_index": e.number, "tasks": list(e.tasks)} for e in self._episodes]

    def episode(self, index: int, fields: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
        """One episode.

        Args:
            index: Its place in numerical order.
            fields: Which fields; default all.

        Returns:
            `[T, *shape]` of each field.

        Raises:
            ValueError: No such field, or the file is damaged or contradicts the metadata.
        """
        names = list(self._fields if fields is None else fields)
        if unknown := sorted(set(names) - set(self._fields)):
            raise ValueError(f"{self._root} has no field {unknown}; it has {sorted(self._fields)}")
        entry = self._episodes[index]
        ends = [n for n in _ENDS if n in self._fields]
        derived = {"terminated", "truncated"} & set(names)
        columns = [n for n in names if n not in ("terminated", "truncated")]
        table = self._table(entry.file, [*columns, *(ends if derived else [])])
        rows = np.flatnonzero(table["episode_index"] == entry.number)
        if len(rows) != entry.length or not len(rows) or rows[-1] - rows[0] != len(rows) - 1:
            raise ValueError(
                f"{entry.file}: episode {entry.number} has {len(rows)} rows; the list of episodes "
                f"says {entry.length}, back to back. The dataset is damaged: {_AGAIN}"
            )
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        result = {n: table[n][part] for n in columns}
        if derived:
            made = _ends({n: table[n][part] for n in ends}, entry.length)
            result |= {n: made[n] for n in sorted(derived)}
        return result

    def close(self) -> None:
        """Let go of what was read."""
        self._cache = None

    # -- inside -------------------------------------------------------------------------------

    def _look(self) -> tuple[dict[str, FieldSpec], dict[str, str]]:
        present = _column_names(self._episodes[0].file)
        fields: dict[str, FieldSpec] = {}
        unread: dict[str, str] = {}
        for name, feature in self._info["features"].items():
            if name in (*_INDICES, "terminated", "truncated"):
                continue
            if not _is_number(feature.get("dtype")):
                unread[name] = f"{feature.get('dtype')}: only columns of numbers are read"
            elif name not in present:
                raise ValueError(
                    f"{self._episodes[0].file} lacks the column {name!r} of {_INFO}; it has "
                    f"{present}"
                )
            else:
                shape = tuple(feature.get("shape") or ())
                fields[name] = FieldSpec(() if shape == (1,) else shape, feature["dtype"])
        ends = {name: FieldSpec((), "bool") for name in ("terminated", "truncated")}
        return fields | ends, unread

    def _table(self, file: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """The columns of a file as arrays; the last file is kept, since 3.0 packs episodes."""
        key = tuple(sorted(set(names)))
        if self._cache is None or self._cache[:2] != (file, key):
            self._cache = None  # before the next one is read
            table = _read(file, ["episode_index", *key])
            arrays = {"episode_index": _array(table, "episode_index", FieldSpec((), "int64"), file)}
            arrays |= {n: _array(table, n, self._fields[n], file) for n in key}
            self._cache = (file, key, arrays)
        return self._cache[2]


def datasets_root() -> Path:
    """Return LeRobot's folder: `$HF_LEROBOT_HOME`, else `lerobot` in `$HF_HOME` or its default."""
    if chosen := os.environ.get("HF_LEROBOT_HOME"):
        return Path(chosen).expanduser()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HOME") or cache).expanduser() / "lerobot"


def locate(source: str | os.PathLike[str]) -> Path:
    """Find the directory of a dataset.

    Args:
        source: The directory, or an id such as `"lerobot/pusht"`: the folder of that name in
            `datasets_root()`, or else the newest snapshot of it in the folder's `hub/`.

    Returns:
        The directory that holds `meta/info.json`.

    Raises:
        FileNotFoundError: There is none; the message says where it was looked for.
    """
    path = Path(source).expanduser()
    if (path / _INFO).is_file():
        return path
    if path.exists() or path.is_absolute():
        raise FileNotFoundError(f"no LeRobot dataset at {path}: there is no {_INFO}")
    name = path.as_posix()
    place = datasets_root() / path
    snapshots = datasets_root() / "hub" / f"datasets--{name.replace('/', '--')}" / "snapshots"
    found = sorted(snapshots.glob(f"*/{_INFO}"), key=lambda p: p.stat().st_mtime)
    for info in [place / _INFO, *reversed(found)]:
        if info.is_file():
            return info.parents[1]
    raise FileNotFoundError(
        f"no LeRobot dataset {name!r}: looked for {place / _INFO} ($HF_LEROBOT_HOME names the "
        f"folder) and in {snapshots}. Get it with `pip install huggingface_hub` and `hf download "
        f"{name} --repo-type dataset --local-dir {place}`, or give its directory"
    )


def matches(path: Path) -> bool:
    """Whether `path` is a directory with `meta/info.json`."""
    return (path / _INFO).is_file()


def open_source(path: Path) -> LeRobotDirectory:
    """Open a dataset; see `LeRobotDirectory`."""
    return LeRobotDirectory(path)


def default_fields(source: EpisodeSource) -> dict[str, str | list[str]]:
    """State before environment state, as LeRobot's policies; action; with rewards also the ends."""
    states = ("observation.state", "observation.environment_state")
    obs = [n for n in states if n in source.fields]
    chosen: dict[str, str | list[str]] = {"obs": obs} if obs else {}
    if "action" in source.fields:
        chosen["action"] = "action"
    if "next.reward" in source.fields:
        chosen |= {"reward": "next.reward", "terminated": "terminated", "truncated": "truncated"}
    return chosen


# -- metadata ---------------------------------------------------------------------------------


def _info(root: Path) -> dict[str, Any]:
    path = root / _INFO
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {_AGAIN}") from error
    lacks = [k for k in ("codebase_version", "features") if k not in dict(info or {})]
    if lacks or not isinstance(info["features"], dict):
        raise ValueError(f"{path} is not LeRobot's: it lacks {lacks or 'a table of features'}")
    if _major(info) not in _DATA_PATHS:
        raise ValueError(
            f"{root} has LeRobot's version {info['codebase_version']!r}; this reads v2.0, v2.1 and "
            "v3.0. Convert it with LeRobot's own scripts"
        )
    return dict(info)


def _major(info: Mapping[str, Any]) -> int | None:
    major = str(info["codebase_version"]).removeprefix("v").partition(".")[0]
    return int(major) if major.isdecimal() else None


def _episodes(root: Path, info: Mapping[str, Any]) -> list[_Episode]:
    major = _major(info) or 0
    rows = _lines(root / "meta/episodes.jsonl") if major == 2 else _episode_tables(root)
    try:
        episodes = sorted(_episode(root, info, row, major) for row in rows)
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{root}: the list of episodes or data_path lacks {error}") from error
    said = info.get("total_episodes")
    numbers = [e.number for e in episodes]
    if not episodes or said not in (None, len(episodes)) or len(set(numbers)) != len(numbers):
        raise ValueError(
            f"{root}: the list of episodes has {len(numbers)} entries for {len(set(numbers))} "
            f"episodes; {_INFO} says {said}. The dataset is damaged or empty: {_AGAIN}"
        )
    return episodes


def _episode(root: Path, info: Mapping[str, Any], row: Mapping[str, Any], major: int) -> _Episode:
    index = int(row["episode_index"])
    places = {"episode_index": index, "episode_chunk": index // int(info.get("chunks_size", 1000))}
    if major == 3:
        places = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
    inner = str(info.get("data_path") or _DATA_PATHS[major]).format(**places)
    if Path(inner).is_absolute() or ".." in Path(inner).parts:
        raise ValueError(f"{root}: data_path leads out of the dataset: {inner!r}")
    return _Episode(index, int(row["length"]), list(row.get("tasks") or []), root / inner)


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


def _episode_tables(root: Path) -> list[dict[str, Any]]:
    files = sorted((root / "meta/episodes").glob("*/*.parquet"))
    if not files:
        raise FileNotFoundError(f"no list of episodes at {root / 'meta/episodes'}; {_AGAIN}")
    wanted = ["episode_index", "length", "tasks", "data/chunk_index", "data/file_index"]
    rows: list[dict[str, Any]] = []
    for file in files:
        present = _column_names(file)
        rows += _read(file, [n for n in wanted if n in present]).to_pylist()
    return rows


def _id_of(root: Path) -> str:
    home = datasets_root()
    if home in root.parents and "hub" not in root.relative_to(home).parts[:1]:
        return root.relative_to(home).as_posix()
    for part in root.parts:
        if part.startswith("datasets--"):
            return part.removeprefix("datasets--").replace("--", "/")
    return root.name


# -- Parquet ----------------------------------------------------------------------------------


def _parquet() -> Any:
    try:
        return import_module("pyarrow.parquet")
    except ImportError as error:
        raise ImportError(
            'reading LeRobot datasets needs pyarrow: pip install "diffpolicy[lerobot]"'
        ) from error


def _column_names(file: Path) -> list[str]:
    """What the file says it holds."""
    try:
        return list(_parquet().read_schema(file).names)
    except (ValueError, OSError) as error:  # pyarrow's own errors are kinds of these
        raise ValueError(f"{file} is not a whole Parquet file ({error}); {_AGAIN}") from error


def _read(file: Path, columns: Sequence[str]) -> Any:
    """Columns of a file, as a table."""
    table = None
    try:
        with _parquet().ParquetFile(file) as opened:
            names = list(opened.schema_arrow.names)
            lacks = [name for name in columns if name not in names]
            if not lacks:
                table = opened.read(columns=list(columns), use_threads=False)
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} is not a whole Parquet file ({error}); {_AGAIN}") from error
    if lacks:
        raise ValueError(f"{file} lacks the columns {lacks}; it has {names}")
    return table


def _array(table: Any, name: str, spec: FieldSpec, file: Path) -> NDArray[Any]:
    """`[rows, *shape]` of a column of numbers, or of (nested) lists of them."""
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
        return np.dtype(dtype).kind in "fiub" if isinstance(dtype, str) else False
    except TypeError:
        return False


def _ends(columns: Mapping[str, NDArray[Any]], length: int) -> dict[str, NDArray[Any]]:
    """`terminated` and `truncated` of one episode; the module says how."""
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
