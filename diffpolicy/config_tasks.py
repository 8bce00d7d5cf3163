"""Tasks of sequences in configurations: whether one was named, and what a file of one implies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffpolicy.config_compose import given_text, keys_given, quoted


def of_task(given: Mapping[str, str]) -> bool:
    """Whether a task of sequences was named."""
    return any(key.split(".")[0] == "task" for key in given)


def of_file(kind: str, overrides: Sequence[str]) -> list[str]:
    """Overrides with what is different for a task of a file, unless it was said otherwise.

    The task has the file's name, and its generator is a ``sequence_cnn``.
    """
    given, more = keys_given(overrides), []
    if "task.sequences" in given:
        if kind == "train sequences" and not {"network", "experiment"} & set(given):
            more.append("network=sequence_cnn")
        if "task.name" not in given:
            name = Path(given_text(given["task.sequences"])).name.split(".")[0]
            more.append(f"task.name={quoted(name)}")
    return [*overrides, *more]


def with_kwargs(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration whose task has its settings in ``kwargs``, wherever they were given.

    ``task.sequences=FILE`` is ``task.kwargs.sequences=FILE``.
    """
    task = values.get("task")
    if task is None:
        return values
    known = {key: task[key] for key in ("id", "name") if key in task}
    beside = {key: value for key, value in task.items() if key not in ("id", "name", "kwargs")}
    kwargs = {**(task.get("kwargs") or {}), **beside}
    return {**values, "task": {**known, "kwargs": kwargs}}
