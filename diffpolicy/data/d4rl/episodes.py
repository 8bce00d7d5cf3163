"""Where the trajectories of a D4RL file end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Episodes(NamedTuple):
    """The trajectories of a file, back to back.

    Attributes:
        ends: `[E]` int64 cumulative ends: trajectory i is rows `ends[i-1]..ends[i]-1`.
        terminated: `[E]` whether its last step led to a terminal state.
        truncated: `[E]` whether its last step was cut off (a time-out, or a change of goal). Both
            may hold only after `split_goals`: the goal was reached and the trip was cut there.
        partial: whether the last trajectory is unfinished: the file ends in the middle of it.
    """

    ends: NDArray[np.int64]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    partial: bool

    @property
    def starts(self) -> NDArray[np.int64]:
        """`[E]` first rows."""
        return np.concatenate([np.zeros(1, np.int64), self.ends[:-1]])

    def sums(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """`[E]` sums of `values` `[N]` over each of them, in float64."""
        if not len(self.ends):
            return np.zeros(0)
        found: NDArray[np.float64] = np.add.reduceat(
            values[: self.ends[-1]].astype(np.float64), self.starts
        )
        return found

    def first(self, count: int) -> Episodes:
        """Only the first `count` of them."""
        partial = self.partial and count >= len(self.ends)
        return Episodes(self.ends[:count], self.terminated[:count], self.truncated[:count], partial)


def find_episodes(
    terminals: NDArray[Any], timeouts: NDArray[Any] | None, max_episode_steps: int | None = None
) -> Episodes:
    """Split a file's rows into trajectories, each with how it ended.

    A trajectory ends where `terminals` or `timeouts` says so; where both do, the state was terminal
    and the step limit did not matter. A file without `timeouts` leaves the time-outs to be counted:
    every `max_episode_steps` rows after a start. (D4RL's own functions count one row less after the
    first trajectory; `views` does as they do.)

    Args:
        terminals: `[N]`, true in steps that lead to a terminal state.
        timeouts: `[N]`, true in steps after which the recording was cut off; None if not recorded.
        max_episode_steps: The step limit, needed without `timeouts`.

    Returns:
        The trajectories, the last of which may be partial.

    Raises:
        ValueError: Neither `timeouts` nor a step limit.
    """
    n = len(terminals)
    terminal = np.asarray(terminals, bool)
    if timeouts is not None:
        ends = np.flatnonzero(terminal | np.asarray(timeouts, bool)) + 1
    elif max_episode_steps is None:
        raise ValueError("without timeouts the step limit of the environment is needed")
    else:
        stops = np.append(np.flatnonzero(terminal) + 1, n)
        ends = _cut(np.unique(stops), max_episode_steps)
        # The tail is whole if it happens to end at the limit.
        lengths = np.diff(ends, prepend=0)
        if not terminal[n - 1] and lengths[-1] < max_episode_steps:
            ends = ends[:-1]
    partial = not len(ends) or ends[-1] < n
    ends = np.append(ends, n) if partial else ends
    terminated = terminal[ends - 1]
    truncated = ~terminated
    if partial:
        truncated[-1] = False
    return Episodes(ends.astype(np.int64), terminated, truncated, partial)


def _cut(stops: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """Ends after cutting each of the segments that end at `stops` every `limit` rows."""
    starts = np.concatenate([[0], stops[:-1]])
    pieces = -(-(stops - starts) // limit)
    first = np.repeat(np.cumsum(pieces) - pieces, pieces)
    number = np.arange(int(pieces.sum())) - first + 1
    cuts = np.repeat(starts, pieces) + limit * number
    ends: NDArray[np.int64] = np.minimum(cuts, np.repeat(stops, pieces))
    return ends
