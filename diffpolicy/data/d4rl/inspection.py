"""Checks of every value of a file, made while its rows pass by."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np

from diffpolicy.data.check import Issue

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

# D4RL's continuous actions lie in [-1, 1], apart from these families.
UNBOUNDED = ("flow", "minigrid")
_SLACK = 1e-5


class Inspection:
    """Collects what is wrong with the rows of a file, block by block, in order.

    Args:
        name: The file, for messages.
        bounded: Whether actions have to lie in [-1, 1].

    Attributes:
        failed: Number and fault of each episode with values that are not finite, and of each copy.
    """

    def __init__(self, name: str, *, bounded: bool) -> None:
        self._name = name
        self._bounded = bounded
        self._issues: list[Issue] = []
        self.failed: dict[int, str] = {}
        self._seen: dict[bytes, int] = {}
        self._copies: list[tuple[int, int]] = []
        self._outside: tuple[int, int, float] | None = None
        self._episodes = 0
        self._rows = 0
        self._low: NDArray[Any] | None = None
        self._high: NDArray[Any] | None = None

    def add(
        self, columns: Mapping[str, NDArray[Any]], ends: NDArray[np.int64], episode: int, row: int
    ) -> None:
        """Look at a block of whole episodes.

        Args:
            columns: `[T, *shape]` of `obs`, `action`, `reward` and possibly more.
            ends: `[E]` ends of the block's episodes, counted in the block.
            episode: The number of the first of them.
            row: The number of their first row.
        """
        self._episodes, self._rows = episode, row
        for name, values in columns.items():
            self._check_finite(name, values, ends)
        if self._bounded:
            self._check_bounds(columns["action"])
        self._note_range(columns["obs"])
        self._note_copies(columns, ends)

    def issues(self, *, copies: bool = True) -> list[Issue]:
        """What was found: errors for values that are not finite, warnings for the rest."""
        found = list(self._issues)
        if self._outside is not None:
            row, count, value = self._outside
            message = f"{count} actions lie outside [-1, 1], up to {value:.6g}"
            found.append(
                self._issue("warning", message, "clip them, or learn in their own units", row=row)
            )
        if self._copies and copies:
            copy, original = self._copies[0]
            message = (
                f"{len(self._copies)} episodes are exact copies of earlier ones (the first: "
                f"episode {copy} of episode {original})"
            )
            fix = "leave them out of what is held back for validation"
            found.append(self._issue("warning", message, fix, episode=copy))
        return found

    def constant_columns(self) -> list[int]:
        """The entries of a flat observation that never change; empty for other observations."""
        if self._low is None or self._high is None or self._low.ndim != 1:
            return []
        return [int(i) for i in np.flatnonzero(self._low == self._high)]

    def _issue(self, severity: Any, message: str, fix: str, **where: Any) -> Issue:
        place = {"episode": None, "row": None, "field": None, **where}
        return Issue(severity=severity, file=self._name, message=message, fix=fix, **place)

    def _check_finite(self, name: str, values: NDArray[Any], ends: NDArray[np.int64]) -> None:
        if values.dtype.kind != "f":
            return
        bad = ~np.isfinite(values).reshape(len(values), -1).all(1)
        for index in np.unique(np.searchsorted(ends, np.flatnonzero(bad), "right")).tolist():
            self.failed.setdefault(self._episodes + index, f"{name} is not finite")
        if bad.any() and not any(i.field == name for i in self._issues):
            row = int(np.argmax(bad))
            message = f"{int(bad.sum())} rows or more hold values that are not finite"
            fix = "copy the file again if it should not have them, or leave these episodes out"
            place = {"row": self._rows + row, "field": name}
            place["episode"] = self._episodes + int(np.searchsorted(ends, row, "right"))
            self._issues.append(self._issue("error", message, fix, **place))

    def _check_bounds(self, action: NDArray[Any]) -> None:
        size = np.abs(action).reshape(len(action), -1).max(1)
        outside = np.flatnonzero(size > 1 + _SLACK)
        if len(outside):
            row, count, value = self._outside or (self._rows + int(outside[0]), 0, 0.0)
            self._outside = row, count + len(outside), max(value, float(size[outside].max()))

    def _note_range(self, obs: NDArray[Any]) -> None:
        low, high = obs.min(0), obs.max(0)
        self._low = low if self._low is None else np.minimum(self._low, low)
        self._high = high if self._high is None else np.maximum(self._high, high)

    def _note_copies(self, columns: Mapping[str, NDArray[Any]], ends: NDArray[np.int64]) -> None:
        kept = [np.ascontiguousarray(columns[name]) for name in ("obs", "action", "reward")]
        start = 0
        for number, end in enumerate(ends, self._episodes):
            digest = blake2b(digest_size=16)
            for column in kept:
                digest.update(column[start:end].data)
            start = end
            first = self._seen.setdefault(digest.digest(), number)
            # A single row may well occur twice (a reset to a fixed state).
            if first != number and len(kept[0]) > 1:
                self._copies.append((number, first))
                self.failed.setdefault(number, f"a copy of episode {first}")
