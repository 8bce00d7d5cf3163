"""Policies on other devices: what belongs to the weights follows them, or says that it did not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffpolicy.data.normalize import Normalizer
from diffpolicy.policies.diffusion import DiffusionPlanner
from diffpolicy.policies.rti import RTI
from diffpolicy.policies.spec import PolicySpec
from diffpolicy.policies.streaming import StreamingPlanner


def planner(kind: type = DiffusionPlanner, **settings) -> DiffusionPlanner:
    spec = PolicySpec(
        2, 2, horizon=4, n_obs_steps=1, n_action_steps=1,
        network={"type": "mlp", "width": 8, "depth": 1, "t_kind": "position"},
        **settings,
    )  # fmt: skip
    low, high, mid = -np.ones(2), np.ones(2), np.zeros(2)
    ends = {"min": low, "max": high, "mean": mid, "std": high, "q01": low, "q99": high}
    normalizer = Normalizer.fit(
        {"obs": ends, "action": ends}, {"obs": "minmax", "action": "minmax"}
    )
    torch.manual_seed(0)
    return kind(spec, spec.make_denoiser(), normalizer)


def first_action(policy: DiffusionPlanner) -> np.ndarray:
    action, _ = policy.act(np.zeros((1, 2), np.float32), policy.initial_state([0]))
    return action


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (DiffusionPlanner, {"rti": RTI(t_start=0.5)}),
        (StreamingPlanner, {"level_law": "position", "trained_action_steps": 1}),
    ],
)
def test_a_policy_moves_as_a_whole(kind, settings):
    policy = planner(kind, **settings)
    assert policy.to("meta") is policy
    assert policy.device == torch.device("meta")
    loops = policy._loops.values()
    assert {loop.device.type for loop in loops} == {"meta"}
    assert {row.device.type for loop in loops for row in loop.grid.rows[0].constants()} == {"meta"}


def test_moving_to_where_it_is_changes_nothing():
    policy = planner()
    before = first_action(policy)
    np.testing.assert_array_equal(first_action(policy.to("cpu")), before)


def test_weights_that_were_moved_alone_are_noticed():
    policy = planner()
    policy.denoiser.double()
    with pytest.raises(
        ValueError, match=r"on cpu as torch.float64, .* made for cpu and torch.floa"
    ):
        first_action(policy)
    policy.denoiser.float()
    before = first_action(policy)
    policy.denoiser.to("meta")
    with pytest.raises(ValueError, match=r"policy.to\('meta'\)"):
        first_action(policy)
    assert np.isfinite(before).all()
