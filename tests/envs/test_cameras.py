"""Cameras in MuJoCo: images beside the vector, which leave the simulation as it was."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest

pytest.importorskip("mujoco", exc_type=ImportError)
pytestmark = pytest.mark.mujoco

PUSH = "diffpolicy_envs:diffpolicy/FetchPush-v0"
REACH = "diffpolicy_envs:diffpolicy/FetchReach-v0"
ANY = "diffpolicy_envs:diffpolicy/Cameras-v0"


def made(name=PUSH, **kwargs):
    pytest.importorskip("gymnasium_robotics", exc_type=ImportError)
    try:
        return gym.make(name, disable_env_checker=True, **kwargs)
    except gym.error.Error as error:
        if "cameras need MuJoCo to draw" in str(error):
            pytest.skip(str(error))
        raise


def test_images_stand_beside_the_vector_and_leave_its_course_alone():
    views = {"front": 32, "top": {"size": [24, 40], "elevation": -85.0}}
    views["again"] = {"size": 32, "view": "front"}
    seeing, blind = made(cameras=views, entries=[0, 1, 2]), made()
    obs, _ = seeing.reset(seed=3)
    other, _ = blind.reset(seed=3)
    seen = []
    for _ in range(3):
        assert seeing.observation_space.contains(obs)
        assert obs["top"].shape == (24, 40, 3)
        assert np.array_equal(obs["again"], obs["front"])
        assert np.array_equal(obs["observation"], other[:3])
        seen.append(obs["front"])
        action = seeing.get_wrapper_attr("expert_action")(np.random.default_rng(0))
        obs, reward, *_ = seeing.step(action)
        other, expected, *_ = blind.step(action)
        assert reward == expected
    assert seen[0].std() > 10
    assert not np.array_equal(seen[0], seen[2])
    again, _ = seeing.reset(seed=3)
    assert np.array_equal(again["front"], seen[0])
    seeing.close()
    blind.close()


def test_the_environments_own_pictures_are_as_without_cameras():
    pictures = []
    for views in ({"front": 16}, None):
        env = made(REACH, cameras=views, render_mode="rgb_array", width=40, height=40)
        env.reset(seed=1)
        frames = []
        for _ in range(3):
            env.step(np.full(4, 0.5, np.float32))
            frames.append(env.render())
        pictures.append(np.stack(frames))
        env.close()
    assert pictures[0].std() > 10
    assert np.array_equal(*pictures)


def test_cameras_may_be_all_that_is_observed():
    env = made(REACH, cameras={"front": 8}, entries=[])
    obs, _ = env.reset(seed=0)
    assert list(obs) == list(env.observation_space.spaces) == ["front"]
    env.close()


def test_any_environment_with_mujoco_inside_may_have_cameras():
    env = made(ANY, env_id="Hopper-v5", cameras={"track": 16})
    obs, _ = env.reset(seed=0)
    assert obs["track"].shape == (16, 16, 3)
    assert obs["observation"].dtype == np.float64
    assert env.spec.max_episode_steps == 1000
    env.close()


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"cameras": {"observation": 8}}, "cannot be called"),
        ({"cameras": {"front": {"side": 8}}}, "takes a size and any of"),
        ({"cameras": {"front": [8, 0]}}, r"needs a size of pixels"),
        ({"cameras": {"front": {"size": 8, "view": "moon"}}}, "the model has .*head_camera_rgb"),
        ({"cameras": {"frnt": 8}}, r"got 'frnt'; did you mean 'front'\?"),
        ({"cameras": {"head_camera": 8}}, r"did you mean 'head_camera_rgb'\?"),
        (
            {"cameras": {"top": {"size": 8, "view": "front", "distance": 1}}},
            r"leave \['distance'\]",
        ),
        ({"cameras": 8}, r"sizes by name, .*got 8"),
        ({"cameras": ["front"]}, r"sizes by name, .*got \['front'\]"),
        ({"cameras": {"front": 8}, "entries": [99]}, "entries must be"),
        ({"cameras": {"front": 8}, "entries": [-1]}, "entries must be"),
        ({"entries": [1]}, "give cameras="),
    ],
)
def test_what_is_no_camera_is_refused(kwargs, said):
    with pytest.raises(ValueError, match=said):
        made(REACH, **kwargs)


def test_cameras_need_mujoco():
    with pytest.raises(ValueError, match="no MuJoCo inside"):
        gym.make(ANY, env_id="Pendulum-v1", cameras={"front": 8})
    with pytest.raises(ValueError, match="need an environment to be in"):
        gym.make(ANY)
