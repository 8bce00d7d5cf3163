"""A Fetch task that punishes stale actions: keep the gripper on a target that will not keep still.

A controller that acts on what it saw a few steps ago aims at where the target was going, and loses
reward at every turn and jump that it has not seen yet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from diffpolicy_envs.base import Action, Info, Observation
from diffpolicy_envs.fetch import LICENCE, FetchEnv
from diffpolicy_envs.fetch_experts import MovingReachExpert
from diffpolicy_envs.motion import Motion, MotionSettings, draw_motion
from diffpolicy_envs.recipes import Recipe

EPISODE_STEPS = 100
"""Control steps of an episode, of 0.04 s each."""
STEP_SECONDS = 0.04
"""Duration of a control step."""
MAX_SPEED = 0.6
"""Fastest target in m/s; the gripper moves at about 0.75 m/s along each axis."""
TOLERANCE = 0.03
"""Distance in metres within which the quality is 1."""
REACH = 0.13
"""Distance in metres from which on the quality is 0."""
SUCCESS = 0.6
"""Mean quality of an episode from which on it counts as a success."""

# Where the target moves, relative to the gripper's place at reset, in metres: the box in which
# FetchReach draws its goals, without the part that lies inside the table.
BOX_LOW = np.array([-0.15, -0.15, -0.08])
BOX_HIGH = np.array([0.15, 0.15, 0.15])


def quality(distance: float) -> float:
    """How well the target is held: 1 within `TOLERANCE`, falling in a line to 0 at `REACH`.

    Args:
        distance: between gripper and target, in metres.

    Returns:
        A number in [0, 1].
    """
    return float(np.clip((REACH - distance) / (REACH - TOLERANCE), 0.0, 1.0))


class FetchReachMovingEnv(FetchEnv):
    """The Fetch arm follows a target that turns and jumps without notice, for 100 steps.

    Observation (O = 19): that of ``FetchReach-v0`` (16: gripper's position 0-2, fingers 3-4,
    gripper's velocity 5-7, fingers' velocity 8-9, target 10-12, target relative to the gripper
    13-15) and the target's velocity in m/s (16-18), so that the motion can be led. Action [4] in
    [-1, 1]: gripper displacement in units of about 3 cm, and the fingers' (ignored).

    Reward: the `quality` of this step over 100, so that the return of an episode is its mean
    quality, in [0, 1]; that return is the score. A best or a final value would hide staleness:
    every controller meets the target at some time. ``info["quality"]`` is this step's, in [0, 1],
    ``info["distance"]`` in metres. ``info["is_success"]`` is false until the last step; there it
    says whether the mean quality was at least 0.6. The episode does not terminate; it is truncated
    after 100 steps.

    The whole course of the target is drawn at reset from this environment's own generator: the same
    seed gives the same course whatever the robot does.

    Args:
        render_mode: None, ``"rgb_array"`` or ``"human"``.
        speed: largest speed of the target in m/s, 0 to 0.6.
        turn_rate: probability per step of a new direction, 0 to 1.
        jump_rate: probability per step of a jump, 0 to 1.
        width: width of the image in pixels.
        height: height of the image in pixels.
        camera: entries of MuJoCo's free camera to change, as for `FetchEnv`.

    Raises:
        ValueError: a speed or rate outside its range, or an unknown camera entry.
        gymnasium.error.DependencyNotInstalled: gymnasium-robotics or a fitting MuJoCo is missing.
    """

    def __init__(
        self,
        render_mode: str | None = None,
        *,
        speed: float = 0.5,
        turn_rate: float = 0.15,
        jump_rate: float = 0.02,
        width: int = 480,
        height: int = 480,
        camera: Mapping[str, float | Sequence[float]] | None = None,
    ) -> None:
        if not 0.0 <= speed <= MAX_SPEED:
            raise ValueError(f"speed must be in [0, {MAX_SPEED}] m/s, got {speed}")
        self.settings = MotionSettings(speed, turn_rate, jump_rate)
        super().__init__("reach", render_mode, width=width, height=height, camera=camera)
        assert isinstance(self.observation_space, gym.spaces.Box)
        dim = self.observation_space.shape[0] + 3
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, shape=(dim,), dtype=np.float32)
        self._expert = MovingReachExpert(STEP_SECONDS)
        self._motion = Motion(np.zeros((1, 3)), np.zeros((1, 3)))
        self._clock, self._total = 0, 0.0

    @property
    def motion(self) -> Motion:
        """The target's whole course in this episode, which no policy is shown."""
        return self._motion

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        """Start an episode and draw the target's course; see `FlatEnv.reset`.

        Returns:
            The observation [19] and an info with ``is_success``, ``quality`` and ``distance``.
        """
        self._clock, self._total = 0, 0.0
        # What `_flatten` shows of the last episode's course before there is a new one is discarded.
        _, info = super().reset(seed=seed, options=options)
        simulator: Any = self.simulator
        centre = np.asarray(simulator.initial_gripper_xpos[:3], dtype=np.float64)
        self._motion = draw_motion(
            self.np_random,
            (centre + BOX_LOW, centre + BOX_HIGH),
            EPISODE_STEPS,
            settings=self.settings,
            seconds=STEP_SECONDS,
        )
        simulator.goal = self._motion.position[0].copy()
        # The simulator described the goal it had drawn itself.
        observation = self._flatten({**self._raw, "desired_goal": simulator.goal})
        return observation, {**info, "is_success": False, **self._judge()}

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, Info]:
        """Advance one control step of 0.04 s, the target with it; see `FlatEnv.step`."""
        self._clock = min(self._clock + 1, EPISODE_STEPS)
        simulator: Any = self.simulator
        simulator.goal = self._motion.position[self._clock].copy()
        observation, _, _, _, info = super().step(action)
        judged = self._judge()
        self._total += judged["quality"] / EPISODE_STEPS
        over = self._clock == EPISODE_STEPS
        success = over and self._total >= SUCCESS
        info = {**info, **judged, "is_success": success}
        return observation, judged["quality"] / EPISODE_STEPS, False, over, info

    def _judge(self) -> dict[str, float]:
        """Distance and quality of the present step."""
        distance = math.dist(self._raw["desired_goal"], self._raw["achieved_goal"])
        return {"distance": distance, "quality": quality(distance)}

    def _flatten(self, raw: Mapping[str, NDArray[np.float64]]) -> Observation:
        velocity = self._motion.velocity[self._clock]
        position = super()._flatten({**raw, "target_velocity": velocity})
        return np.concatenate([position, velocity.astype(np.float32)])


RECIPES = {
    "fetch/reach-moving": Recipe(
        env="diffpolicy_envs:diffpolicy/FetchReachMoving-v0",
        episodes=200,
        noise=0.15,
        keep="all",
        about="the gripper follows a target that turns and jumps without notice",
        licence=LICENCE,
        extra="robotics",
        minutes=1.0,
        megabytes=2.4,
    ),
}
