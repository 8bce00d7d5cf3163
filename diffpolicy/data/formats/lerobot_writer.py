"""Stores as LeRobot datasets of version 3.0: the numbers bit for bit, images as films."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffpolicy.data.blocks import spans
from diffpolicy.data.fields import FieldSpec
from diffpolicy.data.formats.lerobot import LeRobotDirectory
from diffpolicy.data.formats.lerobot_store import StoreNotes
from diffpolicy.data.formats.video import FilmWriter, decibels
from diffpolicy.data.observation import is_obs
from diffpolicy.data.statistics import RunningStatistics, has_statistics
from diffpolicy.data.store import EpisodeStore
from diffpolicy.data.tasks import FIELD as TASK
from diffpolicy.data.tasks import counts_tasks, instructions, told
from diffpolicy.extras import need
from diffpolicy.files import replaced_directory
from diffpolicy.settings import check_range

# As LeRobot: a file is followed by another when it has so many bytes, a folder when it has so many.
_DATA_BYTES, _FILM_BYTES, _FILES = 100 * 2**20, 200 * 2**20, 1000
_FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
_DATA, _FILM = f"data/{_FILE}.parquet", f"videos/{{video_key}}/{_FILE}.mp4"
# Fields of ours that have another name there.
_NAMES = {"obs": "observation.state", "action": "action", "reward": "next.reward"}
_ENDS = {"terminated": "next.done", "truncated": "next.truncated"}
_INDICES = ("timestamp", "frame_index", "episode_index", "index", "task_index")
_PIXELS = 2**12  # of an episode's pictures, for their statistics
_log = logging.getLogger("diffpolicy.data")

Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Written:
    """What became of a store.

    Attributes:
        path: The dataset's directory.
        episodes: How many.
        steps: How many rows.
        fps: Steps a second.
        psnr: Peak signal-to-noise ratio of each camera's films in dB, over all pixels, as they are
            decoded again; infinite if no pixel has changed.
        left_out: What LeRobot has no place for, with the reason.
    """

    path: Path
    episodes: int
    steps: int
    fps: float
    psnr: Mapping[str, float]
    left_out: Mapping[str, str]


def write_lerobot(
    store: EpisodeStore,
    target: str | os.PathLike[str],
    *,
    fps: float | None = None,
    lossless: bool = False,
    overwrite: bool = False,
) -> Written:
    """Write a store as a LeRobot dataset of version 3.0, which its package and ours read.

    ``obs`` or ``obs.state`` becomes ``observation.state``, ``obs.NAME`` ``observation.NAME``,
    images ``observation.images.NAME``; reward and ends ``next.reward``, ``next.done`` and
    ``next.truncated``; other numbers keep their names. Instructions are the episodes' ``tasks``, or
    their ``task``. What LeRobot has no place for, such as seeds of episodes and the store's
    attributes, stands in ``meta/diffpolicy.json``, by which ``convert`` makes the store again.

    Args:
        store: An open store with observations and actions.
        target: The directory to make. It appears when it is complete.
        fps: Steps a second; default the store's attribute ``fps``.
        lossless: Keep every pixel (H.264 in RGB, which fewer players show); otherwise H.264 at
            quality 18.
        overwrite: Replace the dataset that was written to ``target``.

    Returns:
        What was written, and how well the films show what they should.

    Raises:
        ImportError: pyarrow is not installed; or PyAV, and there are images.
        FileExistsError: Something is at ``target``.
        ValueError: Nothing says how many steps a second has, or there is no observation or action,
            or none in some episode.

    Example:
        >>> write_lerobot(EpisodeStore.open("data/pusht.zarr"), "data/pusht_lerobot", fps=10)
    """
    rate = store.attrs.get("fps") if fps is None else fps
    if rate is None:
        raise ValueError(
            f"{store.name} does not say how many steps a second has; give it, such as fps=10"
        )
    check_range("(0, inf)", fps=rate)
    goal = Path(target)
    if goal.exists() and not overwrite and (goal.is_file() or any(goal.iterdir())):
        raise FileExistsError(f"{goal} exists; choose another path, remove it, or overwrite=true")
    with replaced_directory(goal) as partial:
        writer = _Writer(store, partial, Fraction(rate).limit_denominator(1001), lossless)
        writer.write()
        psnr = writer.compare()
    done = Written(goal, len(store), store.num_steps, float(rate), psnr, writer.left_out)
    for name, why in done.left_out.items():
        _log.warning("%s leaves out %s: %s", goal, name, why)
    return done


@dataclass
class _Rolling:
    """Numbered files, each for as many episodes as fit in."""

    template: str
    number: int = 0
    writer: Any = None

    @property
    def place(self) -> dict[str, int]:
        """Which file it is, as LeRobot counts."""
        return {"chunk_index": self.number // _FILES, "file_index": self.number % _FILES}

    def path(self, root: Path, **names: str) -> Path:
        """Where it is."""
        path = root / self.template.format(**names, **self.place)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def close(self) -> None:
        """Finish the present file; the next episode begins another."""
        if self.writer is not None:
            self.writer.close()
            self.writer, self.number = None, self.number + 1


@dataclass
class _Writer:
    """One store on its way into the directory ``root``."""

    store: EpisodeStore
    root: Path
    fps: Fraction
    lossless: bool
    left_out: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._arrow, self._parquet = need("pyarrow"), need("pyarrow.parquet")
        self.names = self._named()  # of what is written: the field that it comes from
        self.cameras = {n for n, f in self.names.items() if self.store.fields[f].is_image}
        self._films = {n: _Rolling(_FILM) for n in self.cameras}
        self._data = _Rolling(_DATA)
        self._rows: list[dict[str, Any]] = []  # of the list of episodes
        self._said: dict[str, dict[str, Any]] = {}  # of each camera's films
        self._tasks, self._known = instructions(self.store), self.store.episode_attrs
        self._say_episodes()
        self._totals: dict[str, RunningStatistics] = {}

    def _named(self) -> dict[str, str]:
        """The name there of every field that has a place."""
        found: dict[str, str] = {}
        for name, spec in self.store.fields.items():
            other = _name(name, spec)
            why = _no_place(name, spec) or (other in found and f"{other} is {found[other]}")
            if why:
                self.left_out[name] = why
            elif name != TASK or not counts_tasks(self.store):
                found[other] = name
        kinds = {name.partition(".")[0] for name in found}
        if lacks := [name for name in ("observation", "action") if name not in kinds]:
            raise ValueError(
                f"{self.store.name} has no {' and no '.join(lacks)}; its fields are "
                f"{sorted(self.store.fields)}: convert it to a store of ours before"
            )
        return found

    def _say_episodes(self) -> None:
        """See what episodes were told, of which LeRobot keeps one instruction a step.

        Raises:
            ValueError: Some have no actions, which would be written as zeros.
        """
        if len(idle := np.flatnonzero(~self.store.has_actions)):
            raise ValueError(
                f"the episodes {idle.tolist()} of {self.store.name} have no actions, which LeRobot "
                f"cannot say: leave them out by `diffpolicy data filter {self.store.name} "
                "OTHER.zarr exclude=actions=false`"
            )
        several = [i for i, known in enumerate(self._known) if len(told(known)) > 1]
        if several and not counts_tasks(self.store):
            self.left_out["tasks"] = f"of the several of each of {several} the first stands for all"

    def write(self) -> None:
        """Write data, films and metadata."""
        for index, (start, stop) in enumerate(spans(self.store.episode_ends)):
            self._write_episode(index, start, stop)
        for file in (self._data, *self._films.values()):
            file.close()
        arrow, tables = self._arrow, self.root / "meta/episodes/chunk-000/file-000.parquet"
        tables.parent.mkdir(parents=True)
        self._parquet.write_table(arrow.Table.from_pylist(self._rows), tables)
        texts = arrow.table({"task_index": range(len(self._tasks)), "task": self._tasks})
        texts = texts.replace_schema_metadata({"pandas": json.dumps(_PANDAS)})
        self._parquet.write_table(texts, self.root / "meta/tasks.parquet")
        stats = {name: _as_lists(running.result()) for name, running in self._totals.items()}
        for name, value in {"info": self._info(), "stats": stats}.items():
            text = json.dumps(value, indent=1, allow_nan=False)
            (self.root / f"meta/{name}.json").write_text(text + "\n")
        StoreNotes(self._read_again(), self.store.attrs, self._known).write(self.root)

    def _read_again(self) -> dict[str, str]:
        """Of the store's fields, what our reader has them as."""
        found = {own: own if own == "terminated" else name for name, own in self.names.items()}
        return found | ({TASK: "task_index"} if counts_tasks(self.store) else {})

    def _write_episode(self, index: int, start: int, stop: int) -> None:
        columns = {n: self.store.read(f, start, stop) for n, f in self.names.items()}
        steps = stop - start
        if "next.done" in columns and "next.truncated" in columns:
            columns["next.done"] = columns["next.done"] | columns["next.truncated"]
        films = {name: columns.pop(name) for name in self.cameras}
        columns |= self._indices(index, start, stop)
        ids = np.unique(columns["task_index"]).tolist()
        row: dict[str, Any] = {
            "episode_index": index,
            "tasks": [self._tasks[i] for i in ids],
            "length": steps,
            "dataset_from_index": start,
            "dataset_to_index": stop,
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
        }
        row |= {f"data/{k}": v for k, v in self._append(columns).items()}
        for name, pictures in films.items():
            row |= {f"videos/{name}/{k}": v for k, v in self._film(name, pictures).items()}
        for name, values in {**columns, **films}.items():
            known = _as_lists(self._described(name, values))
            row |= {f"stats/{name}/{part}": value for part, value in known.items()}
        self._rows.append(row)

    def _indices(self, index: int, start: int, stop: int) -> Columns:
        """What LeRobot counts: steps, episodes, seconds; and the task of each step."""
        frames = np.arange(stop - start)
        if counts_tasks(self.store):
            ids = self.store.read(TASK, start, stop).reshape(-1)
        else:
            said = told(self._known[index]) or self._tasks
            ids = np.full(len(frames), self._tasks.index(said[0]))
        return {
            "timestamp": (frames / float(self.fps)).astype(np.float32),
            "frame_index": frames,
            "episode_index": np.full(len(frames), index),
            "index": np.arange(start, stop),
            "task_index": ids.astype(np.int64),
        }

    def _append(self, columns: Columns) -> dict[str, int]:
        """Write an episode's rows, a row group by itself; return in which file."""
        table = self._arrow.table({name: self._column(v) for name, v in columns.items()})
        path = self._data.path(self.root)
        if self._data.writer is None:
            self._data.writer = self._parquet.ParquetWriter(path, table.schema)
        self._data.writer.write_table(table)
        place = self._data.place
        if path.stat().st_size > _DATA_BYTES:
            self._data.close()
        return place

    def _column(self, values: NDArray[Any]) -> Any:
        """An array ``[T, ...]`` as LeRobot writes it: vectors of a fixed size, lists of lists."""
        values = values[:, 0] if values.shape[1:] == (1,) else values
        found = self._arrow.array(values.reshape(-1))
        for size in reversed(values.shape[1:]):
            if values.ndim == 2:
                return self._arrow.FixedSizeListArray.from_arrays(found, size)
            steps = self._arrow.array(np.arange(0, len(found) + 1, size, dtype=np.int32))
            found = self._arrow.ListArray.from_arrays(steps, found)
        return found

    def _film(self, name: str, pictures: NDArray[Any]) -> dict[str, float]:
        """Append an episode's pictures to a film; return which one, and from when to when."""
        film = self._films[name]
        path = film.path(self.root, video_key=name)
        if film.writer is None:
            shape = pictures.shape[1:]
            film.writer = FilmWriter(path, self.fps, shape, lossless=self.lossless)
            self._said[name] = film.writer.described
        first = film.writer.count
        film.writer.append(pictures)
        times = {"from_timestamp": first / self.fps, "to_timestamp": film.writer.count / self.fps}
        place = film.place
        if path.stat().st_size > _FILM_BYTES:
            film.close()
        return place | {k: float(v) for k, v in times.items()}

    def _described(self, name: str, values: NDArray[Any]) -> dict[str, Any]:
        """Statistics of an episode's column, which those of the whole take, too."""
        rows = values[:, None] if values.ndim == 1 else values
        if name in self.cameras:  # of colours in [0, 1], as [3, 1, 1]
            pixels = values.reshape(-1, 3)
            pixels = pixels[:: max(1, len(pixels) // _PIXELS)]
            rows = (pixels / 255).reshape(-1, 3, 1, 1)
        elif not has_statistics(FieldSpec.of(rows)):
            return {}
        shape, many = rows.shape[1:], len(rows) * len(self.store)
        total = self._totals.setdefault(name, RunningStatistics(name, shape, many))
        one = RunningStatistics(name, shape, len(rows))
        for running in (total, one):
            running.update(rows)
        return one.result()

    def _info(self) -> dict[str, Any]:
        whole, said = self.fps.denominator == 1, self.store.attrs
        kinds = self.store.fields
        features: dict[str, Any] = {}
        for name, own in self.names.items():
            shape = list(kinds[own].shape) or [1]
            labels = (said.get("names") or {}).get(name)
            features[name] = {"dtype": kinds[own].dtype, "shape": shape, "names": labels}
            if name in self.cameras:
                features[name] |= {"dtype": "video", "info": self._said[name]}
                features[name]["names"] = ["height", "width", "channels"]
        for name in _INDICES:
            kind = "float32" if name == "timestamp" else "int64"
            features[name] = {"dtype": kind, "shape": [1], "names": None}
        return {
            "codebase_version": "v3.0",
            "robot_type": said.get("robot_type"),
            "total_episodes": len(self.store),
            "total_frames": self.store.num_steps,
            "total_tasks": len(self._tasks),
            "chunks_size": _FILES,
            "data_files_size_in_mb": _DATA_BYTES >> 20,
            "video_files_size_in_mb": _FILM_BYTES >> 20,
            "fps": int(self.fps) if whole else float(self.fps),
            "splits": {"train": f"0:{len(self.store)}"},
            "data_path": _DATA,
            "video_path": _FILM if self.cameras else None,
            "features": features,
        }

    def compare(self) -> dict[str, float]:
        """Decode all films again; return each camera's peak signal-to-noise ratio in dB."""
        errors: dict[str, list[float]] = {name: [] for name in sorted(self.cameras)}
        made = LeRobotDirectory(self.root)
        for index in range(len(self.store) if errors else 0):
            shown = made.episode(index, list(errors))
            meant = self.store.episode(index, [self.names[name] for name in errors])
            for name, squares in errors.items():
                off = shown[name].astype(np.int16) - meant[self.names[name]]
                squares.append(float(np.square(off, dtype=np.float64).sum()))
        sizes = {n: self.store.num_steps * self.store.fields[self.names[n]].size for n in errors}
        return {name: decibels(sum(found) / sizes[name]) for name, found in errors.items()}


def _name(name: str, spec: FieldSpec) -> str:
    """What a field of ours is called there."""
    if spec.is_image:
        part = name.removeprefix("obs.")
        return "observation.image" if name == "obs" else f"observation.images.{part}"
    part = f"observation.{name[4:]}" if is_obs(name) else name
    return {**_NAMES, **_ENDS}.get(name, part)


def _no_place(name: str, spec: FieldSpec) -> str | None:
    """Why LeRobot has no place for a field, if it has none."""
    if spec.is_image and spec.shape[2:] != (3,):
        return f"films show pictures of three colours, not {list(spec.shape)}"
    if is_obs(name.removeprefix("next_")) and not is_obs(name):
        return "nothing is kept of what follows the last action"
    return "LeRobot counts this itself" if name in (*_INDICES, "task") else None


def _as_lists(known: Mapping[str, Any]) -> dict[str, Any]:
    """Statistics as LeRobot has them: lists, the count too."""
    return {part: value if isinstance(value, list) else [value] for part, value in known.items()}


# By this pandas takes the texts for the names of the rows, which LeRobot looks them up by.
_COLUMNS = {"task_index": ("int64", "int64"), "task": ("unicode", "object")}
_PANDAS = {
    "index_columns": ["task"],
    "column_indexes": [],
    "columns": [
        {"name": n, "field_name": n, "pandas_type": kind, "numpy_type": numpy, "metadata": None}
        for n, (kind, numpy) in _COLUMNS.items()
    ],
    "pandas_version": "2.0.0",
}
