"""What a run leaves in its directory, and how all of it is removed before another takes its place.

Only names that a run itself writes are removed, and directories only if nothing else is in them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from diffpolicy.files import ForeignFilesError, check_owned, remove_leftovers, remove_owned
from diffpolicy.training.checkpoint import Snapshots
from diffpolicy.training.logging import is_metrics, logged_until

# What a run writes beside its checkpoints, of which an overwritten run must leave nothing: numbers
# and pictures of other weights would be taken for those of the new.
RESULTS = (
    "metrics.csv",
    "eval.json",
    "score.json",
    "curve.png",
    "curves.png",
    "rollouts.mp4",
    "contact_sheet.png",
    "report.json",
    "report.md",
    "score_by_nfe.png",
)
_REPORT = ("report.md", "score_by_nfe.png")  # written with report.json, under common names
_BOARD = re.compile(r"events\.out\.tfevents\..+")
_EVALUATION = re.compile(r"eval(_\d+)?")


def has_run(run_dir: str | os.PathLike[str]) -> bool:
    """Whether a run was begun in a directory."""
    folder = Path(run_dir)
    return (folder / "checkpoints").exists() or (folder / "metrics.csv").exists()


def check_resumable(run_dir: Path, first: int) -> None:
    """Refuse to start anew where a run was to be continued.

    Args:
        run_dir: of the run.
        first: the step by which a run like this has a checkpoint.

    Raises:
        ValueError: no run, or one whose checkpoints are gone.
    """
    if not has_run(run_dir):
        raise ValueError(
            f"there is no run to resume in {run_dir}; give the directory of one, or start anew "
            "without resume"
        )
    file, snapshots = run_dir / "metrics.csv", Snapshots(run_dir / "checkpoints")
    if not snapshots.exist and logged_until(file) > first:
        raise ValueError(
            f"{file} has rows to step {logged_until(file)}, but the checkpoints of that run are "
            f"gone; bring {snapshots.folder} back, or start anew with overwrite"
        )


def clear_run(run_dir: str | os.PathLike[str], *, only_check: bool = False) -> None:
    """Remove an earlier run: its checkpoints, metrics, evaluations and pictures.

    What else is in the directory stays.

    Args:
        run_dir: of the run.
        only_check: only find out whether that may be done.

    Raises:
        ForeignFilesError: something else is among its checkpoints, or has the name of its metrics.
            Nothing was removed.
    """
    folder = Path(run_dir)
    snapshots = Snapshots(folder / "checkpoints")
    remove_leftovers(snapshots.folder)
    snapshots.clear(only_check=True)
    check_owned(folder / ".candidate")
    metrics = folder / "metrics.csv"
    if metrics.is_file() and not is_metrics(metrics):
        raise ForeignFilesError(
            f"{metrics} is not removed, because it is no table of ours (its first column is not "
            "'step'). Choose another directory, or move that file away first"
        )
    if only_check:
        return
    evaluations = [p for p in folder.glob("eval*") if _EVALUATION.fullmatch(p.name) and p.is_dir()]
    for place in (folder, *evaluations):
        for name in _results(place):
            (place / name).unlink(missing_ok=True)
    for file in (folder / "tb").glob("events.*"):
        if _BOARD.fullmatch(file.name):
            file.unlink()
    for place in (*evaluations, folder / "tb"):
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()
    remove_owned(folder / ".candidate")
    snapshots.clear()


def _results(place: Path) -> list[str]:
    """Names of results in a directory; a report that no ``report.json`` goes with is the user's."""
    ours = (place / "report.json").is_file()
    return [name for name in RESULTS if ours or name not in _REPORT]


__all__ = ["RESULTS", "check_resumable", "clear_run", "has_run"]
