"""Rewards of one task for recorded data that were made without any."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffpolicy_envs.ogbench.simulator import family, make_simulator
from diffpolicy_envs.ogbench.tasks import task_number

Arrays = Mapping[str, NDArray[Any]]
_OBJECTS = 14  # entries of qpos that are the arm's
_CUBE = 7  # entries of qpos that are one cube's: place [3] and quaternion [4]
_NEAR = 0.04  # metres from where it should be that an object may be


class Goal(NamedTuple):
    """Where a task wants the objects.

    Attributes:
        cubes: [N, 3] in metres, N may be 0.
        buttons: [M], M may be 0.
        slides: of drawer and window [2] in metres, or [0].
    """

    cubes: NDArray[np.float64]
    buttons: NDArray[np.int64]
    slides: NDArray[np.float64]


@cache
def goal_of(name: str, task: int) -> Goal:
    """The goal of a task, as the wheel lists it.

    Args:
        name: of the environment.
        task: 1 to 5, or 0: the default task.
    """
    number = task_number(name, task)
    simulator, _ = make_simulator(name)
    listed = simulator.task_infos[number - 1]
    none = np.zeros(0)
    if family(name) == "cube":
        return Goal(listed["goal_xyzs"], none.astype(np.int64), none)
    if family(name) == "puzzle":
        return Goal(np.zeros((0, 3)), listed["goal_button_states"], none)
    there = listed["goal"]
    slides = np.array([there["drawer_pos"], there["window_pos"]])
    return Goal(there["block_xyzs"], there["button_states"], slides)


def relabel(
    episode: Arrays, *, name: str, task: int = 0, sparse: bool = False
) -> dict[str, NDArray[Any]]:
    """What the steps of a recorded episode earn in one task.

    Reward, end and success are those of the state in which a step begins, as the benchmark
    relabels its data. An end inside of an episode cuts the stretch from which temporal-difference
    learning draws; what follows it is another one.

    Args:
        episode: ``info.qpos`` [T, Q] and, but for cubes, ``info.button_states`` [T, M].
        name: of the environment, such as ``"scene"``.
        task: 1 to 5, or 0: the environment's default task.
        sparse: -1 for every step at which the task is not done, in place of minus the number of
            objects that are not where they should be.

    Returns:
        ``reward`` [T] float32, ``terminated`` [T] bool and ``success`` [T] bool, the same.

    Raises:
        ValueError: an unknown name or task.

    Example:
        >>> relabel({"info.qpos": qpos, "info.button_states": buttons}, name="scene", task=1)
    """
    goal = goal_of(name, task)
    qpos = np.asarray(episode["info.qpos"])
    steps, cubes = len(qpos), len(goal.cubes)
    places = qpos[:, _OBJECTS : _OBJECTS + cubes * _CUBE].reshape(steps, cubes, _CUBE)[..., :3]
    done = [np.linalg.norm(goal.cubes - places, axis=-1) <= _NEAR]
    if len(goal.buttons):
        done.append(np.asarray(episode["info.button_states"]) == goal.buttons)
    if len(goal.slides):
        # Behind the cubes come the buttons, then drawer and window.
        first = _OBJECTS + cubes * _CUBE + len(goal.buttons)
        done.append(np.abs(qpos[:, first : first + 2] - goal.slides) <= _NEAR)
    reached = np.concatenate(done, axis=1)
    over: NDArray[np.bool_] = np.all(reached, axis=1)
    left = np.sum(~reached, axis=1)
    reward = np.where(over, 0, -1) if sparse else -left
    return {"reward": reward.astype(np.float32), "terminated": over, "success": over}
