"""The U-shaped point maze of gymnasium-robotics with a flat observation and a scripted expert."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from diffpolicy_envs.base import FlatEnv, Observation
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

    Raises:
        gymnasium.error.DependencyNotInstalled: gymnasium-robotics or MuJoCo is missing.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        **FlatEnv.metadata,
        "render_fps": 100,
    }
    KP, KD = 10.0, 1.0
    """Gains of the expert's controller, in force per metre and per m/s."""

    def __init__(
        self,
        simulator_id: str = "PointMaze_UMaze-v3",
        render_mode: str | None = None,
        *,
        width: int = 480,
        height: int = 480,
        stop_at_goal: bool = True,
    ) -> None:
        import_robotics(fetch=False)
        simulator: Any = gym.make(
            simulator_id,
            max_episode_steps=-1,
            disable_env_checker=True,
            render_mode=render_mode,
            width=width,
            height=height,
            continuing_task=not stop_at_goal,
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
        force = self.KP * (target - position) - self.KD * velocity
        return np.clip(force, -1.0, 1.0).astype(np.float32)

    def _cell(self, position: NDArray[np.float64]) -> Cell:
        row, column = self._maze.cell_xy_to_rowcol(position)
        return int(row), int(column)

    def _flatten(self, raw: Mapping[str, NDArray[np.float64]]) -> Observation:
        self._raw = raw
        return np.concatenate([raw["observation"], raw["desired_goal"]]).astype(np.float32)

    def _success(self, info: Mapping[str, Any]) -> bool:
        return bool(info["success"])
