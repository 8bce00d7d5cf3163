"""Files of rollouts joined into one in D4RL's layout: medium-expert is medium, then expert."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffpolicy.data.hdf5 import open_hdf5
from generators.layout import (
    NOT_COMPARABLE,
    STEP_FIELDS,
    Arrays,
    check_steps,
    joined,
    write_d4rl,
)

_NPZ_FIELDS = ("observations", "actions", "rewards", "terminals")


def read_rollouts(path: str | Path) -> tuple[Arrays, dict[str, Any]]:
    """One file of rollouts as D4RL's arrays, and what it says about itself.

    Args:
        path: a ``.npz`` with ``observations`` ``[T, O]``, ``actions`` ``[T, A]``, ``rewards``
            ``[T]``, ``terminals`` ``[T]`` and ``episode_ends`` (the row after each episode's last,
            ascending), or an HDF5 file in D4RL's layout. Without ``timeouts`` a step that ends an
            episode and is not terminal was a time-out. Nothing is unpickled.

    Returns:
        The step fields and those in groups of one row a step, and the attributes (none of a
        ``.npz``).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is neither, lacks a field, or its fields disagree.
        ImportError: an HDF5 file, and h5py is not installed.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}")
    attrs: dict[str, Any] = {}
    if file.suffix == ".npz":
        arrays = _read_npz(file)
    elif file.suffix in (".hdf5", ".h5"):
        arrays, attrs = _read_hdf5(file)
    else:
        raise ValueError(f"{file.name}: expected a .npz of rollouts or a .hdf5 in D4RL's layout")
    if not check_steps(arrays, file.name):
        raise ValueError(f"{file.name} holds no step")
    if not _ends(arrays)[-1]:
        arrays["timeouts"][-1] = True  # a partial tail must not run on into the next source
    return arrays, attrs


def generate_rollouts(sources: Sequence[str | Path], target: str | Path) -> Path:
    """Joins files of rollouts, episode by episode and in the order given, into one.

    Args:
        sources: see :func:`read_rollouts`. Fields in groups (``infos/...``) are kept if every
            source has them.
        target: the HDF5 file; must not exist.

    Returns:
        The path. The file's attributes name the sources with their episodes, steps and mean return.

    Raises:
        FileExistsError: the target exists.
        ValueError: no source, or sources whose observations or actions differ in size.
    """
    path = Path(target)
    if path.exists():
        raise FileExistsError(f"{path} exists already; remove it or choose another target")
    if not sources:
        raise ValueError("sources is empty; give at least one .npz or .hdf5 file")
    pieces, descriptions = [], []
    for source in sources:
        arrays, attrs = read_rollouts(source)
        pieces.append(arrays)
        descriptions.append({"file": Path(source).name, **summary(arrays), "attrs": attrs})
        for name in ("observations", "actions"):
            if arrays[name].shape[1:] != pieces[0][name].shape[1:]:
                raise ValueError(
                    f"{name} of {Path(source).name} have shape {arrays[name].shape[1:]}, those of "
                    f"{Path(sources[0]).name} {pieces[0][name].shape[1:]}: not the same task"
                )
    whole = joined(pieces)
    attrs = {"sources": descriptions, **summary(whole), "note": NOT_COMPARABLE}
    return write_d4rl(path, whole, attrs)


def summary(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """Steps, episodes, and the mean and standard deviation of the episodes' returns.

    Args:
        arrays: with ``rewards``, ``terminals`` and ``timeouts`` ``[T]``. A tail that no flag ends
            counts as an episode.
    """
    starts = np.flatnonzero(np.concatenate([[True], _ends(arrays)[:-1]]))
    returns = np.add.reduceat(np.asarray(arrays["rewards"], np.float64), starts)
    return {
        "steps": len(arrays["rewards"]),
        "episodes": len(returns),
        "return_mean": float(returns.mean()),
        "return_std": float(returns.std()),
    }


def _ends(arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
    ends: NDArray[np.bool_] = arrays["terminals"] | arrays["timeouts"]
    return ends


def _read_npz(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as file:
        missing = [name for name in (*_NPZ_FIELDS, "episode_ends") if name not in file.files]
        if missing:
            raise ValueError(f"{path.name} lacks {', '.join(missing)}; it holds {file.files}")
        arrays = {name: file[name] for name in _NPZ_FIELDS}
        ends = file["episode_ends"].astype(np.int64)
    steps = len(arrays["observations"])
    if not (len(ends) and (np.diff(ends, prepend=0) > 0).all() and ends[-1] <= steps):
        raise ValueError(
            f"episode_ends of {path.name} must ascend from above 0 to at most {steps}, got {ends}"
        )
    last = np.zeros(steps, np.bool_)
    last[ends - 1] = True
    last[-1] = True
    return _flagged(arrays, last)


def _read_hdf5(path: Path) -> tuple[Arrays, dict[str, Any]]:
    file = open_hdf5(path)
    try:
        missing = [name for name in _NPZ_FIELDS if name not in file]
        if missing:
            raise ValueError(f"{path.name} lacks {', '.join(missing)}; it holds {sorted(file)}")
        rows = file["observations"].shape[:1]
        arrays: Arrays = {
            name: item[()]
            for name, item in file.datasets()
            if item.shape[:1] == rows and not name.startswith("metadata/")
        }
        attrs = {name: _plain(value) for name, value in file.attrs.items()}
        short = [name for name in STEP_FIELDS if name in file and name not in arrays]
        if short:
            raise ValueError(f"{path.name}: {', '.join(short)} differ in rows from observations")
    finally:
        file.close()
    if "timeouts" not in arrays:
        raise ValueError(
            f"{path.name} has no timeouts, so its episodes have no known ends; read it with "
            "diffpolicy.data first, which knows the time limits of D4RL's own files"
        )
    return _flagged(arrays, arrays["timeouts"].reshape(-1).astype(np.bool_)), attrs


def _flagged(arrays: Arrays, last: NDArray[np.bool_]) -> Arrays:
    """Rewards and flags as vectors; an episode ends with one flag, the terminal one winning."""
    arrays["rewards"] = arrays["rewards"].reshape(-1)
    arrays["terminals"] = arrays["terminals"].reshape(-1).astype(np.bool_)
    return {**arrays, "timeouts": last & ~arrays["terminals"]}


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, str) and value[:1] in "[{":
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value if isinstance(value, str | int | float | bool) else str(value)
