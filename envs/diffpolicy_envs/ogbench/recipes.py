"""OGBench's manipulation data sets, as long as the published ones, and rewards for each task."""

from __future__ import annotations

from diffpolicy_envs.ogbench.collecting import STEPS, STYLES
from diffpolicy_envs.ogbench.simulator import NAMES, family
from diffpolicy_envs.ogbench.tasks import TASKS
from diffpolicy_envs.recipes import Recipe

EPISODES = {"cube-triple": 3000, "cube-quadruple": 5000, "puzzle-4x5": 3000, "puzzle-4x6": 5000}
"""Episodes of the published training sets that are not of 1,000."""
SPARSE = ("scene", "puzzle-3x3")
"""Environments whose tasks Q-chunking (Li et al. 2025) rewards sparsely."""
# The published validation sets are a tenth as long and of other episodes.
_VALIDATION_FROM = 50_000
_LICENCE = "MIT (ogbench); BSD-3-Clause and BSD-2-Clause (models of the arm and the gripper)"
# Of a million steps: CPU minutes on a core that does nothing else, megabytes, and megabytes without
# the simulator's states. Estimated, from the simulators' rates and the sizes of what is stored.
_COSTS = {
    "cube-single": (33, 250, 110),
    "cube-double": (35, 325, 145),
    "cube-triple": (38, 400, 175),
    "cube-quadruple": (42, 475, 205),
    "scene": (40, 335, 160),
    "puzzle-3x3": (37, 360, 205),
    "puzzle-4x4": (54, 505, 300),
    "puzzle-4x5": (65, 585, 355),
    "puzzle-4x6": (75, 665, 410),
}
_ENV = "diffpolicy_envs:diffpolicy/OGBench-v0"
_COLLECT = "diffpolicy_envs:diffpolicy/OGBenchCollect-v0"


def _recorded(name: str, style: str, *, validation: bool) -> Recipe:
    episodes = EPISODES.get(name, 1000) // (10 if validation else 1)
    buttons = () if family(name) == "cube" else ("button_states",)
    how = {"play": "open-loop plans", "noisy": "closed loop, noisy and at times random"}[style]
    minutes, megabytes, _ = _COSTS[name]
    steps = episodes * STEPS / 1e6
    return Recipe(
        env=_COLLECT,
        kwargs={"name": name, "style": style},
        episodes=episodes,
        seeds_from=_VALIDATION_FROM if validation else 0,
        about=f"OGBench {name}: random tasks, {how}; {'validation' if validation else 'training'}",
        licence=_LICENCE,
        extra="ogbench",
        minutes=round(minutes * steps),
        megabytes=round(megabytes * steps),
        fields=("qpos", "qvel", *buttons),
    )


def _rewarded(name: str, task: int, *, sparse: bool) -> Recipe:
    steps = EPISODES.get(name, 1000) * STEPS / 1e6
    kind = "-1 until it is done" if sparse else "minus the objects that are wrong"
    return Recipe(
        env=_ENV,
        kwargs={"name": name, "task": task, **({"sparse": True} if sparse else {})},
        episodes=EPISODES.get(name, 1000),
        about=f"OGBench {name}, play, rewarded for task {task}: {kind}",
        licence=_LICENCE,
        extra="ogbench",
        minutes=max(1, round(steps)),
        megabytes=round(_COSTS[name][2] * steps),
        derived=f"ogbench/{name}-play",
        relabel="diffpolicy_envs.ogbench:relabel",
    )


RECIPES: dict[str, Recipe] = {
    **{
        f"ogbench/{name}-{style}{'-val' if validation else ''}": _recorded(
            name, style, validation=validation
        )
        for name in NAMES
        for style in STYLES
        for validation in (False, True)
    },
    **{
        f"ogbench/{name}-play-task{task}{'-sparse' if sparse else ''}": _rewarded(
            name, task, sparse=sparse
        )
        for name in NAMES
        for task in TASKS
        for sparse in ((False, True) if name in SPARSE else (False,))
    },
}
"""``ogbench/NAME-play`` and ``-noisy``, each with ``-val``; ``ogbench/NAME-play-taskN``, some of
them with ``-sparse``."""
