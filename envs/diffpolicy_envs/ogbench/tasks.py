"""OGBench's evaluation: five tasks in each environment, with a reward or with a goal to look at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from diffpolicy_envs.base import Action, Info
from diffpolicy_envs.ogbench.simulator import ManipulationEnv, make_simulator

TASKS = (1, 2, 3, 4, 5)
DEFAULT_TASKS = {"puzzle-3x3": 4, "puzzle-4x4": 4}
"""The task that stands for an environment where only one is reported; elsewhere task 2."""
Timing = Literal["pre", "post"]


def task_number(name: str, task: int) -> int:
    """The number of a task, 1 to 5; 0 stands for the environment's default task.

    Raises:
        ValueError: there is no such task.
    """
    if task not in (0, *TASKS):
        raise ValueError(f"task must be 1 to 5, or 0 for the default task; got {task!r}")
    return task or DEFAULT_TASKS.get(name, 2)


class OGBenchEnv(ManipulationEnv):
    """One task of an OGBench environment, with the benchmark's reward (``...-singletask-taskN``).

    The reward is minus the number of objects that are not where they should be, so 0 where the
    task is done, and an episode ends there. Since ogbench 1.2.0 reward, success and end are those
    of the state *before* the action (``success_timing="pre"``): an episode goes on for one step
    after the task is done, and the last step is the one with reward 0. Older versions, and the
    curves published before, took the state after it (``"post"``).

    Published scores are success rates over 50 episodes of a task.

    Args:
        name: such as ``"cube-single"``, ``"scene"`` or ``"puzzle-3x3"``.
        task: 1 to 5, or 0: the environment's default task.
        sparse: a reward of -1 for every step at which the task is not done, as Q-chunking uses for
            ``scene`` and ``puzzle-3x3``.
        success_timing: ``"pre"`` or ``"post"``.
        render_mode: None or ``"rgb_array"``.

    Raises:
        ValueError: an unknown name, task or timing.
        gymnasium.error.DependencyNotInstalled: ogbench is missing.

    Example:
        >>> env = gym.make("diffpolicy_envs:diffpolicy/OGBench-v0", name="scene", task=1)
    """

    def __init__(
        self,
        name: str = "cube-single",
        task: int = 0,
        sparse: bool = False,
        success_timing: Timing = "pre",
        render_mode: str | None = None,
    ) -> None:
        if success_timing not in ("pre", "post"):
            raise ValueError(f'success_timing must be "pre" or "post", got {success_timing!r}')
        settings: dict[str, Any] = {"success_timing": success_timing}
        settings["reward_task_id"] = task_number(name, task)
        if not name.startswith("puzzle"):
            settings["permute_blocks"] = False  # which cube goes where is fixed
        self._sparse = sparse
        super().__init__(*make_simulator(name, **settings), render_mode)
        self._task = str(self.simulator.cur_task_info["task_name"])  # type: ignore[attr-defined]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, Info]:
        observation, info = super().reset(seed=seed, options=options)
        return observation, {"is_success": info["is_success"], "task": self._task}

    def step(self, action: Action) -> tuple[Any, float, bool, bool, Info]:
        observation, reward, terminated, truncated, info = super().step(action)
        if self._sparse:
            reward = 0.0 if reward == 0 else -1.0
        told = {"is_success": info["is_success"], "task": self._task}
        return observation, reward, terminated, truncated, told

    def _success(self, info: Mapping[str, Any]) -> bool:
        return bool(info.get("success", False))


class OGBenchGoalsEnv(ManipulationEnv):
    """The goal-conditioned evaluation of an OGBench environment: reach the state that is shown.

    Observation: a ``Dict`` of ``observation`` [O] and ``desired_goal`` [O], an observation of the
    state to reach. The reward is 1 where it is reached, and the episode ends there. Which of the
    five tasks an episode is follows from its seed: ``seed % 5 + 1``. ``info["task"]`` names it.

    Published scores are success rates over the five tasks, 50 episodes each (seeds ``n`` to
    ``n + 249``).

    Args:
        name: such as ``"cube-single"``, ``"scene"`` or ``"puzzle-3x3"``.
        task: 1 to 5: every episode is this task; None: the seed says which.
        flat: the observation is one vector [2 O], the state and behind it the goal.
        render_mode: None or ``"rgb_array"``.

    Raises:
        ValueError: an unknown name or task.
        gymnasium.error.DependencyNotInstalled: ogbench is missing.

    Example:
        >>> env = gym.make("diffpolicy_envs:diffpolicy/OGBenchGoals-v0", name="cube-double")
        >>> observation, info = env.reset(seed=3)
        >>> info["task"]
        'task4_swap'
    """

    def __init__(
        self,
        name: str = "cube-single",
        task: int | None = None,
        flat: bool = False,
        render_mode: str | None = None,
    ) -> None:
        self._fixed = None if task is None else task_number(name, task)
        super().__init__(*make_simulator(name), render_mode, first={"task_id": 1})
        one: gym.Space[Any] = self.observation_space
        self._flat, self._task = flat, ""
        self._goal: NDArray[np.float32] = np.zeros(one.shape or (), np.float32)
        both = {"observation": one, "desired_goal": one}
        space: gym.Space[Any] = gym.spaces.Dict(both)
        if flat:
            space = gym.spaces.Box(-np.inf, np.inf, (2 * len(self._goal),), np.float32)
        self.observation_space = space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, Info]:
        if seed is not None:
            task = seed % len(TASKS) + 1
        else:
            task = int(self.np_random.integers(len(TASKS))) + 1
        asked = {"task_id": self._fixed or task, **(options or {})}
        observation, info = super().reset(seed=seed, options=asked)
        self._goal = self._flatten(info["goal"])
        self._task = str(self.simulator.cur_task_info["task_name"])  # type: ignore[attr-defined]
        return self._seen(observation), self._told(info)

    def step(self, action: Action) -> tuple[Any, float, bool, bool, Info]:
        observation, reward, terminated, truncated, info = super().step(action)
        return self._seen(observation), reward, terminated, truncated, self._told(info)

    def _seen(self, observation: NDArray[np.float32]) -> Any:
        if self._flat:
            return np.concatenate([observation, self._goal])
        return {"observation": observation, "desired_goal": self._goal.copy()}

    def _told(self, info: Info) -> Info:
        return {"is_success": info["is_success"], "task": self._task}

    def _success(self, info: Mapping[str, Any]) -> bool:
        return bool(info.get("success", False))
