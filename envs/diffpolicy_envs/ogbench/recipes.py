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
# CPU minutes and megabytes of a million steps: measured on an idle core where in the first line.
_MINUTES = {"cube-single": 33, "cube-double": 35, "scene": 38, "puzzle-3x3": 36, "puzzle-4x4": 52}
_MINUTES |= {"cube-triple": 38, "cube-quadruple": 42, "puzzle-4x5": 60, "puzzle-4x6": 70}
_ENV = "diffpolicy_envs:diffpolicy/OGBench-v0"
_COLLECT = "diffpolicy_envs:diffpolicy/OGBenchCollect-v0"


def _recorded(name: str, style: str, *, validation: bool) -> Recipe:
    episodes = EPISODES.get(name, 1000) // (10 if validation else 1)
    buttons = () if family(name) == "cube" else ("button_states",)
    how = {"play": "open-loop plans", "noisy": "closed loop, noisy and at times random"}[style]
    steps = episodes * STEPS / 1e6
    return Recipe(
        env=_COLLECT,
        kwargs={"name": name, "style": style},
        episodes=episodes,
        seeds_from=_VALIDATION_FROM if validation else 0,
        about=f"OGBench {name}: random tasks, {how}; {'validation' if validation else 'training'}",
        licence=_LICENCE,
        extra="ogbench",
        minutes=max(1.0, round(_MINUTES[name] * steps, 1)),
        megabytes=round(_megabytes(name) * steps, 1),
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
        minutes=max(1.0, round(steps)),
        megabytes=round(_megabytes(name) * steps, 1),
        derived=f"ogbench/{name}-play",
        relabel="diffpolicy_envs.ogbench:relabel",
    )


def _megabytes(name: str) -> float:
    return 200.0


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
