"""What a tuning did to a policy: scores before and after on the same episodes, with pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from diffpolicy.report.figures import draw_pictures, plot_nfe, plot_rounds
from diffpolicy.report.tables import VERSION, ending, markdown, save_report, signed
from diffpolicy.rollout.intervals import mean_interval, paired_difference
from diffpolicy.rollout.results import EvalResult

FORMAT = "diffpolicy-tuning"
FIELDS = {"max_reward": "max_reward", "return": "episode_return", "length": "length"}
COSTS = ("nfe_per_plan", "ms_per_plan", "wall_s")


def episode_scores(result: EvalResult, score: str) -> list[float]:
    """Return the score of every episode, in the order of its seeds; NaN where it could not be run.

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
    drawings: dict[str, Callable[[Path], Any]] = {
        "curves.png": lambda path: plot_rounds(folder, path)
    }
    if report["before"]:
        rows = {"before": report["before"], method: report["after"]}
        drawings["score_by_nfe.png"] = lambda path: plot_nfe(rows, path, score=score, title=task)
    report["pictures"], _ = draw_pictures(folder, drawings)
    return save_report(folder, report, _text(report))


def _made_with(results: Sequence[EvalResult]) -> dict[str, Any]:
    """What a number can be made again with: the command, the machine, versions."""
    found: dict[str, Any] = {"command": list(sys.argv), "diffpolicy": version("diffpolicy")}
    for result in results[:1]:
        found |= {"env": result.env, "machine": result.settings.get("machine")}
    return found


def _text(report: Mapping[str, Any]) -> str:
    head = ["NFE", f"{report['score']} before", "after", "difference (paired, 95 %)"]
    after, difference = report["after"], report["difference"]
    rows = [
        [n, f"{before['value']:.3f}", f"{after[n]['value']:.3f}", signed(difference[n])]
        for n, before in report["before"].items()
    ]
    parts = [
        f"# {report['task']}: {report['method']}, seed {report['seed']}\n",
        markdown(head, rows),
        f"{len(report['seeds'])} episodes; training {report['training']['train_s']:.0f} s.\n",
    ]
    failed = sum(n for found in report["failed"].values() for n in found.values())
    if failed:
        parts.append(f"{failed} episodes could not be run and have the worst score.\n")
    return "\n".join([*parts, *ending(report["pictures"])])
