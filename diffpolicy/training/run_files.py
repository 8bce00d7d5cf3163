"""What a run leaves in its directory: its metrics, and how an earlier run is removed.

Metrics are one CSV file that has neither gaps nor repeats, whatever was interrupted. Only names
that a run itself writes are removed, and directories only if nothing else is in them.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffpolicy.extras import need
from diffpolicy.files import (
    ForeignFilesError,
    check_owned,
    naming,
    remove_leftovers,
    remove_owned,
    write_atomic,
)
from diffpolicy.training.checkpoint import Snapshots

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
)
# Written with report.json, under common names.
_REPORT = (
    "report.md",
    "score_by_nfe.png",
    "designs.fasta",
    "designs.csv",
)
_EVALUATION = re.compile(r"eval(_\d+)?")


class MetricsFile:
    """Rows of numbers by step.

    Args:
        path: of the CSV file.
        keep_until: rows after this step are dropped (the steps that a resumed run will do again).
    """

    def __init__(self, path: Path, *, keep_until: int = 0) -> None:
        self.path = path
        self.rows: list[dict[str, str]] = []
        self.columns: list[str] = ["step"]
        if path.is_file():
            self.rows = [row for row in read_metrics(path) if int(row["step"]) <= keep_until]
            for row in self.rows:
                self.columns += [name for name in row if name not in self.columns]
            self._rewrite()

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Add one row; a new column rewrites the file in one step."""
        row = {"step": str(step), **{name: repr(float(value)) for name, value in values.items()}}
        self.rows.append(row)
        fresh = [name for name in row if name not in self.columns]
        self.columns += fresh
        if fresh or not self.path.exists():
            self._rewrite()
            return
        with naming(self.path), self.path.open("a", newline="") as file:
            file.write(self._text([row]))
            file.flush()
            os.fsync(file.fileno())

    def _text(self, rows: list[dict[str, str]], *, header: bool = False) -> str:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, self.columns, restval="", lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return buffer.getvalue()

    def _rewrite(self) -> None:
        write_atomic(self.path, self._text(self.rows, header=True))


def summary_writer() -> Any:
    """Import the class that writes TensorBoard files.

    Raises:
        ImportError: the package is missing, with the install command.
    """
    need("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter


class TensorBoard:
    """The same rows as TensorBoard scalars."""

    def __init__(self, folder: Path, step: int) -> None:
        self._writer: Any = summary_writer()(str(folder), purge_step=step + 1)

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Write one row."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics file that say their step; half a line of a killed writer is left out.

    Raises:
        ValueError: it is damaged, or no file of ours; names it.
    """
    if not is_metrics(path):
        raise ValueError(
            f"{path} is no table of ours: its first column is not 'step'; move it away"
        )
    text = path.read_text(errors="replace")
    rows = list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))
    for row in rows:
        if row["step"] and not row["step"].isdecimal():
            raise ValueError(
                f"{path} is damaged: {row['step']!r:.40} is no step; mend it, or move it away"
            )
    return [row for row in rows if row["step"]]


def is_metrics(path: Path) -> bool:
    """Whether a file begins as the metrics of a run do, or is still empty."""
    with path.open("rb") as file:
        return file.read(5) in (b"", b"step,", b"step\n", b"step\r")


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
        raise ValueError(f"there is no run to resume in {run_dir}; start one without resume")
    file, snapshots = run_dir / "metrics.csv", Snapshots(run_dir / "checkpoints")
    rows = read_metrics(file) if file.is_file() else []
    until = max((int(row["step"]) for row in rows), default=0)
    if not snapshots.exist and until > first:
        raise ValueError(
            f"{file} has rows to step {until}, but the checkpoints of that run are gone; bring "
            f"{snapshots.folder} back, or start anew with overwrite"
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
            f"{metrics} is not removed: its first column is not 'step', so it is not ours; move it"
        )
    if only_check:
        return
    evaluations = [p for p in folder.glob("eval*") if _EVALUATION.fullmatch(p.name) and p.is_dir()]
    for place in (folder, *evaluations):
        ours = (place / "report.json").is_file()  # without it, its companions are the user's
        for name in RESULTS + _REPORT * ours:
            (place / name).unlink(missing_ok=True)
    for file in (folder / "tb").glob("events.out.tfevents.*"):
        file.unlink()
    for place in (*evaluations, folder / "tb"):
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()
    remove_owned(folder / ".candidate")
    snapshots.clear()
