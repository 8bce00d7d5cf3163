"""Episodes on disk while a file grows: each is written whole, and a killed run goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffpolicy.files import atomic_file, remove_leftovers, remove_owned, write_atomic
from generators.layout import Arrays, joined


class Parts:
    """A folder with one file an episode, which grows until the whole can be written.

    Args:
        folder: made if it does not exist; see :func:`beside`.
        settings: what the episodes depend on, as JSON values. Parts made with other settings are
            refused: they would be a mixture.

    Raises:
        ValueError: the folder holds parts that were made with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self._count = 0
        check_settings(folder, settings)
        while self._file(self._count).exists():
            self._count += 1

    def __len__(self) -> int:
        """Number of episodes without a gap from the first."""
        return self._count

    def append(self, episode: Arrays) -> None:
        """Write the next episode, whole or not at all."""
        plain = {name.replace("/", "."): value for name, value in episode.items()}
        write_npz(self._file(len(self)), plain)
        self._count += 1

    def read(self, index: int) -> Arrays:
        """One episode as it was appended."""
        with np.load(self._file(index), allow_pickle=False) as file:
            return {name.replace(".", "/"): file[name] for name in file.files}

    def truncate(self, count: int) -> None:
        """Forget the episodes from ``count`` on."""
        while self._count > count:
            self._count -= 1
            self._file(self._count).unlink()

    def steps(self) -> int:
        """Number of rows in all episodes."""
        return sum(len(self.read(index)["rewards"]) for index in range(len(self)))

    def joined(self) -> Arrays:
        """All episodes one after the other."""
        return joined([self.read(index) for index in range(len(self))])

    def remove(self) -> None:
        """Delete the folder, once the file is there."""
        remove_leftovers(self.folder)
        remove_owned(self.folder, re.compile(r"(\d{6}\.npz|\w+\.(json|writing))").fullmatch)

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:06d}.npz"


def beside(target: Path) -> Path:
    """The folder ``TARGET.partial`` for the episodes of a file that is to be.

    Raises:
        FileExistsError: the file is there already.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists already; remove it or choose another target")
    return target.with_name(target.name + ".partial")


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes ``settings.json`` into a folder, or compares the settings with those it holds.

    Args:
        folder: made if it does not exist.
        settings: JSON values.

    Raises:
        ValueError: the folder was begun with other settings.
    """
    file, plain = folder / "settings.json", json.loads(json.dumps(dict(settings)))
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, plain)
        return
    found = json.loads(file.read_text())
    if found != plain:
        other = sorted(k for k in {*plain, *found} if plain.get(k) != found.get(k))
        raise ValueError(
            f"{folder} was begun with another {', '.join(other)}: "
            f"{ {k: found.get(k) for k in other} }. Give the same settings to go on with it, or "
            "remove it."
        )


def write_npz(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays by name, whole or not at all."""
    with atomic_file(path) as writing, writing.open("wb") as file:
        np.savez(file, allow_pickle=False, **dict(arrays))


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    write_atomic(path, json.dumps(value, indent=1))


def episode_seed(seed: int, index: int) -> int:
    """The seed with which episode ``index`` of a dataset is reset: one of 0..99,999.

    Those are the project's seeds for demonstrations; nothing is evaluated on them. Datasets with
    seeds 0..9 share none of their first 10,000 episodes.
    """
    return (10_000 * seed + index) % 100_000
