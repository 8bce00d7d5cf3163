"""Environments that match D4RL's datasets, and scores that say what they are scores of.

D4RL's own environments need a simulator that no longer installs. Gymnasium's version 4 of the
MuJoCo locomotion tasks keeps the dynamics and rewards of the version 2 in which the data were
recorded; version 5 does not. Where no maintained simulator does the same, the label says "not
comparable" and why.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from diffpolicy.data.d4rl.catalogue import SOURCE, DatasetInfo, lookup, normalized_score
from diffpolicy.rollout.env_spec import EnvSpec, installed_versions
from diffpolicy.rollout.intervals import mean_interval

_LOCOMOTION = {"hopper": "Hopper-v4", "halfcheetah": "HalfCheetah-v4", "walker2d": "Walker2d-v4"}
_ADROIT = {
    "pen": "AdroitHandPen",
    "door": "AdroitHandDoor",
    "hammer": "AdroitHandHammer",
    "relocate": "AdroitHandRelocate",
}
_MAZES = {"umaze": "UMaze", "medium": "Medium", "large": "Large"}
_ROBOTS = {
    ("antmaze", "umaze"): ("AntMazeUMaze", 700),
    ("antmaze", "medium"): ("AntMazeMedium", 1000),
    ("antmaze", "large"): ("AntMazeLarge", 1000),
    ("kitchen", "complete"): ("KitchenSlider", 280),
    ("kitchen", "partial"): ("KitchenSlider", 280),
    ("kitchen", "mixed"): ("KitchenBurner", 280),
}
_ROBOT_NOTE = "gymnasium-robotics' simulator, whose dynamics and noise are not D4RL's"
_ANT_FORCES = range(27, 111)
_GONE = {
    "bullet": "PyBullet's environments, which are no longer maintained",
    "carla": "the CARLA driving simulator with D4RL's own server and routes",
    "flow": "the Flow traffic environments on SUMO, which are no longer maintained",
    "minigrid": "D4RL's own gridworld; its actions are discrete, diffpolicy's are continuous",
}
_ROBOTICS_FIXED = (1, 4, 3)
_ROBOTICS = "gymnasium-robotics"
_PACKAGES = ("diffpolicy", "numpy", "gymnasium", "mujoco", _ROBOTICS)


class NoEnvironmentError(ValueError):
    """No maintained simulator with a flat observation matches a dataset."""


@dataclass(frozen=True)
class D4RLEnvironment:
    """An environment to evaluate in.

    Attributes:
        env: the environment.
        comparable: whether its scores may stand beside D4RL's published ones.
        note: what differs, or what makes them alike.
    """

    env: EnvSpec
    comparable: bool
    note: str


def evaluation_env(dataset: str, *, constant_columns: Sequence[int] = ()) -> D4RLEnvironment:
    """The environment that matches a dataset.

    Args:
        dataset: id of a D4RL dataset.
        constant_columns: entries of the observation that never change in the data; stores made of
            D4RL files hold them as ``constant_obs_columns``. The ant's contact forces are all zero
            in data recorded with some simulator versions; the environment then observes zero too,
            and pays nothing for contacts, as it was when the data were recorded.

    Returns:
        The environment, and whether its scores compare.

    Raises:
        ValueError: D4RL has no such dataset.
        NoEnvironmentError: nothing matches; the message says why.
    """
    info = lookup(dataset)
    agent = info.id.split("-")[0]
    if agent in _LOCOMOTION:
        note = "version 4 keeps the dynamics and rewards of the version 2 that recorded the data"
        return D4RLEnvironment(EnvSpec(_LOCOMOTION[agent]), True, note)
    if agent == "ant":
        return _ant(set(_ANT_FORCES) <= set(constant_columns))
    if agent in _ADROIT:
        return _adroit(agent, info)
    if agent == "maze2d":
        return _maze2d(info)
    if agent in _GONE:
        raise NoEnvironmentError(
            f"{dataset!r} was recorded in {_GONE[agent]}. Train on its data, but evaluate "
            "elsewhere: no maintained simulator matches it"
        )
    name, steps = _ROBOTS[agent, info.id.split("-")[1]]
    note = f"{_ROBOT_NOTE}; D4RL's flat observation, and its start and goal or tasks"
    env = EnvSpec(f"diffpolicy_envs:diffpolicy/{name}-v0", {}, steps)
    return D4RLEnvironment(env, False, note)


def _ant(silent: bool) -> D4RLEnvironment:
    kwargs: dict[str, Any] = {"use_contact_forces": True}
    note = "version 4 with contact forces has the data's 111 entries"
    if silent:
        kwargs["contact_force_range"] = [0.0, 0.0]
        note += "; the forces (entries 27..110) are zero, as in the data"
    return D4RLEnvironment(EnvSpec("Ant-v4", kwargs), True, note)


def _adroit(agent: str, info: DatasetInfo) -> D4RLEnvironment:
    numbers = re.findall(r"\d+", installed_versions([_ROBOTICS]).get(_ROBOTICS, ""))
    fixed = tuple(int(n) for n in numbers[:3]) >= _ROBOTICS_FIXED
    version = "v2" if fixed else "v1"
    env = EnvSpec(f"gymnasium_robotics:{_ADROIT[agent]}-{version}", {}, info.max_episode_steps)
    if agent == "pen":
        note = (
            "D4RL ends an episode when the pen is dropped, gymnasium-robotics goes on to the limit "
            "of 100 steps: returns of policies that drop it are lower here"
        )
        return D4RLEnvironment(env, False, note)
    if not fixed:
        note = (
            "gymnasium-robotics 1.2.1 to 1.4.2 reward the hand's distance (+0.1 d) where D4RL "
            "punishes it (-0.1 d); 1.4.3 and its version 2 do as D4RL"
        )
        return D4RLEnvironment(env, False, note)
    return D4RLEnvironment(env, True, "reward and step limit are D4RL's")


def _maze2d(info: DatasetInfo) -> D4RLEnvironment:
    match = re.fullmatch(r"maze2d-(umaze|medium|large)(-dense)?-v\d", info.id)
    if match is None:
        raise NoEnvironmentError(
            f"{info.id!r} has no environment here: its maze is D4RL's own. There are mazes for "
            "maze2d-umaze, -medium and -large"
        )
    name = _MAZES[match[1]]
    kwargs: dict[str, Any] = {"stop_at_goal": False}
    if match[2]:
        kwargs["simulator_id"] = f"PointMaze_{name}Dense-v3"
    env = EnvSpec(f"diffpolicy_envs:diffpolicy/PointMaze{name}-v0", kwargs, info.max_episode_steps)
    note = (
        "other dynamics and goals than D4RL's; it observes [x, y, vx, vy, goal x, goal y], as data "
        "read with the transform split_goals do"
    )
    return D4RLEnvironment(env, False, note)


def score(
    dataset: str,
    returns: ArrayLike,
    *,
    environment: EnvSpec | None = None,
    transforms: Sequence[str] = (),
    versions: Mapping[str, str] | None = None,
    constant_columns: Sequence[int] = (),
    doubts: Sequence[str] = (),
) -> dict[str, Any]:
    """Normalised scores of evaluation episodes, with everything they depend on.

    Args:
        dataset: id of the dataset that was trained on.
        returns: ``[n]`` undiscounted returns of whole episodes, as the environment rewards.
        environment: where they were measured; default `evaluation_env(dataset)`. Another than that
            one is labelled not comparable.
        transforms: transforms of the training data.
        constant_columns: see `evaluation_env`, which is asked for the matching environment.
        doubts: what speaks against the training data being all of the dataset, such as
            `diffpolicy.data.d4rl.catalogue.doubts` finds; with one the label is not comparable.
        versions: of the packages that the environment loaded; default those installed.

    Returns:
        JSON values: ``score`` and ``return``, each a 95 % Student's t interval of the mean over the
        episodes (`Interval.to_dict`); ``scores`` of every episode; and ``label``, what they are
        scores of: ``dataset``, its ``transforms``, ``env``, ``versions``, ``references`` (returns
        that are scored 0 and 100), whether it is ``comparable`` with D4RL's published scores, and a
        ``note`` of what differs or makes them alike.

    Raises:
        ValueError: no such dataset, no reference returns for it, no episodes, or a return that is
            not finite.
        NoEnvironmentError: no ``environment`` was given and none matches.
    """
    sample = np.asarray(returns, np.float64)
    if sample.ndim != 1 or not len(sample) or not np.isfinite(sample).all():
        raise ValueError(f"returns must be finite numbers [n], one an episode; got {returns!r}")
    scores = normalized_score(dataset, sample)
    info = lookup(dataset)
    matched = _matched(dataset, environment, constant_columns)
    label = {
        "dataset": info.id,
        "transforms": list(transforms),
        "env": matched.env.to_dict(),
        "versions": installed_versions(_PACKAGES) if versions is None else dict(versions),
        "references": {"min": info.ref_min, "max": info.ref_max, "source": SOURCE},
        "comparable": matched.comparable and not doubts,
        "note": "; ".join([matched.note, *doubts]),
    }
    return {
        "score": mean_interval(scores).to_dict(),
        "return": mean_interval(sample).to_dict(),
        "scores": scores.tolist(),
        "label": label,
    }


def _matched(
    dataset: str, environment: EnvSpec | None, constant_columns: Sequence[int]
) -> D4RLEnvironment:
    try:
        match = evaluation_env(dataset, constant_columns=constant_columns)
    except NoEnvironmentError:
        if environment is None:
            raise
    else:
        if environment in (None, match.env):
            return match
    assert environment is not None
    return D4RLEnvironment(environment, False, "this environment is not the one of the dataset")
