"""Push-T with a block that is kicked and a goal that moves: a task that punishes stale actions."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffpolicy_envs.base import Info, Observation
from diffpolicy_envs.motion import MotionSettings, check_rate, draw_motion
from diffpolicy_envs.pusht import LICENCE, RESETS, PushTEnv
from diffpolicy_envs.recipes import Recipe

Vector = NDArray[np.float64]

EPISODE_STEPS = 300
"""Control steps of an episode, of 0.1 s each."""
STEP_SECONDS = 0.1
"""Duration of a control step."""
KICK_STEPS = 2
"""Control steps that a kick lasts."""
TABLE = 512.0
"""Width and height of the table in pixels."""
GOAL = np.array([256.0, 256.0, np.pi / 4])
"""The goal of ``diffpolicy/PushT-v0``: x, y in pixels, angle in radians."""
LEVER = 100.0
"""Pixels that count as one radian where one number sets a shift and a turn; the T is 120 long."""
GOAL_RANGE = 60.0
"""How far the goal moves from its place at reset, along x and y in pixels (angle: over `LEVER`)."""
NEAR_GOAL = "near_goal"
START_RANGE = 40.0
"""How far from the goal the block starts, along x and y in pixels (angle: over `LEVER`)."""
AGENT_START = 200.0
"""Distance of the disc from the goal at the start in pixels, clear of the block."""
GOAL_TURN_RATE = 0.05
"""Probability per control step that the goal drifts on in another direction."""


class Kicks(NamedTuple):
    """What the block is kicked with in every control step: shifts [T, 2] in pixels, turns [T]."""

    shift: Vector
    turn: Vector


def to_goal_frame(points: Vector, goal: Vector) -> Vector:
    """Express points of the table in the frame of the goal.

    The frame is reached by the rigid motion that takes the goal's pose to the one that Push-T's
    goal has always; where the goal has that pose, nothing changes, to the last bit.

    Args:
        points: [..., 2] positions on the table in pixels.
        goal: [3] pose of the goal: x, y in pixels, angle in radians.

    Returns:
        [..., 2] positions in the frame of the goal, in pixels.
    """
    # x + (R - 1)(x - g) + (g0 - g), which is R(x - g) + g0 without a rounding error at R = 1.
    moved: Vector = (points - goal[:2]) @ _turn(GOAL[2] - goal[2]).T + (GOAL[:2] - goal[:2])
    return points + moved


def from_goal_frame(points: Vector, goal: Vector) -> Vector:
    """Express points of the goal's frame on the table: the inverse of `to_goal_frame`.

    Args:
        points: [..., 2] positions in the frame of the goal, in pixels.
        goal: [3] pose of the goal: x, y in pixels, angle in radians.

    Returns:
        [..., 2] positions on the table in pixels.
    """
    moved: Vector = (points - GOAL[:2]) @ _turn(goal[2] - GOAL[2]).T + (goal[:2] - GOAL[:2])
    return points + moved


def _turn(angle: float) -> Vector:
    """A rotation by an angle, less the identity: [2, 2]."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos - 1.0, -sin], [sin, cos - 1.0]])


def draw_kicks(rng: np.random.Generator, steps: int, rate: float, distance: float) -> Kicks:
    """Draw when, whither and how hard the block is kicked, whatever a policy is going to do.

    Args:
        rng: consumed by an amount that depends on `steps` alone.
        steps: number of control steps T.
        rate: probability per control step that a kick begins.
        distance: largest shift of a kick in pixels; every kick has its own, between half of it and
            all of it, and a turn of up to ``distance / LEVER`` either way.

    Returns:
        Shift and turn of every control step; a kick lasts `KICK_STEPS` of them.
    """
    times = rng.random(steps) < rate
    angle = rng.uniform(0.0, 2 * np.pi, steps)
    length = distance * rng.uniform(0.5, 1.0, steps)
    turn = distance / LEVER * rng.uniform(-1.0, 1.0, steps)
    shift = length[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    kicks = Kicks(np.zeros((steps, 2)), np.zeros(steps))
    for step in np.flatnonzero(times):
        kicks.shift[step : step + KICK_STEPS] = shift[step] / KICK_STEPS
        kicks.turn[step : step + KICK_STEPS] = turn[step] / KICK_STEPS
    return kicks


def draw_start(rng: np.random.Generator) -> Vector:
    """Draw a state with the block near the goal and the disc clear of it.

    Args:
        rng: consumed by a fixed amount.

    Returns:
        [5] agent x, y; block x, y in pixels; block angle in radians.
    """
    around = rng.uniform(0.0, 2 * np.pi)
    agent = GOAL[:2] + AGENT_START * np.array([np.cos(around), np.sin(around)])
    block = GOAL + rng.uniform(-START_RANGE, START_RANGE, 3) / np.array([1.0, 1.0, LEVER])
    return np.concatenate([agent, block])


class PushTDisturbedEnv(PushTEnv):
    """Push-T in which the block is kicked and the goal drifts and jumps, for 300 steps.

    Engine, block and disc are those of ``diffpolicy/PushT-v0``. A kick drags the block along with a
    given velocity for 0.2 s; disc and walls still stop it. Kicks and goal poses of the whole
    episode are drawn at reset from this environment's own generator: the same seed gives the same
    disturbances whatever the policy does. The goal starts at Push-T's own pose, the block within
    40 pixels and 0.4 radians of it: keeping the block there is the task, not bringing it there.

    **The goal's frame.** Observation (O = 26, the layout of ``diffpolicy/PushT-v0``) and action [2]
    (in [0, 512]) are in the frame of the goal: moved rigidly so that the goal lies where Push-T's
    goal lies. So a policy that was trained with ``diffpolicy/PushT-v0``, or on its human
    demonstrations, acts here unchanged; to it a goal that moves looks like a table that moves the
    other way. An action is read in the frame of the observation that came before it, and the point
    it means is clipped to the table. Without kicks and with a goal at rest, observations equal
    Push-T's exactly.

    **Score.** Reward: coverage of the present goal by the block over 0.95, clipped to [0, 1] (this
    is ``info["quality"]``, and the reward of Push-T), over 300; the episode goes on after a
    success. So the return of an episode is its mean quality, in [0, 1], and that is the score:
    Push-T's own, the largest reward, would hide everything that happens after the first success.
    ``info["is_success"]`` is true in steps whose coverage exceeds 0.95.

    Args:
        render_mode: None, ``"rgb_array"`` or ``"human"``.
        kick_rate: probability per step that a kick begins, 0 to 1 (0: none).
        kick_distance: largest shift of a free block by one kick in pixels, 0 to 200.
        goal_speed: largest drift of the goal in pixels per second, 0 to 200 (0: none); a turn by
            one radian counts as 100 pixels.
        goal_jump_rate: probability per step that the goal jumps to another pose, 0 to 1.
        width: width of the image in pixels.
        height: height of the image in pixels.
        resets: who draws the initial state: ``"near_goal"`` (see above), ``"gym_pusht"`` or
            ``"diffusion_policy"`` (as for `PushTEnv`; the way to the goal then counts too).

    Raises:
        ValueError: a value outside its range.
        gymnasium.error.DependencyNotInstalled: gym-pusht or a pymunk below 7 is missing.
    """

    def __init__(
        self,
        render_mode: str | None = None,
        *,
        kick_rate: float = 0.015,
        kick_distance: float = 40.0,
        goal_speed: float = 5.0,
        goal_jump_rate: float = 0.003,
        width: int = 480,
        height: int = 480,
        resets: str = "near_goal",
    ) -> None:
        check_rate("kick_rate", kick_rate)
        check_rate("goal_jump_rate", goal_jump_rate)
        for name, value in (("kick_distance", kick_distance), ("goal_speed", goal_speed)):
            if not 0.0 <= value <= 200.0:
                raise ValueError(f"{name} must be in [0, 200], got {value}")
        if resets not in (NEAR_GOAL, *RESETS):
            raise ValueError(f"resets must be one of {(NEAR_GOAL, *RESETS)}, not {resets!r}")
        self._near_goal = resets == NEAR_GOAL
        drawn = RESETS[0] if self._near_goal else resets
        super().__init__(render_mode, width=width, height=height, resets=drawn)
        self._kick_rate, self._kick_distance = kick_rate, kick_distance
        self._goal_settings = MotionSettings(goal_speed, GOAL_TURN_RATE, goal_jump_rate)
        self._kicks = Kicks(np.zeros((0, 2)), np.zeros(0))
        self._goals = GOAL[None].copy()
        self._clock = 0

    @property
    def kicks(self) -> Kicks:
        """The kicks of this episode, which no policy is shown; T = 300."""
        return self._kicks

    @property
    def goals(self) -> Vector:
        """Poses [301, 3] of the goal in this episode: x, y in pixels, angle in radians."""
        return self._goals

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        """Start an episode and draw its disturbances; see `PushTEnv.reset`.

        Returns:
            The observation [26] and an info with ``is_success``, ``coverage`` and ``quality``.
        """
        self._clock, self._goals = 0, GOAL[None].copy()
        observation, info = super().reset(seed=seed, options=options)
        self._kicks = draw_kicks(
            self.np_random, EPISODE_STEPS, self._kick_rate, self._kick_distance
        )
        reach, pixels = np.full(3, GOAL_RANGE), np.array([1.0, 1.0, LEVER])
        drift = draw_motion(
            self.np_random,
            (-reach, reach),
            EPISODE_STEPS,
            settings=self._goal_settings,
            seconds=STEP_SECONDS,
            start=np.zeros(3),
        )
        self._goals = GOAL + drift.position / pixels
        if self._near_goal and "state" not in (options or {}):
            observation, info = super().reset(options={"state": draw_start(self.np_random)})
        if self._kick_rate > 0:
            self._physics.block.velocity_func = self._block_velocity
        return observation, {**info, "quality": self._quality(info["coverage"])}

    def step(self, action: NDArray[Any]) -> tuple[Observation, float, bool, bool, Info]:
        """Advance one control step of 0.1 s, kick and goal with it; see `FlatEnv.step`."""
        target = np.clip(
            from_goal_frame(np.asarray(action, np.float64), self._goals[self._clock]), 0.0, TABLE
        )
        self._clock = min(self._clock + 1, EPISODE_STEPS)
        self._physics.goal_pose = self._goals[self._clock].copy()
        observation, _, _, _, info = super().step(target)
        quality = self._quality(info["coverage"])
        over = self._clock == EPISODE_STEPS
        return observation, quality / EPISODE_STEPS, False, over, {**info, "quality": quality}

    def expert_action(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """The scripted expert's action, in the frame of the goal; see `PushTEnv.expert_action`.

        Its mean score on the seeds 200000 to 200019 was 0.72; with its actions applied 1, 3, 7 and
        28 steps late 0.66, 0.58, 0.43 and 0.29 (standard errors up to 0.03).
        """
        point = super().expert_action(rng).astype(np.float64)
        return np.clip(to_goal_frame(point, self._goals[self._clock]), 0.0, TABLE).astype(
            np.float32
        )

    def _flatten(self, raw: NDArray[np.float64]) -> Observation:
        goal = self._goals[self._clock]
        places = to_goal_frame(raw[:4].reshape(2, 2), goal).reshape(4)
        angle = (raw[4] + (GOAL[2] - goal[2])) % (2 * np.pi)
        return super()._flatten(np.append(places, angle))

    def _quality(self, coverage: float) -> float:
        """The reward of Push-T: coverage over 0.95, clipped to [0, 1]."""
        return float(np.clip(coverage / self._physics.success_threshold, 0.0, 1.0))

    def _block_velocity(self, body: Any, gravity: Any, damping: float, dt: float) -> None:
        """The engine's velocity update of the block, once per substep, with the kick in it.

        The table's friction (gym-pusht: a damping that stops everything at once) is not changed;
        contacts are resolved afterwards, so the block is not pushed through disc or walls.
        """
        type(body).update_velocity(body, gravity, damping, dt)
        # `step` has put the clock on already.
        shift, turn = self._kicks.shift[self._clock - 1], self._kicks.turn[self._clock - 1]
        if turn or shift.any():
            body.velocity = tuple((shift / STEP_SECONDS).tolist())
            body.angular_velocity = float(turn / STEP_SECONDS)


RECIPES = {
    "pusht/disturbed": Recipe(
        env="diffpolicy_envs:diffpolicy/PushTDisturbed-v0",
        episodes=100,
        keep="all",
        about="the script keeps the T in an outline that moves, while the T is kicked",
        licence=LICENCE,
        extra="pusht",
        minutes=1.8,
        megabytes=3.5,
    ),
}
