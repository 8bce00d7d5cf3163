"""Weighted denoising: its fixed point is the tilted law; weights, buffers, limits."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tuning_tables import all_paths, rollout_of, sequences, table_denoiser

from diffpolicy.learn.reward.replay import effective_fraction, resample, settle
from diffpolicy.learn.reward.weighted import WeightedDenoising, WeightedDenoisingLoss
from diffpolicy.sequences.exact import ExactLaw

ALPHA = 0.5
REWARDS = torch.randn(8, generator=torch.Generator().manual_seed(9))
BATCH = {"index": torch.arange(128)}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def reward(x):
    """Of sequences of 3 tokens of 2, multilinear in soft ones."""
    a, b, c = x.unbind(1)
    return torch.einsum("na,nb,nc,abc->n", a, b, c, REWARDS.view(2, 2, 2).to(x))


def objective_of(seed=2, reference_seed=2, cond_dim=0, **settings):
    pair = [table_denoiser(seed=s, cond_dim=cond_dim) for s in (seed, reference_seed)]
    return WeightedDenoisingLoss(
        *pair, reward, WeightedDenoising(**{"kl_weight": ALPHA, **settings})
    )


def train(loss, steps, lr=0.05, batch=BATCH, first=0):
    optimizer = torch.optim.Adam([loss.denoiser.network.logits], lr=lr, betas=(0.9, 0.99))
    for step in range(first, first + steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - (step - first) / steps)
        optimizer.zero_grad()
        out = loss(batch, seeded(step))
        out.loss.mean().backward()
        optimizer.step()
        loss.after_step()
    return out


def laws(loss):
    with torch.no_grad():
        law, other = (ExactLaw.of(d).p for d in (loss.denoiser, loss.reference))
    return law, other, (other.log() + REWARDS.double() / ALPHA).softmax(0)


def divergence(p, q):
    return (p * (p / q).log()).sum().item()


def test_weights_of_all_paths_sum_to_the_tilted_law():
    """``p_roll w`` over all paths, by sequence, is ``p_ref exp(r / alpha)``: no bias at all."""
    loss = objective_of(seed=1)
    tokens, groups, order = all_paths(2, 3)
    with torch.no_grad():
        rollout = rollout_of(loss.denoiser, loss.reference, tokens, groups, 3)
        worth = loss.score(tokens)
    mass = order * (rollout.log_p.sum(1) + worth / ALPHA - rollout.log_ratio).exp()
    index = (tokens * torch.tensor([4, 2, 1])).sum(1)
    found = torch.zeros(8, dtype=torch.float64).index_add(0, index, mass)
    _, other, best = laws(loss)
    torch.testing.assert_close(found / found.sum(), best, atol=1e-6, rtol=0)
    assert divergence(best, other) > 0.1


@pytest.mark.parametrize(
    "settings",
    [
        {"pick": "resample"},
        {"pick": "uniform", "remasks": 2},
        {"min_ess": 0.5},
        {"num_steps": 2, "refresh_every": 2},
    ],
)
def test_fixed_point_is_the_tilted_law(settings):
    loss = objective_of(buffer=512, refresh=128, **settings)
    out = train(loss, 90)
    law, other, best = laws(loss)
    # Two steps draw other sequences than one by one do, but their weights target that chain's law.
    assert divergence(best, law) < (0.02 if settings.get("num_steps") is None else 0.06)
    assert divergence(best, other) > 0.4
    assert out.metrics["ess"] > (0.5 if settings.get("num_steps") is None else 0.2)
    assert out.metrics["power"] > 0.99


def test_infinite_kl_weight_leaves_the_reference():
    loss = objective_of(kl_weight=1e6, buffer=1024, refresh=512)
    out = train(loss, 40, lr=0.01)
    law, other, _ = laws(loss)
    assert divergence(law, other) < 3e-3
    assert out.metrics["ess"] > 0.9


def test_soft_values_tilt_the_last_reveal_exactly():
    """With one mask left the value of the next state is the reward itself."""
    loss = objective_of(target="soft_value", buffer=2048, refresh=512, remasks=4, value="draw")
    train(loss, 150)
    tokens = sequences(2, 3)
    state = tokens.clone()
    state[:, 1] = 2
    with torch.no_grad():
        t = torch.zeros(1, 1, 1)
        mine, theirs = (d.log_probs(state, t)[:, 1] for d in (loss.denoiser, loss.reference))
    pair = tokens[:, None].expand(-1, 2, -1).clone()
    pair[:, :, 1] = torch.arange(2)
    tilted = theirs + loss.score(pair.flatten(0, 1)).view(-1, 2) / ALPHA
    torch.testing.assert_close(mine.exp(), tilted.softmax(-1), atol=0.06, rtol=0)
    law, other, best = laws(loss)
    assert divergence(best, law) < 0.35 * divergence(best, other)


def test_step_weights_are_those_by_hand():
    loss = objective_of(seed=1, target="soft_value", buffer=8, refresh=8, num_steps=2)
    tokens = torch.tensor([[1, 0, 1], [0, 1, 1]])
    groups = torch.tensor([[0, 1, 1], [0, 0, 0]])
    with torch.no_grad():
        rollout = rollout_of(loss.denoiser, loss.reference, tokens, groups, 2)
        worth = loss.score(tokens)
        got = loss._step_weights(rollout, worth, seeded())
        t = torch.zeros(1, 1, 1)
        first, second = (
            loss.reference(torch.nn.functional.one_hot(rollout.states()[:, k], 3).float(), t).x0_hat
            for k in (0, 1)
        )
        v = [reward(first[..., :2]), reward(second[..., :2]), worth]
    ratio = rollout.log_reference - rollout.log_p
    expected = [
        [
            (v[1][0] - v[0][0]) / ALPHA + ratio[0, 0],
            (v[2][0] - v[1][0]) / ALPHA + ratio[0, 1:].sum(),
        ],
        [(v[2][1] - v[0][1]) / ALPHA + ratio[1].sum(), torch.tensor(-math.inf)],
    ]
    torch.testing.assert_close(got, torch.tensor(expected))


def test_unanchored_weights_leave_the_ratio_out():
    loss = objective_of(
        seed=1, target="soft_value", anchored=False, buffer=4, refresh=4, value="mode"
    )
    other = objective_of(seed=1, target="soft_value", buffer=4, refresh=4, value="mode")
    new, old = (o.draw(4, BATCH, seeded()) for o in (loss, other))
    total = (old["log_weight"] - new["log_weight"]).sum(1)
    with torch.no_grad():
        rollout = rollout_of(loss.denoiser, loss.reference, new["tokens"], new["groups"], 3)
    torch.testing.assert_close(total, -rollout.log_ratio, atol=1e-4, rtol=1e-4)


def test_weights_have_mean_one_and_respect_their_limits():
    raw = torch.tensor([[0.0, 0.0], [5.0, -math.inf], [1.0, 1.0], [-2.0, 2.0]])
    weights, power = settle(raw)
    torch.testing.assert_close(weights.sum(0), torch.tensor([4.0, 3.0]))
    assert weights[1, 1] == 0
    assert power == 1
    assert effective_fraction(torch.ones(1, 4, 2), raw.unsqueeze(0)).item() < 1.2
    limited, _ = settle(raw, max_weight=2.0)
    assert limited.max() < weights.max()
    torch.testing.assert_close(limited.sum(0), torch.tensor([4.0, 3.0]))
    spread, power = settle(raw, min_ess=0.8)
    assert 0 < power < 1
    ess = (spread.sum(0).square() / spread.square().sum(0) / torch.tensor([4, 3])).mean()
    assert ess.item() == pytest.approx(0.8, abs=1e-3)
    grouped, _ = settle(raw, group_size=2)
    torch.testing.assert_close(grouped.view(2, 2, 2).sum(1), torch.tensor([[2.0, 1.0], [2.0, 2.0]]))


def test_resampling_is_in_proportion():
    drawn = resample(torch.tensor([0.5, 0.0, 2.0, 1.5]), 8, seeded())
    assert torch.bincount(drawn, minlength=4).tolist() == [1, 0, 4, 3]


@pytest.mark.parametrize("target", ["sequence", "soft_value"])
def test_evaluation_mode_leaves_the_buffer(target):
    loss = objective_of(buffer=8, refresh=4, target=target)
    loss(BATCH, seeded())
    loss.after_step()
    before = {k: v.clone() for k, v in loss.state_dict().items()}
    loss.eval()(BATCH, seeded(1))
    assert all(torch.equal(v, before[k]) for k, v in loss.state_dict().items())
    loss.denoiser.training = loss.training = True  # as the trainer does: of what it trains alone
    loss(BATCH, seeded(1))
    assert loss.replay["tokens"].ne(before["replay.tokens"]).any()


@pytest.mark.parametrize("target", ["sequence", "soft_value"])
def test_a_resumed_run_is_the_same(target):
    settings = {"buffer": 16, "refresh": 4, "refresh_every": 3, "target": target, "num_steps": 2}
    batch = {"index": torch.arange(8)}

    def run(loss, first, last):
        optimizer = torch.optim.SGD([loss.denoiser.network.logits], lr=0.3)
        for step in range(first, last):
            optimizer.zero_grad()
            loss(batch, seeded(step)).loss.mean().backward()
            optimizer.step()
            loss.after_step()

    straight, first, second = (
        objective_of(**settings),
        objective_of(**settings),
        objective_of(7, **settings),
    )
    run(straight, 0, 8)
    run(first, 0, 4)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, 4, 8)
    assert torch.equal(second.denoiser.network.logits, straight.denoiser.network.logits)


def test_conditions_have_weights_of_their_own():
    loss = objective_of(cond_dim=1, buffer=8, refresh=8, group_size=4, remasks=2)
    batch = {"index": torch.arange(6), "cond": torch.tensor([[0.0], [2.0]] * 3)}
    assert loss(batch, seeded()).loss.shape == (6,)
    assert loss.replay["cond"].flatten().tolist() == [0] * 4 + [2] * 4
    one = objective_of(cond_dim=1, buffer=8, refresh=8, remasks=2)  # all under one condition
    assert one({**batch, "cond": torch.ones(6, 1)}, seeded()).loss.shape == (6,)


def test_reward_is_asked_for_new_sequences_alone():
    calls = []

    def black_box(x):
        calls.append(len(x))
        return torch.tensor([float(row.argmax(-1).sum()) for row in x.numpy()])

    loss = WeightedDenoisingLoss(
        table_denoiser(), None, black_box, WeightedDenoising(buffer=8, refresh=4, refresh_every=2)
    )
    train(loss, 5)
    assert calls == [8, 4, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_weight": 0.0}, "kl_weight must be positive"),
        ({"target": "all"}, "unknown target 'all'"),
        ({"buffer": 10, "refresh": 4}, "must divide buffer"),
        ({"group_size": 3}, "group_size=3 must divide refresh"),
        ({"min_ess": 1.0}, "min_ess must be in"),
        ({"max_weight": 1.0}, "max_weight must be above 1"),
        ({"refresh_every": 0}, "must be at least 1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        WeightedDenoising(**settings)
