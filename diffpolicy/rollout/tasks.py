"""Scores of each task of an environment that has several, and means over tasks and their groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diffpolicy.rollout.intervals import Interval, mean_interval, mean_over, wilson_interval

if TYPE_CHECKING:
    from diffpolicy.rollout.results import EpisodeRecord

RATES = ("success", "final_success")
SCORES = (*RATES, "max_reward", "return")
"""What an episode can be scored by: the names of a summary's entries."""


def episode_score(record: EpisodeRecord, score: str) -> float | None:
    """One episode's score, a name of :data:`SCORES`.

    Returns:
        0 or 1 for a rate; an episode that could not be run is a failure. ``None`` where the
        environment does not say, and for the rewards of an episode that could not be run.
    """
    if score in RATES:
        said = getattr(record, score)
        return None if said is None else float(said)
    value = record.episode_return if score == "return" else record.max_reward
    return None if record.error is not None else float(value)


def summarise_tasks(
    records: Sequence[EpisodeRecord], groups: Mapping[str, Sequence[str]]
) -> dict[str, Any] | None:
    """Score every task by itself, then their mean and those of groups, as JSON values.

    Args:
        records: of all episodes. One that failed before it told its task is counted nowhere.
        groups: names of tasks by group, as an environment declares them.

    Returns:
        ``None`` if no episode told a task; else ``tasks`` (by name, in the order of the records),
        ``mean`` (over all tasks, each counting the same) and ``groups`` (the same over the tasks of
        each group). Each entry has ``n_episodes``, ``n_errors`` and the intervals of
        :data:`SCORES`, which are ``None`` where the environment does not say; ``mean`` and
        ``groups`` also ``n_tasks``, and a group ``missing``, those of its tasks that were not run.
    """
    by_task: dict[str, list[EpisodeRecord]] = {}
    for record in records:
        if record.task is not None:
            by_task.setdefault(record.task, []).append(record)
    if not by_task:
        return None
    # An environment that tells of success in any episode tells it in all: errors then are failures.
    told = [name for name in RATES if any(_tells(record, name) for record in records)]
    scored = {task: _scores(mine, told) for task, mine in by_task.items()}
    return {
        "tasks": {task: _plain(found) for task, found in scored.items()},
        "mean": _mean(scored.values()),
        "groups": {
            group: {
                **_mean([scored[task] for task in names if task in scored]),
                "missing": [task for task in names if task not in scored],
            }
            for group, names in groups.items()
            if any(task in scored for task in names)
        },
    }


def _tells(record: EpisodeRecord, name: str) -> bool:
    return record.error is None and getattr(record, name) is not None


def _scores(records: Sequence[EpisodeRecord], told: Sequence[str]) -> dict[str, Any]:
    errors = sum(record.error is not None for record in records)
    found: dict[str, Any] = {"n_episodes": len(records), "n_errors": errors}
    for score in SCORES:
        if score not in RATES:
            known = [episode_score(record, score) for record in records]
            found[score] = mean_interval([value for value in known if value is not None])
        elif score in told:
            successes = sum(getattr(record, score) is True for record in records)
            found[score] = wilson_interval(successes, len(records))
        else:
            found[score] = None
    return found


def _mean(scored: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean over tasks of each score; unknown where it is of one of them."""
    parts = list(scored)
    means: dict[str, Interval | None] = {}
    for score in SCORES:
        each = [part[score] for part in parts]
        means[score] = mean_over(each) if all(one is not None for one in each) else None
    counts = {name: sum(part[name] for part in parts) for name in ("n_episodes", "n_errors")}
    return {"n_tasks": len(parts), **_plain({**counts, **means})}


def _plain(found: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.to_dict() if isinstance(v, Interval) else v for k, v in found.items()}
