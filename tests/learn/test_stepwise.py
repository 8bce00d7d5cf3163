"""Stepwise alignment: DPO as its smallest case, its minimiser, and groups."""

from __future__ import annotations

import copy

import pytest
import torch
from tuning_tables import sequences, table_denoiser

from diffpolicy.learn.reward.stepwise import Stepwise, StepwiseLoss, stepwise_loss
from diffpolicy.sequences.exact import ExactLaw

ALPHA = 0.5
REWARDS = torch.randn(8, generator=torch.Generator().manual_seed(9))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def reward(x):
    return REWARDS[(x.argmax(-1) * torch.tensor([4, 2, 1])).sum(-1)]


def objective_of(seed=2, reference_seed=2, cond_dim=0, **settings):
    pair = [table_denoiser(seed=s, cond_dim=cond_dim) for s in (seed, reference_seed)]
    defaults = {"kl_weight": ALPHA, "buffer": 64, "refresh": 64}
    return StepwiseLoss(*pair, reward, Stepwise(**{**defaults, **settings}))


def test_two_sequences_with_hard_labels_are_dpo():
    gain = torch.randn(5, 2, 3, generator=seeded())
    worth = torch.randn(5, 2, generator=seeded(1))
    loss, best = stepwise_loss(gain, worth, Stepwise(kl_weight=0.3, group_size=2, labels="hard"))
    sign = torch.where(worth[:, 0] > worth[:, 1], 1.0, -1.0)
    margin = sign[:, None] * (gain[:, 0] - gain[:, 1])
    torch.testing.assert_close(loss, -torch.nn.functional.logsigmoid(0.3 * margin).mean(1))
    assert torch.equal(best, worth.argmax(1))


def test_whole_dpo_loss_by_hand():
    """The objective on one pair with everything masked."""
    loss = objective_of(seed=1, group_size=2, labels="hard", buffer=2, refresh=2, remasks=1)
    for seed in range(50):  # until the one draw of the mask count is three
        copied = copy.deepcopy(loss)
        out = copied({"index": torch.arange(2)}, seeded(seed))
        tokens, worth = copied.replay["tokens"], copied.replay["reward"]
        state = torch.full((2, 3), 2)
        with torch.no_grad():
            ratio = [
                d.log_probs(state, torch.zeros(1, 1, 1))
                .gather(-1, tokens.unsqueeze(-1))
                .sum((1, 2))
                for d in (copied.denoiser, copied.reference)
            ]
        gain = ratio[0] - ratio[1]
        better = int(worth.argmax())
        expected = -torch.nn.functional.logsigmoid(ALPHA * (gain[better] - gain[1 - better]))
        if torch.isclose(out.loss[0], expected, rtol=1e-5):
            return
    pytest.fail("no draw of the masks gave the loss by hand")


def test_soft_labels_are_matched_where_ratios_tilt_as_rewards_do():
    """Gradient zero, and least loss, at ``log p - log p_ref = r / alpha + const``."""
    settings = Stepwise(kl_weight=ALPHA, group_size=4)
    worth = torch.randn(3, 4, generator=seeded())
    gain = (worth / ALPHA + torch.randn(3, 1, generator=seeded(1))).unsqueeze(-1)
    gain.requires_grad_()
    loss, _ = stepwise_loss(gain, worth, settings)
    (slope,) = torch.autograd.grad(loss.sum(), gain)
    assert slope.abs().max() < 1e-6
    law = (worth / ALPHA).softmax(1)
    torch.testing.assert_close(loss, -(law * law.log()).sum(1))


def train(loss, steps, lr=0.05, size=64):
    optimizer = torch.optim.Adam([loss.denoiser.network.logits], lr=lr, betas=(0.9, 0.99))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        out = loss({"index": torch.arange(size)}, seeded(step))
        out.loss.mean().backward()
        optimizer.step()
        loss.after_step()
    return out


@pytest.mark.parametrize(("beta", "left"), [("constant", 0.15), ("bound", 0.35)])
def test_aligns_with_the_reward(beta, left):
    loss = objective_of(group_size=8, buffer=256, refresh=64, beta=beta)
    out = train(loss, 100)
    with torch.no_grad():
        law, other = (ExactLaw.of(d).p for d in (loss.denoiser, loss.reference))
    best = (other.log() + REWARDS.double() / ALPHA).softmax(0)
    before, after = ((best * (best / p).log()).sum().item() for p in (other, law))
    assert before > 0.4
    assert after < left * before
    assert out.metrics["accuracy"] > 0.6
    assert (law * REWARDS).sum() > (other * REWARDS).sum() + 0.4


def test_infinite_kl_weight_leaves_the_reference():
    loss = objective_of(kl_weight=1e6, buffer=256, refresh=64)
    train(loss, 60)
    with torch.no_grad():
        law, other = (ExactLaw.of(d).p for d in (loss.denoiser, loss.reference))
    assert (law - other).abs().max() < 0.01


def test_masks_are_shared_within_groups():
    loss = objective_of(group_size=4, remasks=3)
    seen = []
    loss.denoiser.network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    loss.replay.write(loss.draw(64, {}, seeded()))
    seen.clear()
    loss({"index": torch.arange(8)}, seeded())
    masked = seen[0].argmax(-1).view(2, 4, 3, 3) == 2
    assert (masked == masked[:, :1]).all()
    counts = masked[:, 0].sum(-1)
    assert (counts == torch.tensor([1, 2, 3])).all()


def test_groups_share_a_condition():
    loss = objective_of(group_size=4, cond_dim=1, buffer=16, refresh=16, remasks=1)
    seen = []
    loss.denoiser.network.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    batch = {"index": torch.arange(8), "cond": torch.arange(4.0).view(4, 1)}
    loss(batch, seeded())
    assert loss.replay["cond"].view(4, 4).tolist() == [[v] * 4 for v in (0.0, 1.0, 2.0, 3.0)]
    groups = seen[-1].view(2, 4)
    assert (groups == groups[:, :1]).all()


def test_a_resumed_run_is_the_same():
    settings = {"buffer": 16, "refresh": 8, "refresh_every": 3, "group_size": 4}

    def run(loss, first, last):
        optimizer = torch.optim.SGD([loss.denoiser.network.logits], lr=0.3)
        for step in range(first, last):
            optimizer.zero_grad()
            loss({"index": torch.arange(8)}, seeded(step)).loss.mean().backward()
            optimizer.step()
            loss.after_step()

    straight, first, second = (objective_of(seed=s, **settings) for s in (2, 2, 7))
    run(straight, 0, 8)
    run(first, 0, 4)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, 4, 8)
    assert torch.equal(second.denoiser.network.logits, straight.denoiser.network.logits)


def test_all_rows_are_used_before_any_twice():
    loss = objective_of(buffer=12, refresh=12, group_size=4)
    picked = loss._picked(16, seeded())
    assert sorted(picked[:12].tolist()) == list(range(12))
    assert len(sequences(2, 3)) == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_weight": 0.0}, "kl_weight must be positive"),
        ({"labels": "firm"}, "unknown labels 'firm'"),
        ({"beta": "t"}, "unknown beta 't'"),
        ({"group_size": 1}, "group_size must be at least 2"),
        ({"group_size": 3}, "group_size=3 must divide refresh"),
        ({"remasks": 0}, "remasks must be at least 1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Stepwise(**settings)


def test_batches_hold_whole_groups():
    with pytest.raises(ValueError, match="group_size=8 must divide the batch of 12"):
        objective_of()({"index": torch.arange(12)}, seeded())
