"""Human labels of published files: pairs of segments by their first rows, and who won.

Files of this kind (Uni-RLHF, Yuan et al. 2024; Preference Transformer, Kim et al. 2023; B-Pref)
number the rows of a ``qlearning_dataset``, which D4RL makes by dropping the last step of each
episode, so a segment of 50 consecutive indices may leave out a stored step and go on in the next
episode. A map from index to stored row says what is meant, and a segment is kept exactly as it is:
several spans where it is not one run of steps.

They are published as one npz, or as three pickles of one array each: ``indices_1*``, ``indices_2*``
and ``human_label*`` (Uni-RLHF), or ``indices_num*``, ``indices_2_num*`` and ``label_human``
(Preference Transformer).
"""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffpolicy.data.d4rl.views import transition_rows
from diffpolicy.data.fields import whole_numbers
from diffpolicy.data.preferences.pickled_array import read_pickled_array
from diffpolicy.data.preferences.records import Pair, Segment, segment_of_rows
from diffpolicy.data.store import EpisodeStore
from diffpolicy.settings import check_choice, check_range

Index = Literal["qlearning", "rows"]
_LENGTH = re.compile(r"_(?:len_|q)(\d+)(?:\D|$)")


def from_indices(
    store: EpisodeStore,
    index_1: ArrayLike,
    index_2: ArrayLike,
    label: ArrayLike,
    length: int,
    *,
    raw_index_map: ArrayLike | None = None,
    source: str = "human",
) -> list[Pair]:
    """Make pairs of two lists of indices and a label each.

    Args:
        store: The episodes.
        index_1: ``[N]`` where the first segments begin.
        index_2: ``[N]`` where the second segments begin.
        label: ``[N]``: 0 the first is better, 1 the second, -1 neither (a tie). Or ``[N, 2]``: one
            number for each, the larger one is better, equal ones are a tie.
        length: Indices in a segment.
        raw_index_map: ``[M]`` the row of the store that each index stands for; default the index
            itself.
        source: Who judged, kept with every pair.

    Returns:
        N pairs in the order given, the first segment as ``chosen`` of a tie; ``info`` holds
        ``{"row": i}``.

    Raises:
        ValueError: Lists of other lengths, labels of another kind, or indices outside the map or
            the store; the message names the row.
    """
    check_range("[1, inf)", length=length)
    first, second = whole_numbers("index_1", index_1), whole_numbers("index_2", index_2)
    verdict = _verdicts(np.asarray(label))
    if not len(first) == len(second) == len(verdict):
        got = f"{len(first)}, {len(second)} and {len(verdict)}"
        raise ValueError(f"index_1, index_2 and label must have the same length; got {got}")
    ends = store.episode_ends
    rows = np.arange(store.num_steps) if raw_index_map is None else raw_index_map
    rows = whole_numbers("raw_index_map", rows)

    def segment(index: int) -> Segment:
        if not 0 <= index <= len(rows) - length:
            raise ValueError(
                f"a segment of {length} from index {index} does not fit 0..{len(rows) - 1}; is "
                "raw_index_map the one of these labels?"
            )
        return segment_of_rows(rows[index : index + length], ends)

    pairs = []
    judged = zip(first.tolist(), second.tolist(), verdict.tolist(), strict=True)
    for row, (a, b, won) in enumerate(judged):
        try:
            items = (segment(b), segment(a)) if won == 1 else (segment(a), segment(b))
            pairs.append(Pair(*items, tie=won == -1, source=source, info={"row": row}))
        except ValueError as error:
            raise ValueError(f"{store.name}, row {row} of the labels: {error}") from error
    return pairs


def qlearning_rows(store: EpisodeStore) -> NDArray[np.int64]:
    """Return the row of the store that each transition of D4RL's ``qlearning_dataset`` is.

    D4RL leaves out the last row of an episode that timed out, for want of an observation after it,
    and the last of all; the rows that lead to terminal states stay. A store that does not say how
    its episodes ended is taken for one of time-outs: every row but each episode's last. (A row that
    is both terminal and timed out is left out by D4RL; a store keeps it as terminal alone.)

    Args:
        store: All episodes of the file that the labels were given for, in its order.

    Returns:
        ``[M]``, for ``from_indices``.

    Raises:
        ValueError: The store's episodes are not those of the file: split at goals, or a part.
    """
    attrs, ends = store.attrs, store.episode_ends
    split = any(str(t).startswith("split_goals") for t in attrs.get("transforms", []))
    if split or attrs.get("left_out_episodes"):
        raise ValueError(
            f"{store.name} {'was split at goals' if split else 'leaves out episodes'}, but labels "
            "count the rows of whole trajectories; make a store of all of the source as it is"
        )
    last = np.zeros(store.num_steps, bool)
    last[ends - 1] = True
    if "terminated" not in store.fields:
        return np.flatnonzero(~last)
    terminals = store.read("terminated").reshape(-1).astype(bool)
    counted = any("no timeouts" in str(note) for note in attrs.get("notes", []))
    if counted and attrs.get("max_episode_steps"):
        return transition_rows(terminals, None, int(attrs["max_episode_steps"]))
    return transition_rows(terminals, last & ~terminals)


def read_label_file(
    path: str | os.PathLike[str],
    store: EpisodeStore,
    *,
    kind: str = "human",
    length: int | None = None,
    index: Index | None = None,
) -> list[Pair]:
    """Read pairs of published indices and labels.

    Args:
        path: An npz file that holds ``index_1``, ``index_2`` and ``<kind>_label`` (or ``label``);
            where there are ``<kind>_index_1`` and ``<kind>_index_2``, these; perhaps
            ``raw_index_map`` and ``seg_len``. Or a folder of three pickles, or the one of them that
            holds the labels; they are read in a process of their own, by a reader that knows arrays
            of numbers alone.
        store: The episodes.
        kind: Whose labels, where there are several, such as ``"scripted"``; the pairs' source.
        length: Indices in a segment; default the file's ``seg_len``, or the one in its name.
        index: What an index counts: ``"qlearning"``, the transitions of D4RL's
            ``qlearning_dataset`` (see ``qlearning_rows``), or ``"rows"``, the rows of the store.
            Default: the file's ``raw_index_map``; for pickles ``"qlearning"``. An npz file without
            a map must be told.

    Returns:
        See ``from_indices``.

    Raises:
        FileNotFoundError: No file.
        ValueError: Not such a file, or what ``from_indices`` refuses.
    """
    check_choice("index", index, (None, *get_args(Index)))
    target = Path(path)
    if not target.exists():
        raise FileNotFoundError(f"no label file at {target}")
    pickled = target.is_dir() or target.suffix != ".npz"
    arrays = _read_pickles(target, kind) if pickled else _read_npz(target)

    def find(*names: str) -> NDArray[Any]:
        for name in names:
            if name in arrays:
                return arrays[name]
        raise ValueError(f"{target} has no array {' or '.join(names)}; it has {sorted(arrays)}")

    rows = arrays.get("raw_index_map") if index is None else None
    if rows is None and index is None and not pickled:
        raise ValueError(
            f"{target} has no raw_index_map, so what its indices count must be said: index="
            "qlearning (transitions of D4RL's qlearning_dataset) or index=rows (of the store)"
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
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, OSError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        reason = str(error).partition(" when allow_pickle")[0]  # no advice to unpickle
        raise ValueError(f"{path} is not an npz file of plain arrays: {reason}") from error


def _read_pickles(path: Path, kind: str) -> dict[str, NDArray[Any]]:
    """The three pickles of a set, under the names of an npz file."""
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
            f"{path} must be an npz file, or hold three pickles, indices_1*, indices_2* and "
            f"{kind}_label*; there are {len(first)}, {len(second)} and {len(labels)} of them among "
            f"{names[:8]}. Of several sets name the file of the labels"
        )
    places = {"index_1": first[0], "index_2": second[0], f"{kind}_label": labels[0]}
    arrays = {name: read_pickled_array(folder / place) for name, place in places.items()}
    if found := _LENGTH.search(first[0]):
        arrays["seg_len"] = np.array(int(found[1]))
    return arrays


def _verdicts(label: NDArray[Any]) -> NDArray[np.int64]:
    """-1, 0 or 1 of each row."""
    numbers = label.dtype.kind in "iufb" and np.isfinite(label).all()
    if not numbers or label.shape[1:] not in ((), (2,)) or label.ndim == 0:
        raise ValueError(
            f"label must be [N] or [N, 2] finite numbers; got shape {label.shape} of {label.dtype}"
        )
    if label.ndim == 2:
        return np.where(label[:, 0] == label[:, 1], -1, label[:, 1] > label[:, 0])
    for row in np.flatnonzero(~np.isin(label, (-1, 0, 1)))[:1]:
        raise ValueError(f"label must be 0, 1 or -1; got {label[row]} in row {row}")
    return label.astype(np.int64)
