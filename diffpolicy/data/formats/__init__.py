"""Foreign formats, each read through the same few members.

A format is a module with three functions; to add one, write the module and name it in `FORMATS`:

- `matches(path) -> bool`: whether `path` looks like it (cheap, never raises);
- `open_source(path) -> EpisodeSource`: open it, or say why not;
- `default_fields(source) -> dict`: which of its fields make `obs` and `action`.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from diffpolicy.data.fields import FieldSpec

FORMATS: dict[str, str] = {
    "minari": "diffpolicy.data.formats.minari",
    "lerobot": "diffpolicy.data.formats.lerobot",
    "replay_zarr": "diffpolicy.data.formats.replay_zarr",
    "d4rl": "diffpolicy.data.formats.d4rl",
    "robomimic": "diffpolicy.data.formats.robomimic",
    "arrays": "diffpolicy.data.formats.arrays",
}


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


class EpisodeSource(Protocol):
    """Episodes that can be read one after the other."""

    @property
    def name(self) -> str:
        """The path, for messages."""

    @property
    def num_episodes(self) -> int:
        """How many there are."""

    @property
    def fields(self) -> Mapping[str, FieldSpec]:
        """Name -> row shape and dtype."""

    @property
    def attrs(self) -> Mapping[str, Any]:
        """JSON values that describe the whole."""

    @property
    def episode_attrs(self) -> Sequence[Mapping[str, Any]]:
        """JSON values that describe each episode."""

    @property
    def unread(self) -> Mapping[str, str]:
        """What the source holds and no field is made of, each with the reason."""

    @property
    def masks(self) -> Mapping[str, Sequence[int]]:
        """Named lists of episodes, such as a training split."""

    def gaps(self, fields: Sequence[str]) -> list[Gap]:
        """Rows of these fields that were never written, or got lost, and read as zeros."""

    def episode(self, index: int, fields: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
        """`[T, *shape]` of each of the `fields` (default all) of one episode."""

    def close(self) -> None:
        """Let go of the file."""


class Format(Protocol):
    """What a format's module offers."""

    def matches(self, path: Path) -> bool:
        """Whether `path` looks like this format."""

    def open_source(self, path: Path) -> EpisodeSource:
        """Open it."""

    def default_fields(self, source: EpisodeSource) -> dict[str, str | list[str]]:
        """The fields that make `obs` and `action`, as far as the format settles them."""


def get_format(name: str, path: Path) -> tuple[str, Format]:
    """Find a format by its name, or by looking at a file.

    Args:
        name: A key of `FORMATS`, or `"auto"`.
        path: The file or directory to look at.

    Returns:
        The format's name and module.

    Raises:
        ValueError: No such format, or none that matches.
    """
    if name != "auto":
        if name not in FORMATS:
            raise ValueError(f"unknown format {name!r}; choose 'auto' or one of {sorted(FORMATS)}")
        return name, cast("Format", import_module(FORMATS[name]))
    for candidate, module in FORMATS.items():
        found = cast("Format", import_module(module))
        if found.matches(path):
            return candidate, found
    raise ValueError(
        f"{path} looks like none of the formats {sorted(FORMATS)}; if it is one of them, name it "
        "with format=..."
    )
