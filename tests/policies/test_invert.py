"""Actions, their noise, and the way back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffpolicy.data.action_groups import ActionGroup
from diffpolicy.policies.guided import Costs
from diffpolicy.policies.invert import invert, restore
from diffpolicy.policies.spec import PolicySampler


@pytest.mark.parametrize(
    "changes",
    [
        {"process": {"type": "ddpm_cosine"}, "prediction": "eps"},
        {"process": {"type": "flow"}, "prediction": "velocity", "clip": False},
        {"prediction": "v", "actions": (ActionGroup(dims=(0,), kind="relative", of=(1,)),)},
    ],
    ids=["clipped eps", "flow", "relative"],
)
def test_a_round_trip_is_exact_in_float32(make_planner, changes):
    policy, rng = make_planner(**changes), np.random.default_rng(0)
    shape = (6, policy.horizon, policy.action_dim)
    history = rng.uniform(-0.5, 0.5, (6, policy.n_obs_steps, policy.obs_dim)).astype(np.float32)
    actions = rng.uniform(-0.45, 0.45, shape).astype(np.float32)
    found = invert(policy, history, actions, num_steps=10)
    assert found.noise.shape == found.second.shape == (6, policy.horizon, policy.spec.planned_dim)
    np.testing.assert_allclose(restore(policy, history, found), actions, rtol=0, atol=1e-5)
    assert torch.isfinite(found.noise).all()


def test_what_cannot_be_inverted_is_refused(make_planner):
    policy = make_planner()
    history = np.zeros((2, policy.n_obs_steps, policy.obs_dim), np.float32)
    with pytest.raises(ValueError, match="actions must be"):
        invert(policy, history, np.zeros((2, 3, 2), np.float32))
    actions = np.zeros((2, policy.horizon, policy.action_dim), np.float32)
    with pytest.raises(ValueError, match="num_steps must be at least 2"):
        invert(policy, history, actions, num_steps=1)


HIGH = {"type": "limits", "dims": [0], "high": [0.3]}
BY_ENDS = {"solver": "ddim", "num_steps": 1, "options": {"eta": 1.0, "variance": "renoise"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance": Costs((HIGH,))}, "invert without guidance by costs"),
        ({"trained_steps": 4}, "estimates are of its 4 steps alone"),
        ({"sampler": PolicySampler(**BY_ENDS)}, "estimates are of where paths end alone"),
    ],
    ids=["costs", "halving", "consistency"],
)
def test_policies_whose_chains_have_no_way_back_are_refused(make_planner, changes, message):
    policy = make_planner(**changes)
    history = np.zeros((2, policy.n_obs_steps, policy.obs_dim), np.float32)
    with pytest.raises(ValueError, match=message):
        invert(policy, history, np.zeros((2, policy.horizon, policy.action_dim), np.float32))
