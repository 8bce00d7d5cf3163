"""Stable-Baselines3's own evaluator drives the policy unmodified and agrees with ours."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch

from diffpolicy.rollout.env_spec import EnvSpec
from diffpolicy.rollout.evaluate import evaluate
from diffpolicy.rollout.pool.supervisor import Workers

sb3 = pytest.importorskip("stable_baselines3", reason="needs the sb3 extra")
ENV = "Pendulum-v1"


@pytest.fixture
def policy():
    """Random weights; deterministic actions depend on the observations alone."""
    from diffpolicy.core.sampler import Sampler
    from diffpolicy.data.normalize import Normalizer
    from diffpolicy.policies.diffusion import DiffusionPlanner
    from diffpolicy.policies.spec import PolicySpec

    torch.manual_seed(0)
    network = {"type": "mlp", "width": 16, "depth": 1}
    spec = PolicySpec(
        3,
        1,
        6,
        2,
        3,
        network=network,
        sampler=Sampler(num_steps=3),
        action_low=(-2.0,),
        action_high=(2.0,),
    )
    denoiser = spec.make_denoiser()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    statistics = {
        name: {
            "min": [-high] * dim,
            "max": [high] * dim,
            "mean": [0.0] * dim,
            "std": [1.0] * dim,
            "q01": [-high] * dim,
            "q99": [high] * dim,
            "count": 10,
        }
        for name, dim, high in (("obs", 3, 8.0), ("action", 1, 2.0))
    }
    return DiffusionPlanner(
        spec, denoiser, Normalizer.fit(statistics, {"obs": "minmax", "action": "minmax"})
    )


@pytest.mark.parametrize("num_envs", [1, 3])
def test_evaluate_policy_drives_it_and_agrees(policy, num_envs):
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.monitor import Monitor
    from stable_baselines3.common.vec_env import DummyVecEnv

    first = 300_000
    venv = DummyVecEnv([lambda: Monitor(gym.make(ENV)) for _ in range(num_envs)])
    venv.seed(first)  # environment i resets with first + i
    theirs, lengths = evaluate_policy(
        policy, venv, n_eval_episodes=num_envs, deterministic=True, return_episode_rewards=True
    )
    result = evaluate(
        policy,
        EnvSpec(ENV),
        range(first, first + num_envs),
        deterministic=True,
        progress=False,
        workers=Workers(num_envs=num_envs, num_workers=0),
    )
    ours = [episode.episode_return for episode in result.episodes]
    assert lengths == [200] * num_envs
    np.testing.assert_allclose(sorted(theirs), sorted(ours), rtol=1e-4)
