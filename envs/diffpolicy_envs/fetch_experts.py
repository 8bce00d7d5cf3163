"""Scripted experts for the Fetch tasks: closed-loop controllers on the simulator's observation.

Each decides from the positions it is shown what to do next, so that an episode whose executed
actions are disturbed is corrected rather than continued blindly. Positions are in metres; an action
is a displacement in units of about 5 cm plus the gripper's opening (1 open, -1 closed).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
RawObservation = Mapping[str, Vector]

GAIN = 10.0
OPEN, CLOSED = 1.0, -1.0


class Expert(Protocol):
    """A controller for one episode; a new episode takes a new instance."""

    def action(self, raw: RawObservation) -> Vector:
        """Action [4] in [-1, 1] for the simulator's dict observation."""


def towards(displacement: Vector, gripper: float) -> Vector:
    """A proportional step along a displacement [3], clipped to the action bounds.

    Args:
        displacement: where to go from here, in metres.
        gripper: opening of the gripper in [-1, 1].

    Returns:
        Action [4] in [-1, 1].
    """
    return np.append(np.clip(GAIN * displacement, -1.0, 1.0), gripper)


class ReachExpert:
    """Goes straight to the goal."""

    def action(self, raw: RawObservation) -> Vector:
        """See `Expert.action`."""
        return towards(raw["desired_goal"] - raw["observation"][:3], CLOSED)


class MovingReachExpert:
    """Goes to where a moving target is going to be at the end of the step.

    It has no memory and knows nothing of the turns to come. The gripper's response was measured: a
    full step moves it by 3.1 cm within the same control step, without overshoot. Its mean score on
    the seeds 200000 to 200019 was 0.94; with its actions applied 1, 3, 7 and 28 steps late 0.87,
    0.37, 0.07 and 0.06.

    Args:
        lead: how far to lead the target, in seconds.
    """

    RESPONSE = 0.031
    """Displacement of the gripper by a full action in one control step, in metres."""

    def __init__(self, lead: float = 0.04) -> None:
        self.lead = lead

    def action(self, raw: RawObservation) -> Vector:
        """See `Expert.action`; the observation also holds ``target_velocity`` [3] in m/s."""
        ahead = raw["desired_goal"] + self.lead * raw["target_velocity"]
        displacement = ahead - raw["observation"][:3]
        # Scaled as a whole, so that a distant target is approached in a straight line.
        action = displacement / max(self.RESPONSE, float(np.abs(displacement).max()))
        return np.append(action, CLOSED)


class PickAndPlaceExpert:
    """Hovers over the block with an open gripper, descends, closes, carries the block to the goal.

    Its only memory is how long the gripper has been closing around the block; a block that slips
    out of the fingers clears it and is picked up again.
    """

    HOVER = 0.08
    """Height of the hovering point over the block's centre, in metres."""
    ALIGNED = 0.02
    """Horizontal distance below which the gripper may descend, in metres."""
    GRASPED = 0.025
    """Distance between gripper and block below which the fingers enclose it, in metres."""
    LOST = 0.05
    """Distance above which a carried block has slipped, in metres."""
    CLOSING_STEPS = 5

    def __init__(self) -> None:
        self._closing = 0

    def action(self, raw: RawObservation) -> Vector:
        """See `Expert.action`."""
        observation = raw["observation"]
        block, to_block = observation[3:6], observation[6:9]
        distance = float(np.linalg.norm(to_block))
        if self._closing and distance > self.LOST:
            self._closing = 0
        if self._closing == 0 and distance > self.GRASPED:
            return towards(self._approach(to_block), OPEN)
        if self._closing < self.CLOSING_STEPS:
            self._closing += 1
            return towards(to_block, CLOSED)
        return towards(raw["desired_goal"] - block, CLOSED)

    def _approach(self, to_block: Vector) -> Vector:
        """Displacement [3]: above the block until aligned with it, then straight down."""
        over = to_block.copy()
        if np.linalg.norm(to_block[:2]) > self.ALIGNED:
            over[2] += self.HOVER
        return over


class PushExpert:
    """Flies behind the block on the line to the goal, comes down, and pushes it there.

    Without memory: behind the block it pushes, steering across the line; anywhere else it rises and
    goes round, over the block. A block at its goal is left alone, the gripper keeping clear of it.
    """

    ARRIVED = 0.02
    """Distance to the goal at which pushing stops, in metres."""
    NEAR = 0.04
    """Distance to the goal that is not worth going round the block for, in metres."""
    BEHIND = 0.08
    """Distance from the block at which the gripper comes down, in metres."""
    ALIGNED = 0.02
    """Horizontal distance to that point below which the gripper may descend, in metres."""
    BESIDE_LINE = 0.03
    """Distance from the line through block and goal within which pushing goes on, in metres."""
    LOW, HIGH = 0.03, 0.09
    """Heights over the block's centre: below the first it can push, at the second it flies."""
    STEERING = 2.0

    def action(self, raw: RawObservation) -> Vector:
        """See `Expert.action`."""
        gripper, block = raw["observation"][:3], raw["observation"][3:6]
        to_goal = (raw["desired_goal"] - block)[:2]
        distance = float(np.linalg.norm(to_goal))
        from_block = gripper - block
        line = to_goal / max(distance, 1e-6)
        along = float(from_block[:2] @ line)
        across = from_block[:2] - along * line
        beside = float(np.linalg.norm(across))
        behind = along < -self.ALIGNED and beside < self.BESIDE_LINE and from_block[2] < self.LOW
        if distance < (self.ARRIVED if behind else self.NEAR):
            return towards(self._clear_of(from_block), CLOSED)
        if behind:
            push = line * distance - self.STEERING * across
            return towards(np.append(push, -from_block[2]), CLOSED)
        return towards(self._go_round(from_block, line), CLOSED)

    def _go_round(self, from_block: Vector, line: Vector) -> Vector:
        """Displacement [3] to the point behind the block: up, across, then down."""
        to_behind = -self.BEHIND * line - from_block[:2]
        if np.linalg.norm(to_behind) < self.ALIGNED:
            return np.append(to_behind, -from_block[2])
        near = float(np.linalg.norm(from_block[:2]))
        if near < 1.2 * self.BEHIND and from_block[2] < 0.7 * self.HIGH:
            return self._clear_of(from_block, self.HIGH)
        return np.append(to_behind, self.HIGH - from_block[2])

    def _clear_of(self, from_block: Vector, height: float = 0.0) -> Vector:
        """Displacement [3] that backs off from the block, to a height over its centre."""
        near = max(float(np.linalg.norm(from_block[:2])), 1e-6)
        away = from_block[:2] * max(self.BEHIND / near - 1.0, 0.0)
        return np.append(away, height - from_block[2])
