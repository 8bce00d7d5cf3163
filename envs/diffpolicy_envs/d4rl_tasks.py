"""D4RL's kitchen and ant mazes with D4RL's flat observations, in gymnasium-robotics' simulators.

Dynamics, noise and resets are those of the simulators, so scores do not compare with D4RL's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from diffpolicy_envs.base import FlatEnv, Info, Observation
from diffpolicy_envs.simulators import import_robotics


class KitchenEnv(FlatEnv):
    """A Franka arm that moves four things in a kitchen, in any order.

    Observation (O = 60): positions of the arm [9] and of the objects [21], then the goal [30]: the
    wanted positions of the things to move at their places among the 30, 0 elsewhere. Action [9] in
    [-1, 1]: joint velocities. Reward 1 for each thing when it arrives; the episode terminates when
    all of them have.

    Args:
        tasks: what to move, such as ``"microwave"`` or ``"kettle"``.
        render_mode: None, ``"rgb_array"`` or ``"human"``.

    Raises:
        gymnasium.error.DependencyNotInstalled: gymnasium-robotics or MuJoCo is missing.
        ValueError: a task that the kitchen does not have.
    """

    def __init__(self, tasks: Sequence[str], render_mode: str | None = None) -> None:
        import_robotics(fetch=True)
        self._tasks = tuple(tasks)
        simulator = gym.make(
            "FrankaKitchen-v1",
            max_episode_steps=-1,
            disable_env_checker=True,
            render_mode=render_mode,
            tasks_to_complete=list(tasks),
        ).unwrapped
        super().__init__(simulator, 60, render_mode)

    def _flatten(self, raw: Mapping[str, Any]) -> Observation:
        # The simulator observes positions and velocities of the arm, then of the objects.
        arm, objects = raw["observation"][:9], raw["observation"][18:39]
        goal = np.zeros(30)
        for task, value in raw["desired_goal"].items():
            goal[_KITCHEN_ENTRIES[task]] = value
        return np.concatenate([arm, objects, goal]).astype(np.float32)

    def _success(self, info: Mapping[str, Any]) -> bool:
        return len(info.get("episode_task_completions", ())) == len(self._tasks)


_KITCHEN_ENTRIES: Mapping[str, list[int]] = {
    "bottom burner": [11, 12],
    "top burner": [15, 16],
    "light switch": [17, 18],
    "slide cabinet": [19],
    "hinge cabinet": [20, 21],
    "microwave": [22],
    "kettle": list(range(23, 30)),
}


class AntMazeEnv(FlatEnv):
    """A four-legged robot that walks from one corner of a maze to the other.

    Observation (O = 29): position in the maze [2], then height, orientation and joints [13], and
    velocities [14]. Action [8] in [-1, 1]: torques. Reward 1 within 0.5 m of the goal, where the
    episode terminates, else 0.

    Args:
        simulator_id: an ant maze of gymnasium-robotics, version 4.
        goal_cell: row and column of the goal; the robot starts in cell (1, 1).
        render_mode: None, ``"rgb_array"`` or ``"human"``.

    Raises:
        gymnasium.error.DependencyNotInstalled: gymnasium-robotics or MuJoCo is missing.
    """

    def __init__(
        self, simulator_id: str, goal_cell: Sequence[int], render_mode: str | None = None
    ) -> None:
        import_robotics(fetch=False)
        simulator: Any = gym.make(
            simulator_id,
            max_episode_steps=-1,
            disable_env_checker=True,
            render_mode=render_mode,
            continuing_task=False,
        ).unwrapped
        # The simulator writes its maze into the temporary folder and leaves the file there.
        Path(simulator.tmp_xml_file_path).unlink(missing_ok=True)
        self._options = {"reset_cell": np.array([1, 1]), "goal_cell": np.array(goal_cell)}
        super().__init__(simulator, 29, render_mode)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        """Start in the maze's first corner; see `gymnasium.Env.reset`."""
        return super().reset(seed=seed, options={**self._options, **(options or {})})

    def _flatten(self, raw: Mapping[str, NDArray[np.float64]]) -> Observation:
        return np.concatenate([raw["achieved_goal"], raw["observation"]]).astype(np.float32)

    def _success(self, info: Mapping[str, Any]) -> bool:
        return bool(info.get("success", False))
