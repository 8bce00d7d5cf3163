"""Minari datasets in HDF5, read with h5py alone: `<id>/data/main_data.hdf5` and `metadata.json`.

An episode of T steps is the group `episode_<i>` with `observations` (T + 1 rows), `actions`,
`rewards`, `terminations`, `truncations` (T rows) and `infos`; observations and actions may be
groups of groups. Minari 0.4 keeps the metadata as attributes of the file instead.

A dataset is named by its file, its directory or its id, such as `mujoco/hopper/medium-v0`, which
is looked up in `$MINARI_DATASETS_PATH` or else `~/.minari/datasets`. `minari download ID` (of the
minari package, which is not needed otherwise) puts datasets there.
"""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from diffpolicy.data.fields import FieldSpec
from diffpolicy.data.formats import Gap
from diffpolicy.data.hdf5 import open_hdf5, read_rows, unwritten_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from diffpolicy.data.formats import EpisodeSource

_MAIN = "main_data.hdf5"
_STEPS = {"reward": "rewards", "terminated": "terminations", "truncated": "truncations"}
_PROVENANCE = ("minari_version", "algorithm_name", "author", "code_permalink", "description")


class _Column(NamedTuple):
    """Where in an episode's group a field is, and which of its rows: see `_rows`."""

    place: str
    kind: str  # "observation", "next_observation", "step" or "info"


class MinariFile:
    """An open dataset, its episodes in numerical order (`episode_2` before `episode_10`).

    Fields of an episode of T steps, `[T, *shape]` each: `observation` (the first T of the T + 1)
    and `next_observation` (the last T), `action`, `reward`, `terminated`, `truncated`, and what is
    numeric in the infos as `info.<key>` (the first T where there are T + 1). Every leaf of a
    dictionary or tuple is a field of its own: `observation.achieved_goal`, `action.0`. Text and
    JPEG-encoded images are not read; `unread` names them.

    Args:
        source: `main_data.hdf5`, a directory that holds it (or `data/main_data.hdf5`), or an id.

    Raises:
        ImportError: h5py is not installed.
        FileNotFoundError: Nothing is there; the message says where it was looked for.
        ValueError: It is not a whole Minari dataset, or not one in HDF5.
    """

    def __init__(self, source: str | os.PathLike[str]) -> None:
        self._path = locate(source)
        self._file = open_hdf5(self._path, "reading Minari datasets")
        try:
            self._metadata = _metadata(self._path, self._file)
            self._episodes = _episode_names(self._path, self._file, self._metadata)
            self._columns, self._fields, self._unread = self._look()
            self._episode_attrs = [self._attrs_of(name) for name in self._episodes]
        except BaseException:
            self._file.close()
            raise

    @property
    def name(self) -> str:
        """The path."""
        return str(self._path)

    @property
    def num_episodes(self) -> int:
        """How many there are."""
        return len(self._episodes)

    @property
    def fields(self) -> dict[str, FieldSpec]:
        """The numeric fields of the first episode."""
        return dict(self._fields)

    @property
    def attrs(self) -> dict[str, Any]:
        """Id, environment, reference scores and provenance, as far as the metadata say them."""
        known = self._metadata
        attrs = {key: known[key] for key in _PROVENANCE if key in known}
        attrs |= {"source": {"name": self._path.name, "format": "minari"}}
        attrs |= {"dataset": str(known.get("dataset_id") or _id_of(self._path))}
        for key in ("env_spec", "eval_env_spec"):
            if spec := _json_or_none(known.get(key)):
                attrs[key] = spec
        if "env_spec" in attrs:
            attrs["env_id"] = attrs["env_spec"].get("id")
        scores = {k: known.get(f"ref_{k}_score") for k in ("min", "max")}
        if None not in scores.values():
            episodes = known.get("num_episodes_average_score")
            attrs["reference_scores"] = scores | {"episodes": episodes, "source": "minari"}
        return attrs

    @property
    def unread(self) -> dict[str, str]:
        """What of an episode is not made of numbers, with the reason."""
        return dict(self._unread)

    @property
    def masks(self) -> Mapping[str, Sequence[int]]:
        """None; Minari has no splits."""
        return {}

    def gaps(self, fields: Sequence[str]) -> list[Gap]:
        """Chunks that were never written."""
        places = sorted({self._columns[n].place for n in fields if n in self._columns})
        return [
            Gap(index, index, f"{name}/{place}: rows {rows} were never written, and read as zeros")
            for index, name in enumerate(self._episodes)
            for place in places
            if (member := self._file.get(f"{name}/{place}")) is not None
            for rows in [unwritten_rows(member)]
            if rows
        ]

    @property
    def episode_attrs(self) -> list[dict[str, Any]]:
        """`id`, `seed` and what else the file says of each episode."""
        return [dict(attrs) for attrs in self._episode_attrs]

    def episode(self, index: int, fields: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
        """One episode.

        Args:
            index: Its place in numerical order.
            fields: Which fields; default all of the first episode.

        Returns:
            `[T, *shape]` of each field; `terminated` and `truncated` are bool.

        Raises:
            ValueError: The episode lacks a field, is damaged, or does not hold T + 1 observations
                for T steps.
        """
        name = self._episodes[index]
        names = list(self._fields if fields is None else fields)
        if unknown := sorted(set(names) - set(self._columns)):
            raise ValueError(f"{self._path} has no field {unknown}; it has {sorted(self._fields)}")
        places = {self._columns[n].place for n in names} | {"rewards"}
        values = {place: self._read(name, place) for place in places}
        steps = len(values["rewards"])
        said = self._file[name].attrs.get("total_steps")
        if steps == 0 or (said is not None and int(said) != steps):
            raise ValueError(
                f"{self._path}: {name} has {steps} rewards; expected {said or 'at least 1'}. The "
                "dataset is damaged: download it again, or leave the episode out"
            )
        where = f"{self._path}: {name}"
        return {
            n: _rows(values[self._columns[n].place], self._columns[n], steps, where) for n in names
        }

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    # -- inside -------------------------------------------------------------------------------

    def _read(self, episode: str, place: str) -> NDArray[Any]:
        where = f"{self._path}: {episode}/{place}"
        found = self._file[episode].get(place)
        if found is None:
            raise ValueError(f"{where} is missing; the episode has {sorted(self._file[episode])}")
        if not hasattr(found, "shape"):
            raise ValueError(f"{where} is a group, not an array; download it again")
        return read_rows(found, where)

    def _look(self) -> tuple[dict[str, _Column], dict[str, FieldSpec], dict[str, str]]:
        """The fields of the first episode, and what of it is not read."""
        group = self._file[self._episodes[0]]
        columns: dict[str, _Column] = {}
        specs: dict[str, FieldSpec] = {}
        unread: dict[str, str] = {}
        spaces = {k: _json_or_none(self._metadata.get(f"{k}_space")) for k in _SPACED}
        for base, place in (*_SPACED.items(), *_STEPS.items(), ("info", "infos")):
            if place not in group:
                if base != "info":
                    raise ValueError(
                        f"{self._path} is not a Minari dataset: {group.name} has no {place!r}, "
                        f"only {sorted(group)}"
                    )
                continue
            for name, inner, leaf, space in _leaves(group[place], base, place, spaces.get(base)):
                if reason := _unreadable(leaf, space):
                    unread[name] = reason
                    continue
                boolean = base in ("terminated", "truncated")
                spec = FieldSpec(tuple(leaf.shape[1:]), "bool" if boolean else str(leaf.dtype))
                kind = base if base in ("observation", "info") else "step"
                columns[name], specs[name] = _Column(inner, kind), spec
                if base == "observation":
                    columns[f"next_{name}"] = _Column(inner, "next_observation")
                    specs[f"next_{name}"] = spec
        return columns, specs, unread

    def _attrs_of(self, name: str) -> dict[str, Any]:
        attrs = {str(k): _plain(v) for k, v in self._file[name].attrs.items()}
        if attrs.get("seed") in (None, "None"):  # Minari 0.4 wrote the text "None"
            attrs.pop("seed", None)
        return {"id": _number(name)} | {k: v for k, v in attrs.items() if k != "total_steps"}


_SPACED = {"observation": "observations", "action": "actions"}


def datasets_root() -> Path:
    """Return where Minari keeps datasets: `$MINARI_DATASETS_PATH`, else `~/.minari/datasets`."""
    chosen = os.environ.get("MINARI_DATASETS_PATH")
    return Path(chosen).expanduser() if chosen else Path.home() / ".minari" / "datasets"


def locate(source: str | os.PathLike[str]) -> Path:
    """Find the `main_data.hdf5` of a dataset.

    Args:
        source: The file, a directory that holds it (or `data/main_data.hdf5`), or an id such as
            `"D4RL/pen/human-v2"`, looked up in `datasets_root()`.

    Returns:
        The file.

    Raises:
        FileNotFoundError: There is none; the message says where it was looked for and how to get
            it.
        ValueError: The dataset is stored as Arrow or Parquet.
    """
    path = Path(source).expanduser()
    root = datasets_root()
    is_id = not path.exists() and not path.is_absolute()
    place = root / path if is_id else path
    if place.is_file():
        return place
    for candidate in (place / _MAIN, place / "data" / _MAIN):
        if candidate.is_file():
            return candidate
    for directory in (place, place / "data"):
        stored = _stored_format(directory)
        if stored not in (None, "hdf5"):
            raise ValueError(
                f"{place} is stored as {stored!r}; this reads 'hdf5' alone. Make it anew with "
                'minari\'s data_format="hdf5", or download it: published datasets are HDF5'
            )
    raise FileNotFoundError(_missing(path.as_posix(), place, root, is_id=is_id))


def matches(path: Path) -> bool:
    """Whether `path` is a `main_data.hdf5` or a dataset's directory."""
    if path.is_file():
        return path.name == _MAIN
    return any((path / inner).is_file() for inner in (_MAIN, f"data/{_MAIN}", "data/metadata.json"))


def open_source(path: Path) -> MinariFile:
    """Open a dataset; see `MinariFile`."""
    return MinariFile(path)


def default_fields(source: EpisodeSource) -> dict[str, str | list[str]]:
    """Observations, actions, rewards, both kinds of end, and the observations after each step.

    A dictionary of vectors becomes one vector in the order of its space, which is the order of
    `gymnasium.wrappers.FlattenObservation`. Where a part is not of floating-point numbers (an
    index, text, an image) nothing is chosen. Name `next_obs` along with `obs` when you choose
    yourself: `fields={"obs": ["observation.x"], "next_obs": next_fields(["observation.x"])}`.
    """
    chosen: dict[str, str | list[str]] = {}
    unread = source.unread
    for target, base in (("obs", "observation"), ("action", "action")):
        names = [n for n in source.fields if n == base or n.startswith(f"{base}.")]
        floats = all(np.dtype(source.fields[n].dtype).kind == "f" for n in names)
        whole = not any(name == base or name.startswith(f"{base}.") for name in unread)
        if names and floats and whole:
            chosen[target] = names
    chosen |= {name: name for name in _STEPS}
    # Of a choice among several parts only the user knows, and next_obs must follow it.
    if chosen.get("obs") == ["observation"]:
        chosen["next_obs"] = next_fields(["observation"])
    return chosen


def next_fields(obs: Sequence[str]) -> list[str]:
    """Name the fields that hold, for these fields of the observation, the values after the step.

    Returns:
        As many names; none if a field is no part of the observation, which has no next value.
    """
    known = all(n == "observation" or n.startswith("observation.") for n in obs)
    return [f"next_{name}" for name in obs] if known else []


# -- reading ----------------------------------------------------------------------------------


def _rows(values: NDArray[Any], column: _Column, steps: int, where: str) -> NDArray[Any]:
    extra = len(values) - steps
    wanted = {"step": (0,), "info": (0, 1)}.get(column.kind, (1,))
    if extra not in wanted:
        expected = " or ".join(str(steps + n) for n in wanted)
        hint = "; Minari keeps the observation after the last step too" if wanted == (1,) else ""
        raise ValueError(
            f"{where}/{column.place} has {len(values)} rows for {steps} steps; expected "
            f"{expected}{hint}"
        )
    if column.place in ("terminations", "truncations"):
        return values.astype(bool)
    return values[extra:] if column.kind == "next_observation" else values[:steps]


def _leaves(node: Any, name: str, place: str, space: Any) -> Iterator[tuple[str, str, Any, Any]]:
    """Datasets below a node, in the order of its space: field name, place, dataset, space."""
    if not hasattr(node, "keys"):
        yield name, place, node, space
        return
    inner = (space or {}).get("subspaces", {})
    if isinstance(inner, list):  # a tuple
        inner = {f"_index_{i}": part for i, part in enumerate(inner)}
    others = sorted(set(node) - set(inner), key=lambda k: (len(k) * k.startswith("_index_"), k))
    for key in [k for k in inner if k in node] + others:
        short = key.removeprefix("_index_")
        yield from _leaves(node[key], f"{name}.{short}", f"{place}/{key}", inner.get(key))


def _unreadable(leaf: Any, space: Mapping[str, Any] | None) -> str | None:
    """Why a dataset is not a field; None if it is one."""
    if leaf.dtype.kind not in "fiub":
        return "text or encoded images"
    if leaf.ndim == 0:
        return "not a row a step"
    shape = (space or {}).get("shape")
    if (space or {}).get("type") == "Box" and shape and list(leaf.shape[1:]) != list(shape):
        return f"rows of {list(leaf.shape[1:])} for a space of {list(shape)}: encoded images"
    return None


def _metadata(path: Path, file: Any) -> dict[str, Any]:
    beside = path.with_name("metadata.json")
    if not beside.is_file():
        return {str(k): _plain(v) for k, v in file.attrs.items()}
    try:
        known = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{beside} is damaged ({error}); download it again") from error
    if not isinstance(known, dict):
        raise ValueError(f"{beside} must hold a JSON object; got {type(known).__name__}")
    return known


def _episode_names(path: Path, file: Any, metadata: Mapping[str, Any]) -> list[str]:
    names = sorted((n for n in file if _number(n) is not None), key=lambda n: _number(n) or 0)
    if not names:
        raise ValueError(
            f"{path} is not a Minari dataset: it has no episode_<i> groups, only {sorted(file)[:5]}"
        )
    said = metadata.get("total_episodes")
    if said is not None and int(said) != len(names):
        raise ValueError(
            f"{path} has {len(names)} episodes, but its metadata say {said}: an interrupted "
            "download or collection. Download it again"
        )
    return names


def _number(name: str) -> int | None:
    prefix, _, number = name.rpartition("_")
    return int(number) if prefix == "episode" and number.isdecimal() else None


def _plain(value: Any) -> Any:
    """An HDF5 attribute as a JSON value."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _json_or_none(text: Any) -> Any:
    """The object that a text of the metadata holds (Minari nests JSON in JSON)."""
    try:
        value = json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


# -- looking for it ---------------------------------------------------------------------------


def _id_of(path: Path) -> str:
    directory = path.parent.parent if path.parent.name == "data" else path.parent
    root = datasets_root()
    return directory.relative_to(root).as_posix() if root in directory.parents else directory.name


def _stored_format(directory: Path) -> str | None:
    try:
        known = json.loads((directory / "metadata.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(known["data_format"]) if isinstance(known, dict) and "data_format" in known else None


def _missing(name: str, place: Path, root: Path, *, is_id: bool) -> str:
    if not is_id:
        below = _ids_below(place) if place.is_dir() else []
        inner = f"; it holds the datasets {below[:8]}, name one of them" if below else ""
        return f"no Minari dataset at {place}: there is no {_MAIN} and no data/{_MAIN}{inner}"
    here = _ids_below(root)
    near = difflib.get_close_matches(name, here, n=3, cutoff=0.6)
    hint = f"There are {near}. " if near else ""
    return (
        f"no Minari dataset {name!r}: looked for {place / 'data' / _MAIN} "
        f"($MINARI_DATASETS_PATH names the folder). {hint}Get it with "
        f'`pip install "minari[hdf5,hf]"` and `minari download {name}`, or give its path'
    )


def _ids_below(root: Path) -> list[str]:
    """Ids of the datasets below a folder; they are nested three deep at most in practice."""
    found: set[str] = set()
    for depth in range(5):
        pattern = "/".join(["*"] * depth + ["data", _MAIN])
        found |= {p.parents[1].relative_to(root).as_posix() for p in root.glob(pattern)}
    return sorted(found - {"."})
