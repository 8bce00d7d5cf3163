"""The report on several runs of reward tuning beside each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffpolicy.files import write_atomic
from diffpolicy.report.sequence_figures import plot_front, plot_logo
from diffpolicy.report.sequences import (
    FORMAT,
    PRETRAINED,
    TOP,
    TUNED,
    VERSION,
    draw_pictures,
    ending,
    read_report,
    to_json,
)
from diffpolicy.report.tables import COSTS, figure, label_of, method_statistics, method_table

COLUMNS = {
    "exact.progress": "progress (exact)",
    "exact.reward": "E[reward] (exact)",
    "reward": "reward",
    "held_out": "held-out reward",
    "kl": "KL",
    "log_likelihood": "log-likelihood",
    "kmer_correlation": "k-mer corr.",
    "profile_correlation": "profile corr.",
    "entropy": "entropy",
    "diversity": "diversity",
    "unique": "unique",
    "valid": "valid",
}


def compare_report(reports: Iterable[str | Path], output: str | Path) -> Path:
    """Writes ``report.json``, ``report.md``, ``front.png`` and ``logo.png`` of several runs.

    A line of the table is a method with one setting, over its seeds. The front shows exact figures
    if the runs have them, with the optimum; a run without them takes part by the mean reward of its
    sequences. Otherwise it shows medians.

    Args:
        reports: of :func:`write_report`, files or the directories that hold them.
        output: a directory.

    Returns:
        The path of ``report.json``.

    Raises:
        ValueError: no reports, files that are none, runs of different tasks, or two runs of one
            method with the same setting and seed.
    """
    found = [read_report(path) for path in reports]
    _check_comparable(found)
    rows = _before_rows(found) + [_row(report) for report in found]
    exact = any(report["exact"] for report in found)
    front = [_point(row, "mean" if exact else "median") for row in rows]
    optimum: list[Any] = next((report["optimum"] for report in found if report["optimum"]), [])
    logos = _mean_profiles(found)
    label = "mean reward" if exact else "median reward"
    task, folder = found[0]["task"], Path(output)
    pictures, notes = draw_pictures(
        folder,
        {
            "front.png": lambda path: plot_front(
                front, path, optimum=optimum if exact else (), title=task, label=label
            ),
            "logo.png": lambda path: plot_logo(
                logos, path, alphabet=found[0]["alphabet"], title=task
            ),
        },
    )
    columns = {k: v for k, v in COLUMNS.items() if any(figure(r, k) is not None for r in rows)}
    report = {
        "format": f"{FORMAT}-comparison",
        "version": VERSION,
        "task": task,
        "rows": rows,
        "methods": method_statistics(rows, [*columns, *COSTS]),
        "front": front,
        "optimum": optimum,
        "warnings": [
            f"{label_of(r)}, seed {r['seed']}, update {r['warning']['step']}: "
            f"{r['warning']['message']}"
            for r in found
            if r["warning"]
        ],
        "pictures": pictures,
        "notes": [*_kl_notes(rows), *notes],
    }
    write_atomic(folder / "report.md", _comparison_text(report, method_table(rows, columns)))
    return write_atomic(folder / "report.json", to_json(report))


def _check_comparable(reports: Sequence[Mapping[str, Any]]) -> None:
    if not reports:
        raise ValueError("there are no reports to compare")
    lengths = [len(next(iter(report["profiles"].values()))) for report in reports]
    for name, of in (
        ("task", [report["task"] for report in reports]),
        ("alphabet", [report["alphabet"] for report in reports]),
        ("length", lengths),
    ):
        values = list(dict.fromkeys(of))
        if len(values) > 1:
            raise ValueError(f"runs of one {name} can be compared; these have {values}")
    seen: set[tuple[str, int]] = set()
    for report in reports:
        key = (label_of(report), report["seed"])
        if key in seen:
            raise ValueError(
                f"two reports are of {key[0]!r} with seed {key[1]}; leave one out, or give them "
                "different `setting`s"
            )
        seen.add(key)


def _row(report: Mapping[str, Any]) -> dict[str, Any]:
    names = ("method", "setting", "seed")
    costs = {name: report["cost"].get(name) for name in COSTS}
    return {**{n: report[n] for n in names}, **report["after"], "exact": report["exact"], **costs}


def _before_rows(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The pre-trained model as a method, once per seed."""
    rows = []
    for seed in sorted({report["seed"] for report in reports}):
        mine = [report for report in reports if report["seed"] == seed]
        law = next((report["exact"] for report in mine if report["exact"]), None)
        exact = law and {"progress": 0.0, "reward": law["objective_reference"], "kl": 0.0}
        names = {"method": PRETRAINED, "setting": "", "seed": seed}
        rows.append({**names, **mine[0]["before"], "exact": exact})
    return rows


def _point(row: Mapping[str, Any], statistic: str) -> dict[str, Any]:
    exact = row.get("exact")
    names = {n: row[n] for n in ("method", "setting", "seed")}
    if exact:
        return {**names, "kl": exact["kl"], "reward": exact["reward"]}
    return {**names, "kl": row.get("kl"), "reward": row["reward"][statistic]}


def _mean_profiles(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Profiles of the methods over their seeds, between the reference and the top of the data."""
    groups: dict[str, list[Any]] = {PRETRAINED: []}
    for report in reports:
        for name, profile in report["profiles"].items():
            if name != TOP:
                label = label_of(report) if name == TUNED else name
                groups.setdefault(label, []).append(profile)
    groups[TOP] = [r["profiles"][TOP] for r in reports if TOP in r["profiles"]]
    return {label: np.mean(found, axis=0) for label, found in groups.items() if found}


def _kl_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    says = {"exact": "of sequences, exact", "path": "of paths, an upper bound of that of sequences"}
    kinds: dict[str, list[str]] = {}
    for row in rows:
        if row.get("kl_kind"):
            kinds.setdefault(row["kl_kind"], []).append(label_of(row))
    return [
        f"KL ({', '.join(dict.fromkeys(labels))}): {says.get(kind, kind)}."
        for kind, labels in kinds.items()
    ]


def _comparison_text(report: Mapping[str, Any], table: str) -> str:
    warnings = [f"**Warning**, {warning}.\n" for warning in report["warnings"]]
    head = f"# {report['task']}: methods compared\n"
    about = "Median over sequences; over seeds, median [quartiles].\n"
    return "\n".join([head, *warnings, about, table, *ending(report)])


__all__ = ["COLUMNS", "compare_report"]
