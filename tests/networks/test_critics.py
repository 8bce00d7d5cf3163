"""Critics against the same networks written out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from diffpolicy.networks.critics import QEnsemble, StateValue


def by_hand(mlp, member, x, *, layer_norm):
    for layer in mlp.hidden:
        x = x @ layer.weight[member] + layer.bias[member]
        if layer_norm:
            x = F.layer_norm(x, (mlp.width,))
        x = x * torch.sigmoid(x)
    return (x @ mlp.outward.weight[member] + mlp.outward.bias[member])[:, 0]


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize(("members", "depth"), [(1, 1), (2, 2), (3, 3)])
def test_every_member_is_a_network_of_its_own(members, depth, layer_norm):
    critic = QEnsemble(
        5, 3, 2, width=16, depth=depth, members=members, layer_norm=layer_norm
    ).double()
    cond, chunk = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 3, 2, dtype=torch.float64)
    x = torch.cat([cond, chunk.flatten(1)], 1)
    expected = torch.stack(
        [by_hand(critic.mlp, m, x, layer_norm=layer_norm) for m in range(members)]
    )
    torch.testing.assert_close(critic(cond, chunk), expected)
    torch.testing.assert_close(critic.score(cond, chunk), expected.min(0).values)
    assert critic.members == members


def test_members_start_different_and_learn_apart():
    critic = QEnsemble(2, 1, 1, width=8)
    values = critic(torch.randn(4, 2), torch.randn(4, 1, 1))
    assert not torch.allclose(values[0], values[1])
    values[0].sum().backward()
    assert all(p.grad[0].abs().sum() > 0 for p in critic.parameters())
    assert all(not p.grad[1].any() for p in critic.parameters())


def test_weights_begin_as_those_of_a_linear_layer():
    torch.manual_seed(0)
    layer = QEnsemble(40, 1, 24, width=300).mlp.hidden[0]
    bound = 1 / 64**0.5
    assert layer.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_state_value_is_a_network_of_the_observation(layer_norm):
    value = StateValue(5, width=16, depth=2, layer_norm=layer_norm)
    cond = torch.randn(7, 5)
    expected = by_hand(value.mlp, 0, cond, layer_norm=layer_norm)
    torch.testing.assert_close(value(cond), expected)


def test_layer_norm_keeps_the_values_of_far_actions_in_bounds():
    torch.manual_seed(0)
    cond = torch.randn(64, 3)
    far = 1e4 * torch.randn(64, 1, 2)
    bounded, free = (QEnsemble(3, 1, 2, width=32, layer_norm=n) for n in (True, False))
    assert bounded(cond, far).abs().max() < 10
    assert free(cond, far).abs().max() > 100


@pytest.mark.parametrize(
    "critic",
    [
        QEnsemble(4, 2, 3, width=8, depth=3, members=4, layer_norm=True),
        StateValue(4, width=8, depth=1, layer_norm=True),
    ],
)
def test_config_rebuilds_the_same_network(critic):
    config = critic.config()
    kind = config.pop("type")
    assert kind == {"QEnsemble": "q_ensemble", "StateValue": "state_value"}[type(critic).__name__]
    again = type(critic)(**config)
    again.load_state_dict(critic.state_dict())
    assert again.config() == critic.config()


def test_shapes_that_do_not_fit_are_named():
    critic = QEnsemble(4, 2, 3, width=8)
    with pytest.raises(ValueError, match=r"chunk must be \[B, 2, 3\], got \[5, 3, 2\]"):
        critic(torch.zeros(5, 4), torch.zeros(5, 3, 2))
    with pytest.raises(ValueError, match=r"cond must be \[B, 4\].*got \[5, 1, 4\]"):
        critic(torch.zeros(5, 1, 4), torch.zeros(5, 2, 3))
    with pytest.raises(ValueError, match=r"cond must be \[B, 4\]"):
        StateValue(4)(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="members must be a positive integer, got 0"):
        QEnsemble(4, 2, 3, members=0)
    with pytest.raises(ValueError, match="cond_dim must be a positive integer"):
        StateValue(0)
