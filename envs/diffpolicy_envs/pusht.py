"""Push-T of gym-pusht: push a T-shaped block into its outline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from diffpolicy_envs.base import FlatEnv, Info, Observation
from diffpolicy_envs.pusht_expert import PushTExpert
from diffpolicy_envs.pusht_features import OBSERVATION_DIM, STATE_DIM, distance_to_goal
from diffpolicy_envs.pusht_features import observation_from_state as features
from diffpolicy_envs.recipes import Recipe
from diffpolicy_envs.simulators import import_pusht

RESETS = ("gym_pusht", "diffusion_policy")
CLEAR = (50.0, 450.0, 300.0, 200.0, 0.0)
"""A state in which the disc does not touch the block."""
IMAGE_SIZE = 96
"""Pixels a side of observed images, as in Diffusion Policy's demonstrations."""


def diffusion_policy_state(seed: int) -> NDArray[np.float64]:
    """The state Diffusion Policy's own Push-T runner hands its simulator for a seed.

    Args:
        seed: the runner's seed, 100000 to 100049 in the published tables.

    Returns:
        [5] agent x, y; block x, y in pixels; block angle in radians.
    """
    # The legacy generator is the point here: the published initial states come from it.
    rng = np.random.RandomState(seed)
    agent = rng.randint(50, 450), rng.randint(50, 450)
    block = rng.randint(100, 400), rng.randint(100, 400)
    angle = rng.randn() * 2 * np.pi - np.pi
    return np.array([*agent, *block, angle], dtype=np.float64)


class PushTBase(FlatEnv):
    """A disc pushes a T-shaped block on a table of 512 x 512 pixels, seen from above, at 10 Hz.

    Action [2] in [0, 512]: the point the disc is drawn to, in pixels. Reward: coverage of the
    outline by the block, divided by 0.95 and clipped to [0, 1], as in Diffusion Policy; the episode
    terminates, and ``info["is_success"]`` is true, when ``info["coverage"]`` (0 to 1) exceeds 0.95.
    What is observed is a subclass's to say.

    Args:
        render_mode: None, ``"rgb_array"`` or ``"human"``.
        width: width of the image in pixels.
        height: height of the image in pixels.
        resets: who draws the initial state of a seed: ``"gym_pusht"`` (that package's own) or
            ``"diffusion_policy"`` (the states of Diffusion Policy's runner, which its published
            scores average over).

    Raises:
        ValueError: an unknown kind of resets.
        gymnasium.error.DependencyNotInstalled: gym-pusht or a pymunk below 7 is missing.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        **FlatEnv.metadata,
        "render_fps": 10,
        "packages": ["gym-pusht", "pymunk"],
    }

    def __init__(
        self,
        render_mode: str | None = None,
        *,
        width: int = 480,
        height: int = 480,
        resets: str = "gym_pusht",
    ) -> None:
        if resets not in RESETS:
            raise ValueError(f"resets must be one of {RESETS}, not {resets!r}")
        simulator = import_pusht().PushTEnv(
            obs_type="state",
            render_mode=render_mode or "rgb_array",
            visualization_width=width,
            visualization_height=height,
            observation_width=IMAGE_SIZE,
            observation_height=IMAGE_SIZE,
        )
        super().__init__(simulator, OBSERVATION_DIM, render_mode)
        self._physics: Any = simulator
        self._resets = resets
        self._expert: PushTExpert | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        """Start an episode; see `FlatEnv.reset`.

        Args:
            seed: seeds the simulator's own generator; None goes on with it.
            options: ``{"state": [5]}`` starts from a recorded state, exactly (see `set_state`).

        Returns:
            The observation and an info with ``is_success`` and ``coverage``.

        Raises:
            ValueError: an unknown option, or a state that is not five finite numbers.
        """
        self._expert = None
        options = dict(options or {})
        state = options.pop("state", None)
        if options:
            raise ValueError(f'unknown reset options {sorted(options)}; known: "state"')
        simulator_options: dict[str, Any] | None = None
        if state is not None:
            # Where disc and block overlap the simulator's reset leaves a push behind that would
            # still move the block after `set_state`: let it start from a state where they do not.
            simulator_options = {"reset_to_state": CLEAR}
        elif self._resets == "diffusion_policy":
            drawn = int(self.np_random.integers(2**31)) if seed is None else seed
            simulator_options = {"reset_to_state": diffusion_policy_state(drawn)}
        observation, info = super().reset(seed=seed, options=simulator_options)
        if state is not None:
            observation = self.set_state(state)
            # The simulator described the state it had drawn.
            info = {**self._physics._get_info(), "is_success": False}
        return observation, {**info, "coverage": float(self._physics._get_coverage())}

    def step(self, action: NDArray[Any]) -> tuple[Observation, float, bool, bool, Info]:
        """Advance one control step of 0.1 s; see `FlatEnv.step`."""
        observation, reward, terminated, truncated, info = super().step(action)
        return (
            observation,
            reward,
            terminated,
            truncated,
            {**info, "coverage": float(info["coverage"])},
        )

    def state(self) -> NDArray[np.float64]:
        """The simulator's state as it is recorded.

        Returns:
            [5] agent x, y; block x, y in pixels; block angle in radians, in [0, 2 pi).
        """
        state: NDArray[np.float64] = self._physics.get_obs()
        return state

    def set_state(self, state: NDArray[Any]) -> Observation:
        """Put agent and block, at rest, into a recorded state.

        Args:
            state: [5] agent x, y; block x, y in pixels; block angle in radians.

        Returns:
            The observation there.

        Raises:
            ValueError: the state is not five finite numbers.
        """
        state = np.asarray(state, dtype=np.float64)
        if state.shape != (STATE_DIM,) or not np.isfinite(state).all():
            raise ValueError(
                "expected a state of five finite numbers (agent x, y, block x, y, block angle), "
                f"got {state}"
            )
        agent, block = self._physics.agent, self._physics.block
        agent.position, agent.velocity = (float(state[0]), float(state[1])), (0.0, 0.0)
        # The angle first: pymunk turns the block about its centre of gravity, which is not the
        # origin of its frame, so that turning it afterwards moves it tens of pixels away.
        block.angle = float(state[4])
        block.position = (float(state[2]), float(state[3]))
        block.velocity, block.angular_velocity = (0.0, 0.0), 0.0
        for body in (agent, block):
            self._physics.space.reindex_shapes_for_body(body)
        return self._flatten(self.state())

    def expert_action(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """The scripted expert's action for the current state (see `PushTExpert`).

        Measured on the seeds 200000 to 200019: it solved all 20 episodes, in 99 steps on average.
        A step takes milliseconds, one in which it plans some tenths of a second.

        Args:
            rng: breaks ties between pushes that promise the same.

        Returns:
            Action [2] in [0, 512].
        """
        if self._expert is None:
            self._expert = PushTExpert()
        goal = np.asarray(self._physics.goal_pose, dtype=np.float64)
        return self._expert.action(self.state(), goal, rng).astype(np.float32)

    def _success(self, info: Mapping[str, Any]) -> bool:
        return bool(info["is_success"])


class PushTEnv(PushTBase):
    """Push-T with 26 numbers as observation (`pusht_features.observation_from_state`)."""

    @staticmethod
    def observation_from_state(state: NDArray[Any]) -> NDArray[np.float32]:
        """Observations [T, 26] for recorded states [T, 5]; needs no simulator."""
        return features(state)

    @staticmethod
    def dense_reward(
        observation: NDArray[Any], action: NDArray[Any], reward: NDArray[Any]
    ) -> NDArray[np.float64]:
        """A reward that also tells how far the block is away where it covers nothing.

        For what is learned of recorded steps (`judge.reward=dense`); `step` gives coverage alone.

        Args:
            observation: [T, 26], before each step.
            action: [T, 2]; not looked at.
            reward: [T] of the steps.

        Returns:
            [T] the reward, less the mean distance of the block's key points from where they are to
            be, in units of 200 pixels.
        """
        del action
        dense: NDArray[np.float64] = reward - distance_to_goal(observation) / 200
        return dense

    def _flatten(self, raw: NDArray[np.float64]) -> Observation:
        observation: Observation = features(raw[None])[0]
        return observation


class PushTImageEnv(PushTBase):
    """Push-T seen by a camera: ``image`` uint8 [96, 96, 3] and ``agent_pos`` [2] in pixels.

    The image is drawn as that of Diffusion Policy's human demonstrations, without their targets.
    """

    def __init__(self, render_mode: str | None = None, **kwargs: Any) -> None:
        super().__init__(render_mode, **kwargs)
        self.observation_space = gym.spaces.Dict(  # type: ignore[assignment]
            {
                "agent_pos": gym.spaces.Box(0.0, 512.0, (2,), np.float32),
                "image": gym.spaces.Box(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8),
            }
        )

    def _flatten(self, raw: NDArray[np.float64]) -> Any:
        # Not `render`, whose image shows the last action.
        return {"agent_pos": raw[:2].astype(np.float32), "image": self._physics._render()}


LICENCE = "simulator: Apache-2.0 and MIT (gym-pusht, pymunk); expert: MIT (ours)"

RECIPES = {
    "pusht/script": Recipe(
        env="diffpolicy_envs:diffpolicy/PushT-v0",
        episodes=200,
        about="a script that looks one push ahead brings the T into its outline",
        licence=LICENCE,
        extra="pusht",
        minutes=1.3,
        megabytes=2.8,
    ),
}
