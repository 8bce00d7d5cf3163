"""Tunings of the same policies beside each other."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffpolicy.files import write_atomic
from diffpolicy.report.tuning import read_tuning_report, signed
from diffpolicy.report.tuning_figures import plot_nfe
from diffpolicy.rollout.intervals import mean_interval, paired_difference


def compare_tunings(
    reports: Iterable[str | Path], output: str | Path, *, baseline: str = "bc"
) -> Path:
    """Several tunings of the same policies beside each other.

    A line is a method over its seeds: mean score by NFE, and the differences from the policies
    before and from the method ``baseline``, paired by tuning seed and episode. Where runs were
    scored on more episodes, or at more numbers of steps, than others, what all have is compared.

    Args:
        reports: of :func:`write_tuning_report`, files or directories.
        output: a directory for ``report.json``, ``report.md`` and ``score_by_nfe.png``.
        baseline: name of a method among them; without it that column is left out.

    Returns:
        The path of ``report.md``.

    Raises:
        ValueError: no reports, runs of different tasks, runs without an episode or a number of
            network evaluations in common, runs that were not scored, or two runs of one method with
            the same seed.
    """
    whole = [read_tuning_report(path) for path in reports]
    _check_comparable(whole)
    found = _shared(whole)
    rows = [_row(name, found, baseline) for name in dict.fromkeys(r["method"] for r in found)]
    rows.insert(0, _row(None, found, baseline))
    folder, first = Path(output), found[0]
    folder.mkdir(parents=True, exist_ok=True)
    lines = {row["method"]: row["score"] for row in rows}
    plot_nfe(lines, folder / "score_by_nfe.png", score=first["score"], title=first["task"])
    names = {"task": first["task"], "score": first["score"], "baseline": baseline}
    names["episodes"] = len(first["seeds"])
    write_atomic(folder / "report.json", json.dumps({**names, "rows": rows}, indent=1))
    text = [f"# {first['task']}: tunings compared", ""]
    text += [f"{len(first['seeds'])} episodes of each policy{_left_out(whole, first)}.", ""]
    text += [comparison_table(rows, baseline)]
    text += ["", "![score](score_by_nfe.png)", ""]
    return write_atomic(folder / "report.md", "\n".join(text))


def comparison_table(rows: Sequence[Mapping[str, Any]], baseline: str) -> str:
    """The rows of :func:`compare_tunings` as Markdown."""
    nfes = list(rows[0]["score"])
    head = ["method", "seeds", "updates", *(f"NFE {n}" for n in nfes)]
    last = nfes[-1]
    head += [f"minus before (NFE {last})", f"minus {baseline} (NFE {last})", "training s"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [row["method"], str(len(row["seeds"])), str(row["updates"] or "")]
        cells += [f"{row['score'][n]['value']:.3f}" for n in nfes]
        for key in ("minus_before", "minus_baseline"):
            cells.append(signed(row[key][last]) if row[key] else "")
        cells.append("" if row["train_s"] is None else f"{row['train_s']:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _check_comparable(reports: Sequence[Mapping[str, Any]]) -> None:
    if not reports:
        raise ValueError("there are no reports to compare")
    unscored = [r for r in reports if not r["seeds"]]
    if unscored:
        raise ValueError(
            f"the run of {unscored[0]['method']!r} with seed {unscored[0]['seed']} was not scored "
            "(evaluation.episodes=0), so there is nothing to compare; leave it out, or tune again "
            "with episodes"
        )
    for name in ("task", "score"):
        values = [report[name] for report in reports]
        if any(value != values[0] for value in values):
            raise ValueError(f"tunings of one {name} can be compared; these differ in it")
    keys = [(report["method"], report["seed"]) for report in reports]
    twice = [key for key in keys if keys.count(key) > 1]
    if twice:
        raise ValueError(
            f"two reports are of {twice[0][0]!r} with seed {twice[0][1]}; leave one out, or name "
            "them with method=..."
        )


def _left_out(reports: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]) -> str:
    """Which methods have results that are not compared."""
    nfes, seeds = list(shared["episodes"]["before"]), shared["seeds"]
    more = [r["method"] for r in reports if r["seeds"] != seeds or list(r["before"]) != nfes]
    if not more:
        return ""
    return f"; further episodes or numbers of steps of {', '.join(dict.fromkeys(more))} left out"


def _common(lists: Sequence[Sequence[Any]]) -> list[Any]:
    """What all lists have, in the order of the first."""
    return [item for item in lists[0] if all(item in other for other in lists[1:])]


def _shared(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The reports cut down to the episodes and numbers of steps that all of them have.

    Raises:
        ValueError: there are none.
    """
    seeds = _common([report["seeds"] for report in reports])
    nfes = _common([list(report["before"]) for report in reports])
    if not seeds:
        raise ValueError("tunings scored on the same seeds can be compared; these share none")
    if not nfes:
        own = [f"{r['method']!r} has nfe={_listed(list(r['before']))}" for r in reports]
        raise ValueError(
            "tunings scored at the same numbers of steps can be compared; "
            f"{' and '.join(own)}: tune one of them again with the nfe of the others"
        )
    found = []
    for report in reports:
        places = [report["seeds"].index(seed) for seed in seeds]
        episodes = {
            when: {n: [report["episodes"][when][n][i] for i in places] for n in nfes}
            for when in ("before", "after")
        }
        found.append({**report, "seeds": seeds, "episodes": episodes})
    return found


def _listed(steps: Sequence[str]) -> str:
    return f"[{','.join(steps)}]"


def _row(name: str | None, reports: Sequence[Mapping[str, Any]], baseline: str) -> dict[str, Any]:
    """A method over its seeds; ``None``: the policies before."""
    if name is None:
        mine = list({report["seed"]: report for report in reports}.values())
    else:
        mine = [report for report in reports if report["method"] == name]
    when = "before" if name is None else "after"
    others = {r["seed"]: r for r in reports if r["method"] == baseline}
    paired = name not in (None, baseline) and all(r["seed"] in others for r in mine)
    nfes = list(mine[0]["episodes"][when])

    def joined(key: str, nfe: str, chosen: Sequence[Mapping[str, Any]]) -> Any:
        return np.concatenate([report["episodes"][key][nfe] for report in chosen])

    partners = [others[r["seed"]] for r in mine] if paired else []
    return {
        "method": "before" if name is None else name,
        "seeds": [r["seed"] for r in mine],
        "updates": None if name is None else sum(t["steps"] for t in mine[0]["training"]["rounds"]),
        "score": {n: mean_interval(joined(when, n, mine)).to_dict() for n in nfes},
        "per_seed": {n: [float(np.mean(r["episodes"][when][n])) for r in mine] for n in nfes},
        "minus_before": {
            n: paired_difference(joined("after", n, mine), joined("before", n, mine)).to_dict()
            for n in nfes
            if name is not None
        },
        "minus_baseline": {
            n: paired_difference(joined("after", n, mine), joined("after", n, partners)).to_dict()
            for n in nfes
            if paired
        },
        "train_s": None
        if name is None
        else float(np.mean([r["training"]["train_s"] for r in mine])),
    }


__all__ = ["compare_tunings", "comparison_table"]
