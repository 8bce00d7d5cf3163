"""Environments for diffpolicy: flat float32 observations, scripted experts, sequences to design.

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
    "diffpolicy/Agent-v0",
    "diffpolicy/AntMazeLarge-v0",
    "diffpolicy/AntMazeMedium-v0",
    "diffpolicy/AntMazeUMaze-v0",
    "diffpolicy/Cameras-v0",
    "diffpolicy/FetchPickAndPlace-v0",
    "diffpolicy/FetchPush-v0",
    "diffpolicy/FetchReach-v0",
    "diffpolicy/FetchReachMoving-v0",
    "diffpolicy/GB1-v0",
    "diffpolicy/KitchenBurner-v0",
    "diffpolicy/KitchenSlider-v0",
    "diffpolicy/LacPromoter-v0",
    "diffpolicy/PointMazeLarge-v0",
    "diffpolicy/PointMazeMedium-v0",
    "diffpolicy/PointMazeUMaze-v0",
    "diffpolicy/PushT-v0",
    "diffpolicy/PushTDisturbed-v0",
    "diffpolicy/PushTImage-v0",
    "diffpolicy/RNAFolding-v0",
    "diffpolicy/SpliceSite-v0",
    "diffpolicy/TFBind8-v0",
    "diffpolicy/MetaWorld-v0",
    "diffpolicy/OCBench-v0",
    "diffpolicy/OGBench-v0",
    "diffpolicy/OGBenchCollect-v0",
    "diffpolicy/OGBenchGoals-v0",
)
"""The ids this package registers."""


def _register() -> None:
    """Register every id once; importing the package again in the same process changes nothing."""
    agent = "diffpolicy_envs.agents:AgentEnv"
    fetch = "diffpolicy_envs.fetch:FetchEnv"
    moving = "diffpolicy_envs.fetch_moving:FetchReachMovingEnv"
    maze = "diffpolicy_envs.pointmaze:PointMazeEnv"
    ant, kitchen = (f"diffpolicy_envs.d4rl_tasks:{name}Env" for name in ("AntMaze", "Kitchen"))
    slider = ["microwave", "kettle", "light switch", "slide cabinet"]  # complete and partial
    burner = ["microwave", "kettle", "bottom burner", "light switch"]  # mixed
    ocbench = "diffpolicy_envs.ocbench:OCBenchEnv"
    design = "diffpolicy_envs.sequences.env:SequenceDesignEnv"  # ends by itself after one step
    metaworld = "diffpolicy_envs.metaworld:MetaWorldEnv"
    ogbench = "diffpolicy_envs.ogbench"  # ends by itself after the benchmark's number of steps
    goals, single = (f"{ogbench}.tasks:OGBench{name}Env" for name in ("Goals", ""))
    recorded = f"{ogbench}.collecting:OGBenchCollectEnv"
    entries: tuple[tuple[str, str | None, int | None, dict[str, object]], ...] = (
        ("Cameras", None, None, {}),  # in an environment of another package, which knows its limit
        ("Agent", agent, None, {}),  # likewise
        ("AntMazeLarge", ant, 1000, {"simulator_id": "AntMaze_Large-v4", "goal_cell": [7, 10]}),
        ("AntMazeMedium", ant, 1000, {"simulator_id": "AntMaze_Medium-v4", "goal_cell": [6, 6]}),
        ("AntMazeUMaze", ant, 700, {"simulator_id": "AntMaze_UMaze-v4", "goal_cell": [3, 1]}),
        ("KitchenBurner", kitchen, 280, {"tasks": burner}),
        ("KitchenSlider", kitchen, 280, {"tasks": slider}),
        ("FetchPickAndPlace", fetch, 50, {"task": "pick_and_place"}),
        ("FetchPush", fetch, 50, {"task": "push"}),
        ("FetchReach", fetch, 50, {"task": "reach"}),
        ("FetchReachMoving", moving, 100, {}),
        ("PointMazeLarge", maze, 800, {"simulator_id": "PointMaze_Large-v3"}),
        ("PointMazeMedium", maze, 600, {"simulator_id": "PointMaze_Medium-v3"}),
        ("PointMazeUMaze", maze, 300, {"simulator_id": "PointMaze_UMaze-v3"}),
        ("PushT", "diffpolicy_envs.pusht:PushTEnv", 300, {}),
        ("PushTDisturbed", "diffpolicy_envs.pusht_disturbed:PushTDisturbedEnv", 300, {}),
        ("PushTImage", "diffpolicy_envs.pusht:PushTImageEnv", 300, {}),
        ("GB1", design, None, {"task": "gb1"}),
        ("LacPromoter", design, None, {"task": "lac_promoter"}),
        ("RNAFolding", design, None, {"task": "rna_folding"}),
        ("SpliceSite", design, None, {"task": "splice_site"}),
        ("TFBind8", design, None, {"task": "tfbind8"}),
        ("MetaWorld", metaworld, 500, {}),
        ("OCBench", ocbench, None, {}),  # its limit is the task's
        ("OGBench", single, None, {}),
        ("OGBenchCollect", recorded, None, {}),
        ("OGBenchGoals", goals, None, {}),
    )
    seen = {None, fetch, moving, maze, ant, kitchen, metaworld, ocbench, single, recorded, goals}
    for name, entry_point, steps, kwargs in entries:
        env_id = f"diffpolicy/{name}-v0"
        if entry_point in seen:  # by cameras, if wanted
            kwargs = {"home": entry_point, **kwargs}
            entry_point = "diffpolicy_envs.cameras:make"
        if env_id not in gym.registry:
            gym.register(env_id, entry_point, max_episode_steps=steps, kwargs=kwargs)


_register()
