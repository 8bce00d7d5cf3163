"""Runs of tuning beside each other: of sequence models by a reward, and of policies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffpolicy.report import sequences, tuning
from diffpolicy.report.figures import draw_pictures, plot_nfe
from diffpolicy.report.sequence_figures import plot_front, plot_logo
from diffpolicy.report.sequences import PRETRAINED, TOP, TUNED
from diffpolicy.report.tables import (
    COSTS,
    VERSION,
    check_comparable,
    ending,
    figure,
    label_of,
    markdown,
    method_statistics,
    method_table,
    read_report,
    save_report,
    signed,
)
from diffpolicy.rollout.intervals import mean_interval, paired_difference

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


# ------------------------------------------------------------------ sequence models


def compare_report(reports: Iterable[str | Path], output: str | Path) -> Path:
    """Write ``report.json``, ``report.md``, ``front.png`` and ``logo.png`` of several runs.

    A line of the table is a method with one setting, over its seeds. The front shows exact figures
    if the runs have them, with the optimum; a run without them takes part by the mean reward of its
    sequences. Otherwise it shows medians.

    Args:
        reports: of :func:`diffpolicy.report.sequences.write_report`, files or the directories that
            hold them.
        output: a directory.

    Returns:
        The path of ``report.md``.

    Raises:
        ValueError: no reports, files that are none, runs of different tasks, or two runs of one
            method with the same setting and seed.
    """
    found = [read_report(path, sequences.FORMAT) for path in reports]
    check_comparable(
        found,
        task=lambda report: report["task"],
        alphabet=lambda report: report["alphabet"],
        length=lambda report: len(next(iter(report["profiles"].values()))),
    )
    rows = _before_rows(found) + [_sequence_row(report) for report in found]
    exact = any(report["exact"] for report in found)
    front = [_point(row, "mean" if exact else "median") for row in rows]
    optimum: list[Any] = next((report["optimum"] for report in found if report["optimum"]), [])
    look: dict[str, Any] = {
        "optimum": optimum if exact else (),
        "label": f"{'mean' if exact else 'median'} reward",
    }
    logos, alphabet = _mean_profiles(found), found[0]["alphabet"]
    task, folder = found[0]["task"], Path(output)
    pictures, notes = draw_pictures(
        folder,
        {
            "front.png": lambda path: plot_front(front, path, title=task, **look),
            "logo.png": lambda path: plot_logo(logos, path, alphabet=alphabet, title=task),
        },
    )
    columns = {k: v for k, v in COLUMNS.items() if any(figure(r, k) is not None for r in rows)}
    report = {
        "format": f"{sequences.FORMAT}-comparison",
        "version": VERSION,
        "task": task,
        "rows": rows,
        "methods": method_statistics(rows, [*columns, *COSTS]),
        "front": front,
        "optimum": optimum,
        "warnings": [_warning(r) for r in found if r["warning"]],
        "pictures": pictures,
        "notes": [*_kl_notes(rows), *notes],
    }
    save_report(folder, report, _sequence_text(report, method_table(rows, columns)))
    return folder / "report.md"


def _sequence_text(report: Mapping[str, Any], table: str) -> str:
    warnings = [f"**Warning**, {warning}.\n" for warning in report["warnings"]]
    head = f"# {report['task']}: methods compared\n"
    about = "Median over sequences; over seeds, median [quartiles].\n"
    return "\n".join([head, *warnings, about, table, *ending(report["pictures"], report["notes"])])


def _sequence_row(report: Mapping[str, Any]) -> dict[str, Any]:
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
    names = {n: row[n] for n in ("method", "setting", "seed")}
    if row["exact"]:
        return {**names, "kl": row["exact"]["kl"], "reward": row["exact"]["reward"]}
    return {**names, "kl": row.get("kl"), "reward": row["reward"][statistic]}


def _warning(report: Mapping[str, Any]) -> str:
    warning = report["warning"]
    run = f"{label_of(report)}, seed {report['seed']}"
    return f"{run}, update {warning['step']}: {warning['message']}"


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


# ------------------------------------------------------------------ policies


def compare_tunings(
    reports: Iterable[str | Path], output: str | Path, *, baseline: str = "bc"
) -> Path:
    """Write ``report.json``, ``report.md`` and ``score_by_nfe.png`` of several tunings.

    A line is a method over its seeds: mean score by NFE, and the differences from the policies
    before and from the method ``baseline``, paired by tuning seed and episode. Where runs were
    scored on more episodes, or at more numbers of steps, than others, what all have is compared.

    Args:
        reports: of :func:`diffpolicy.report.tuning.write_tuning_report`, files or directories.
        output: a directory.
        baseline: name of a method among them; without it that column is left out.

    Returns:
        The path of ``report.md``.

    Raises:
        ValueError: no reports, runs of different tasks, runs without an episode or a number of
            network evaluations in common, runs that were not scored, or two runs of one method with
            the same seed.
    """
    whole = [read_report(path, tuning.FORMAT) for path in reports]
    check_comparable(whole, task=lambda report: report["task"], score=lambda r: r["score"])
    found = _shared(whole)
    methods = dict.fromkeys(report["method"] for report in found)
    rows = [_policy_row(name, found, baseline) for name in (None, *methods)]
    folder, first = Path(output), found[0]
    task, score, episodes = first["task"], first["score"], len(first["seeds"])
    lines = {row["method"]: row["score"] for row in rows}
    picture = "score_by_nfe.png"
    drawings = {picture: lambda path: plot_nfe(lines, path, score=score, title=task)}
    pictures, _ = draw_pictures(folder, drawings)
    report = {"task": task, "score": score, "baseline": baseline, "episodes": episodes}
    parts = [
        f"# {task}: tunings compared\n",
        f"{episodes} episodes of each policy{_left_out(whole, first)}.\n",
        _policy_table(rows, baseline),
        *ending(pictures),
    ]
    save_report(folder, {**report, "rows": rows}, "\n".join(parts))
    return folder / "report.md"


def _shared(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The reports cut down to the episodes and numbers of steps that all of them have.

    Raises:
        ValueError: there are none.
    """
    unscored = [r for r in reports if not r["seeds"]]
    if unscored:
        raise ValueError(
            f"the run of {unscored[0]['method']!r} with seed {unscored[0]['seed']} was not scored "
            "(evaluation.episodes=0), so there is nothing to compare; leave it out, or tune again "
            "with episodes"
        )
    seeds = _common([report["seeds"] for report in reports])
    nfes = _common([list(report["before"]) for report in reports])
    if not seeds:
        raise ValueError("tunings scored on the same seeds can be compared; these share none")
    if not nfes:
        own = [f"{r['method']!r} has nfe=[{','.join(r['before'])}]" for r in reports]
        raise ValueError(
            "tunings scored at the same numbers of steps can be compared; "
            f"{' and '.join(own)}: tune one of them again with the nfe of the others"
        )
    found = []
    for report in reports:
        places = [report["seeds"].index(seed) for seed in seeds]
        episodes = {
            when: {n: np.array([report["episodes"][when][n][i] for i in places]) for n in nfes}
            for when in ("before", "after")
        }
        found.append({**report, "seeds": seeds, "episodes": episodes})
    return found


def _common(lists: Sequence[Sequence[Any]]) -> list[Any]:
    """What all lists have, in the order of the first."""
    return [item for item in lists[0] if all(item in other for other in lists[1:])]


def _left_out(reports: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]) -> str:
    """Which methods have results that are not compared."""
    nfes, seeds = list(shared["episodes"]["before"]), shared["seeds"]
    more = [r["method"] for r in reports if r["seeds"] != seeds or list(r["before"]) != nfes]
    if not more:
        return ""
    return f"; further episodes or numbers of steps of {', '.join(dict.fromkeys(more))} left out"


def _policy_row(
    name: str | None, reports: Sequence[Mapping[str, Any]], baseline: str
) -> dict[str, Any]:
    """A method over its seeds; ``None``: the policies before."""
    others = {r["seed"]: r for r in reports if r["method"] == baseline}
    if name is None:
        mine = list({report["seed"]: report for report in reports}.values())
    else:
        mine = [report for report in reports if report["method"] == name]
    paired = name not in (None, baseline) and all(r["seed"] in others for r in mine)
    own = _joined(mine, "before" if name is None else "after")
    row: dict[str, Any] = {
        "method": "before" if name is None else name,
        "seeds": [r["seed"] for r in mine],
        "updates": None,
        "score": {n: mean_interval(np.concatenate(v)).to_dict() for n, v in own.items()},
        "per_seed": {n: [float(np.mean(part)) for part in v] for n, v in own.items()},
        "minus_before": {},
        "minus_baseline": {},
        "train_s": None,
    }
    if name is not None:
        row["updates"] = sum(t["steps"] for t in mine[0]["training"]["rounds"])
        row["minus_before"] = _differences(own, _joined(mine, "before"))
        row["train_s"] = float(np.mean([r["training"]["train_s"] for r in mine]))
    if paired:
        partners = [others[r["seed"]] for r in mine]
        row["minus_baseline"] = _differences(own, _joined(partners, "after"))
    return row


def _joined(reports: Sequence[Mapping[str, Any]], when: str) -> dict[str, list[Any]]:
    """Scores of the episodes of every report, by number of network evaluations."""
    nfes = reports[0]["episodes"][when]
    return {n: [report["episodes"][when][n] for report in reports] for n in nfes}


def _differences(own: Mapping[str, list[Any]], others: Mapping[str, list[Any]]) -> dict[str, Any]:
    return {
        n: paired_difference(np.concatenate(own[n]), np.concatenate(others[n])).to_dict()
        for n in own
    }


def _policy_table(rows: Sequence[Mapping[str, Any]], baseline: str) -> str:
    nfes = list(rows[0]["score"])
    last = nfes[-1]
    head = ["method", "seeds", "updates", *(f"NFE {n}" for n in nfes)]
    head += [f"minus before (NFE {last})", f"minus {baseline} (NFE {last})", "training s"]
    lines = []
    for row in rows:
        cells = [row["method"], str(len(row["seeds"])), str(row["updates"] or "")]
        cells += [f"{row['score'][n]['value']:.3f}" for n in nfes]
        cells += [
            signed(row[k][last]) if row[k] else "" for k in ("minus_before", "minus_baseline")
        ]
        cells.append("" if row["train_s"] is None else f"{row['train_s']:.0f}")
        lines.append(cells)
    return markdown(head, lines)


__all__ = ["COLUMNS", "compare_report", "compare_tunings"]
