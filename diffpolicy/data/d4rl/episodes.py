"""Where the trajectories of a D4RL file end."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffpolicy.data.d4rl.raw import RawFile

_BLOCK_BYTES = 2**25


class Episodes(NamedTuple):
    """The trajectories of a file, back to back.

    Attributes:
        ends: ``[E]`` int64 cumulative ends: trajectory i is rows ``ends[i-1]..ends[i]-1``.
        terminated: ``[E]`` whether its last step led to a terminal state.
        truncated: ``[E]`` whether its last step was cut off (a time-out, or a change of goal). Both
            may hold only after ``split_goals``: the goal was reached and the trip was cut there.
        partial: whether the last trajectory is unfinished: the file ends in the middle of it.
    """

    ends: NDArray[np.int64]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    partial: bool

    @property
    def starts(self) -> NDArray[np.int64]:
        """``[E]`` first rows."""
        return self.ends - np.diff(self.ends, prepend=0)

    def sums(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Sum ``values`` ``[N]`` over each of them: ``[E]``, in float64."""
        if not len(self.ends):
            return np.zeros(0)
        return np.add.reduceat(values[: self.ends[-1]].astype(np.float64), self.starts)

    def complete(self) -> Episodes:
        """Leave out the last one, if it is partial."""
        count = len(self.ends) - self.partial
        return Episodes(self.ends[:count], self.terminated[:count], self.truncated[:count], False)


def find_episodes(
    terminals: NDArray[Any],
    timeouts: NDArray[Any] | None,
    max_episode_steps: int | None = None,
    breaks: NDArray[Any] | None = None,
) -> Episodes:
    """Split a file's rows into trajectories, each with how it ended.

    A trajectory ends where ``terminals`` or ``timeouts`` says so; where both do, the state was
    terminal and the step limit did not matter. A file without ``timeouts`` leaves the time-outs to
    be counted: every ``max_episode_steps`` rows after a start. (D4RL's own functions count one row
    less after the first trajectory; ``views`` does as they do.)

    Args:
        terminals: ``[N]``, true in steps that lead to a terminal state.
        timeouts: ``[N]``, true in steps after which the recording was cut off; None if not
            recorded.
        max_episode_steps: The step limit, needed without ``timeouts`` and ``breaks``.
        breaks: ``[N]``, true in steps that the next row does not follow on (see ``find_breaks``);
            only without ``timeouts``.

    Returns:
        The trajectories, the last of which may be partial. (With ``breaks`` alone it is taken for a
        whole one if it is as long as the longest.)
    """
    n = len(terminals)
    terminal = np.asarray(terminals, bool)
    if timeouts is not None:
        ends = np.flatnonzero(terminal | np.asarray(timeouts, bool)) + 1
    else:
        last = terminal if breaks is None else terminal | breaks
        ends = np.unique(np.append(np.flatnonzero(last) + 1, n))
        ends = ends if max_episode_steps is None else _cut(ends, max_episode_steps)
        # The tail is whole if it happens to end at the limit.
        lengths = np.diff(ends, prepend=0)
        limit = max_episode_steps or lengths[:-1].max(initial=n + 1 if len(lengths) == 1 else 0)
        if not terminal[n - 1] and lengths[-1] < limit:
            ends = ends[:-1]
    partial = not len(ends) or ends[-1] < n
    ends = np.append(ends, n) if partial else ends
    terminated = terminal[ends - 1]
    truncated = ~terminated
    if partial:
        truncated[-1] = False
    return Episodes(ends.astype(np.int64), terminated, truncated, partial)


def find_breaks(raw: RawFile) -> NDArray[np.bool_]:
    """Mark the rows whose ``next_observations`` the next row does not begin with (a reset).

    Args:
        raw: A file with ``next_observations``.

    Returns:
        ``[N]``; the last row, which nothing follows, is not marked.

    Raises:
        ValueError: Most rows do not follow on: they are in no order of time.
    """
    n = raw.num_rows
    found = np.zeros(n, bool)
    step = max(1, _BLOCK_BYTES // (8 * max(1, int(np.prod(raw.row_shape("observations"))))))
    for start in range(0, n - 1, step):
        stop = min(start + step, n - 1)
        after = raw.read("next_observations", start, stop).reshape(stop - start, -1)
        row = raw.read("observations", start + 1, stop + 1).reshape(stop - start, -1)
        found[start:stop] = ~np.isclose(after, row, rtol=1e-5, atol=1e-6, equal_nan=True).all(1)
    if 2 * int(found.sum()) > n:
        raise ValueError(
            f"{raw.path}: of {n} rows {int(found.sum())} are not followed by their "
            "next_observations, so they are in no order of time; else say max_episode_steps=N"
        )
    return found


def read_episodes(
    raw: RawFile, dataset_limit: int | None, asked: int | None
) -> tuple[Episodes, str]:
    """Find the trajectories of a file by what it holds.

    Args:
        raw: The file.
        dataset_limit: The step limit of the dataset that it is of, if it is one.
        asked: The step limit that the user gave.

    Returns:
        The trajectories, and in words how they were found; empty where the file's own flags say.

    Raises:
        ValueError: A step limit is given for a file with flags, or the rows are in no order.
    """
    timeouts = raw.read("timeouts") if "timeouts" in raw else None
    said = timeouts is not None and bool(timeouts.any())
    if asked is not None and said:
        why = "has timeouts, which say where its episodes end"
        raise ValueError(f"{raw.path} {why}; leave max_episode_steps out")
    limit = asked or (None if timeouts is not None else dataset_limit)
    follows = "next_observations" in raw and dataset_limit is None and not said
    breaks = find_breaks(raw) if follows else None
    terminals = raw.read("terminals")
    if limit is None and breaks is None:
        return find_episodes(terminals, timeouts), ""
    how = [f"cut every {limit} steps"] if limit else []
    how += ["cut where the next row does not begin with next_observations"] if follows else []
    note = f"the file has no timeouts: episodes were {' and '.join(how)}"
    return find_episodes(terminals, None, limit, breaks), note


def _cut(stops: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """Ends after cutting each of the segments that end at ``stops`` every ``limit`` rows."""
    starts = np.concatenate([[0], stops[:-1]])
    pieces = -(-(stops - starts) // limit)
    first = np.repeat(np.cumsum(pieces) - pieces, pieces)
    number = np.arange(int(pieces.sum())) - first + 1
    cuts = np.repeat(starts, pieces) + limit * number
    ends: NDArray[np.int64] = np.minimum(cuts, np.repeat(stops, pieces))
    return ends
