"""What :mod:`diffpolicy.policies.choose_level` measured, and the level that it chose."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Level:
    """What was measured at one candidate level.

    Attributes:
        t: the level.
        measured: part of a guess's error that survives, measured on pairs of guesses; of warm
            starts only.
        predicted: the same in closed form.
        actions: per action dimension, CRPS over that of the best candidate, minus 1.
        changes: the same for the changes of actions, over the worst number of steps.
    """

    t: float
    measured: float | None
    predicted: float | None
    actions: tuple[float, ...]
    changes: tuple[float, ...]

    @property
    def regret(self) -> float:
        """The worst of them."""
        return max(*self.actions, *self.changes)


@dataclass(frozen=True)
class LevelReport:
    """Why a level was chosen.

    Attributes:
        t_start: the choice, one level or one per action dimension.
        levels: every candidate.
        shift_error: root mean square of shifted last plan minus full solve, executed part,
            normalised units; of warm starts only.
        episodes: demonstrations used.
        replicates: independent runs along each.
    """

    t_start: float | tuple[float, ...]
    levels: tuple[Level, ...]
    shift_error: float | None
    episodes: int
    replicates: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def table(self) -> str:
        """The candidates as text, the chosen one marked."""
        chosen = self.t_start if isinstance(self.t_start, tuple) else (self.t_start,)
        lines = ["  level   regret (actions, changes)   contraction (closed form)  retained error"]
        for level in self.levels:
            mark = "*" if level.t in chosen else " "
            parts = f"{max(level.actions):.3f}, {max(level.changes):.3f}"
            line = f"{mark} {level.t:5.2f}   {level.regret:6.3f} ({parts})"
            if level.measured is not None and self.shift_error is not None:
                retained = level.measured * self.shift_error
                closed = "-" if level.predicted is None else f"{level.predicted:.3f}"
                line += f"   {level.measured:11.3f} ({closed:>11})  {retained:14.4f}"
            lines.append(line)
        return "\n".join([*lines, f"chosen: {self.t_start}", *self.warnings()])

    def warnings(self) -> list[str]:
        """What a reader should know before trusting the choice."""
        found = []
        levels = [level.t for level in self.levels]
        if self.t_start in (levels[0], levels[-1]) and len(levels) > 1:
            found.append("warning: the choice is at an end of the candidates; try others beyond it")
        pairs = [(v.measured, v.predicted) for v in self.levels if v.predicted is not None]
        if any(m is not None and abs(m - p) > 0.5 for m, p in pairs):
            found.append(
                "warning: measured and closed-form contraction differ by over 0.5: plans are far "
                "from Gaussian around their modes, or the policy is badly trained"
            )
        return found
