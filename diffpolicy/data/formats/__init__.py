"""Foreign formats, each read through the same few members.

A format is a subclass of :class:`EpisodeSource` in a module of its own; to add one, write it and
name it in ``FORMATS``.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

from numpy.typing import NDArray

from diffpolicy.data.fields import FieldSpec, check_has
from diffpolicy.data.formats.images import is_picture
from diffpolicy.data.hdf5 import open_hdf5
from diffpolicy.data.store import EpisodeStore
from diffpolicy.settings import check_choice, load_named

FORMATS: dict[str, str] = {
    "minari": "diffpolicy.data.formats.minari:MinariDataset",
    "lerobot": "diffpolicy.data.formats.lerobot:LeRobotDirectory",
    "replay_zarr": "diffpolicy.data.formats.replay_zarr:ReplayBuffer",
    "d4rl": "diffpolicy.data.d4rl.file:D4RLFile",
    "robomimic": "diffpolicy.data.formats.robomimic:RobomimicFile",
    "ogbench": "diffpolicy.data.formats.ogbench:OGBenchFile",
    "arrays": "diffpolicy.data.formats.arrays:ArraysFile",
}
"""Where the class of each format is; the first that matches a file reads it."""


class Gap(NamedTuple):
    """Rows that are not in the file, but would be read as zeros.

    Attributes:
        first: The first episode concerned.
        last: The last one.
        reason: What is missing, with its place in the source.
    """

    first: int
    last: int
    reason: str


class EpisodeSource(ABC):
    """Episodes of a file or directory, read one after the other.

    A format settles the attributes below when it opens a file, or when they are asked for.

    Attributes:
        name: The path, for messages.
        fields: Name -> row shape and dtype.

        unread: What the source holds and no field is made of, each with the reason.
        masks: Named lists of episodes, such as a training split.
    """

    name: str
    fields: Mapping[str, FieldSpec] = {}

    unread: Mapping[str, str] = {}
    masks: Mapping[str, Sequence[int]] = {}
    _file: Any = None

    @abstractmethod
    def __init__(self, path: Path) -> None:
        """Open it, or say why not."""

    @staticmethod
    @abstractmethod
    def matches(path: Path) -> bool:
        """Tell whether ``path`` looks like this format; cheap, never raises."""

    @abstractmethod
    def episode(self, index: int, fields: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
        """Read ``[T, *shape]`` of each of the ``fields`` (default all) of one episode."""

    @abstractmethod
    def default_fields(self) -> dict[str, str | list[str]]:
        """Name the fields that make ``obs`` and ``action``, as far as the format settles them.

        Cameras stand first in ``obs``; together with vectors they become observations by name.
        """

    @cached_property
    def attrs(self) -> Mapping[str, Any]:
        """JSON values that describe the whole."""
        return {}

    @cached_property
    def episode_attrs(self) -> Sequence[Mapping[str, Any]]:
        """JSON values that describe each episode."""
        return []

    @cached_property
    def tasks(self) -> Sequence[str]:
        """Instructions in the order of their ids; none where the source does not list them."""
        found = self.attrs.get("tasks")
        return found if isinstance(found, list) else []

    @property
    def task_field(self) -> str | None:
        """The field of each step's task, where the format settles it and it is no constant."""
        return None

    def texts(self, index: int, name: str) -> Any:
        """Return what an episode, or the whole, says under a name that is no field.

        Returns:
            A value, or one for each step; None where there is nothing of that name.
        """
        return self.episode_attrs[index].get(name, self.attrs.get(name))

    def cameras(self) -> list[str]:
        """Name the fields of observed images."""
        pictures = (name for name, spec in self.fields.items() if is_picture(spec))
        return [name for name in pictures if not name.startswith("next")]

    def with_cameras(self, state: Iterable[str]) -> list[str]:
        """Name all cameras, and the fields of ``state`` behind them."""
        return list(dict.fromkeys([*self.cameras(), *state]))

    @property
    def num_episodes(self) -> int:
        """How many there are."""
        return len(self.episode_attrs)

    def gaps(self, fields: Sequence[str]) -> list[Gap]:
        """List the rows of these fields that were never written, or got lost, and read as zeros."""
        return []

    def remarks(self, store: EpisodeStore) -> dict[str, Any]:
        """Return attributes, and ``warnings``, that follow from what was stored of it."""
        return {}

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        """Say whatever a library raises of a damaged file as one kind of error."""
        try:
            yield
        except (ImportError, FileNotFoundError):
            raise  # their messages say what is missing
        except Exception as error:
            raise ValueError(
                f"{self.name}: {what} cannot be read, so it is damaged: download or copy it again "
                f"(a clone needs `git lfs pull`). {error!r}"
            ) from error

    def _names(self, fields: Iterable[str] | None) -> list[str]:
        """The fields that are asked for; default all.

        Raises:
            ValueError: There is no such field.
        """
        names = list(self.fields if fields is None else fields)
        check_has(self.name, names, self.fields)
        return names


Format = type[EpisodeSource]


def get_format(name: str, path: Path) -> tuple[str, Format]:
    """Find a format by its name, or by looking at a file.

    Args:
        name: A key of ``FORMATS``, or ``"auto"``.
        path: The file or directory to look at.

    Returns:
        The format's name and class.

    Raises:
        ValueError: No such format, or none that matches.
    """
    if name != "auto":
        check_choice("format", name, ["auto", *FORMATS])
        return name, load_named("format", FORMATS[name])
    if not path.exists():
        hint = "to look up a dataset by its id, name the format, such as format=minari"
        raise FileNotFoundError(f"nothing to convert at {path}; {hint}")
    for candidate, place in FORMATS.items():
        if (found := load_named("format", place)).matches(path):
            return candidate, found
    raise ValueError(f"{path} looks like none of the formats {sorted(FORMATS)}; say format=...")


def hdf5_names(path: Path) -> list[str] | None:
    """List what is at the top of an HDF5 file: nothing of other files, None if it cannot be opened.

    Nothing of it is read, so that formats can tell whether it is theirs.
    """
    if path.suffix not in (".hdf5", ".h5") or not path.is_file():
        return []
    try:
        with contextlib.closing(open_hdf5(path)) as file:
            return list(file)
    except (ImportError, ValueError):
        return None
