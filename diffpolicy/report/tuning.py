"""What a tuning did to a policy: scores before and after on the same episodes, with pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from diffpolicy.report.figures import draw_pictures, plot_nfe, plot_rounds
from diffpolicy.report.tables import Row, markdown, save_report, signed
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
    return _each(values, lambda own: [v if np.isfinite(v) else worst for v in own])


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
    folder, runs = Path(run_dir), list(scores["before"].values())
    measured = _each(scores, lambda result: episode_scores(result, score))
    values = without_failures(measured, score)
    drawings: dict[str, Callable[[Path], Any]] = {
        "curves.png": lambda path: plot_rounds(folder, path)
    }
    intervals = _each(values, lambda own: mean_interval(own).to_dict())
    if runs:
        rows = {"before": intervals["before"], method: intervals["after"]}
        drawings["score_by_nfe.png"] = lambda path: plot_nfe(rows, path, score=score, title=task)
    names = {"task": task, "method": method, "seed": seed, "score": score}
    report = {
        **names,
        "seeds": [e.seed for e in runs[0].episodes] if runs else [],
        **intervals,
        "difference": {
            nfe: paired_difference(values["after"][nfe], before).to_dict()
            for nfe, before in values["before"].items()
        },
        "episodes": values,
        "failed": _each(measured, lambda own: int(np.sum(~np.isfinite(own)))),
        "evaluation": _each(scores, lambda result: {n: result.summary[n] for n in COSTS}),
        "made_with": _made_with([*runs, *scores["after"].values()]),
        "training": training,
        "settings": settings,
        "pictures": draw_pictures(folder, drawings)[0],
    }
    return save_report(folder, FORMAT, report, *_words(report))


def _each(found: Mapping[str, Row], make: Callable[[Any], Any]) -> dict[str, dict[str, Any]]:
    """Apply a function to what was found before and after, at each number of evaluations."""
    return {when: {nfe: make(value) for nfe, value in own.items()} for when, own in found.items()}


def _made_with(results: Sequence[EvalResult]) -> dict[str, Any]:
    """What a number can be made again with: the command, the machine, versions."""
    found: dict[str, Any] = {"command": sys.argv, "diffpolicy": version("diffpolicy")}
    for result in results[:1]:
        found |= {"env": result.env, "machine": result.settings.get("machine")}
    return found


def _words(report: Row) -> list[str]:
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
    return parts
