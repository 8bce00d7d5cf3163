"""Human labels of published files: pairs of segments by their first rows, and who won.

Files of this kind (Uni-RLHF, Yuan et al. 2024; B-Pref and its relatives) number the rows of a
`qlearning_dataset`, which D4RL makes by dropping the last step of each episode, so a segment of 50
consecutive indices may leave out a stored step and go on in the next episode. A map from index to
stored row says what is meant, and a segment is kept exactly as it is: several spans where it is not
one run of steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from diffpolicy.data.d4rl.views import transition_rows
from diffpolicy.data.preferences.records import Pair, Segment, segment_of_rows

if TYPE_CHECKING:
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


def qlearning_rows(store: EpisodeStore) -> NDArray[np.int64]:
    """The row of the store that each transition of D4RL's `qlearning_dataset` is.

    D4RL leaves out the last row of an episode that timed out, for want of an observation after it,
    and the last of all; the rows that lead to terminal states stay. A store that does not say how
    its episodes ended is taken for one of time-outs: every row but each episode's last. (A row that
    is both terminal and timed out is left out by D4RL; a store keeps it as terminal alone.)

    Args:
        store: All episodes of the file that the labels were given for, in its order.

    Returns:
        `[M]`, for `from_indices`.

    Raises:
        ValueError: The store's episodes are not those of the file: split at goals, or a part.
    """
    attrs, ends = store.attrs, store.episode_ends
    if any(str(t).startswith("split_goals") for t in attrs.get("transforms", [])):
        raise ValueError(
            f"{store.name} was split at goals, and the labels are of whole trajectories; make a "
            "store without split_goals"
        )
    if attrs.get("left_out_episodes"):
        raise ValueError(
            f"{store.name} leaves out episodes of its source, and the labels count them; make a "
            "store of all of it"
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
