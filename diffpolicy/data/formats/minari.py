"""Minari datasets, read by the minari package: HDF5, Arrow and Parquet, with decoded images.

A dataset is named by its directory or its id, such as ``mujoco/hopper/medium-v0``, which is looked
up in ``$MINARI_DATASETS_PATH`` or else ``~/.minari/datasets``; ``minari download ID`` puts datasets
there. Datasets of Minari 0.4, whose metadata lie within the HDF5 file, are not read.

An episode of T steps has T + 1 observations, T actions, rewards, terminations and truncations, and
T or T + 1 rows of infos; observations and actions may be dictionaries and tuples.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffpolicy.data.fields import FieldSpec, jsonable
from diffpolicy.data.formats import EpisodeSource, Gap
from diffpolicy.data.hdf5 import open_hdf5, unwritten_rows
from diffpolicy.extras import need

_METADATA = "metadata.json"
_HDF5 = "main_data.hdf5"
# Fields of an episode, and what minari calls them.
_PARTS = {
    "observation": "observations",
    "action": "actions",
    "reward": "rewards",
    "terminated": "terminations",
    "truncated": "truncations",
    "info": "infos",
}
_ENDS = ("terminated", "truncated")
_AGAIN = "Download it again"
_PROVENANCE = ("minari_version", "algorithm_name", "author", "code_permalink", "description")


class MinariDataset(EpisodeSource):
    """An open dataset, its episodes in numerical order.

    Fields of an episode of T steps, ``[T, *shape]`` each: ``observation`` (the first T of the T +
    1) and ``next_observation`` (the last T), ``action``, ``reward``, ``terminated``, ``truncated``,
    and what is numeric in the infos as ``info.<key>`` (the first T). Every leaf of a dictionary or
    tuple is a field of its own: ``observation.achieved_goal``, ``action.0``. Texts are not read;
    ``unread`` names them.

    Args:
        path: The directory that holds ``metadata.json`` (or ``data/metadata.json``), a file in it,
            or an id.

    Raises:
        ImportError: minari is not installed.
        FileNotFoundError: Nothing is there; the message says where it was looked for.
        ValueError: It is not a whole Minari dataset.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._data = locate(path)
        self._last: tuple[int, dict[str, NDArray[Any]]] = (-1, {})
        self.name = str(self._data)
        minari = need("minari.dataset.minari_storage")
        self._metadata = self._read_metadata()
        # The HDF5 file is looked at for what minari does not tell.
        if self._metadata.get("data_format") == "hdf5":
            self._file = open_hdf5(self._data / _HDF5)
        try:
            self._check_count()
            with self._reading("the dataset"):
                self._storage = minari.MinariStorage.read(self._data)
                numbers = range(self._metadata["total_episodes"])
                known = list(self._storage.get_episode_metadata(numbers))
            self._steps = [one.pop("total_steps", None) for one in known]
            self.episode_attrs = [
                {"id": i} | jsonable(one, "episode") for i, one in enumerate(known)
            ]
            self._look()
        except BaseException:
            self.close()
            raise
        self.attrs = _described(self._metadata, self._data)

    @staticmethod
    def matches(path: Path) -> bool:
        """Tell whether ``path`` is the HDF5 file or the directory of a dataset."""
        if path.is_file():
            return path.name == _HDF5
        places = (path / _HDF5, path / "data" / _HDF5, path / "data" / _METADATA)
        return any(place.is_file() for place in places)

    def default_fields(self) -> dict[str, str | list[str]]:
        """Name observations, actions, rewards, both ends, and the observations after each step.

        A dictionary of vectors becomes one vector in the order of its space, which is the order of
        ``gymnasium.wrappers.FlattenObservation``. Where a part is not of floating-point numbers (an
        index, text) nothing is chosen; beside images, only what is of such numbers.
        """
        chosen: dict[str, str | list[str]] = {}
        for target, base in (("obs", "observation"), ("action", "action")):
            names = [n for n in self.fields if _is_part(n, base)]
            floats = [n for n in names if np.dtype(self.fields[n].dtype).kind == "f"]
            if target == "obs" and self.cameras():
                chosen[target] = self.with_cameras(floats)
            elif names and floats == names and not any(_is_part(n, base) for n in self.unread):
                chosen[target] = names
        chosen |= {name: name for name in ("reward", *_ENDS)}
        # Of a choice among several parts only the user knows, and next_obs must follow it.
        if chosen.get("obs") == ["observation"]:
            chosen["next_obs"] = self.next_fields(["observation"])
        return chosen

    @staticmethod
    def next_fields(obs: Sequence[str]) -> list[str]:
        """Name the fields that hold, for these fields of the observation, the values after a step.

        Returns:
            As many names; none if a field is no part of the observation, which has no next value.
        """
        known = all(_is_part(name, "observation") for name in obs)
        return [f"next_{name}" for name in obs] if known else []

    def cameras(self) -> list[str]:
        """Name the fields of images in the observation."""
        return [name for name in super().cameras() if _is_part(name, "observation")]

    def texts(self, index: int, name: str) -> Any:
        """Return the texts of the steps, such as ``observation.mission``, or what the base does."""
        found = self._columns(index).get(name) if name in self.unread else None
        if found is None or found.dtype.kind != "U":
            return super().texts(index, name)
        return found[: len(self._columns(index)["reward"])].tolist()

    def gaps(self, fields: Sequence[str]) -> list[Gap]:
        """List the episodes of an HDF5 file with chunks that were never written."""
        if self._file is None:
            return []
        parts = {_PARTS[name.removeprefix("next_").partition(".")[0]] for name in fields}
        return [
            Gap(i, i, f"episode_{i}/{place}: rows {rows} were never written, and read as zeros")
            for i in range(self.num_episodes)
            for place, array in self._file[f"episode_{i}"].datasets()
            if place.partition("/")[0] in parts and (rows := unwritten_rows(array))
        ]

    def episode(self, index: int, fields: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
        """Read ``[T, *shape]`` of each field (default all of the first episode) of one episode.

        Raises:
            ValueError: The episode lacks a field, is damaged, or does not hold T + 1 observations
                for T steps.
        """
        names, columns = self._names(fields), self._columns(index)
        steps, said = len(columns["reward"]), self._steps[index]
        if steps == 0 or said not in (None, steps):
            expected = f"expected {said or 'at least 1'}. {_AGAIN}"
            raise ValueError(f"{self.name}: episode {index} has {steps} rewards; {expected}")
        found = {}
        for name in names:
            column = name.removeprefix("next_")
            if column not in columns:
                raise ValueError(f"{self.name}: episode {index} has no {column}. {_AGAIN}")
            base, rows = column.partition(".")[0], columns[column]
            allowed = {"observation": {steps + 1}, "info": {steps, steps + 1}}.get(base, {steps})
            if len(rows) not in allowed:
                raise ValueError(
                    f"{self.name}: episode {index} has {len(rows)} rows of {column} for {steps} "
                    f"steps; expected {' or '.join(map(str, sorted(allowed)))}. {_AGAIN}"
                )
            found[name] = rows[1:] if name != column else rows[:steps]
        return found | {name: found[name].astype(bool) for name in _ENDS if name in found}

    # -- inside -------------------------------------------------------------------------------

    def _read_metadata(self) -> dict[str, Any]:
        with self._reading(_METADATA):
            known = dict(json.loads((self._data / _METADATA).read_text(encoding="utf-8")))
        # Without them minari makes the environment, and so runs code that the dataset names.
        lacks = [k for k in ("observation_space", "action_space") if not _parsed(known.get(k))]
        if lacks:
            raise ValueError(f"{self._data / _METADATA} lacks {lacks}, by which episodes are read")
        return known

    def _check_count(self) -> None:
        said = there = self._metadata.get("total_episodes")
        if self._file is not None:
            there = sum(name.startswith("episode_") for name in self._file)
        if there != said or not said:
            raise ValueError(
                f"{self.name} has {there} episodes, but its metadata say {said}. {_AGAIN}"
            )

    def _columns(self, index: int) -> dict[str, NDArray[Any]]:
        """Every leaf of an episode, by its name as a field; the last one is remembered."""
        if self._last[0] == index:
            return self._last[1]
        if self._file is not None:  # refuses what lies in other files, which minari would follow
            list(self._file[f"episode_{index}"].datasets())
        with self._reading(f"episode {index}"):
            values = next(iter(self._storage.get_episodes([index])))
        found: dict[str, NDArray[Any]] = {}
        for base, part in _PARTS.items():
            space = _parsed(self._metadata.get(f"{base}_space"))
            found |= {n: np.asarray(rows) for n, rows in _leaves(values[part], base, space)}
        self._last = index, found
        return found

    def _look(self) -> None:
        """Tell which leaves of the first episode are fields, and which are not read."""
        fields: dict[str, FieldSpec] = {}
        unread: dict[str, str] = {}
        for name, rows in self._columns(0).items():
            if rows.dtype.kind not in "fiub" or rows.ndim == 0:
                unread[name] = f"{rows.dtype}, not a row of numbers a step"
                continue
            spec = FieldSpec(rows.shape[1:], "bool" if name in _ENDS else str(rows.dtype))
            fields[name] = spec
            if _is_part(name, "observation"):
                fields[f"next_{name}"] = spec
        self.fields, self.unread = fields, unread


def _is_part(name: str, base: str) -> bool:
    return name == base or name.startswith(f"{base}.")


def _leaves(node: Any, name: str, space: Any) -> Iterator[tuple[str, Any]]:
    """Name and values of every leaf of dictionaries and tuples, in the order of their space."""
    inner = (space or {}).get("subspaces", {})
    if isinstance(node, tuple):
        inner = dict(enumerate(inner))
        node = dict(enumerate(node))
    if isinstance(node, dict):
        for key in sorted(node, key=lambda k: list(inner).index(k) if k in inner else len(inner)):
            yield from _leaves(node[key], f"{name}.{key}", inner.get(key))
    elif node is not None:
        yield name, node


def _parsed(text: Any) -> Any:
    """The JSON that a text of the metadata holds (Minari nests JSON in JSON)."""
    try:
        return json.loads(text) if isinstance(text, str) else None
    except ValueError:
        return None


def _described(known: Mapping[str, Any], data: Path) -> dict[str, Any]:
    """Id, environment, reference scores and provenance, as far as the metadata say them."""
    attrs = {key: known[key] for key in _PROVENANCE if key in known}
    attrs["dataset"] = str(known.get("dataset_id") or _id_of(data))
    specs = {key: _parsed(known.get(key)) for key in ("env_spec", "eval_env_spec")}
    attrs |= {key: spec for key, spec in specs.items() if spec}
    if specs["env_spec"]:
        attrs["env_id"] = specs["env_spec"].get("id")
    scores = {k: known.get(f"ref_{k}_score") for k in ("min", "max")}
    if None not in scores.values():
        episodes = known.get("num_episodes_average_score")
        attrs["reference_scores"] = scores | {"episodes": episodes, "source": "minari"}
    return attrs


# -- looking for it ---------------------------------------------------------------------------


def datasets_root() -> Path:
    """Return where Minari keeps datasets: ``$MINARI_DATASETS_PATH``, or ``~/.minari/datasets``."""
    return Path(os.environ.get("MINARI_DATASETS_PATH") or "~/.minari/datasets").expanduser()


def locate(source: str | os.PathLike[str]) -> Path:
    """Find the directory of a dataset that holds ``metadata.json``.

    Args:
        source: The directory, the one above it, a file in it, or an id such as
            ``"D4RL/pen/human-v2"``, looked up in ``datasets_root()``.

    Returns:
        The directory.

    Raises:
        FileNotFoundError: There is none; the message says where it was looked for and how to get
            it.
    """
    path, root = Path(source).expanduser(), datasets_root()
    is_id = not path.exists() and not path.is_absolute()
    place = root / path if is_id else path
    place = place.parent if place.is_file() else place
    for candidate in (place, place / "data"):
        if (candidate / _METADATA).is_file():
            return candidate
    if not is_id:
        below = _ids_below(place)[:8]
        inner = f"; it holds the datasets {below}, name one of them" if below else ""
        raise FileNotFoundError(f"no Minari dataset at {place}: there is no {_METADATA}{inner}")
    near = difflib.get_close_matches(path.as_posix(), _ids_below(root), n=3, cutoff=0.6)
    raise FileNotFoundError(
        f"no Minari dataset {path.as_posix()!r}: looked for {place / 'data' / _METADATA} "
        f"($MINARI_DATASETS_PATH names the folder). {f'There are {near}. ' if near else ''}Get it "
        f'with `pip install "minari[hf]"` and `minari download {path.as_posix()}`, or give its '
        "path"
    )


def _ids_below(root: Path) -> list[str]:
    """Ids of the datasets below a folder; they are nested three deep at most in practice."""
    patterns = ["/".join(["*"] * depth + ["data", _METADATA]) for depth in range(1, 5)]
    return sorted(p.parents[1].relative_to(root).as_posix() for t in patterns for p in root.glob(t))


def _id_of(data: Path) -> str:
    directory = data.parent if data.name == "data" else data
    root = datasets_root()
    return directory.relative_to(root).as_posix() if root in directory.parents else directory.name
