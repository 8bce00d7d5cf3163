"""Human labels of published files: pairs of segments by their first rows, and who won.

Files of this kind (Uni-RLHF, Yuan et al. 2024; B-Pref and its relatives) number the rows of a
`qlearning_dataset`, which D4RL makes by dropping the last step of each episode, so a segment of 50
consecutive indices may leave out a stored step and go on in the next episode. A map from index to
stored row says what is meant, and a segment is kept exactly as it is: several spans where it is not
one run of steps.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffpolicy.data.preference_records import Pair, Segment, segment_of_rows

if TYPE_CHECKING:
    import os

    from numpy.typing import ArrayLike, NDArray

    from diffpolicy.data.store import EpisodeStore


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
    """Pairs of two lists of indices and a label each.

    Args:
        store: The episodes.
        index_1: `[N]` where the first segments begin.
        index_2: `[N]` where the second segments begin.
        label: `[N]`: 0 the first is better, 1 the second, -1 neither (a tie). Or `[N, 2]`: one
            number for each, the larger one is better, equal ones are a tie.
        length: Indices in a segment.
        raw_index_map: `[M]` the row of the store that each index stands for; default the index
            itself.
        source: Who judged, kept with every pair.

    Returns:
        N pairs in the order given, the first segment as `chosen` of a tie; `info` holds
        `{"row": i}`.

    Raises:
        ValueError: Lists of other lengths, labels of another kind, or indices outside the map or
            the store; the message names the row.
    """
    first, second = (_whole(v, name) for v, name in ((index_1, "index_1"), (index_2, "index_2")))
    verdict = _verdicts(np.asarray(label))
    if not len(first) == len(second) == len(verdict):
        raise ValueError(
            "index_1, index_2 and label must have the same length; got "
            f"{len(first)}, {len(second)} and {len(verdict)}"
        )
    if length < 1:
        raise ValueError(f"length must be at least 1; got {length}")
    ends = store.episode_ends
    rows = np.arange(store.num_steps)
    if raw_index_map is not None:
        rows = _whole(raw_index_map, "raw_index_map")

    def segment(index: int) -> Segment:
        if not 0 <= index <= len(rows) - length:
            raise ValueError(
                f"a segment of {length} from index {index} does not fit 0..{len(rows) - 1}; is "
                "raw_index_map the one of these labels?"
            )
        return segment_of_rows(rows[index : index + length], ends)

    pairs = []
    for row, (a, b, won) in enumerate(
        zip(first.tolist(), second.tolist(), verdict.tolist(), strict=True)
    ):
        try:
            items = (segment(b), segment(a)) if won == 1 else (segment(a), segment(b))
            pairs.append(Pair(*items, tie=won == -1, source=source, info={"row": row}))
        except ValueError as error:
            raise ValueError(f"{store.name}, row {row} of the labels: {error}") from error
    return pairs


def read_label_file(
    path: str | os.PathLike[str],
    store: EpisodeStore,
    *,
    kind: str = "human",
    length: int | None = None,
) -> list[Pair]:
    """Pairs of an npz file of indices and labels.

    Args:
        path: Holds `index_1`, `index_2` and `<kind>_label` (or `label`); where there are
            `<kind>_index_1` and `<kind>_index_2`, these; `raw_index_map` if the indices are not
            the store's rows; and `seg_len`. Nothing in it is unpickled.
        store: The episodes.
        kind: Whose labels, where a file holds several, such as `"scripted"`; the pairs' source.
        length: Indices in a segment; default the file's `seg_len`.

    Returns:
        See `from_indices`.

    Raises:
        FileNotFoundError: No file.
        ValueError: Not such a file, or what `from_indices` refuses.
    """
    target = Path(path)
    arrays = _read_npz(target)

    def find(*names: str) -> NDArray[Any]:
        for name in names:
            if name in arrays:
                return arrays[name]
        raise ValueError(
            f"{target} has no array {' or '.join(names)}; it has {sorted(arrays)}. Labels are "
            "index_1, index_2, <kind>_label, and perhaps seg_len and raw_index_map"
        )

    steps = int(find("seg_len")) if length is None else length
    return from_indices(
        store,
        find(f"{kind}_index_1", "index_1"),
        find(f"{kind}_index_2", "index_2"),
        find(f"{kind}_label", *(("label",) if kind == "human" else ())),
        steps,
        raw_index_map=arrays.get("raw_index_map"),
        source=kind,
    )


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"no label file at {path}")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, OSError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not an npz file of plain arrays: {error}") from error


def _whole(values: ArrayLike, name: str) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"{name} must be a vector of whole numbers; got shape {list(array.shape)}, dtype "
            f"{array.dtype}"
        )
    return array.astype(np.int64)


def _verdicts(label: NDArray[Any]) -> NDArray[np.int64]:
    """-1, 0 or 1 of each row."""
    if label.dtype.kind not in "iufb" or label.ndim not in (1, 2):
        raise ValueError(
            f"label must be [N] or [N, 2] numbers; got shape {list(label.shape)}, dtype "
            f"{label.dtype}"
        )
    if label.ndim == 2:
        if label.shape[1] != 2 or not np.isfinite(label).all():
            raise ValueError(
                f"label [N, 2] must be two finite numbers a row; got shape {list(label.shape)}"
            )
        better = np.where(label[:, 1] > label[:, 0], 1, 0)
        return np.where(label[:, 0] == label[:, 1], -1, better)
    wrong = np.flatnonzero(~np.isin(label, (-1, 0, 1)))
    if len(wrong):
        raise ValueError(
            "label must be 0 (the first is better), 1 (the second) or -1 (neither); got "
            f"{label[wrong[0]]} in row {wrong[0]}"
        )
    return label.astype(np.int64)
