"""Evaluations task by task: the table of one, and several compared on the same episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffpolicy.report import tables
from diffpolicy.rollout.intervals import Interval, mean_interval, mean_over, paired_difference
from diffpolicy.rollout.intervals import wilson_interval as rate_interval
from diffpolicy.rollout.results import EvalResult
from diffpolicy.rollout.tasks import RATES, SCORES, episode_score
from diffpolicy.settings import check_choice

FORMAT = "diffpolicy-evaluations"
_ALL = "all episodes"
Lines = list[list[str]]


# ------------------------------------------------------------------ one evaluation


def task_lines(summary: Mapping[str, Any]) -> tuple[list[str], Lines]:
    """Heads and cells of the table of an evaluation's tasks, then their mean and those of groups.

    Args:
        summary: of an :class:`EvalResult`; without tasks the table has one line, of all episodes.
    """
    found = summary.get("tasks")
    rows: dict[str, Mapping[str, Any]] = {_ALL: summary}
    if found is not None:
        rows = {**found["tasks"], f"mean of {found['mean']['n_tasks']} tasks": found["mean"]}
        rows |= {_group_name(name, group): group for name, group in found["groups"].items()}
    scores = [name for name in SCORES if any(row[name] is not None for row in rows.values())]
    lines = [
        [name, _episodes(row), *(cell(row[score]) for score in scores)]
        for name, row in rows.items()
    ]
    return ["task", "episodes", *(score.replace("_", " ") for score in scores)], lines


def task_table(summary: Mapping[str, Any]) -> str:
    """The table of :func:`task_lines` in Markdown."""
    return tables.markdown(*task_lines(summary))


def cell(interval: Mapping[str, Any] | None) -> str:
    """An estimate with its interval; blank where it is not known."""
    if interval is None or interval["value"] is None:
        return ""
    ends = [interval["low"], interval["high"]]
    shown = "" if None in ends else f" [{tables.text(ends[0])}, {tables.text(ends[1])}]"
    return tables.text(interval["value"]) + shown


def _episodes(row: Mapping[str, Any]) -> str:
    errors = row["n_errors"]
    return str(row["n_episodes"]) + (f" ({errors} could not be run)" if errors else "")


def _group_name(name: str, group: Mapping[str, Any]) -> str:
    missing, count = len(group["missing"]), group["n_tasks"]
    return f"mean of {name} ({count}{f' of {count + missing}' if missing else ''} tasks)"


# ------------------------------------------------------------------ several


def compare_evaluations(
    evaluations: Sequence[str | Path], output: str | Path, *, score: str | None = None
) -> Path:
    """Write ``report.json`` and ``report.md``: each evaluation minus the first, task by task.

    Episodes are paired by their environment seed; those that not all evaluations have are left out,
    and so are, for rewards, those that one of them could not run. The mean over tasks counts every
    task the same; groups are those that the environment declares.

    Args:
        evaluations: files or directories as :meth:`EvalResult.load` reads them; two or more.
        output: a directory.
        score: a name of :data:`SCORES`; ``None``: success where all tell of it, else the return.

    Returns:
        The path of ``report.md``.

    Raises:
        ValueError: fewer than two, another environment, no seed in common, a seed that is of
            another task in one of them, or a score that they do not have.
    """
    names = [str(path) for path in evaluations]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"two or more different evaluations are compared; got {names}")
    found = [EvalResult.load(path) for path in evaluations]
    _check_environments(names, found)
    chosen = _score(found, score)
    values, tasks, left_out = _shared(names, found, chosen)
    groups: Mapping[str, Sequence[str]] = found[0].env.get("task_groups", {})
    rows = _rows(values, tasks, groups, rate=chosen in RATES)
    notes = [f"{left_out} episodes are not in all of them, or could not be run."] * bool(left_out)
    notes += _versions(names, found)
    report = {"evaluations": names, "score": chosen, "left_out": left_out, "rows": rows}
    tables.save_report(
        Path(output),
        f"{FORMAT}-comparison",
        {**report, "env": found[0].env, "pictures": [], "notes": notes},
        f"# {found[0].env['id']}: {chosen.replace('_', ' ')} compared\n",
        *(f"{_letter(i)}: `{name}`.\n" for i, name in enumerate(names)),
        "Differences are paired by episode; 95 % intervals.\n",
        tables.markdown(*_comparison_lines(rows, len(names))),
    )
    return Path(output) / "report.md"


def _check_environments(names: Sequence[str], found: Sequence[EvalResult]) -> None:
    ids = {name: result.env.get("id") for name, result in zip(names, found, strict=True)}
    if len(set(ids.values())) > 1:
        raise ValueError(f"evaluations of one environment can be compared; these are of {ids}")


def _score(found: Sequence[EvalResult], score: str | None) -> str:
    has = [s for s in SCORES if all(result.summary.get(s) is not None for result in found)]
    if score is None:
        return "success" if "success" in has else "return"
    check_choice("score", score, has)
    return score


def _shared(
    names: Sequence[str], found: Sequence[EvalResult], score: str
) -> tuple[list[dict[int, float]], dict[int, str | None], int]:
    """Scores by seed of the episodes that all have, the tasks of these, and how many are left out.

    Raises:
        ValueError: there are none, or a seed stands for different tasks.
    """
    by_seed = [{record.seed: record for record in result.episodes} for result in found]
    every = list(dict.fromkeys(seed for records in by_seed for seed in records))
    values: list[dict[int, float]] = [{} for _ in found]
    tasks: dict[int, str | None] = {}
    for seed in every:
        records = [one[seed] for one in by_seed if seed in one]
        scores = [episode_score(record, score) for record in records]
        if len(records) < len(found) or any(one is None for one in scores):
            continue
        told = list(dict.fromkeys(record.task for record in records if record.task is not None))
        if len(told) > 1:
            raise ValueError(
                f"seed {seed} is an episode of {' and of '.join(told)} in {' and '.join(names)}; "
                "evaluations of the same tasks can be compared"
            )
        tasks[seed] = told[0] if told else None
        for own, value in zip(values, scores, strict=True):
            own[seed] = float(value or 0.0)
    if not tasks:
        raise ValueError(f"{' and '.join(names)} share no episode (seed) that has a {score}")
    return values, tasks, len(every) - len(tasks)


def _rows(
    values: Sequence[Mapping[int, float]],
    tasks: Mapping[int, str | None],
    groups: Mapping[str, Sequence[str]],
    *,
    rate: bool,
) -> list[dict[str, Any]]:
    """A row per task, then the means over tasks and over groups of them."""
    seeds: dict[str, list[int]] = {}
    for seed, task in tasks.items():
        if task is not None:
            seeds.setdefault(task, []).append(seed)
    if not seeds:
        seeds = {_ALL: list(tasks)}
    rows = {
        name: _row([[own[s] for s in mine] for own in values], rate) for name, mine in seeds.items()
    }
    means: dict[str, dict[str, list[Interval]]] = {}
    if _ALL not in rows:
        means[f"mean of {len(rows)} tasks"] = _means(list(rows.values()))
        for group, names in groups.items():
            mine = [rows[name] for name in names if name in rows]
            if mine:
                means[f"mean of {group} ({len(mine)} tasks)"] = _means(mine)
    return [
        {
            "task": name,
            "episodes": row["score"][0].n,
            "score": [one.to_dict() for one in row["score"]],
            "minus_first": [one.to_dict() for one in row["minus_first"]],
        }
        for name, row in {**rows, **means}.items()
    ]


def _row(values: Sequence[Sequence[float]], rate: bool) -> dict[str, list[Interval]]:
    estimates = [
        rate_interval(round(sum(own)), len(own)) if rate else mean_interval(own) for own in values
    ]
    first = values[0]
    return {
        "score": estimates,
        "minus_first": [paired_difference(own, first) for own in values[1:]],
    }


def _means(rows: Sequence[Mapping[str, list[Interval]]]) -> dict[str, list[Interval]]:
    return {
        name: [mean_over(parts) for parts in zip(*(row[name] for row in rows), strict=True)]
        for name in ("score", "minus_first")
    }


def _comparison_lines(rows: Sequence[Mapping[str, Any]], count: int) -> tuple[list[str], Lines]:
    letters = [_letter(i) for i in range(count)]
    heads = ["task", "episodes", *letters, *(f"{one} minus A" for one in letters[1:])]
    lines = [
        [
            row["task"],
            str(row["episodes"]),
            *(cell(one) for one in row["score"]),
            *(tables.signed(one) for one in row["minus_first"]),
        ]
        for row in rows
    ]
    return heads, lines


def _letter(place: int) -> str:
    return chr(ord("A") + place) if place < 26 else f"#{place + 1}"


def _versions(names: Sequence[str], found: Sequence[EvalResult]) -> list[str]:
    """What else differs between the evaluations: arguments of the environment, and versions."""
    notes = []
    for what in ("kwargs", "max_episode_steps", "versions"):
        values = {name: result.env.get(what) for name, result in zip(names, found, strict=True)}
        if any(value != values[names[0]] for value in values.values()):
            notes.append(f"They differ in the environment's {what}: {values}.")
    return notes
