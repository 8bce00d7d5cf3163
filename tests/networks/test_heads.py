"""Heads: by name, by hand, and their errors."""

from __future__ import annotations

import pytest
import torch

from diffpolicy.networks.heads import HEADS, TrajectoryValue, make_head

CONFIGS = {
    "inverse": {"obs_dim": 4, "action_dim": 2, "width": 8, "depth": 1},
    "value": {"horizon": 8, "dim": 3, "cond_dim": 5, "base": {"type": "mlp", "width": 16}},
    "draft": {"obs_dim": 4, "horizon": 8, "n_obs_steps": 2, "base": "transformer", "width": 16},
    "q_ensemble": {"cond_dim": 5, "horizon": 2, "action_dim": 3, "width": 8},
    "sequence_regressor": {"length": 8, "vocab_size": 4, "outputs": 2, "width": 8, "depth": 1},
    "state_value": {"cond_dim": 5, "width": 8},
}


@pytest.mark.parametrize("kind", list(HEADS))
def test_a_head_is_rebuilt_from_its_config(kind):
    head = make_head({"type": kind, **CONFIGS[kind]})
    config = head.config()
    again = make_head(config)
    assert again.config() == config
    again.load_state_dict(head.state_dict())
    assert config["type"] == kind
    assert CONFIGS[kind].items() <= config.items()


def test_inverse_dynamics_takes_pairs_and_windows():
    head = make_head({"type": "inverse", **CONFIGS["inverse"]})
    obs = torch.randn(3, 7, 4)
    actions = head(obs[:, :-1], obs[:, 1:])
    assert actions.shape == (3, 6, 2)
    torch.testing.assert_close(actions[:, 2], head(obs[:, 2], obs[:, 3]))


@pytest.mark.parametrize("kind", ["mlp", "unet1d", "transformer"])
def test_any_network_is_the_base_of_a_value(kind):
    base = {
        "mlp": {"width": 16},
        "unet1d": {"down_dims": [16, 32], "diffusion_step_embed_dim": 16},
        "transformer": {"width": 16, "depth": 1, "heads": 2},
    }[kind]
    torch.manual_seed(0)
    head = TrajectoryValue(8, 3, 5, base={"type": kind, **base})
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, cond = torch.randn(4, 8, 3, requires_grad=True), torch.randn(4, 5)
    t = torch.tensor([0.0, 10.0, 500.0, 1000.0]).view(4, 1, 1)
    value = head(x, t, cond)
    assert value.shape == (4,)
    torch.testing.assert_close(value[2:3], head(x[2:3], t[2:3], cond[2:3]))  # rows are apart
    torch.testing.assert_close(head.score(cond, x)[0], value[0])
    assert not torch.allclose(head.score(cond, x)[3], value[3])
    (slope,) = torch.autograd.grad(value.sum(), x)
    assert (slope.flatten(1).norm(dim=1) > 0).all()


def test_a_value_without_condition_is_that_of_the_plan_alone():
    head = TrajectoryValue(8, 3, base={"type": "mlp", "width": 16})
    x = torch.randn(4, 8, 3)
    assert torch.equal(head.score(torch.randn(4, 1), x), head.score(None, x))


def test_the_clean_time_is_what_score_uses():
    head = TrajectoryValue(8, 3, base={"type": "mlp", "width": 16}, clean_time=-2.7)
    with torch.no_grad():  # its blocks start as the identity, whatever the time
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(4, 8, 3)
    assert torch.equal(head.score(None, x), head(x, -2.7))
    assert not torch.equal(head.score(None, x), head(x, 0.0))


def test_errors():
    with pytest.raises(
        ValueError, match=r"unknown head type .*expected one of draft, inverse, value"
    ):
        make_head({"type": "reward"})
    with pytest.raises(ValueError, match=r"head 'inverse' has no setting 'widht'.*did you mean"):
        make_head({"type": "inverse", "obs_dim": 4, "action_dim": 2, "widht": 3})
    with pytest.raises(ValueError, match="head 'inverse' needs action_dim"):
        make_head({"type": "inverse", "obs_dim": 4})
    with pytest.raises(ValueError, match="obs_dim must be a positive integer, got 0"):
        make_head({"type": "inverse", "obs_dim": 0, "action_dim": 2})
    with pytest.raises(ValueError, match="dim of this network are given otherwise"):
        TrajectoryValue(8, 3, base={"type": "mlp", "dim": 3})
    with pytest.raises(ValueError, match="unknown network type"):
        TrajectoryValue(8, 3, base={"width": 16})
    head = TrajectoryValue(8, 3)
    with pytest.raises(ValueError, match=r"x must be \[B, 8, 3\], got \[2, 8, 4\]"):
        head(torch.zeros(2, 8, 4), 0.0)
    with pytest.raises(ValueError, match=r"one level per plan.*got \[1, 8, 1\]"):
        head(torch.zeros(2, 8, 3), torch.zeros(1, 8, 1))
