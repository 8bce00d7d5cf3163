"""Preference losses on labelled sequences: the optimum of reward tuning, by comparisons alone."""

from __future__ import annotations

import copy

import pytest
import torch
from tuning_tables import table_denoiser

from diffpolicy.learn.material import SequenceMaterial
from diffpolicy.learn.methods import make_method
from diffpolicy.learn.preferences.dpo import SequenceDPO, SequenceDPOLoss
from diffpolicy.learn.preferences.pso import PSOLoss
from diffpolicy.sequences.exact import ExactLaw, divergence, optimum

ALPHA = 0.5
REWARDS = torch.randn(8, generator=torch.Generator().manual_seed(9))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def reward(x):
    return REWARDS[(x.argmax(-1) * torch.tensor([4, 2, 1])).sum(-1)]


def objective_of(cond_dim=0, **settings):
    pair = [table_denoiser(seed=2, cond_dim=cond_dim) for _ in range(2)]
    chosen = {"kl_weight": ALPHA, "kl_beta": 1.0, "buffer": 512, "refresh": 512, **settings}
    chosen = {"refresh_every": 10, **chosen}
    return SequenceDPOLoss(*pair, reward, SequenceDPO(**chosen))


def trained(loss, steps=150, lr=0.08):
    optimizer = torch.optim.Adam([loss.denoiser.network.logits], lr=lr, betas=(0.9, 0.99))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        out = loss({"index": torch.arange(96)}, seeded(step))
        out.loss.mean().backward()
        optimizer.step()
        loss.after_step()
    return out


@pytest.mark.parametrize(
    ("drawn_by", "kl_beta"), [("denoiser", 1.0), ("denoiser", 0.5), ("reference", 1.0)]
)
def test_dpo_approaches_the_optimum_of_reward_tuning(drawn_by, kl_beta):
    """Labels have the scale kl_weight / kl_beta, so kl_beta does not move the optimum."""
    loss = objective_of(drawn_by=drawn_by, kl_beta=kl_beta)
    with torch.no_grad():
        before = ExactLaw.of(loss.reference).p
    best = optimum(before, REWARDS, ALPHA)
    out = trained(loss)
    with torch.no_grad():
        after = ExactLaw.of(loss.denoiser).p
    # Not at it: the average over masks is inside the sigmoid's expectation (see SequenceDPO).
    assert divergence(after, best) < 0.4 * divergence(before, best)
    assert {"reward", "kl", "accuracy", "gap", "saturated"} <= set(out.metrics)


@pytest.mark.parametrize(
    "settings",
    [{"loss": "ipo", "kl_beta": 0.2, "kl_weight": 0.1}, {"loss": "kto"}, {"loss": "margin"}],
)
def test_other_losses_raise_the_reward(settings):
    loss = objective_of(**settings)
    with torch.no_grad():
        before = ExactLaw.of(loss.reference).p
    trained(loss, steps=80)
    with torch.no_grad():
        after = ExactLaw.of(loss.denoiser).p
    assert after @ REWARDS.double() > before @ REWARDS.double() + 0.1


def test_labels_have_the_chance_that_bradley_and_terry_give():
    loss = objective_of()
    loss({"index": torch.arange(4)}, seeded())
    batch = loss.pairs(20_000, seeded(1))
    gap = REWARDS[(batch["chosen"] * torch.tensor([4, 2, 1])).sum(-1)]
    gap = gap - REWARDS[(batch["rejected"] * torch.tensor([4, 2, 1])).sum(-1)]
    for least, most in ((0.2, 0.6), (1.0, 1.6)):
        near = (gap.abs() > least) & (gap.abs() < most)
        expected = torch.sigmoid(gap[near].abs() / ALPHA).mean()
        assert abs((gap[near] > 0).float().mean() - expected) < 0.02


def test_pairs_share_their_condition():
    loss = objective_of(cond_dim=1)
    loss({"index": torch.arange(2), "cond": torch.tensor([[0.0], [1.0]])}, seeded())
    side = torch.arange(512) % 2  # every row tells its condition by its tokens
    loss.replay["cond"].copy_(side.unsqueeze(1))
    loss.replay["tokens"].copy_(side.unsqueeze(1).expand(-1, 3))
    batch = loss.pairs(64, seeded(1))
    assert set(batch["cond"].flatten().tolist()) == {0.0, 1.0}
    for name in ("chosen", "rejected"):
        assert torch.equal(batch[name].float(), batch["cond"].expand(-1, 3))


def test_same_state_and_generator_give_the_same_loss():
    loss = objective_of(refresh=64)
    batch = {"index": torch.arange(16)}
    loss(batch, seeded())
    loss.after_step()
    other = objective_of(refresh=64)
    other.load_state_dict(loss.state_dict())
    a, b = (o(batch, seeded(5)).loss for o in (loss, other))
    assert torch.equal(a, b)
    copied = copy.deepcopy(loss)  # the copy's loss must look at the copy's denoiser
    assert copied._loss[0].denoiser is copied.denoiser


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"drawn_by": "me"}, "unknown drawn_by 'me'"),
        ({"kl_weight": 0.0}, "kl_weight must be positive"),
        ({"draws": 0}, "draws must be at least 1"),
        ({"refresh": 100}, "must divide"),
    ],
)
def test_unusable_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        objective_of(**settings)


def test_by_name():
    denoiser, material = table_denoiser(seed=2), SequenceMaterial(reward)
    made = make_method({"type": "sequence_dpo", "loss": "kto"}).objective(denoiser, material)
    assert isinstance(made, SequenceDPOLoss)
    assert made.settings == SequenceDPO(loss="kto")
    settings = {"kl_weight": 0.2, "kl_beta": 2.0, "num_steps": None, "clip": None}
    pso = make_method({"type": "sequence_pso", **settings}).objective(denoiser, material)
    assert isinstance(pso, PSOLoss)
    assert pso.settings.label_scale == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"unknown key 'sequence_pso\.beta'"):
        make_method({"type": "sequence_pso", "beta": 1.0})
