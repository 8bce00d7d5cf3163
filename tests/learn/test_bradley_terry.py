"""The Bradley-Terry objective: known values, symmetries, ties, what a bootstrap weight does."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from diffpolicy.learn.preferences.bradley_terry import (
    BradleyTerryLoss,
    bradley_terry_loss,
    segment_rewards,
)
from diffpolicy.networks.critics import QEnsemble

B, W, OBS, A, M = 6, 4, 3, 2, 3


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(1)
    found = {}
    for side in ("chosen", "rejected"):
        found[f"{side}_obs"] = torch.randn(B, W, 1, OBS, generator=draws)
        found[f"{side}_action"] = torch.randn(B, W, 1, A, generator=draws)
        found[f"{side}_steps"] = torch.ones(B, W, 1, dtype=torch.bool)
    return found


@pytest.fixture
def network() -> QEnsemble:
    torch.manual_seed(0)
    return QEnsemble(OBS, 1, A, width=8, depth=1, members=M)


def swapped(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {"chosen": "rejected", "rejected": "chosen"}
    return {
        "_".join([names[k.split("_")[0]], *k.split("_")[1:]]): value for k, value in batch.items()
    }


def test_known_values():
    gap = torch.tensor([0.0, 2.0, -2.0], dtype=torch.float64)
    wanted = torch.tensor([math.log(2), math.log1p(math.exp(-2)), math.log1p(math.exp(2))])
    torch.testing.assert_close(bradley_terry_loss(gap), wanted.double())
    tie = torch.tensor([True, True, False])
    half = (wanted[1] + wanted[2]) / 2
    torch.testing.assert_close(
        bradley_terry_loss(gap, tie), torch.stack([wanted[0], half, wanted[2]]).double()
    )


def test_smoothing_is_least_at_its_own_logit():
    best = math.log(0.9 / 0.1)
    gap = torch.linspace(best - 1, best + 1, 201, dtype=torch.float64)
    found = gap[bradley_terry_loss(gap, label_smoothing=0.1).argmin()].item()
    assert found == pytest.approx(best, abs=0.011)


def test_a_tie_pulls_the_gap_to_zero():
    gap = torch.tensor([1.5, -1.5], requires_grad=True)
    bradley_terry_loss(gap, torch.tensor([True, True])).sum().backward()
    assert gap.grad is not None
    assert gap.grad[0] > 0 > gap.grad[1]
    torch.testing.assert_close(gap.grad[0], -gap.grad[1])


def test_equal_segments_cost_log_2(batch, network):
    same = {**batch, **{f"rejected_{k}": batch[f"chosen_{k}"] for k in ("obs", "action")}}
    out = BradleyTerryLoss(network)(same, generator())
    torch.testing.assert_close(out.loss, torch.full((B,), math.log(2)))
    assert out.metrics["accuracy"] == 0.5


def test_swapping_the_sides_flips_gap_and_gradient_of_a_blank_start(batch, network):
    loss = BradleyTerryLoss(network)
    there, back = (loss(b, generator()) for b in (batch, swapped(batch)))
    torch.testing.assert_close(there.metrics["gap"], -back.metrics["gap"])
    torch.testing.assert_close(there.metrics["accuracy"], 1 - back.metrics["accuracy"])
    gap = there.loss - back.loss  # softplus(-g) - softplus(g) = -g
    torch.testing.assert_close(gap.mean(), -there.metrics["gap"])
    with torch.no_grad():
        network.mlp.outward.weight.zero_()
    gradients = [
        torch.autograd.grad(loss(b, generator()).loss.sum(), network.mlp.outward.weight)[0]
        for b in (batch, swapped(batch))
    ]
    torch.testing.assert_close(gradients[0], -gradients[1])


def test_a_constant_changes_nothing_also_where_lengths_differ(batch, network):
    batch["chosen_steps"][:, 2:] = False
    loss = BradleyTerryLoss(network)
    before = loss(batch, generator()).loss
    with torch.no_grad():
        network.mlp.outward.bias += 5
    torch.testing.assert_close(loss(batch, generator()).loss, before, atol=1e-5, rtol=1e-5)


def test_steps_outside_a_segment_do_not_count(batch, network):
    steps = batch["chosen_steps"].clone()
    steps[:, -1] = False
    parts = batch["chosen_obs"], batch["chosen_action"]
    short = segment_rewards(network, parts[0][:, :-1], parts[1][:, :-1], steps[:, :-1])
    torch.testing.assert_close(segment_rewards(network, *parts, steps), short)


def test_windows_of_several_steps_weigh_as_many():
    class First(nn.Module):
        def forward(self, cond: torch.Tensor, chunk: torch.Tensor) -> torch.Tensor:
            return cond[:, 0].unsqueeze(0)

    obs = torch.tensor([[[[1.0]], [[4.0]]]])
    steps = torch.tensor([[[True, True], [True, False]]])
    found = segment_rewards(First(), obs, torch.zeros(1, 2, 2, 1), steps)
    torch.testing.assert_close(found, torch.tensor([[2.0]]))


def test_weights_decide_what_a_member_learns_from(batch, network):
    weight = torch.ones(B, M)
    weight[:, 1] = 0
    out = BradleyTerryLoss(network)({**batch, "weight": weight}, generator())
    gradient = torch.autograd.grad(out.loss.sum(), network.mlp.outward.weight)[0]
    assert gradient[1].abs().max() == 0
    assert gradient[0].abs().max() > 0


def test_ties_are_left_out_of_the_accuracy(batch, network):
    tie = torch.ones(B, dtype=torch.bool)
    out = BradleyTerryLoss(network)({**batch, "tie": tie}, generator())
    assert out.metrics["accuracy"] == 0
    assert bool((out.loss >= math.log(2)).all())


@pytest.mark.parametrize("value", [-0.1, 0.5])
def test_smoothing_out_of_range_is_refused(value, network):
    with pytest.raises(ValueError, match="label_smoothing"):
        BradleyTerryLoss(network, label_smoothing=value)
