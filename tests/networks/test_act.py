from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffpolicy.networks import make_network
from diffpolicy.networks.act import divergence

SIZES = {"horizon": 4, "dim": 2, "cond_dim": 3}


def act(**settings):
    torch.manual_seed(0)
    small = {"width": 16, "depth": 1, "heads": 2, "expansion": 2, "latent": 2, "dropout": 0.0}
    return make_network({"type": "act", **small, **SIZES, **settings})


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def test_divergence_is_that_of_torch_distributions():
    mean, log_variance = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    law = Normal(mean, (0.5 * log_variance).exp())
    expected = kl_divergence(law, Normal(torch.zeros_like(mean), torch.ones_like(mean))).sum(1)
    torch.testing.assert_close(divergence(mean, log_variance), expected)


def test_loss_by_hand():
    network, cond, plan = act(kl_weight=3.0), torch.randn(2, 3), torch.randn(2, 4, 2)
    valid = torch.ones(2, 4).bool()
    mean, log_variance = network.style_of(cond, plan, valid)
    z = mean + (0.5 * log_variance).exp() * torch.randn(2, 2, generator=gen())
    l1 = (network.decoded(cond, z) - plan).abs().mean((1, 2))
    loss, metrics = network.errors(cond, plan, valid, gen())
    torch.testing.assert_close(loss, l1 + 3.0 * divergence(mean, log_variance))
    torch.testing.assert_close(metrics["l1"], l1.mean())


def test_padding_is_neither_read_nor_scored():
    network, cond, plan = act(), torch.randn(2, 3), torch.randn(2, 4, 2)
    valid = torch.tensor([[True, True, True, True], [True, True, False, False]])
    before, _ = network.errors(cond, plan, valid, gen())
    plan[1, 2:] = 50.0
    after, _ = network.errors(cond, plan, valid, gen())
    assert torch.equal(before, after)
    plan[0, 2:] = 50.0
    assert network.errors(cond, plan, valid, gen())[0][0] > before[0] + 1


def test_acting_is_the_style_0():
    network, cond = act().eval(), torch.randn(3, 3)
    expected = network.decoded(cond, torch.zeros(3, 2))
    assert torch.equal(network(torch.randn(3, 4, 2), torch.ones(1, 1, 1), cond), expected)
    assert make_network(network.config()).config() == network.config()


@pytest.mark.parametrize(("kl_weight", "ignored"), [(1e-3, False), (100.0, True)])
def test_a_heavy_divergence_makes_the_style_nothing(two_modes, kl_weight, ignored):
    """Where it weighs little the style says which of two modes; else all styles are one plan."""
    network, plan = two_modes(act(kl_weight=kl_weight), steps=150)
    cond = torch.zeros(len(plan), 3)
    mean, log_variance = network.style_of(cond, plan, torch.ones(len(plan), 4).bool())
    styled = network.decoded(cond, mean)
    if ignored:
        assert divergence(mean, log_variance).max() < 0.01
        draws = network.decoded(cond, torch.randn(len(plan), 2, generator=gen()))
        torch.testing.assert_close(draws, network.plan(cond, plan), atol=0.1, rtol=0)
    else:
        assert divergence(mean, log_variance).min() > 0.5
        torch.testing.assert_close(styled, plan, atol=0.2, rtol=0)


def test_refusals():
    with pytest.raises(ValueError, match="width must be a multiple of heads, got 16 and 3"):
        act(heads=3)
    with pytest.raises(ValueError, match="kl_weight"):
        act(kl_weight=-1.0)
