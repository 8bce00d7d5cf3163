"""What a tuning did to a policy: scores before and after on the same episodes, with pictures."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from diffpolicy.rollout.results import EvalResult
from diffpolicy.rollout.scores import mean_interval, paired_difference
from diffpolicy.rollout.tuning_plots import plot_curves, plot_nfe

FORMAT, VERSION = "diffpolicy-tuning", 1
FIELDS = {"max_reward": "max_reward", "return": "episode_return", "length": "length"}
COSTS = ("nfe_per_plan", "ms_per_plan", "wall_s")


def episode_scores(result: EvalResult, score: str) -> list[float]:
    """The score of every episode, in the order of its seeds; NaN where it could not be run.

    Raises:
        ValueError: a score that episodes do not have.
    """
    name = FIELDS.get(score, score)
    values = [np.nan if e.error is not None else getattr(e, name, None) for e in result.episodes]
    if any(value is None for value in values):
        raise ValueError(f"these episodes have no {score!r}")
    return [float(value) for value in values if value is not None]


def without_failures(
    values: Mapping[str, Mapping[str, Sequence[float]]], score: str
) -> dict[str, dict[str, list[float]]]:
    """Scores in which an episode that could not be run has the worst one.

    That is the lowest of all episodes given, before and after alike, so that no method gains by
    failing; a failed episode is no success, and with no sound episode at all the score is 0.

    Args:
        values: scores by when and number of network evaluations; NaN where an episode failed.
        score: its name.
    """
    every = np.array([v for found in values.values() for own in found.values() for v in own])
    sound = every[np.isfinite(every)]
    worst = 0.0 if "success" in score or not len(sound) else float(sound.min())
    return {
        when: {n: [v if np.isfinite(v) else worst for v in own] for n, own in found.items()}
        for when, found in values.items()
    }


def write_tuning_report(
    run_dir: str | Path,
    *,
    method: str,
    task: str,
    seed: int,
    score: str,
    scores: Mapping[str, Mapping[str, EvalResult]],
    training: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Write ``report.json``, ``report.md`` and pictures.

    Args:
        run_dir: of the tuning; ``metrics.csv`` (or that of each ``round_*``) is drawn.
        method: its name in comparisons.
        task: name of the environment.
        seed: of the tuning.
        score: which number of an episode counts.
        scores: ``before`` and ``after``, by number of network evaluations per plan; the same
            seeds in both.
        training: what is known of it, JSON values: ``rounds`` and ``train_s`` at least.
        settings: of the run.

    Returns:
        The report. ``before``, ``after``: mean and 95 % interval of the score by NFE;
        ``difference``: after - before, paired by episode; ``episodes``: the scores themselves, of
        which ``failed`` counts those that could not be run (see :func:`without_failures`);
        ``evaluation``: network evaluations and time of a plan, and seconds of the episodes;
        ``made_with``: the command, the machine and versions.
    """
    folder = Path(run_dir)
    measured = {
        when: {nfe: episode_scores(result, score) for nfe, result in found.items()}
        for when, found in scores.items()
    }
    values = without_failures(measured, score)
    report: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "task": task,
        "method": method,
        "seed": seed,
        "score": score,
        "seeds": next(([e.seed for e in r.episodes] for r in scores["before"].values()), []),
        **{
            when: {nfe: mean_interval(v).to_dict() for nfe, v in found.items()}
            for when, found in values.items()
        },
        "difference": {
            nfe: paired_difference(values["after"][nfe], before).to_dict()
            for nfe, before in values["before"].items()
        },
        "episodes": values,
        "failed": {
            when: {nfe: int(np.sum(~np.isfinite(v))) for nfe, v in found.items()}
            for when, found in measured.items()
        },
        "evaluation": {
            when: {nfe: {n: r.summary[n] for n in COSTS} for nfe, r in found.items()}
            for when, found in scores.items()
        },
        "made_with": _made_with([r for found in scores.values() for r in found.values()]),
        "training": dict(training),
        "settings": dict(settings),
    }
    pictures = [plot_curves(folder)]
    if report["before"]:
        rows = {"before": report["before"], method: report["after"]}
        pictures.append(plot_nfe(rows, folder / "score_by_nfe.png", score=score, title=task))
    report["pictures"] = [p.name for p in pictures if p is not None]
    _write(folder / "report.json", json.dumps(report, indent=1))
    _write(folder / "report.md", _text(report))
    return report


def _made_with(results: Sequence[EvalResult]) -> dict[str, Any]:
    """What a number can be made again with: the command, the machine, versions."""
    found: dict[str, Any] = {"command": list(sys.argv), "diffpolicy": version("diffpolicy")}
    for result in results[:1]:
        found |= {"env": result.env, "machine": result.settings.get("machine")}
    return found


def read_tuning_report(path: str | Path) -> dict[str, Any]:
    """A report of :func:`write_tuning_report`, from its file or directory.

    Raises:
        ValueError: a file that is none.
    """
    file = Path(path)
    file = file / "report.json" if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"no report at {file}; `diffpolicy finetune` writes it when it is done")
    report = json.loads(file.read_text())
    if report.get("format") != FORMAT or report.get("version") != VERSION:
        raise ValueError(f"{file} is no report of a policy's tuning of version {VERSION}")
    return dict(report)


def compare_tunings(
    reports: Iterable[str | Path], output: str | Path, *, baseline: str = "bc"
) -> Path:
    """Several tunings of the same policies beside each other.

    A line is a method over its seeds: mean score by NFE, and the differences from the policies
    before and from the method ``baseline``, paired by tuning seed and episode.

    Args:
        reports: of :func:`write_tuning_report`, files or directories.
        output: a directory for ``report.json``, ``report.md`` and ``score_by_nfe.png``.
        baseline: name of a method among them; without it that column is left out.

    Returns:
        The path of ``report.md``.

    Raises:
        ValueError: no reports, runs of different tasks, episodes or numbers of network
            evaluations, runs that were not scored, or two runs of one method with the same seed.
    """
    found = [read_tuning_report(path) for path in reports]
    _check_comparable(found)
    rows = [_row(name, found, baseline) for name in dict.fromkeys(r["method"] for r in found)]
    rows.insert(0, _row(None, found, baseline))
    folder, first = Path(output), found[0]
    folder.mkdir(parents=True, exist_ok=True)
    lines = {row["method"]: row["score"] for row in rows}
    plot_nfe(lines, folder / "score_by_nfe.png", score=first["score"], title=first["task"])
    names = {"task": first["task"], "score": first["score"], "baseline": baseline}
    _write(folder / "report.json", json.dumps({**names, "rows": rows}, indent=1))
    text = [f"# {first['task']}: tunings compared", "", comparison_table(rows, baseline)]
    text += ["", "![score](score_by_nfe.png)", ""]
    return _write(folder / "report.md", "\n".join(text))


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


def signed(interval: Mapping[str, Any]) -> str:
    """A difference with its interval."""
    if interval["low"] is None:
        return f"{interval['value']:+.3f}"
    return f"{interval['value']:+.3f} [{interval['low']:+.3f}, {interval['high']:+.3f}]"


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
    for name in ("task", "score", "seeds"):
        values = [report[name] for report in reports]
        if any(value != values[0] for value in values):
            raise ValueError(f"tunings of one {name} can be compared; these differ in it")
    steps = [list(report["before"]) for report in reports]
    for report, own in zip(reports, steps, strict=True):
        if own != steps[0]:
            raise ValueError(
                "tunings scored at the same numbers of steps can be compared; "
                f"{reports[0]['method']!r} has nfe={_listed(steps[0])} and {report['method']!r} "
                f"nfe={_listed(own)}: tune one of them again with the nfe of the other"
            )
    keys = [(report["method"], report["seed"]) for report in reports]
    twice = [key for key in keys if keys.count(key) > 1]
    if twice:
        raise ValueError(
            f"two reports are of {twice[0][0]!r} with seed {twice[0][1]}; leave one out, or name "
            "them with method=..."
        )


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
    nfes = list(mine[0][when])

    def joined(key: str, nfe: str, chosen: Sequence[Mapping[str, Any]]) -> Any:
        return np.concatenate([report["episodes"][key][nfe] for report in chosen])

    partners = [others[r["seed"]] for r in mine] if paired else []
    return {
        "method": "before" if name is None else name,
        "seeds": [r["seed"] for r in mine],
        "updates": None if name is None else sum(t["steps"] for t in mine[0]["training"]["rounds"]),
        "score": {n: mean_interval(joined(when, n, mine)).to_dict() for n in nfes},
        "per_seed": {n: [r[when][n]["value"] for r in mine] for n in nfes},
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


def _text(report: Mapping[str, Any]) -> str:
    head = ["NFE", f"{report['score']} before", "after", "difference (paired, 95 %)"]
    lines = [f"# {report['task']}: {report['method']}, seed {report['seed']}", ""]
    lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for nfe, before in report["before"].items():
        after, difference = report["after"][nfe], report["difference"][nfe]
        lines.append(
            f"| {nfe} | {before['value']:.3f} | {after['value']:.3f} | {signed(difference)} |"
        )
    training = report["training"]
    lines += ["", f"{len(report['seeds'])} episodes; training {training['train_s']:.0f} s.", ""]
    failed = sum(n for found in report["failed"].values() for n in found.values())
    if failed:
        lines += [f"{failed} episodes could not be run and have the worst score.", ""]
    lines += [f"![{name.split('.')[0]}]({name})" for name in report["pictures"]]
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str) -> Path:
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_text(text)
    partial.replace(path)
    return path


__all__ = [
    "compare_tunings",
    "comparison_table",
    "episode_scores",
    "read_tuning_report",
    "signed",
    "without_failures",
    "write_tuning_report",
]
