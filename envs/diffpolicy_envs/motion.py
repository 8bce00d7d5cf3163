"""Unpredictable smooth motion in a box: what the moving targets of this package follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class MotionSettings:
    """How a target moves.

    Attributes:
        speed: largest speed, in units of length per second, 0 or more; every leg has its own,
            between half of it and all of it.
        turn_rate: probability per control step that a new leg begins, in a direction of its own.
        jump_rate: probability per control step that the target jumps to another place.

    Raises:
        ValueError: a value outside its range.
    """

    speed: float
    turn_rate: float
    jump_rate: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.speed < np.inf:
            raise ValueError(f"speed must be 0 or more, and finite, got {self.speed}")
        check_rate("turn_rate", self.turn_rate)
        check_rate("jump_rate", self.jump_rate)


class Motion(NamedTuple):
    """A target's whole course: positions [T, D] and velocities [T, D] per second."""

    position: Vector
    velocity: Vector


def check_rate(name: str, value: float) -> None:
    """Refuse what is no probability per control step.

    Args:
        name: of the argument, for the message.
        value: what came.

    Raises:
        ValueError: the value is not in [0, 1].
    """
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} is a probability per control step, in [0, 1]; got {value}")


def draw_motion(
    rng: np.random.Generator,
    box: tuple[Vector, Vector],
    steps: int,
    *,
    settings: MotionSettings,
    seconds: float,
    start: Vector | None = None,
) -> Motion:
    """Draw a target's course from a generator, whatever a policy is going to do.

    Legs of constant velocity begin at random times; the velocity goes over from one leg's to the
    next one's by half of the difference per step, so that the course is smooth. At a wall of the
    box position and velocity are reflected. The velocity of a step is the one with which the target
    moves on: ``position[k + 1] = position[k] + seconds * velocity[k]`` unless a wall or a jump
    comes between.

    Args:
        rng: consumed by an amount that depends on `steps` and the box's dimension alone.
        box: lowest [D] and highest [D] corner.
        steps: number of control steps; the course has one entry more.
        settings: speed and rates.
        seconds: duration of a control step.
        start: [D] where the course begins, in the box; None draws a place.

    Returns:
        The course, T = `steps` + 1.
    """
    low, high = box
    # All draws are made, whether used or not: one rate does not shift what another one draws.
    turns, jumps = rng.random(steps + 1), rng.random(steps + 1)
    directions = rng.standard_normal((steps + 1, len(low)))
    speeds = settings.speed * rng.uniform(0.5, 1.0, steps + 1)
    places = rng.uniform(low, high, (steps + 1, len(low)))
    legs = directions / np.linalg.norm(directions, axis=1, keepdims=True) * speeds[:, None]
    position, velocity = np.empty_like(legs), np.empty_like(legs)
    position[0] = places[0] if start is None else start
    velocity[0] = leg = legs[0]
    for k in range(steps):
        place = position[k] + seconds * velocity[k]
        flip = np.where((place < low) | (place > high), -1.0, 1.0)
        place = np.where(place < low, 2 * low - place, place)
        place = np.where(place > high, 2 * high - place, place)
        leg = legs[k + 1] if turns[k + 1] < settings.turn_rate else flip * leg
        position[k + 1] = places[k + 1] if jumps[k + 1] < settings.jump_rate else place
        velocity[k + 1] = (flip * velocity[k] + leg) / 2
    return Motion(position, velocity)
