"""What D4RL's own two functions return, row for row, computed with whole arrays.

Both reproduce D4RL's counting of time-outs in files without `timeouts` exactly: its counter starts
a trajectory at 0 the first time and after a transition that was left out, but at 1 after any other
end, so that most trajectories are cut one step early. `D4RLFile` cuts them where the environment
does; these functions are for comparisons with published code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from diffpolicy.data.d4rl.file import D4RLFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

_FLAT = ("rewards", "terminals", "timeouts")


def qlearning_dataset(
    source: D4RLFile | Mapping[str, NDArray[Any]],
    terminate_on_end: bool = False,
    *,
    max_episode_steps: int | None = None,
) -> dict[str, NDArray[Any]]:
    """Transitions as D4RL's `qlearning_dataset` makes them.

    The next observation is the next row's, also where the file has `next_observations` and where a
    trajectory ends; the last row of the file is left out.

    Args:
        source: An open file, whose reward transforms apply; or its arrays by D4RL's names.
        terminate_on_end: Keep the last transitions of time-outs (with `terminals` as in the file);
            otherwise they are left out.
        max_episode_steps: The step limit, for arrays without `timeouts`.

    Returns:
        `observations`, `actions`, `next_observations` `[M, ...]` and `rewards` `[M]` in float32,
        `terminals` `[M]` bool.

    Raises:
        ValueError: An array is missing or has another length, the step limit is not known, or the
            file was opened with `split_goals`.
    """
    rows = _Rows(source, max_episode_steps)
    timeouts = rows.read("timeouts").astype(bool) if "timeouts" in rows.names else None
    keep = transition_rows(rows.terminals, timeouts, rows.limit)
    keep = np.arange(len(rows.terminals) - 1) if terminate_on_end else keep
    observations = rows.read("observations").astype(np.float32)
    return {
        "observations": observations[keep],
        "actions": rows.read("actions").astype(np.float32)[keep],
        "next_observations": observations[keep + 1],
        "rewards": rows.rewards.astype(np.float32)[keep],
        "terminals": rows.terminals[keep],
    }


def transition_rows(
    terminals: NDArray[np.bool_], timeouts: NDArray[np.bool_] | None, limit: int | None = None
) -> NDArray[np.int64]:
    """The rows that `qlearning_dataset` keeps.

    Args:
        terminals: `[N]`.
        timeouts: `[N]`, or None if a file has none.
        limit: The step limit that counts in their stead.

    Returns:
        `[M]` row numbers.
    """
    final = _final(terminals, timeouts, limit, restart=0, horizon=len(terminals) - 1)
    return np.flatnonzero(~final)


def sequence_dataset(
    source: D4RLFile | Mapping[str, NDArray[Any]], *, max_episode_steps: int | None = None
) -> Iterator[dict[str, NDArray[Any]]]:
    """Trajectories as D4RL's `sequence_dataset` makes them; an unfinished last one is left out.

    Args:
        source: An open file, whose reward transforms apply; or its arrays by D4RL's names.
        max_episode_steps: The step limit, for arrays without `timeouts`.

    Yields:
        Every array with one row a step, in its own type, cut to one trajectory. (D4RL fails on
        files with further arrays under `metadata/`; here they are passed over.)

    Raises:
        ValueError: As for `qlearning_dataset`.
    """
    rows = _Rows(source, max_episode_steps)
    timeouts = rows.read("timeouts").astype(bool) if "timeouts" in rows.names else None
    n = len(rows.terminals)
    final = _final(rows.terminals, timeouts, rows.limit, restart=1, horizon=n)
    ends = np.flatnonzero(rows.terminals | final)
    start = 0
    for end in (int(e) + 1 for e in ends):
        yield {name: rows.read(name, start, end) for name in rows.names}
        start = end


class _Rows:
    """The arrays of a file, or given ones, checked and squeezed alike."""

    def __init__(
        self, source: D4RLFile | Mapping[str, NDArray[Any]], max_episode_steps: int | None
    ) -> None:
        self.limit = max_episode_steps
        self.names: list[str]
        self._read: Callable[[str, int, int | None], NDArray[Any]]
        self._scaled: NDArray[Any] | None = None
        if isinstance(source, D4RLFile):
            self._from_file(source)
        else:
            self._from_arrays(source)
        self.terminals = self.read("terminals").astype(bool)
        if "timeouts" not in self.names and self.limit is None:
            raise ValueError("the arrays have no timeouts: give max_episode_steps")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"max_episode_steps must be at least 1; got {self.limit}")

    def _from_file(self, source: D4RLFile) -> None:
        if any(name.startswith("split_goals") for name in source.transforms):
            raise ValueError("D4RL's functions know no split_goals: open the file without it")
        self.names, self._read = source.raw.names, source.raw.read
        self.limit = self.limit or source._limit or source._dataset_limit
        if source.transforms:
            self._scaled = source.reward_map(source.raw.read("rewards"))

    def _from_arrays(self, source: Mapping[str, NDArray[Any]]) -> None:
        missing = {"observations", "actions", "rewards", "terminals"} - set(source)
        if missing:
            raise ValueError(f"expected arrays by D4RL's names; {sorted(missing)} are missing")
        n = len(source["rewards"])
        arrays = {k: np.asarray(v) for k, v in source.items() if not k.startswith("metadata/")}
        odd = {k: v.shape for k, v in arrays.items() if not v.ndim or len(v) != n}
        if odd:
            raise ValueError(f"every array needs {n} rows, as rewards has; got the shapes {odd}")
        self.names = list(arrays)

        def read(name: str, start: int, stop: int | None) -> NDArray[Any]:
            values = arrays[name][start:stop]
            return values[:, 0] if name in _FLAT and values.ndim == 2 else values

        self._read = read

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows of one array."""
        if name == "rewards" and self._scaled is not None:
            return self._scaled[start:stop]
        return self._read(name, start, stop)

    @property
    def rewards(self) -> NDArray[Any]:
        """All rewards."""
        return self.read("rewards")


def _final(
    terminals: NDArray[np.bool_],
    timeouts: NDArray[np.bool_] | None,
    limit: int | None,
    *,
    restart: int,
    horizon: int,
) -> NDArray[np.bool_]:
    """`[horizon]`: which rows D4RL takes for the last before a time-out.

    Args:
        terminals: `[N]`.
        timeouts: `[N]`, which settle it; or None.
        limit: The step limit, without `timeouts`.
        restart: Where D4RL's counter starts after a time-out (1 after a terminal state, always).
        horizon: How many rows it looks at.
    """
    if timeouts is not None:
        return timeouts[:horizon]
    assert limit is not None
    final = np.zeros(horizon, bool)
    start, counter = 0, 0
    for stop in [*np.flatnonzero(terminals[:horizon]) + 1, horizon]:
        # Within a stretch without terminal states the time-outs are evenly spaced.
        first = start + limit - 1 - counter
        if start <= first < stop:
            period = limit - restart
            final[first : stop if period else first + 1 : max(period, 1)] = True
        counter = restart if stop > start and final[stop - 1] else 1
        start = int(stop)
    return final
