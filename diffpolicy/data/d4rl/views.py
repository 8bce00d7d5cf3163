"""What D4RL's own two functions return, row for row, computed with whole arrays.

Both reproduce D4RL's counting of time-outs in files without ``timeouts`` exactly: its counter
starts a trajectory at 0 the first time and after a transition that was left out, but at 1 after any
other end, so that most trajectories are cut one step early. ``D4RLFile`` cuts them where the
environment does; these functions are for comparisons with published code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffpolicy.data.d4rl.file import D4RLFile
from diffpolicy.data.d4rl.raw import REQUIRED, squeezed
from diffpolicy.data.fields import check_has
from diffpolicy.settings import check_range

Arrays = dict[str, "NDArray[Any]"]


def qlearning_dataset(
    source: D4RLFile | Mapping[str, NDArray[Any]],
    terminate_on_end: bool = False,
    *,
    max_episode_steps: int | None = None,
) -> Arrays:
    """Return transitions as D4RL's ``qlearning_dataset`` makes them.

    The next observation is the next row's, also where the file has ``next_observations`` and where
    a trajectory ends; the last row of the file is left out.

    Args:
        source: An open file, whose reward transforms apply; or its arrays by D4RL's names.
        terminate_on_end: Keep the last transitions of time-outs (with ``terminals`` as in the
            file); otherwise they are left out.
        max_episode_steps: The step limit, for arrays without ``timeouts``.

    Returns:
        ``observations, actions, next_observations`` ``[M, ...]`` and ``rewards`` ``[M]`` in
        float32, ``terminals`` ``[M]`` bool.

    Raises:
        ValueError: An array is missing or has another length, the step limit is not known, or the
            file was opened with ``split_goals``.
    """
    arrays, limit = _loaded(source, max_episode_steps, (*REQUIRED, "timeouts"))
    terminals = arrays["terminals"].astype(bool)
    if terminate_on_end:
        keep = np.arange(len(terminals) - 1)
    else:
        keep = transition_rows(terminals, arrays.get("timeouts"), limit)
    observations = arrays["observations"].astype(np.float32)
    return {
        "observations": observations[keep],
        "actions": arrays["actions"].astype(np.float32)[keep],
        "next_observations": observations[keep + 1],
        "rewards": arrays["rewards"].astype(np.float32)[keep],
        "terminals": terminals[keep],
    }


def transition_rows(
    terminals: NDArray[np.bool_], timeouts: NDArray[Any] | None, limit: int | None = None
) -> NDArray[np.int64]:
    """Return the numbers ``[M]`` of the rows that ``qlearning_dataset`` keeps.

    Args:
        terminals: ``[N]``.
        timeouts: ``[N]``, or None if a file has none.
        limit: The step limit that counts in their stead.
    """
    final = _final(terminals, timeouts, limit, restart=0, horizon=len(terminals) - 1)
    return np.flatnonzero(~final)


def sequence_dataset(
    source: D4RLFile | Mapping[str, NDArray[Any]], *, max_episode_steps: int | None = None
) -> Iterator[Arrays]:
    """Yield trajectories as D4RL's ``sequence_dataset`` makes them, but for an unfinished last one.

    Args:
        source: An open file, whose reward transforms apply; or its arrays by D4RL's names.
        max_episode_steps: The step limit, for arrays without ``timeouts``.

    Yields:
        Every array with one row a step, in its own type, cut to one trajectory. (D4RL fails on
        files with further arrays under ``metadata/``; here they are passed over.)

    Raises:
        ValueError: As for ``qlearning_dataset``.
    """
    arrays, limit = _loaded(source, max_episode_steps)
    terminals = arrays["terminals"].astype(bool)
    final = _final(terminals, arrays.get("timeouts"), limit, restart=1, horizon=len(terminals))
    start = 0
    for end in (np.flatnonzero(terminals | final) + 1).tolist():
        yield {name: values[start:end] for name, values in arrays.items()}
        start = end


def _loaded(
    source: D4RLFile | Mapping[str, NDArray[Any]],
    limit: int | None,
    names: tuple[str, ...] | None = None,
) -> tuple[Arrays, int | None]:
    """The arrays (default all) of a file, or given ones, checked and squeezed alike; the limit."""
    check_range("[1, inf)", max_episode_steps=limit)
    if isinstance(source, D4RLFile):
        if source.splits:
            raise ValueError("D4RL's functions know no split_goals: open the file without it")
        limit = limit or source.step_limit
        wanted = [n for n in source.raw.names if names is None or n in names]
        arrays = {name: source.raw.read(name) for name in wanted}
        if source.transforms:
            arrays["rewards"] = source.reward_map(arrays["rewards"])
    else:
        arrays = _checked(source)
    if "timeouts" not in arrays and limit is None:
        raise ValueError("the arrays have no timeouts: give max_episode_steps")
    return arrays, limit


def _checked(source: Mapping[str, NDArray[Any]]) -> Arrays:
    check_has("what should be D4RL's arrays", REQUIRED, source)
    n = len(source["rewards"])
    arrays = {k: np.asarray(v) for k, v in source.items() if not k.startswith("metadata/")}
    if odd := {k: v.shape for k, v in arrays.items() if v.shape[:1] != (n,)}:
        raise ValueError(f"every array needs {n} rows, as rewards has; got the shapes {odd}")
    return {name: squeezed(name, values) for name, values in arrays.items()}


def _final(
    terminals: NDArray[np.bool_],
    timeouts: NDArray[Any] | None,
    limit: int | None,
    *,
    restart: int,
    horizon: int,
) -> NDArray[np.bool_]:
    """``[horizon]``: which rows D4RL takes for the last before a time-out.

    Args:
        terminals: ``[N]``.
        timeouts: ``[N]``, which settle it; or None.
        limit: The step limit, without ``timeouts``.
        restart: Where D4RL's counter starts after a time-out (1 after a terminal state, always).
        horizon: How many rows it looks at.
    """
    if timeouts is not None:
        return timeouts[:horizon].astype(bool)
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
