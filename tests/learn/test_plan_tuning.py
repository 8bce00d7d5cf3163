"""`DiffusionPolicy.tune`: a policy's plans follow a differentiable reward."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffpolicy import DiffusionPolicy, TrainerConfig
from diffpolicy.data.store import EpisodeStore
from diffpolicy.learn.material import TuningData
from diffpolicy.learn.reward.plan_chain import PlanChain

QUICK = {"batch_size": 32, "warmup_steps": 1, "progress": False}


@pytest.fixture
def store(tmp_path):
    rng = np.random.default_rng(0)
    obs = rng.uniform(-1, 1, (120, 2)).astype(np.float32)
    action = np.clip(obs + 0.3 * rng.standard_normal((120, 2)), -1, 1).astype(np.float32)
    fields = {"obs": obs, "action": action}
    return EpisodeStore.from_arrays(fields, np.arange(20, 121, 20), path=tmp_path / "s.zarr")


@pytest.fixture
def policy(store):
    spec = {
        "horizon": 4,
        "n_obs_steps": 1,
        "n_action_steps": 2,
        "network": {"type": "mlp", "width": 32, "depth": 1},
    }
    return DiffusionPolicy.from_dataset(store, spec=spec)


def push(action: torch.Tensor, obs: torch.Tensor) -> torch.Tensor:
    """High where all actions are at 0.5 in the data's units."""
    assert obs.shape[1:] == (1, 2)
    return -(action - 0.5).square().sum((1, 2))


@pytest.mark.parametrize(
    "method",
    [PlanChain(grad_steps=1), PlanChain(num_steps=4, solver="ddpm", kl_weight=1e-3)],
    ids=["draft_1", "whole chain with KL"],
)
def test_plans_follow_the_reward(method, policy, store, tmp_path):
    policy.learn(store, TrainerConfig(steps=150, lr=3e-3, **QUICK), tmp_path / "run")
    obs = store.read("obs", 0, 60)
    before = np.abs(policy.predict(obs, deterministic=True)[0] - 0.5).mean()
    config = TrainerConfig(steps=60, lr=3e-3, ema_power=None, **QUICK)
    data = TuningData(reward=push, observations=store)
    policy.tune(data, method, config, tmp_path / "tuned")
    after = np.abs(policy.predict(obs, deterministic=True)[0] - 0.5).mean()
    assert after < 0.5 * before
    loaded = DiffusionPolicy.from_pretrained(tmp_path / "tuned")
    a, b = (p.predict(obs, deterministic=True)[0] for p in (policy, loaded))
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_plans_of_states_are_refused(policy, store, tmp_path):
    spec = {"horizon": 4, "n_obs_steps": 1, "n_action_steps": 2, "layout": "trajectory"}
    planner = DiffusionPolicy.from_dataset(
        store, spec={**spec, "network": {"type": "mlp", "width": 16, "depth": 1}}
    )
    data = TuningData(reward=push, observations=store)
    with pytest.raises(ValueError, match="layout='trajectory'"):
        planner.tune(data, PlanChain(), TrainerConfig(steps=1, **QUICK), tmp_path / "run")
