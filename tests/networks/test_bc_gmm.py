from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from diffpolicy.networks import make_network
from diffpolicy.networks.bc_gmm import drawn, normal_of

SIZES = {"horizon": 4, "dim": 2, "cond_dim": 3}


def mixture(**settings):
    torch.manual_seed(0)
    return make_network({"type": "bc_gmm", "width": 16, "components": 3, **SIZES, **settings})


def test_likelihood_is_that_of_torch_distributions():
    network, cond = mixture().double(), torch.randn(5, 3).double()
    plan, valid = torch.randn(5, 4, 2).double(), torch.ones(5, 4).bool()
    log_weights, means, stds = network.mixture(cond)
    law = MixtureSameFamily(Categorical(logits=log_weights), Independent(Normal(means, stds), 2))
    expected = law.log_prob(plan)
    got = network.log_likelihood(cond, plan, valid)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    error, _ = network.errors(cond, plan, valid, None)
    torch.testing.assert_close(error, -expected / 8)


def test_padding_is_integrated_out():
    network, cond, plan = mixture(), torch.randn(1, 3), torch.randn(1, 4, 2)
    valid = torch.tensor([[True, True, False, False]])
    log_weights, means, stds = network.mixture(cond)
    components = Independent(Normal(means[:, :, :2], stds[:, :, :2]), 2)
    law = MixtureSameFamily(Categorical(logits=log_weights), components)
    torch.testing.assert_close(network.log_likelihood(cond, plan, valid), law.log_prob(plan[:, :2]))
    plan[:, 2:] = 1e3
    torch.testing.assert_close(network.log_likelihood(cond, plan, valid), law.log_prob(plan[:, :2]))
    assert torch.isfinite(network.errors(cond, plan, valid & False, None)[0]).all()


def test_draws_follow_the_mixture():
    """A component by its weight, and a standard normal number that knows nothing of it."""
    weights = torch.tensor([[0.2, 0.5, 0.3]]).expand(20_000, -1)
    chosen, rest = drawn(weights, torch.randn(20_000, 1, generator=torch.manual_seed(1)))
    counts = torch.bincount(chosen, minlength=3)
    assert stats.chisquare(counts.numpy(), 20_000 * np.array([0.2, 0.5, 0.3])).pvalue > 1e-3
    for component in range(3):
        fresh = normal_of(rest[chosen == component])
        assert stats.kstest(fresh.numpy(), "norm").pvalue > 1e-3


def test_a_draw_is_its_components_mean_and_spread():
    network, cond = mixture(), torch.randn(1, 3).expand(4000, -1)
    noise = torch.randn(4000, 4, 2, generator=torch.manual_seed(2))
    with torch.no_grad():
        log_weights, means, stds = (part[0] for part in network.mixture(cond[:1]))
        plans, still = network.plan(cond, noise), network.plan(cond, noise, temperature=0.0)
        half = network.plan(cond, noise, temperature=0.5)
    torch.testing.assert_close(half, (plans + still) / 2)
    away = (still.unsqueeze(1) - means).abs().amax((2, 3))  # [B, K]
    assert away.min(1).values.max() < 1e-6
    of_first = away[:, 0] < 1e-6
    assert of_first.float().mean().item() == pytest.approx(log_weights[0].exp().item(), abs=0.03)
    spread = (plans - still)[of_first].std(0) / stds[0]
    torch.testing.assert_close(spread, torch.ones(4, 2), atol=0.08, rtol=0)
    likeliest = network.plan(cond[:1], noise[:1], likeliest=True)[0]
    torch.testing.assert_close(likeliest, means[log_weights.argmax()])


def test_two_components_find_both_modes(two_modes):
    network, _ = two_modes(mixture(components=2))
    log_weights, means, stds = network.mixture(torch.zeros(1, 3))
    torch.testing.assert_close(log_weights.exp(), torch.full((1, 2), 0.5), atol=0.05, rtol=0)
    assert sorted(means.mean((2, 3))[0].tolist()) == pytest.approx([-0.8, 0.8], abs=0.05)
    assert stds.max() < 0.1
    plans = network.plan(torch.zeros(50, 3), torch.randn(50, 4, 2), temperature=0.0)
    assert (plans.mean((1, 2)) > 0).float().mean().item() == pytest.approx(0.5, abs=0.25)
    assert (plans.sign() == plans[:, :1, :1].sign()).all()  # no plan is of both


def test_refusals():
    with pytest.raises(ValueError, match="min_std"):
        mixture(min_std=0.0)
    with pytest.raises(ValueError, match="components"):
        mixture(components=0)
