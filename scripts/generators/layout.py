"""The HDF5 layout of D4RL: one row a step, flags where episodes end, the rest in groups."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffpolicy.extras import need
from diffpolicy.files import atomic_file

Arrays = dict[str, NDArray[Any]]

STEP_FIELDS = ("observations", "actions", "rewards", "terminals", "timeouts")
"""What every file holds, one row a step."""
NOT_COMPARABLE = "made by diffpolicy; scores are not comparable with D4RL's tables"


def check_steps(arrays: Mapping[str, NDArray[Any]], source: str) -> int:
    """The number of rows, after all step fields were found to be of one length.

    Args:
        arrays: at least :data:`STEP_FIELDS`; names with a slash are in a group.
        source: for messages.

    Raises:
        ValueError: a field is missing, or one has another number of rows.
    """
    missing = [name for name in STEP_FIELDS if name not in arrays]
    if missing:
        raise ValueError(f"{source} lacks {', '.join(missing)}; it holds {sorted(arrays)}")
    lengths = {name: len(value) for name, value in arrays.items() if value.ndim}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"{source}: every field needs the same number of rows, got {lengths}")
    return lengths["observations"]


def joined(episodes: Sequence[Mapping[str, NDArray[Any]]]) -> Arrays:
    """Episodes one after the other, for the fields that all of them have."""
    names = set(episodes[0]).intersection(*episodes[1:])
    return {name: np.concatenate([e[name] for e in episodes]) for name in sorted(names)}


def write_d4rl(
    path: str | os.PathLike[str],
    arrays: Mapping[str, NDArray[Any]],
    attrs: Mapping[str, Any],
) -> Path:
    """Writes a file in D4RL's layout; it appears under its name only when it is whole.

    Args:
        path: of the file; replaced if it exists.
        arrays: step fields by name, ``infos/goal`` being the dataset ``goal`` in group ``infos``.
            Floats are stored as float32 except below ``infos``, flags as bool.
        attrs: of the file. What HDF5 cannot hold (mappings, lists) is stored as JSON text.

    Returns:
        The path.

    Raises:
        ImportError: h5py is not installed.
        ValueError: a step field is missing or of another length.
    """
    h5py = need("h5py")
    target = Path(path)
    check_steps(arrays, target.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target) as whole, h5py.File(whole, "w") as file:
        for name, value in arrays.items():
            flag = name in ("terminals", "timeouts")
            kind = np.bool_ if flag else value.dtype if "/" in name else np.float32
            file.create_dataset(name, data=np.asarray(value, kind), compression="gzip")
        for name, entry in attrs.items():
            plain = isinstance(entry, str | int | float | bool)
            file.attrs[name] = entry if plain else json.dumps(entry)
    return target
