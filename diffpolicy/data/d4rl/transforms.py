"""Named changes of a dataset's rewards and episodes, off by default and recorded with the data.

- ``antmaze_reward``: r - 1, as offline RL papers train on AntMaze's sparse rewards;
- ``reward_scale:<x>``: x * r;
- ``reward_shift:<x>``: r + x;
- ``normalize_reward``: 1000 / (max - min) * r over the episodes' returns, as papers in the line of
  IQL (Kostrikov et al. 2022, appendix) train on locomotion;
- ``split_goals`` or ``split_goals:<radius>``: one episode for each goal, see ``split_at_goals``.

They apply in the order given. Scores are always those of untransformed rewards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffpolicy.data.d4rl.episodes import Episodes
from diffpolicy.settings import check_choice, check_range

# Name -> the value where none is written; None: it takes no value; NaN: it needs one.
_DEFAULTS: dict[str, float | None] = {
    "antmaze_reward": None,
    "normalize_reward": None,
    "reward_scale": math.nan,
    "reward_shift": math.nan,
    "split_goals": 0.45,
}


class Transform(NamedTuple):
    """One named change.

    Attributes:
        name: of the list above.
        value: its number; None where it takes none.
    """

    name: str
    value: float | None = None


class RewardMap(NamedTuple):
    """What a reward becomes: ``scale * r + shift``."""

    scale: float = 1.0
    shift: float = 0.0

    def __call__(self, rewards: NDArray[Any]) -> NDArray[Any]:
        """Map rewards of any shape, computed in float64 unless nothing changes."""
        if self == RewardMap():
            return rewards
        return self.scale * rewards.astype(np.float64) + self.shift


def parse_transforms(transforms: Sequence[str]) -> tuple[Transform, ...]:
    """Read and check the names of transforms.

    Args:
        transforms: Such as ``["split_goals", "reward_scale:0.1"]``.

    Returns:
        The transforms, in the same order.

    Raises:
        ValueError: An unknown name, a value that is missing, needless or no number, or
            ``split_goals`` anywhere but first, because it computes the rewards anew.
    """
    if isinstance(transforms, str):
        raise ValueError(f"transforms is a list of names, such as [{transforms!r}]")
    parsed = tuple(_parse(str(text)) for text in transforms)
    if any(t.name == "split_goals" for t in parsed[1:]):
        raise ValueError("split_goals computes the rewards anew: name it once, and first")
    return parsed


def _parse(text: str) -> Transform:
    name, colon, number = text.partition(":")
    check_choice("transform", name, _DEFAULTS)
    value = _DEFAULTS[name]
    if value is None and colon:
        raise ValueError(f"{name} takes no number; got {text!r}")
    if colon:
        try:
            value = float(number)
        except ValueError:
            value = math.nan
    if value is not None and not math.isfinite(value):
        raise ValueError(f"{name} needs a finite number: write '{name}:<x>'; got {text!r}")
    if name in ("split_goals", "reward_scale"):
        check_range("(0, inf)", **{name: value})
    return Transform(name, value)


def reward_map(
    transforms: Sequence[Transform], returns: NDArray[np.float64], lengths: NDArray[np.int64]
) -> RewardMap:
    """Put the transforms of rewards into one affine map.

    Args:
        transforms: What to apply, in order; those that do not change rewards are passed over.
        returns: ``[E]`` sums of the untransformed rewards of each episode.
        lengths: ``[E]`` their numbers of steps.

    Returns:
        The map.

    Raises:
        ValueError: ``normalize_reward`` where all episodes have the same return.
    """
    scale, shift = 1.0, 0.0
    for name, value in transforms:
        if name == "antmaze_reward":
            shift -= 1.0
        elif name == "reward_shift" and value is not None:
            shift += value
        elif name in ("reward_scale", "normalize_reward"):
            factor = value
            if factor is None:
                factor = _normalizing(scale * returns + shift * lengths)
            scale, shift = scale * factor, shift * factor
    return RewardMap(scale, shift)


def _normalizing(returns: NDArray[np.float64]) -> float:
    spread = float(returns.max() - returns.min())
    if not spread > 0:
        raise ValueError(
            f"normalize_reward divides by the spread of the returns, but all {len(returns)} "
            "episodes have the same; use reward_scale:<x>"
        )
    return 1000.0 / spread


def split_at_goals(
    episodes: Episodes, positions: NDArray[Any], goals: NDArray[Any], radius: float
) -> tuple[Episodes, NDArray[np.bool_]]:
    """Cut trajectories that pursue one goal after the other into one episode for each goal.

    D4RL's maze files hold long trajectories of a controller whose goal, ``infos/goal``, changes on
    the way, while their rewards are those of one fixed goal. For policies that are told the goal
    the data become goal-conditioned: the goal is appended to the observation, the reward of a row
    is 1 if its position lies within ``radius`` of its goal and else 0 (as D4RL labels its sparse
    mazes, but with the goal that was pursued), and an episode ends where the goal changes. Such an
    end is ``truncated``, and ``terminated`` as well if the goal was reached in its last row. The
    last piece of a trajectory keeps the way in which the trajectory ended, and is ``terminated``
    too if its goal was reached.

    Args:
        episodes: The trajectories.
        positions: ``[N, G]`` the first G numbers of each observation.
        goals: ``[N, G]`` the goal pursued in each row.
        radius: In the unit of the positions (metres).

    Returns:
        The trips, and ``[N]`` whether a row's position is at the row's goal.
    """
    truncated = np.append((goals[1:] != goals[:-1]).any(1), False)
    ends = np.union1d(np.flatnonzero(truncated) + 1, episodes.ends)
    truncated[episodes.ends - 1] = episodes.truncated
    terminated = np.linalg.norm(positions - goals, axis=1) <= radius
    reached = terminated.copy()
    terminated[episodes.ends - 1] |= episodes.terminated
    last = ends - 1
    return Episodes(ends, terminated[last], truncated[last], episodes.partial), reached
