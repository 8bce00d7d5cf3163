"""What this package declares to diffpolicy, which reads it through the entry point of its kind.

Another package declares its own in the same way, by a module with ``RECIPES`` and ``HOMES`` and a
line in its pyproject.toml::

    [project.entry-points."diffpolicy.envs"]
    my_robot = "my_robot.declared"

No simulator is imported here.
"""

from __future__ import annotations

from diffpolicy_envs import (
    agents,
    fetch,
    fetch_moving,
    metaworld,
    ocbench,
    ogbench,
    pointmaze,
    pusht,
    pusht_disturbed,
)
from diffpolicy_envs.recipes import Recipe

# A new family is one line: its module has RECIPES, by names such as "family/task".
FAMILIES = (
    agents,
    fetch,
    fetch_moving,
    metaworld,
    pointmaze,
    pusht,
    pusht_disturbed,
    ocbench,
    ogbench,
)

RECIPES: dict[str, Recipe] = {
    name: recipe for family in FAMILIES for name, recipe in family.RECIPES.items()
}
"""Data sets that can be made from nothing, by name."""

HOMES: dict[str, str] = {
    "diffpolicy_envs": "",
    "gymnasium_robotics": "robotics",
    "gym_pusht": "pusht",
    "gym_aloha": "",
    "gym_xarm": "",
    "mujoco": "mujoco",
    "pymunk": "pusht",
    "seqfold": "rna",
    "metaworld": "metaworld",
    "ogbench": "ogbench",
    "ocbench": "ocbench",
}
"""Modules that environments live in or stand on, and the extra that installs each (empty: none).

Files may name environments of these packages.
"""
