"""Figures in JSON files: where one is found, and how far two runs of it may lie apart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from diffpolicy.rollout.intervals import mean_interval, student_quantile, wilson_interval
from diffpolicy.settings import ConfigError

Path = Sequence[Any]
"""Keys from the root of a file to a number. A name with ``*`` stands for all that match, a mapping
for the entries of a list that have its values; of several numbers the figure is the mean."""

REASONS = {
    "episodes": (
        "the 95 % interval of the difference of two such runs on the same episodes: sqrt(2) times "
        "that of the recorded score over episodes, or over its training seeds where that is wider"
    ),
    "seeds": "the 95 % interval of the difference of two such runs, from the spread over seeds",
    "interval": (
        "the 95 % interval of the difference of two such runs on the same episodes: sqrt(2) times "
        "the recorded one"
    ),
}
"""Rules of tolerances; others are numbers, ``{rate: n}`` (a rate of n episodes) or ``{relative:
x}``, which say why themselves."""


def values_at(tree: Any, path: Path) -> dict[str, list[float]]:
    """The numbers at a path, by what the first ``*`` or mapping on it stands for.

    Raises:
        LookupError: there are none.

    Example:
        >>> values_at({"a": {"x": 1}, "b": {"x": 2}}, ["*", "x"])
        {'a': [1.0], 'b': [2.0]}
    """
    found: dict[str, list[float]] = {}
    for group, value in _walk(tree, path, ""):
        found.setdefault(group, []).append(value)
    if not found:
        raise LookupError(f"nothing at {list(path)}")
    return found


def _walk(tree: Any, path: Path, group: str) -> Iterator[tuple[str, float]]:
    if not path:
        if isinstance(tree, bool | int | float):
            yield group, float(tree)
        return
    for key, child in _children(tree, path[0]):
        several = isinstance(path[0], Mapping) or "*" in str(path[0])
        yield from _walk(child, path[1:], group or (key if several else ""))


def _children(tree: Any, key: Any) -> Iterator[tuple[str, Any]]:
    entries = enumerate(tree) if isinstance(tree, list) else getattr(tree, "items", tuple)()
    for name, child in entries:
        if isinstance(key, Mapping):
            has = isinstance(child, Mapping) and all(
                str(child.get(k)) == str(wanted) for k, wanted in key.items()
            )
        else:
            has = fnmatchcase(str(name), str(key)) if "*" in str(key) else str(name) == str(key)
        if has:
            yield str(name), child


def figure_at(tree: Any, path: Path, reduce: str = "mean") -> float:
    """The figure at a path: the mean, or the median, of the numbers there.

    Raises:
        LookupError: there are none.
    """
    numbers = np.concatenate(list(values_at(tree, path).values()))
    return float(np.median(numbers) if reduce == "median" else numbers.mean())


def tolerance_of(rule: Any, recorded: float, tree: Any, path: Path) -> float:
    """How far another run of a row may be from the recorded figure.

    Args:
        rule: a name of :data:`REASONS`, a number, ``{rate: n}`` or ``{relative: x}``.
        recorded: the figure.
        tree: the recorded file.
        path: where the figure is in it.

    Raises:
        ConfigError: an unknown rule, or one that the recorded file cannot answer.
    """
    if isinstance(rule, int | float):
        return float(rule)
    if isinstance(rule, Mapping) and len(rule) == 1:
        ((kind, size),) = rule.items()
        if kind == "relative":
            return float(size) * abs(recorded)
        if kind == "rate":
            return _apart(wilson_interval(round(recorded * size), int(size)))
    if rule == "interval":
        ends = [figure_at(tree, [*path[:-1], end]) for end in ("low", "high")]
        return math.sqrt(2) * max(abs(end - recorded) for end in ends)
    if rule in ("episodes", "seeds"):
        return _of_groups(list(values_at(tree, path).values()), rule)
    raise ConfigError(
        f"tolerance {rule!r} is no rule; give a number, {{rate: n}}, {{relative: x}} or one of "
        f"{sorted(REASONS)}"
    )


def _of_groups(groups: Sequence[Sequence[float]], rule: str) -> float:
    widths = []
    if rule == "episodes":
        values = np.concatenate(groups)
        rate = bool(np.isin(values, (0.0, 1.0)).all())
        whole = wilson_interval(int(values.sum()), len(values)) if rate else mean_interval(values)
        widths.append(_apart(whole))
    if len(groups) > 1:  # two samples of n training seeds (Student, 2 (n - 1) degrees of freedom)
        n, means = len(groups), [float(np.mean(group)) for group in groups]
        scale = float(np.std(means, ddof=1)) * math.sqrt(2 / n)
        widths.append(student_quantile(0.95, 2 * (n - 1)) * scale)
    if not widths:
        raise ConfigError("the rule 'seeds' needs figures of two seeds or more")
    return max(widths)


def _apart(interval: Any) -> float:
    ends = (interval.value - interval.low, interval.high - interval.value)
    return math.sqrt(2) * max(ends)
