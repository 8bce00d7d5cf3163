"""The point mazes of gymnasium-robotics with a flat observation and a scripted expert."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from diffpolicy_envs.base import FlatEnv, Observation
from diffpolicy_envs.recipes import Recipe
from diffpolicy_envs.simulators import import_robotics

Cell = tuple[int, int]
WALL = 1


def shortest_path(maze: Sequence[Sequence[int | str]], start: Cell, goal: Cell) -> list[Cell]:
    """Breadth-first search over the free cells of a maze, in the four directions.

    Args:
        maze: rows of cells; 1 is a wall, anything else is free.
        start: (row, column) to start from.
        goal: (row, column) to reach.

    Returns:
        Cells from start to goal, both included.

    Raises:
        ValueError: no free path joins the two.
    """
    came_from: dict[Cell, Cell] = {start: start}
    queue = deque([start])
    while queue:
        cell = queue.popleft()
        if cell == goal:
            path = [cell]
            while path[-1] != start:
                path.append(came_from[path[-1]])
            return path[::-1]
        row, column = cell
        for near in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
            inside = 0 <= near[0] < len(maze) and 0 <= near[1] < len(maze[0])
            if inside and maze[near[0]][near[1]] != WALL and near not in came_from:
                came_from[near] = cell
                queue.append(near)
    raise ValueError(f"no free path from cell {start} to cell {goal}")


class PointMazeEnv(FlatEnv):
    """A ball driven by forces through a maze to within 0.45 m of the goal.

    Observation (O = 6): position [2] in metres, velocity [2] in m/s, goal [2] in metres. Action [2]
    in [-1, 1]: force along x and y. Reward 1 at the goal, else 0, and the episode terminates there.

    Args:
        simulator_id: a point maze of gymnasium-robotics.
        render_mode: None, ``"rgb_array"`` or ``"human"``.
        width: width of the image in pixels.
        height: height of the image in pixels.
        stop_at_goal: terminate when the goal is reached; otherwise go on until the time limit.
        new_goals: draw another goal whenever one is reached (with ``stop_at_goal=False``), as in
            D4RL's maze2d. The observation in which a goal is reached still shows that goal.
        controller: gains of the expert, any of ``kp`` (10, force per metre), ``kd`` (1, force per
            m/s) and ``speed`` (None, m/s): with a speed the pull ``kp * distance`` stops growing at
            ``kd * speed``, at which the ball travels with that speed.

    Raises:
        ValueError: ``new_goals`` without ``stop_at_goal=False``, or gains that are not positive.
        gymnasium.error.DependencyNotInstalled: gymnasium-robotics or MuJoCo is missing.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        **FlatEnv.metadata,
        "render_fps": 100,
    }
    CONTROLLER: ClassVar[dict[str, float | None]] = {"kp": 10.0, "kd": 1.0, "speed": None}
    """Gains of the expert, in force per metre and per m/s; the speed it keeps to, in m/s."""
    GOAL_ENTRIES: ClassVar[tuple[int, int]] = (4, 6)
    """First entry of the goal in the observation, and the one after its last."""

    def __init__(
        self,
        simulator_id: str = "PointMaze_UMaze-v3",
        render_mode: str | None = None,
        *,
        width: int = 480,
        height: int = 480,
        stop_at_goal: bool = True,
        new_goals: bool = False,
        controller: Mapping[str, float | None] | None = None,
    ) -> None:
        if new_goals and stop_at_goal:
            raise ValueError("new_goals=True needs stop_at_goal=False: the episode must go on")
        self.controller = _gains(self.CONTROLLER, controller or {})
        import_robotics(fetch=False)
        simulator: Any = gym.make(
            simulator_id,
            max_episode_steps=-1,
            disable_env_checker=True,
            render_mode=render_mode,
            width=width,
            height=height,
            continuing_task=not stop_at_goal,
            reset_target=new_goals,
        ).unwrapped
        # The simulator writes its maze into the temporary folder and leaves the file there.
        Path(simulator.tmp_xml_file_path).unlink(missing_ok=True)
        # From above: the simulator's own camera loses the ball behind the walls.
        camera = {"distance": 7.0, "elevation": -75.0}
        simulator.point_env.mujoco_renderer.default_cam_config = camera
        super().__init__(simulator, 6, render_mode)
        self._maze = simulator.maze
        self._raw: Mapping[str, NDArray[np.float64]] = {}

    def expert_action(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """The scripted expert's action: a PD controller on the next cell of the shortest path.

        Args:
            rng: part of the convention for experts; this expert is deterministic.

        Returns:
            Action [2] in [-1, 1].
        """
        del rng
        position, velocity = self._raw["observation"][:2], self._raw["observation"][2:]
        goal = self._raw["desired_goal"]
        path = shortest_path(self._maze.maze_map, self._cell(position), self._cell(goal))
        target = goal if len(path) <= 2 else self._maze.cell_rowcol_to_xy(np.array(path[1]))
        kp, kd, speed = (self.controller[name] for name in ("kp", "kd", "speed"))
        assert kp is not None
        assert kd is not None
        pull = kp * (target - position)
        if speed is not None:
            pull *= min(1.0, kd * speed / max(float(np.linalg.norm(pull)), 1e-9))
        return np.clip(pull - kd * velocity, -1.0, 1.0).astype(np.float32)

    def simulator_state(self) -> dict[str, NDArray[np.float64]]:
        """The simulator's state as D4RL stores it: ``qpos`` [2] in m, ``qvel`` [2] in m/s."""
        data = self.simulator.unwrapped.point_env.data  # type: ignore[attr-defined]
        return {"qpos": data.qpos.copy(), "qvel": data.qvel.copy()}

    def _cell(self, position: NDArray[np.float64]) -> Cell:
        row, column = self._maze.cell_xy_to_rowcol(position)
        return int(row), int(column)

    def _flatten(self, raw: Mapping[str, NDArray[np.float64]]) -> Observation:
        self._raw = raw
        return np.concatenate([raw["observation"], raw["desired_goal"]]).astype(np.float32)

    def _success(self, info: Mapping[str, Any]) -> bool:
        return bool(info["success"])


def _gains(
    defaults: Mapping[str, float | None], given: Mapping[str, float | None]
) -> dict[str, float | None]:
    gains = {**defaults, **given}
    if set(gains) != set(defaults):
        raise ValueError(f"controller takes {sorted(defaults)}, got {sorted(given)}")
    for name, value in gains.items():
        if (value is None and name != "speed") or (value is not None and not value > 0):
            raise ValueError(f"controller {name} must be a positive number, got {value!r}")
    return gains


RECIPES = {
    f"pointmaze/{name.lower()}": Recipe(
        env=f"diffpolicy_envs:diffpolicy/PointMaze{name}-v0",
        episodes=100,
        noise=0.1,
        about="a ball goes to a goal along the shortest path through the maze",
        licence="simulator: MIT and Apache-2.0 (gymnasium-robotics, MuJoCo); expert: MIT (ours)",
        extra="robotics",
        minutes=minutes,
        megabytes=megabytes,
    )
    for name, minutes, megabytes in (
        ("UMaze", 0.1, 0.6),
        ("Medium", 0.2, 0.7),
        ("Large", 0.2, 0.9),
    )
}
