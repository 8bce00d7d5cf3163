"""Runs of tuning beside each other: of sequence models by a reward, and of policies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffpolicy.report import sequences, tables, tuning
from diffpolicy.report.figures import draw_pictures, plot_nfe
from diffpolicy.report.sequence_figures import plot_front, plot_logo
from diffpolicy.report.tables import Row
from diffpolicy.rollout.intervals import mean_interval, paired_difference

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
    found = [tables.read_report(path, sequences.FORMAT) for path in reports]
    tables.check_comparable(
        found,
        task=lambda report: report["task"],
        alphabet=lambda report: report["alphabet"],
        length=lambda report: len(next(iter(report["profiles"].values()))),
    )
    rows = _before_rows(found) + [_sequence_row(report) for report in found]
    exact = any(report["exact"] for report in found)
    statistic = "mean" if exact else "median"
    front = [_point(row, statistic) for row in rows]
    optimum: list[Any] = next((report["optimum"] for report in found if report["optimum"]), [])
    best, label = optimum if exact else (), f"{statistic} reward"
    logos, alphabet = _mean_profiles(found), found[0]["alphabet"]
    task, folder = found[0]["task"], Path(output)
    drawings: dict[str, Callable[[Path], Any]] = {
        "front.png": lambda p: plot_front(front, p, title=task, optimum=best, label=label),
        "logo.png": lambda p: plot_logo(logos, p, alphabet=alphabet, title=task),
    }
    pictures, notes = draw_pictures(folder, drawings)
    columns = tables.known_columns(rows, tables.FIGURES)
    report = {
        "task": task,
        "rows": rows,
        "methods": tables.method_statistics(rows, [*columns, *tables.COSTS]),
        "front": front,
        "optimum": optimum,
        "warnings": [
            f"{tables.label_of(r)}, seed {r['seed']}, update {r['warning']['step']}: "
            f"{r['warning']['message']}"
            for r in found
            if r["warning"]
        ],
        "pictures": pictures,
        "notes": [*_kl_notes(rows), *notes],
    }
    tables.save_report(
        folder,
        f"{sequences.FORMAT}-comparison",
        report,
        f"# {task}: methods compared\n",
        *(f"**Warning**, {warning}.\n" for warning in report["warnings"]),
        "Median over sequences; over seeds, median [quartiles].\n",
        tables.method_table(rows, columns),
    )
    return folder / "report.md"


def _names(report: Row) -> dict[str, Any]:
    return {name: report[name] for name in ("method", "setting", "seed")}


def _sequence_row(report: Row) -> dict[str, Any]:
    costs = {name: report["cost"].get(name) for name in tables.COSTS}
    return {**_names(report), **report["after"], "exact": report["exact"], **costs}


def _before_rows(reports: Sequence[Row]) -> list[dict[str, Any]]:
    """The pre-trained model as a method, once per seed."""
    rows: dict[int, dict[str, Any]] = {}
    for report in reports:
        names = {"method": sequences.PRETRAINED, "setting": "", "seed": report["seed"]}
        row = rows.setdefault(report["seed"], {**names, **report["before"], "exact": None})
        if report["exact"] and not row["exact"]:
            reward = report["exact"]["objective_reference"]
            row["exact"] = {"progress": 0.0, "reward": reward, "kl": 0.0}
    return [rows[seed] for seed in sorted(rows)]


def _point(row: Row, statistic: str) -> dict[str, Any]:
    exact = row["exact"] or {"kl": row.get("kl"), "reward": row["reward"][statistic]}
    return {**_names(row), "kl": exact["kl"], "reward": exact["reward"]}


def _mean_profiles(reports: Sequence[Row]) -> dict[str, Any]:
    """Profiles of the methods over their seeds, between the reference and the top of the data."""
    groups: dict[str, list[Any]] = {sequences.PRETRAINED: []}
    for report in reports:
        for name, profile in report["profiles"].items():
            label = tables.label_of(report) if name == sequences.TUNED else name
            groups.setdefault(label, []).append(profile)
    groups[sequences.TOP] = groups.pop(sequences.TOP, [])  # the last
    return {label: np.mean(found, axis=0) for label, found in groups.items() if found}


def _kl_notes(rows: Sequence[Row]) -> list[str]:
    says = {"exact": "of sequences, exact", "path": "of paths, an upper bound of that of sequences"}
    kinds: dict[str, list[str]] = {}
    for row in rows:
        if row.get("kl_kind"):
            kinds.setdefault(row["kl_kind"], []).append(tables.label_of(row))
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
    whole = [tables.read_report(path, tuning.FORMAT) for path in reports]
    tables.check_comparable(whole, task=lambda report: report["task"], score=lambda r: r["score"])
    found = _shared(whole)
    methods = dict.fromkeys(report["method"] for report in found)
    rows = [_policy_row(name, found, baseline) for name in (None, *methods)]
    folder, first = Path(output), found[0]
    task, score, episodes = first["task"], first["score"], len(first["seeds"])
    lines = {row["method"]: row["score"] for row in rows}
    pictures, _ = draw_pictures(
        folder, {"score_by_nfe.png": lambda p: plot_nfe(lines, p, score=score, title=task)}
    )
    report = {"task": task, "score": score, "baseline": baseline, "episodes": episodes}
    tables.save_report(
        folder,
        f"{tuning.FORMAT}-comparison",
        {**report, "rows": rows, "pictures": pictures},
        f"# {task}: tunings compared\n",
        f"{episodes} episodes of each policy{_left_out(whole, first)}.\n",
        _policy_table(rows, baseline),
    )
    return folder / "report.md"


def _shared(reports: Sequence[Row]) -> list[dict[str, Any]]:
    """The reports cut down to the episodes and numbers of steps that all of them have.

    Raises:
        ValueError: there are none.
    """
    for report in reports:
        if not report["seeds"]:
            which = f"the run of {report['method']!r} with seed {report['seed']}"
            raise ValueError(f"{which} was not scored (evaluation.episodes=0); leave it out")
    seeds = _common([report["seeds"] for report in reports])
    nfes = _common([list(report["before"]) for report in reports])
    if not seeds:
        raise ValueError("tunings scored on the same seeds can be compared; these share none")
    if not nfes:
        own = [f"{r['method']!r} has nfe=[{','.join(r['before'])}]" for r in reports]
        raise ValueError(f"tunings with an nfe in common can be compared; {' and '.join(own)}")
    found = []
    for report in reports:
        places = [report["seeds"].index(seed) for seed in seeds]
        whole = report["episodes"]
        cut = {when: {n: np.array(whole[when][n])[places] for n in nfes} for when in whole}
        found.append({**report, "seeds": seeds, "episodes": cut})
    return found


def _common(lists: Sequence[Sequence[Any]]) -> list[Any]:
    """What all lists have, in the order of the first."""
    return [item for item in lists[0] if all(item in other for other in lists[1:])]


def _left_out(reports: Sequence[Row], shared: Row) -> str:
    """Which methods have results that are not compared."""
    nfes, seeds = list(shared["episodes"]["before"]), shared["seeds"]
    more = [r["method"] for r in reports if r["seeds"] != seeds or list(r["before"]) != nfes]
    if not more:
        return ""
    return f"; further episodes or numbers of steps of {', '.join(dict.fromkeys(more))} left out"


def _policy_row(name: str | None, reports: Sequence[Row], baseline: str) -> dict[str, Any]:
    """A method over its seeds; ``None``: the policies before."""
    others = {r["seed"]: r for r in reports if r["method"] == baseline}
    mine = [report for report in reports if name in (None, report["method"])]
    if name is None:
        mine = list({report["seed"]: report for report in mine}.values())
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
        if name != baseline and all(r["seed"] in others for r in mine):
            partners = [others[r["seed"]] for r in mine]
            row["minus_baseline"] = _differences(own, _joined(partners, "after"))
    return row


def _joined(reports: Sequence[Row], when: str) -> dict[str, list[Any]]:
    """Scores of the episodes of every report, by number of network evaluations."""
    nfes = reports[0]["episodes"][when]
    return {n: [report["episodes"][when][n] for report in reports] for n in nfes}


def _differences(own: Mapping[str, list[Any]], others: Mapping[str, list[Any]]) -> dict[str, Any]:
    return {
        n: paired_difference(np.concatenate(own[n]), np.concatenate(others[n])).to_dict()
        for n in own
    }


def _policy_table(rows: Sequence[Row], baseline: str) -> str:
    nfes = list(rows[0]["score"])
    last = nfes[-1]
    head = ["method", "seeds", "updates", *(f"NFE {n}" for n in nfes)]
    head += [f"minus before (NFE {last})", f"minus {baseline} (NFE {last})", "training s"]
    lines = [
        [
            row["method"],
            str(len(row["seeds"])),
            str(row["updates"] or ""),
            *(f"{row['score'][n]['value']:.3f}" for n in nfes),
            *(tables.signed(row[k].get(last)) for k in ("minus_before", "minus_baseline")),
            "" if row["train_s"] is None else f"{row['train_s']:.0f}",
        ]
        for row in rows
    ]
    return tables.markdown(head, lines)
