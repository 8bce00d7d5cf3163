"""The Fetch robot of gymnasium-robotics with flat observations and scripted experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from diffpolicy_envs.base import Action, FlatEnv, Info, Observation
from diffpolicy_envs.cameras import place_goal
from diffpolicy_envs.fetch_experts import Expert, PickAndPlaceExpert, PushExpert, ReachExpert
from diffpolicy_envs.recipes import Recipe
from diffpolicy_envs.simulators import import_robotics


class FetchTask(NamedTuple):
    """One task: the simulator's id and its expert."""

    simulator_id: str
    expert: type[Expert]


TASKS = {
    "pick_and_place": FetchTask("FetchPickAndPlace-v4", PickAndPlaceExpert),
    "push": FetchTask("FetchPush-v4", PushExpert),
    "reach": FetchTask("FetchReach-v4", ReachExpert),
}

# Nearer than gymnasium-robotics' own camera, so that the block is more than a few pixels.
CAMERA = {"distance": 1.25, "azimuth": 145.0, "elevation": -22.0, "lookat": (1.3, 0.75, 0.52)}


class FetchEnv(FlatEnv):
    """A Fetch task: move the block (or, in ``reach``, the gripper) to within 5 cm of the goal.

    Observation (O = 31, ``reach`` 16): the simulator's own observation, which holds the position
    of the gripper, of the block, and the block relative to the gripper; the desired goal [3] in
    metres; and the goal relative to the block (``reach``: to the gripper) [3]. Action [4] in
    [-1, 1]: gripper displacement in units of about 5 cm, and the gripper's opening (ignored by the
    simulator in ``push`` and ``reach``). Reward: the simulator's, -1 until the goal is reached,
    then 0 (``reward_type="dense"``: minus the distance). ``info["is_success"]`` is the state of
    this step.

    Args:
        task: ``"pick_and_place"``, ``"push"`` or ``"reach"``.
        render_mode: None, ``"rgb_array"`` or ``"human"``.
        width: width of the image in pixels.
        height: height of the image in pixels.
        camera: entries of MuJoCo's free camera to change: ``distance``, ``azimuth``, ``elevation``,
            ``lookat`` (x, y, z).
        reward_type: ``"sparse"`` or ``"dense"``.

    Raises:
        ValueError: an unknown task, reward type or camera entry.
        gymnasium.error.DependencyNotInstalled: gymnasium-robotics or a fitting MuJoCo is missing.
    """

    def __init__(
        self,
        task: str,
        render_mode: str | None = None,
        *,
        width: int = 480,
        height: int = 480,
        camera: Mapping[str, float | Sequence[float]] | None = None,
        reward_type: str = "sparse",
    ) -> None:
        if task not in TASKS:
            raise ValueError(f"unknown Fetch task {task!r}; expected one of {sorted(TASKS)}")
        if reward_type not in ("sparse", "dense"):
            raise ValueError(f'reward_type must be "sparse" or "dense", not {reward_type!r}')
        unknown = set(camera or {}) - set(CAMERA)
        if unknown:
            raise ValueError(f"unknown camera entries {sorted(unknown)}; known: {sorted(CAMERA)}")
        import_robotics(fetch=True)
        spec = TASKS[task]
        settings = {**CAMERA, **(camera or {})}
        settings["lookat"] = np.asarray(settings["lookat"], dtype=np.float64)
        simulator = gym.make(
            spec.simulator_id,
            max_episode_steps=-1,
            disable_env_checker=True,
            width=width,
            height=height,
            reward_type=reward_type,
            default_camera_config=settings,
        ).unwrapped
        spaces = simulator.observation_space
        assert isinstance(spaces, gym.spaces.Dict)
        dim = sum(int(np.prod(space.shape or ())) for space in spaces.values())
        super().__init__(simulator, dim, render_mode)
        self._expert = spec.expert()
        self._raw: Mapping[str, NDArray[np.float64]] = {}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        """Start an episode, and the expert's memory with it; see `FlatEnv.reset`."""
        self._expert = type(self._expert)()
        result = super().reset(seed=seed, options=options)
        if self.render_mode == "human":
            self.render()
        return result

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, Info]:
        """Advance one control step of 0.04 s; see `FlatEnv.step`."""
        result = super().step(action)
        if self.render_mode == "human":
            self.render()
        return result

    def render(self) -> Any:
        """Draw the scene, and leave the simulation as it was; see `FlatEnv.render`."""
        if self.render_mode is None:
            return super().render()
        simulator: Any = self.simulator
        place_goal(simulator)  # not the simulator's own `render`, which would change its course
        return simulator.mujoco_renderer.render(self.render_mode)

    @property
    def expert_noise_mask(self) -> NDArray[np.bool_]:
        """Action dimensions [4] a collector may perturb: the displacement, not the gripper."""
        return np.array([True, True, True, False])

    def expert_action(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """The scripted expert's action for the current state of the simulator.

        Args:
            rng: part of the convention for experts; these experts are deterministic.

        Returns:
            Action [4] in [-1, 1].
        """
        del rng
        return self._expert.action(self._raw).astype(np.float32)

    def _flatten(self, raw: Mapping[str, NDArray[np.float64]]) -> Observation:
        self._raw = raw
        goal = raw["desired_goal"]
        parts = (raw["observation"], goal, goal - raw["achieved_goal"])
        return np.concatenate(parts).astype(np.float32)

    def _success(self, info: Mapping[str, Any]) -> bool:
        if "is_success" in info:
            return bool(info["is_success"])
        simulator: Any = self.simulator  # a reset's info is empty
        distance = np.linalg.norm(self._raw["desired_goal"] - self._raw["achieved_goal"])
        return bool(distance < simulator.distance_threshold)


LICENCE = "simulator: MIT and Apache-2.0 (gymnasium-robotics, MuJoCo); expert: MIT (ours)"


def _recipe(env: str, about: str, minutes: float, megabytes: float) -> Recipe:
    return Recipe(
        env=f"diffpolicy_envs:diffpolicy/{env}-v0",
        episodes=200,
        noise=0.15,
        about=about,
        licence=LICENCE,
        extra="robotics",
        minutes=minutes,
        megabytes=megabytes,
    )


RECIPES = {
    "fetch/reach": _recipe("FetchReach", "the gripper goes to a point in the air", 0.5, 1.0),
    "fetch/push": _recipe("FetchPush", "a block is pushed to a place on the table", 0.5, 1.5),
    "fetch/pick-and-place": _recipe(
        "FetchPickAndPlace", "a block is lifted to a point, often in the air", 0.5, 1.6
    ),
}
