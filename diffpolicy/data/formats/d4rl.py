"""D4RL HDF5 files: `observations`, `actions`, `rewards`, `terminals` at the top."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffpolicy.data.d4rl.file import D4RLFile
from diffpolicy.data.d4rl.raw import REQUIRED
from diffpolicy.data.hdf5 import open_hdf5

if TYPE_CHECKING:
    from pathlib import Path

    from diffpolicy.data.formats import EpisodeSource


def matches(path: Path) -> bool:
    """Whether `path` is an HDF5 file with D4RL's arrays at its top (nothing is read of them)."""
    if path.suffix not in (".hdf5", ".h5") or not path.is_file():
        return False
    try:
        file = open_hdf5(path, "reading D4RL files")
    except (ImportError, ValueError):
        return False
    try:
        return all(hasattr(file.get(name), "shape") for name in REQUIRED)
    except ValueError:  # an array that lies elsewhere: opening it says so
        return all(name in file.keys() for name in REQUIRED)  # noqa: SIM118
    finally:
        file.close()


def open_source(path: Path) -> D4RLFile:
    """Open a file; see `D4RLFile`."""
    return D4RLFile(path)


def default_fields(source: EpisodeSource) -> dict[str, str | list[str]]:
    """All that a step consists of, under the names of a store."""
    return {name: name for name in source.fields if not name.startswith("infos/")}
