from __future__ import annotations

import pickle
import sys

import numpy as np
import pytest

from diffpolicy.rollout.env_spec import EnvSpec, EnvSpecError, describe

POINT = "rollout_fake_envs:rollout_fakes/Point-v0"


def test_describe_says_what_a_policy_has_to_know():
    info = describe(EnvSpec(POINT))
    assert (info.obs_dim, info.action_dim, info.max_episode_steps) == (3, 2, 12)
    np.testing.assert_array_equal(info.action_low, [-1, -1])
    np.testing.assert_array_equal(info.action_high, [1, 1])
    assert not info.has_expert
    assert describe(EnvSpec("rollout_fake_envs:rollout_fakes/ExpertPoint-v0")).has_expert
    labels = info.labels()
    assert labels["id"] == POINT
    assert {"python", "gymnasium", "numpy", "diffpolicy"} <= labels["versions"].keys()


def test_a_spec_is_a_value():
    spec = EnvSpec(POINT, {"size": 32, "reward_scale": 2.0}, max_episode_steps=5)
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert EnvSpec(**spec.to_dict()) == spec
    assert hash(EnvSpec(**spec.to_dict())) == hash(spec)
    assert describe(spec).max_episode_steps == 5
    assert EnvSpec(POINT, {"range": (1, 2)}).kwargs == {"range": [1, 2]}


def test_without_a_limit_one_must_be_given():
    endless = "rollout_fake_envs:rollout_fakes/Endless-v0"
    with pytest.raises(EnvSpecError, match="give max_episode_steps"):
        describe(EnvSpec(endless))
    assert describe(EnvSpec(endless, max_episode_steps=9)).max_episode_steps == 9


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (EnvSpec("Pendulum-v11"), "Close matches: Pendulum-v1"),
        (EnvSpec("FetchPickAndPlac-v4"), "package:FetchPickAndPlac-v4.*gymnasium_robotics"),
        (EnvSpec("diffpolicy/Nothing-v0"), "diffpolicy_envs:diffpolicy/Nothing-v0"),
        (EnvSpec("no_such_module:Thing-v0"), "module 'no_such_module', which cannot be imported"),
        (EnvSpec(POINT, {"wrong": 1}), "takes no argument 'wrong'"),
        (EnvSpec("CartPole-v1", {"suton_barto_reward": 1}), "did you mean 'sutton_barto_reward'"),
        (EnvSpec("Hopper-v5", {"frameskip": 1}), "it takes .*did you mean 'frame_skip'"),
        (EnvSpec("rollout_fake_envs:rollout_fakes/Grid-v0"), "FlattenObservation"),
        (EnvSpec("rollout_fake_envs:rollout_fakes/Tuple-v0"), "must be a Box"),
        (EnvSpec("rollout_fake_envs:rollout_fakes/Words-v0"), "MultiDiscrete is needed"),
    ],
)
def test_what_cannot_be_made_says_why(spec, message):
    with pytest.raises(EnvSpecError, match=message):
        spec.make()


def test_missing_packages_come_with_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "gym_pusht", None)
    with pytest.raises(EnvSpecError, match=r'pip install "diffpolicy\[pusht\]"'):
        EnvSpec("gym_pusht:gym_pusht/PushT-v0").make()


def test_bad_specs():
    with pytest.raises(EnvSpecError, match="must be JSON values"):
        EnvSpec(POINT, {"reward": lambda x: x})
    with pytest.raises(ValueError, match="at least 1, got 0"):
        EnvSpec(POINT, max_episode_steps=0)
