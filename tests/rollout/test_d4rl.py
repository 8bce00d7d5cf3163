"""Environments that match D4RL's datasets, and labels of scores."""

import importlib.metadata
import json

import numpy as np
import pytest

from diffpolicy.data.d4rl.catalogue import DATASETS
from diffpolicy.rollout.d4rl import D4RLEnvironment, NoEnvironmentError, evaluation_env, score
from diffpolicy.rollout.env_spec import EnvSpec


@pytest.mark.parametrize(
    ("dataset", "env", "comparable"),
    [
        ("hopper-medium-v2", EnvSpec("Hopper-v4"), True),
        ("halfcheetah-random-v0", EnvSpec("HalfCheetah-v4"), True),
        ("walker2d-full-replay-v1", EnvSpec("Walker2d-v4"), True),
        ("ant-expert-v2", EnvSpec("Ant-v4", {"use_contact_forces": True}), True),
        (
            "maze2d-medium-v1",
            EnvSpec("diffpolicy_envs:diffpolicy/PointMazeMedium-v0", {"stop_at_goal": False}, 600),
            False,
        ),
        (
            "maze2d-umaze-dense-v1",
            EnvSpec(
                "diffpolicy_envs:diffpolicy/PointMazeUMaze-v0",
                {"stop_at_goal": False, "simulator_id": "PointMaze_UMazeDense-v3"},
                300,
            ),
            False,
        ),
    ],
)
def test_environments(dataset, env, comparable):
    found = evaluation_env(dataset)
    assert found.env == env
    assert found.comparable is comparable
    assert found.note


def test_contact_forces_that_were_zero_in_the_data_stay_zero():
    kwargs = {"use_contact_forces": True, "contact_force_range": [0.0, 0.0]}
    assert evaluation_env("ant-medium-v2", constant_columns=range(27, 111)).env.kwargs == kwargs
    partly = evaluation_env("ant-medium-v2", constant_columns=range(27, 110))
    assert partly.env.kwargs == {"use_contact_forces": True}


@pytest.mark.parametrize(
    ("version", "suffix", "door"),
    [("1.4.2", "v1", False), ("1.4.3", "v2", True), ("2.0", "v2", True)],
)
def test_adroit_depends_on_the_rewards_of_gymnasium_robotics(monkeypatch, version, suffix, door):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    found = evaluation_env("door-human-v1")
    assert found.env == EnvSpec(f"gymnasium_robotics:AdroitHandDoor-{suffix}", {}, 200)
    assert found.comparable is door
    pen = evaluation_env("pen-cloned-v0")
    assert pen.env == EnvSpec(f"gymnasium_robotics:AdroitHandPen-{suffix}", {}, 100)
    assert not pen.comparable
    assert "dropped" in pen.note


def test_every_dataset_has_an_environment_or_a_reason():
    reasons = {}
    for name in DATASETS:
        try:
            assert isinstance(evaluation_env(name), D4RLEnvironment)
        except NoEnvironmentError as error:
            reasons[name.split("-")[0]] = str(error)
    assert set(reasons) == {"bullet", "carla", "flow", "minigrid", "maze2d"}
    assert "no maintained simulator" in reasons["bullet"]
    with pytest.raises(ValueError, match="did you mean"):
        evaluation_env("hoper-medium-v2")


def test_scores_carry_what_they_are_scores_of():
    low, high = -20.272305, 3234.3
    result = score(
        "hopper-medium-v2",
        [low, high],
        environment=EnvSpec("Hopper-v4"),
        transforms=["normalize_reward"],
        versions={"gymnasium": "1.2.3"},
    )
    assert result["scores"] == [0.0, 100.0]
    assert result["score"]["value"] == 50.0
    assert result["return"]["value"] == pytest.approx((low + high) / 2)
    assert result["label"] == {
        "dataset": "hopper-medium-v2",
        "transforms": ["normalize_reward"],
        "env": {"id": "Hopper-v4", "kwargs": {}, "max_episode_steps": None},
        "versions": {"gymnasium": "1.2.3"},
        "references": {"min": low, "max": high, "source": "D4RL d4rl/infos.py"},
        "comparable": True,
        "note": "version 4 keeps the dynamics and rewards of the version 2 that recorded the data",
    }
    assert json.loads(json.dumps(result)) == result


def test_other_environments_do_not_compare():
    other = score("hopper-medium-v2", [1.0, 2.0], environment=EnvSpec("Hopper-v5"))["label"]
    assert not other["comparable"]
    assert "not the one of the dataset" in other["note"]
    silent = evaluation_env("ant-medium-v2", constant_columns=range(27, 111))
    forces = {"constant_columns": range(27, 111)}
    labels = [
        score("ant-medium-v2", [1.0], environment=silent.env, **columns)["label"]["comparable"]
        for columns in ({}, forces)
    ]
    assert labels == [False, True]  # the right one for data without forces, and for no others
    kitchen = score("kitchen-mixed-v0", [4.0], environment=EnvSpec("mine:Kitchen-v0"))
    assert kitchen["scores"] == [100.0]
    assert not kitchen["label"]["comparable"]
    assert "gymnasium" in score("hopper-medium-v2", np.zeros(3))["label"]["versions"]


def test_bad_returns():
    for returns in ([], [[1.0]], [np.nan]):
        with pytest.raises(ValueError, match="returns must be finite numbers"):
            score("hopper-medium-v2", returns)
    with pytest.raises(ValueError, match="no reference returns"):
        score("ant-random-expert-v0", [1.0])
    with pytest.raises(NoEnvironmentError):
        score("flow-ring-random-v0", [1.0])


@pytest.mark.mujoco
@pytest.mark.parametrize(
    ("dataset", "shape"),
    [("hopper-medium-v2", (11, 3)), ("halfcheetah-medium-v2", (17, 6)),
     ("walker2d-medium-v2", (17, 6)), ("ant-medium-v2", (111, 8))],
)  # fmt: skip
def test_locomotion_has_the_shapes_of_the_data(dataset, shape):
    pytest.importorskip("mujoco", exc_type=ImportError)
    env = evaluation_env(dataset, constant_columns=range(27, 111)).env.make()
    assert (*env.observation_space.shape, *env.action_space.shape) == shape
    if dataset.startswith("ant"):
        env.reset(seed=0)
        rows = np.stack([env.step(env.action_space.sample())[0] for _ in range(60)])
        assert not rows[:, 27:].any()
    env.close()
