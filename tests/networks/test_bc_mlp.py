from __future__ import annotations

import pytest
import torch

from diffpolicy.networks import make_network

SIZES = {"horizon": 4, "dim": 2, "cond_dim": 3}


def regression(**settings):
    torch.manual_seed(0)
    return make_network({"type": "bc_mlp", "width": 16, **SIZES, **settings})


@pytest.mark.parametrize(("loss", "power"), [("l1", 1), ("l2", 2)])
def test_loss_by_hand(loss, power):
    network, cond = regression(loss=loss), torch.randn(2, 3)
    plan, valid = torch.randn(2, 4, 2), torch.ones(2, 4).bool()
    valid[1, 2:] = False
    away = (network(plan, torch.ones(1, 1, 1), cond) - plan).abs() ** power
    expected = torch.stack([away[0].mean(), away[1, :2].mean()])
    torch.testing.assert_close(network.errors(cond, plan, valid, None)[0], expected)


def test_the_noisy_plan_and_its_level_do_not_matter():
    network, cond = regression(), torch.randn(2, 3)
    one = network(torch.randn(2, 4, 2), torch.zeros(1, 1, 1), cond)
    assert torch.equal(one, network(torch.randn(2, 4, 2), torch.ones(1, 1, 1), cond))
    assert make_network(network.config()).config() == network.config()


def test_of_two_modes_it_does_neither(two_modes):
    network, _ = two_modes(regression())
    assert network.plan(torch.zeros(1, 3), torch.zeros(1, 4, 2)).abs().max() < 0.1


def test_refusals():
    with pytest.raises(ValueError, match="loss"):
        regression(loss="huber")
    with pytest.raises(ValueError, match="cond_dim must be a positive integer, got 0"):
        regression(cond_dim=0)
