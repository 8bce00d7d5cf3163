"""What the checker reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning"]
RECOPY = "copy the store again from where it is whole; otherwise the episodes there are lost"


@dataclass(frozen=True)
class Issue:
    """One finding.

    Attributes:
        severity: `error`: training on it fails or goes wrong; `warning`: probably not meant.
        file: The file or directory at fault.
        episode: The (first) episode concerned, if any.
        row: The (first) row concerned, counted over the whole store, if any.
        field: The field concerned, if any.
        message: What is wrong.
        fix: What to do.
    """

    severity: Severity
    file: str
    episode: int | None
    row: int | None
    field: str | None
    message: str
    fix: str


def format_issue(issue: Issue) -> str:
    """One line: severity, file, field, episode, row, message and fix."""
    parts = (("field", issue.field), ("episode", issue.episode), ("row", issue.row))
    where = [issue.file, *(f"{name} {value}" for name, value in parts if value is not None)]
    return f"{issue.severity}: {', '.join(where)}: {issue.message}. Fix: {issue.fix}."
