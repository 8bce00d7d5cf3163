"""Policies saved by earlier versions: what their files leave out means what it meant then."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from diffpolicy import DiffusionPolicy
from diffpolicy.core.processes import make_process
from diffpolicy.policies.changes import upgraded
from diffpolicy.policies.spec import PolicySpec

FIXTURES = Path(__file__).parents[1] / "fixtures"
LINEAR = {"type": "ddpm_linear", "num_steps": 100}


def acted(policy: DiffusionPolicy) -> np.ndarray:
    """Three decisions of three rows, the first cold and the others warm."""
    state, actions = policy.initial_state([0, 1, 2]), []
    for k in range(3):
        obs = np.linspace(-1, 1, 6).reshape(3, 2).astype(np.float32) * (1 - 0.1 * k)
        action, state = policy.act(obs, state)
        actions.append(action)
    return np.stack(actions)


@pytest.mark.filterwarnings("ignore:process .* ends at alpha:UserWarning")
def test_a_policy_of_before_acts_as_it_did(tmp_path):
    """Written by 0d260cc: betas left out, two ``karras`` steps, warm ``log_snr`` ones."""
    policy = DiffusionPolicy.load(FIXTURES / "policy_0d260cc")
    betas = torch.linspace(1e-4, 0.02, 100, dtype=torch.float64)
    assert policy.denoiser.process.betas == tuple(betas.tolist())
    expected = np.array(json.loads((FIXTURES / "actions_0d260cc.json").read_text()))
    np.testing.assert_allclose(acted(policy), expected, atol=2e-6)
    policy.save(tmp_path / "again")
    again = DiffusionPolicy.load(tmp_path / "again")
    assert again.spec == policy.spec
    np.testing.assert_array_equal(acted(again), acted(policy))


def test_what_is_written_now_says_its_betas_and_is_left_alone():
    spec = PolicySpec.from_config(
        {"obs_dim": 1, "action_dim": 1, "process": LINEAR, "sampler": {"spacing": "karras"}}
    )
    config = json.loads(json.dumps(spec.to_config()))
    assert config["process"] == {**LINEAR, "beta_start": 1e-3, "beta_end": 0.2}
    assert config["sampler"]["t_min"] is None
    assert upgraded(config) == config
    assert PolicySpec.from_config(config) == spec
    assert make_process(config["process"]).betas == make_process(LINEAR).betas


@pytest.mark.parametrize("num_steps", [5, 20, 300, 1000])
def test_said_betas_are_those_that_a_rule_gives(num_steps):
    rule = {"type": "ddpm_linear", "num_steps": num_steps}
    said = PolicySpec(1, 1, process=rule).process
    assert make_process(said).betas == make_process(rule).betas


def test_only_what_meant_something_else_is_filled_in():
    plain = {"process": {"type": "vp_cosine"}, "sampler": {"spacing": "karras", "num_steps": 5}}
    assert upgraded(plain) == plain
    two = upgraded({**plain, "rti": {"spacing": "log_snr", "num_steps": 2}})
    assert (two["rti"]["t_min"], two["sampler"]) == (1e-3, plain["sampler"])
    given = {"process": {**LINEAR, "beta_end": 0.1}}
    assert upgraded(given)["process"] == {**LINEAR, "beta_start": 1e-4, "beta_end": 0.1}
