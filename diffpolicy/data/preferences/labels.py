"""Files of human labels as they are published: one npz, or three pickles of one array each.

Three pickles are `indices_1*`, `indices_2*` and `human_label*` of Uni-RLHF (Yuan et al. 2024), or
`indices_num*`, `indices_2_num*` and `label_human` of Preference Transformer (Kim et al. 2023). Both
number the rows of D4RL's `qlearning_dataset`.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from diffpolicy.data.preferences.pickled_array import read_pickled_array
from diffpolicy.data.preferences.published import from_indices, qlearning_rows

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray

    from diffpolicy.data.preferences.records import Pair
    from diffpolicy.data.store import EpisodeStore

Index = Literal["qlearning", "rows"]
_LENGTH = re.compile(r"_(?:len_|q)(\d+)(?:\D|$)")


def read_label_file(
    path: str | os.PathLike[str],
    store: EpisodeStore,
    *,
    kind: str = "human",
    length: int | None = None,
    index: Index | None = None,
) -> list[Pair]:
    """Pairs of published indices and labels.

    Args:
        path: An npz file that holds `index_1`, `index_2` and `<kind>_label` (or `label`); where
            there are `<kind>_index_1` and `<kind>_index_2`, these; perhaps `raw_index_map` and
            `seg_len`. Or a folder of three pickles, or the one of them that holds the labels; they
            are read in a process of their own, by a reader that knows arrays of numbers alone.
        store: The episodes.
        kind: Whose labels, where there are several, such as `"scripted"`; the pairs' source.
        length: Indices in a segment; default the file's `seg_len`, or the one in its name.
        index: What an index counts: `"qlearning"`, the transitions of D4RL's `qlearning_dataset`
            (see `qlearning_rows`), or `"rows"`, the rows of the store. Default: the file's
            `raw_index_map`; for pickles `"qlearning"`. An npz file without a map must be told.

    Returns:
        See `from_indices`.

    Raises:
        FileNotFoundError: No file.
        ValueError: Not such a file, or what `from_indices` refuses.
    """
    if index is not None and index not in get_args(Index):
        raise ValueError(f"index must be one of {get_args(Index)}; got {index!r}")
    target = Path(path)
    pickled = target.is_dir() or target.suffix != ".npz"
    arrays = _read_pickles(target, kind) if pickled else _read_npz(target)

    def find(*names: str) -> NDArray[Any]:
        for name in names:
            if name in arrays:
                return arrays[name]
        raise ValueError(
            f"{target} has no array {' or '.join(names)}; it has {sorted(arrays)}. Labels are "
            "index_1, index_2, <kind>_label, and perhaps seg_len and raw_index_map"
        )

    if length is None and pickled and "seg_len" not in arrays:
        raise ValueError(f"the names in {target} do not say how long a segment is: give length=N")
    rows = arrays.get("raw_index_map") if index is None else None
    if rows is None and index is None and not pickled:
        raise ValueError(
            f"{target} has no raw_index_map, so what its indices count must be said: "
            "index=qlearning (transitions of D4RL's qlearning_dataset, as in Uni-RLHF and "
            "Preference Transformer) or index=rows (rows of the store)"
        )
    if rows is None and index != "rows":
        rows = qlearning_rows(store)
    return from_indices(
        store,
        find(f"{kind}_index_1", "index_1"),
        find(f"{kind}_index_2", "index_2"),
        find(f"{kind}_label", *(("label",) if kind == "human" else ())),
        int(find("seg_len")) if length is None else length,
        raw_index_map=rows,
        source=kind,
    )


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"no label file at {path}")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, OSError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        reason = str(error).partition(" when allow_pickle")[0]  # no advice to unpickle
        raise ValueError(f"{path} is not an npz file of plain arrays: {reason}") from error


def _read_pickles(path: Path, kind: str) -> dict[str, NDArray[Any]]:
    """The three pickles of a set, under the names of an npz file."""
    if not path.exists():
        raise FileNotFoundError(f"no label file at {path}")
    folder = path if path.is_dir() else path.parent
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    if not path.is_dir():  # of one set: what its name ends with
        shared = re.sub(r"^(human_|fake_|\w+_)?label(_human)?", "", path.name)
        names = [
            n for n in names if n == path.name or (n.startswith("indices") and n.endswith(shared))
        ]
    second = [n for n in names if n.startswith("indices_2")]
    first = [n for n in names if n.startswith("indices") and n not in second]
    labels = [n for n in names if f"{kind}_label" in n or f"label_{kind}" in n]
    if not len(first) == len(second) == len(labels) == 1:
        raise ValueError(
            f"{path} must be an npz file, or hold one set of three pickles, indices_1*, indices_2* "
            f"and {kind}_label*; there are {len(first)}, {len(second)} and {len(labels)} of them "
            f"among {names[:8]}. Of several sets name the file of the labels (labels=KIND: whose)"
        )
    places = {"index_1": first[0], "index_2": second[0], f"{kind}_label": labels[0]}
    arrays = {name: read_pickled_array(folder / place) for name, place in places.items()}
    if found := _LENGTH.search(first[0]):
        arrays["seg_len"] = np.array(int(found[1]))
    return arrays
