"""Scores of finished cells (dataset, algorithm, seed) as one table, with intervals."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np

from reproduce.intervals import (
    INTERVALS,
    Matrix,
    crossed_bootstrap,
    iqm_of,
    iqm_over_datasets,
)


class Published(NamedTuple):
    """A published normalised score and where it was taken from."""

    score: float
    source: str


@cache
def published_scores() -> dict[tuple[str, str], Published]:
    """Published normalised scores by D4RL id and algorithm."""
    text = files("diffpolicy.data.d4rl").joinpath("published.csv").read_text(encoding="utf-8")
    return {
        (row["dataset"], row["algorithm"]): Published(float(row["score"]), row["source"])
        for row in csv.DictReader(text.splitlines())
    }


def rows_of(
    cells: Mapping[str, Mapping[str, Any]],
    datasets: Mapping[str, Mapping[str, Any]],
    algorithms: Sequence[str],
    baseline: str,
) -> list[dict[str, Any]]:
    """A row per dataset and algorithm of which at least one cell is done.

    Args:
        cells: by ``DATASET/ALGORITHM/SEED``, as `reproduce` reports them.
        datasets: by name, with ``d4rl`` (an id or None) and the returns of the data.
        algorithms: in the order of the table.
        baseline: the algorithm that the others are compared with.

    Returns:
        JSON values.
    """
    rows = []
    for dataset, facts in datasets.items():
        reference = _done(cells, dataset, baseline)
        for algorithm in algorithms:
            mine = _done(cells, dataset, algorithm)
            if mine:
                row = {"dataset": dataset, "algorithm": algorithm, **_row(mine, facts)}
                if algorithm != baseline:
                    row["minus_baseline"] = _difference(mine, reference)
                row["published"] = _published(facts, algorithm)
                rows.append(row)
    return rows


def _done(
    cells: Mapping[str, Mapping[str, Any]], dataset: str, algorithm: str
) -> dict[int, Mapping[str, Any]]:
    return {
        int(cell["seed"]): cell
        for cell in cells.values()
        if (cell["dataset"], cell["algorithm"], cell["status"]) == (dataset, algorithm, "done")
    }


def _row(cells: Mapping[int, Mapping[str, Any]], facts: Mapping[str, Any]) -> dict[str, Any]:
    first = next(iter(cells.values()))
    scores = np.array([cell["scores"] for cell in cells.values()], np.float64)
    returns = np.array([cell["returns"] for cell in cells.values()], np.float64)
    means = scores.mean(axis=1)
    spread = float(means.std(ddof=1)) if len(means) > 1 else None
    return {
        "seeds": list(cells),
        "episodes": scores.shape[1],
        "metric": first["metric"],
        "score": {"mean": float(means.mean()), "std": spread, "by_seed": means.tolist()},
        "iqm": crossed_bootstrap(scores, iqm_of).to_dict(),
        "minus_baseline": None,
        "return": float(returns.mean()),
        "of_data": _fraction(returns, facts.get("mean_return")),
        "of_expert": _fraction(returns, facts.get("expert_return")),
        **{name: _average(cells, name) for name in ("nfe", "ms_per_plan", "train_s")},
        "candidates": first["candidates"],
        "steps": first["steps"],
        "comparable": first["comparable"],
    }


def _average(cells: Mapping[int, Mapping[str, Any]], name: str) -> float | None:
    values = [cell[name] for cell in cells.values() if cell[name] is not None]
    return float(np.mean(values)) if values else None


def _fraction(returns: Matrix, reference: float | None) -> float | None:
    """A fraction of a return says something only where that return is positive."""
    return float(returns.mean()) / reference if reference is not None and reference > 0 else None


def _difference(
    mine: Mapping[int, Mapping[str, Any]], reference: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any] | None:
    both = [s for s in mine if s in reference and _episodes(mine[s]) == _episodes(reference[s])]
    if not both:
        return None
    pairs = [np.subtract(mine[s]["scores"], reference[s]["scores"]) for s in both]
    found = crossed_bootstrap(np.array(pairs, np.float64))
    return {**found.to_dict(), "seeds": both, "better": found.low > 0}


def _episodes(cell: Mapping[str, Any]) -> list[int]:
    return list(cell["episode_seeds"])


def _published(facts: Mapping[str, Any], algorithm: str) -> dict[str, Any] | None:
    figure = published_scores().get((str(facts.get("d4rl")), algorithm))
    return None if figure is None or facts.get("toy") else figure._asdict()


def aggregates_of(rows: Sequence[Mapping[str, Any]], datasets: Sequence[str]) -> dict[str, Any]:
    """Means of the normalised scores over datasets, for algorithms that have all of them.

    Args:
        rows: of `rows_of`.
        datasets: the D4RL ids to average over; fewer than two give no aggregate.

    Returns:
        By algorithm: ``mean`` and ``published`` (None where a figure is missing) over datasets,
        ``iqm`` over datasets and the training seeds that all of them have, ``by`` (the program).
    """
    found: dict[str, Any] = {}
    if len(datasets) < 2:
        return found
    for algorithm in dict.fromkeys(row["algorithm"] for row in rows):
        mine = {r["dataset"]: r for r in rows if r["algorithm"] == algorithm}
        if not set(datasets) <= set(mine):
            continue
        columns = [mine[name] for name in datasets]
        seeds = [s for s in columns[0]["seeds"] if all(s in c["seeds"] for c in columns)]
        if not seeds:
            continue
        scores = np.array(
            [[c["score"]["by_seed"][c["seeds"].index(s)] for c in columns] for s in seeds]
        )
        interval, program = iqm_over_datasets(scores)
        figures = [c["published"]["score"] for c in columns if c["published"]]
        found[algorithm] = {
            "datasets": list(datasets),
            "seeds": seeds,
            "mean": float(scores.mean()),
            "iqm": interval.to_dict(),
            "by": program,
            "published": float(np.mean(figures)) if len(figures) == len(datasets) else None,
        }
    return found


_HEAD = (
    "dataset | algorithm | score of seeds | IQM [95 %] | minus baseline [95 %] | published | "
    "return | of data | of expert | seeds x episodes | NFE | candidates | ms/plan | steps | train s"
)


def text(report: Mapping[str, Any]) -> str:
    """The table as Markdown, with what has to stand below it."""
    lines = ["A toy: noise in place of data.", ""] if report["settings"]["toy"] else []
    lines += [f"| {_HEAD} |", "|" + "---|" * (_HEAD.count("|") + 1)]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in report["table"]]
    for algorithm, row in report["aggregate"].items():
        score, iqm = f"{row['mean']:.1f}", _interval(row["iqm"], 1)
        middle = [f"mean of {len(row['datasets'])}", algorithm, score, iqm, ""]
        lines.append("| " + " | ".join([*middle, _number(row["published"], 1), *[""] * 9]) + " |")
    lines += ["", f"Baseline: {report['settings']['baseline']}. Intervals: {INTERVALS}."]
    lines += [f"Mean over datasets, IQM by {p}." for p in _programs(report["aggregate"])]
    lines += [_about(name, facts) for name, facts in report["datasets"].items()]
    sources = {r["published"]["source"] for r in report["table"] if r["published"]}
    lines += [f"Published: {source}." for source in sorted(sources)]
    lines += [
        f"{key}: {cell['status']}: {cell.get('reason', '')}".rstrip(": ")
        for key, cell in report["cells"].items()
        if cell["status"] != "done"
    ]
    return "\n".join(lines)


def _programs(aggregate: Mapping[str, Any]) -> list[str]:
    return sorted({row["by"] for row in aggregate.values()})


def _cells(row: Mapping[str, Any]) -> list[str]:
    digits = 3 if row["metric"] in ("success", "final_success") else 1
    score, difference = row["score"], row["minus_baseline"]
    spread = "" if score["std"] is None else f" ± {score['std']:.{digits}f}"
    return [
        row["dataset"],
        row["algorithm"],
        f"{score['mean']:.{digits}f}{spread}",
        _interval(row["iqm"], digits),
        "" if difference is None else _interval(difference, digits, "+"),
        "" if row["published"] is None else f"{row['published']['score']:.1f}",
        f"{row['return']:.1f}",
        _number(row["of_data"], 3),
        _number(row["of_expert"], 3),
        f"{len(row['seeds'])} x {row['episodes']}",
        f"{row['nfe']:g}",
        str(row["candidates"]),
        _number(row["ms_per_plan"], 2),
        str(row["steps"]),
        _number(row["train_s"], 0),
    ]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _interval(found: Mapping[str, Any], digits: int, sign: str = "") -> str:
    value, low, high = (f"{found[name]:{sign}.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _about(name: str, facts: Mapping[str, Any]) -> str:
    line = f"{name}: {facts['label']}" if facts.get("label") else name
    if facts.get("mean_return") is None:
        return f"{line}."
    return (
        f"{line}. Data: {facts['episodes']} episodes, mean return {facts['mean_return']:.1f}; "
        f"expert {facts['expert_return']:.1f} ({facts['expert_rule']})."
    )
