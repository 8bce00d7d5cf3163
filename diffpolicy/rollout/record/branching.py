"""How rollouts that are to be compared are made: settings."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from diffpolicy.rollout.record.pairing import Scoring

_POINTS = 4  # third word of the seed of the branch points


@dataclass(frozen=True)
class Branching:
    """How rollouts branch off the episodes of a policy.

    Args:
        points: branch points per episode: one at random in each of so many equal parts of it.
        every: instead of ``points``: branch at steps 0, every, 2 every, ...
        branches: at each point.
        lookahead: steps of a branch (fewer where the episode ends).
        common_noise: whether the branches of a point share the policy's noise after their first
            plan (common random numbers), so that they differ because of that plan alone.
        seed: of all the policy's noise and of the branch points; the environment's seeds are
            given beside it.
        scoring: which branch is better.

    Raises:
        ValueError: a number out of range.
    """

    points: int = 4
    every: int | None = None
    branches: int = 6
    lookahead: int = 40
    common_noise: bool = True
    seed: int = 0
    scoring: Scoring = field(default_factory=Scoring)

    def __post_init__(self) -> None:
        for name in ("points", "lookahead"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.every is not None and self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")
        if self.branches < 2:
            raise ValueError(f"branches must be at least 2 to compare, got {self.branches}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")

    def collected(self) -> dict[str, Any]:
        """What decides the rollouts, as JSON values; the scoring does not."""
        values = asdict(self)
        del values["scoring"]
        return {**values, "points": None if self.every else self.points}

    def steps(self, seed: int, length: int, n_action_steps: int) -> list[int]:
        """The branch points of the episode of ``seed``, ascending.

        No point is so late that the episode had no whole chunk left; an episode that is shorter
        than a chunk has the point 0.
        """
        last = max(length - n_action_steps, 0)
        if self.every is not None:
            return list(range(0, last + 1, self.every))
        rng = np.random.default_rng([self.seed, seed, _POINTS])
        edges = np.linspace(0, last + 1, self.points + 1)
        return sorted({int(rng.uniform(low, high)) for low, high in pairwise(edges)})


@dataclass(frozen=True)
class Repeats:
    """Several episodes of each environment seed, with other noise of the policy.

    Args:
        episodes: of each seed.
        seed: of the policy's noise.
        scoring: which episode is better.

    Raises:
        ValueError: a number out of range.
    """

    episodes: int = 4
    seed: int = 0
    scoring: Scoring = field(default_factory=Scoring)

    def __post_init__(self) -> None:
        if self.episodes < 2:
            raise ValueError(f"episodes must be at least 2 to compare, got {self.episodes}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")

    def collected(self) -> dict[str, Any]:
        """What decides the rollouts, as JSON values; the scoring does not."""
        return {"episodes": self.episodes, "seed": self.seed}
