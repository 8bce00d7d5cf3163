"""Where the files of D4RL's datasets are looked for."""

from __future__ import annotations

import os
import re
from pathlib import Path

from diffpolicy.data.d4rl.catalogue import DatasetInfo, by_file, lookup, misfit
from diffpolicy.data.d4rl.raw import RawFile

_SUFFIXES = (".hdf5", ".h5")
# Minari's dataset of the same task, by a pattern of D4RL's id.
_MINARI = (
    (r"(halfcheetah|hopper|walker2d|ant)-(medium|expert)-v\d", r"mujoco/\1/\2-v0"),
    (r"(pen|door|hammer|relocate)-(human|cloned|expert)-v\d", r"D4RL/\1/\2-v2"),
    (r"maze2d-(open|umaze|medium|large)(-dense)?-v\d", r"D4RL/pointmaze/\1\2-v2"),
    (r"antmaze-(umaze(?:-diverse)?|(?:medium|large)-(?:play|diverse))-v\d", r"D4RL/antmaze/\1-v1"),
    (r"kitchen-(complete|partial|mixed)-v\d", r"D4RL/kitchen/\1-v2"),
)


def datasets_dir(data_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return ``data_dir``, else ``$D4RL_DATASET_DIR``, else ``~/.d4rl/datasets``."""
    chosen = data_dir or os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets"
    return Path(chosen).expanduser()


def scan(data_dir: str | os.PathLike[str] | None = None) -> list[Path]:
    """List the HDF5 files in a folder and in the folders directly below it.

    Args:
        data_dir: The folder; default as ``datasets_dir``.

    Returns:
        The files, sorted by name, those of the folder itself first; empty if there is no folder.
    """
    folder = datasets_dir(data_dir)
    paths = [*sorted(folder.glob("*")), *sorted(folder.glob("*/*"))]
    return [path for path in paths if path.suffix in _SUFFIXES and path.is_file()]


def find_dataset(
    id_or_path: str | os.PathLike[str], data_dir: str | os.PathLike[str] | None = None
) -> Path:
    """Find the file of a dataset.

    Args:
        id_or_path: An id such as ``"hopper-medium-v2"``, or the path of a file.
        data_dir: Where to look for an id; default ``$D4RL_DATASET_DIR``, else ``~/.d4rl/datasets``.

    Returns:
        The file.

    Raises:
        FileNotFoundError: The file is not there; the message says where it was looked for and under
            which name.
        ValueError: D4RL has no such id; the message names the nearest ones.
    """
    path = Path(id_or_path).expanduser()
    if path.is_file():
        return path
    if path.suffix in _SUFFIXES or len(path.parts) > 1:
        raise FileNotFoundError(f"no file at {path}")
    info = lookup(str(id_or_path))
    folder = datasets_dir(data_dir)
    for found in scan(folder):
        if found.name == info.file:
            return found
    raise FileNotFoundError(_missing(info, folder))


def identify(raw: RawFile, dataset: str | None) -> tuple[DatasetInfo | None, str]:
    """Find the dataset of a file, by its base name or as it is said to be; its rows must fit.

    Returns:
        The dataset, or None; and a note if the file has the name of one that it is not.

    Raises:
        ValueError: No such dataset, or the file is another one, or has rows of other sizes.
    """
    by_name = by_file(raw.path.name)
    info = by_name if dataset is None else lookup(dataset)
    if dataset is not None and by_name not in (None, info):
        raise ValueError(
            f"{raw.path.name} is the file of {by_name and by_name.id!r}, but dataset={dataset!r}; "
            "leave dataset out, or rename the file"
        )
    if info is None:
        return None, ""
    if dataset is None and "not comparable" in str(raw.notes().get("note")):
        return None, f"the file says that it is not D4RL's {info.id}, whose name it has"
    wrong = misfit(info, raw.row_shape("observations"), raw.row_shape("actions"))
    if wrong is None:
        return info, ""
    if dataset is not None:
        raise ValueError(
            f"{raw.path} is not the file of {dataset!r}: it has {wrong}. For data of your own "
            "leave dataset out, and say max_episode_steps=N if the file has no timeouts"
        )
    note = f"the file has the name of {info.id}'s, but {wrong}: it is taken for data of its own"
    return None, note


def _missing(info: DatasetInfo, folder: Path) -> str:
    home = Path.home()
    shown = f"~/{folder.relative_to(home)}" if home in folder.parents else str(folder)
    successor = minari_name(info.id)
    other = f", or use Minari {successor!r} (different data; no D4RL score)" if successor else ""
    return (
        f"{info.id!r} not found in {shown} (expected {info.file}). Put the file there, set "
        f"D4RL_DATASET_DIR, give the file's path instead of the id{other}. You do not need the "
        "d4rl package."
    )


def minari_name(dataset: str) -> str | None:
    """Return Minari's dataset of the same task, which holds other data, if there is one."""
    found = ((re.fullmatch(pattern, dataset), name) for pattern, name in _MINARI)
    return next((match.expand(name) for match, name in found if match), None)
