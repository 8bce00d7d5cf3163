"""The metrics of a run as one CSV file that has neither gaps nor repeats.

Whatever was interrupted.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffpolicy.files import naming, write_atomic


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
            text = path.read_text()
            whole = text[: text.rfind("\n") + 1]  # a killed writer may leave half a line
            with io.StringIO(whole) as file:
                self.rows = [
                    row
                    for row in csv.DictReader(file)
                    if row["step"] and int(row["step"]) <= keep_until
                ]
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

    def last(self, name: str, step: int) -> float | None:
        """The value of column ``name`` in the row of ``step``, if it is the last one."""
        if not self.rows or self.rows[-1]["step"] != str(step) or not self.rows[-1].get(name):
            return None
        return float(self.rows[-1][name])

    def _text(self, rows: list[dict[str, str]], *, header: bool = False) -> str:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, self.columns, restval="", lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return buffer.getvalue()

    def _rewrite(self) -> None:
        write_atomic(self.path, self._text(self.rows, header=True))


class TensorBoard:
    """The same rows as TensorBoard scalars.

    Raises:
        ImportError: the package is missing, with the install command.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._writer: Any = self.writer_class()(str(folder), purge_step=step + 1)

    @staticmethod
    def writer_class() -> Any:
        """TensorBoard's own writer, to be asked for before anything of an earlier run is removed.

        Raises:
            ImportError: the package is missing, with the install command.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                'trainer.tensorboard=true needs: pip install "diffpolicy[tensorboard]"'
            ) from error
        return SummaryWriter

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Write one row."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()


def logged_until(path: Path) -> int:
    """The largest step that a metrics file has a row of; 0 without one."""
    if not path.is_file():
        return 0
    with path.open(newline="") as file:
        steps = [row.get("step") or "" for row in csv.DictReader(file)]
    return max((int(step) for step in steps if step.isdecimal()), default=0)


def is_metrics(path: Path) -> bool:
    """Whether a file begins as the metrics of a run do, or is still empty."""
    with path.open("rb") as file:
        return file.read(5) in (b"", b"step,", b"step\n", b"step\r")
