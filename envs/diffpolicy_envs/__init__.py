"""Environments for diffpolicy: flat float32 observations, and scripted experts where there are any.

Importing this package registers the ids below with Gymnasium; ``module:id`` does both at once::

    env = gymnasium.make("diffpolicy_envs:diffpolicy/FetchPickAndPlace-v0")

It needs gymnasium and numpy alone. A simulator that is missing is named, with the command that
installs it, when an environment that needs it is made.
"""

from __future__ import annotations

import gymnasium as gym

from diffpolicy_envs.pusht_features import observation_from_state

__all__ = ["ENV_IDS", "observation_from_state"]

ENV_IDS = (
    "diffpolicy/FetchPickAndPlace-v0",
    "diffpolicy/FetchPush-v0",
    "diffpolicy/FetchReach-v0",
    "diffpolicy/FetchReachMoving-v0",
    "diffpolicy/PointMazeLarge-v0",
    "diffpolicy/PointMazeMedium-v0",
    "diffpolicy/PointMazeUMaze-v0",
    "diffpolicy/PushT-v0",
    "diffpolicy/PushTDisturbed-v0",
)
"""The ids this package registers."""


def _register() -> None:
    """Register every id once; importing the package again in the same process changes nothing."""
    fetch = "diffpolicy_envs.fetch:FetchEnv"
    maze = "diffpolicy_envs.pointmaze:PointMazeEnv"
    entries: tuple[tuple[str, str, int, dict[str, object]], ...] = (
        ("FetchPickAndPlace", fetch, 50, {"task": "pick_and_place"}),
        ("FetchPush", fetch, 50, {"task": "push"}),
        ("FetchReach", fetch, 50, {"task": "reach"}),
        ("FetchReachMoving", "diffpolicy_envs.fetch_moving:FetchReachMovingEnv", 100, {}),
        ("PointMazeLarge", maze, 800, {"simulator_id": "PointMaze_Large-v3"}),
        ("PointMazeMedium", maze, 600, {"simulator_id": "PointMaze_Medium-v3"}),
        ("PointMazeUMaze", maze, 300, {"simulator_id": "PointMaze_UMaze-v3"}),
        ("PushT", "diffpolicy_envs.pusht:PushTEnv", 300, {}),
        ("PushTDisturbed", "diffpolicy_envs.pusht_disturbed:PushTDisturbedEnv", 300, {}),
    )
    for name, entry_point, steps, kwargs in entries:
        env_id = f"diffpolicy/{name}-v0"
        if env_id not in gym.registry:
            gym.register(env_id, entry_point, max_episode_steps=steps, kwargs=kwargs)


_register()
