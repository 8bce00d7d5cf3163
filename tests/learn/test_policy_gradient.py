"""Policy gradients against the gradient of the exact objective; clipping; kept rollouts."""

from __future__ import annotations

import copy

import pytest
import torch
from tuning_tables import all_paths, rollout_of, sequences, table_denoiser

from diffpolicy.learn.reward.policy_gradient import Play, PolicyGradient, PolicyGradientLoss, judge
from diffpolicy.sequences.exact import ExactLaw, StateSpace

ALPHA = 0.3
REWARDS = torch.randn(8, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def reward(x):
    """Of sequences of 3 tokens of 2."""
    place = torch.tensor([4, 2, 1])
    return REWARDS.to(x.dtype)[(x.argmax(-1) * place).sum(-1)]


def objective_of(seed=1, reference_seed=2, cond_dim=0, **settings):
    made = {"cond_dim": cond_dim, "dtype": torch.float64}
    pair = [table_denoiser(seed=s, **made) for s in (seed, reference_seed)]
    return PolicyGradientLoss(*pair, reward, PolicyGradient(**{"kl_weight": ALPHA, **settings}))


def exact_gradient(loss, num_steps, kl_weight):
    """Of J by the sum over all paths, differentiated through everything."""
    tokens, groups, order = all_paths(2, 3, num_steps)
    rollout = rollout_of(loss.denoiser, loss.reference, tokens, groups, num_steps or 3)
    chance = order * rollout.log_p.sum(1).exp()
    place = torch.tensor([4, 2, 1])
    j = (chance * (REWARDS[(tokens * place).sum(1)] - kl_weight * rollout.log_ratio)).sum()
    return torch.autograd.grad(j, loss.denoiser.network.logits)[0]


def expected_gradients(loss, num_steps, worth_of=reward):
    """Over all pairs of paths, each the other's baseline; of drawn and of stored rollouts."""
    tokens, groups, order = all_paths(2, 3, num_steps)
    count = len(tokens)
    pairs = torch.cartesian_prod(torch.arange(count), torch.arange(count))
    rows = pairs.flatten()
    rollout = rollout_of(loss.denoiser, loss.reference, tokens[rows], groups[rows], num_steps or 3)
    chance = order[rows] * rollout.log_p.detach().sum(1).exp()
    chance = chance.view(-1, 2).prod(1).repeat_interleave(2)
    worth = worth_of(torch.nn.functional.one_hot(rollout.tokens, 2).double())
    with torch.no_grad():
        play = Play(rollout, worth, *judge(rollout, worth, loss.settings))
    for graph in (True, False):
        out = loss.surrogate(play, seeded(), graph=graph)
        total = (chance * out.loss).sum() / 2
        yield -torch.autograd.grad(total, loss.denoiser.network.logits, retain_graph=True)[0]


@pytest.mark.parametrize("num_steps", [None, 2])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("kl", ["path", "reward", None])
@pytest.mark.parametrize("baseline", ["leave_one_out", "group"])
def test_expected_gradient_is_that_of_the_exact_objective(baseline, kl, ratio, num_steps):
    """Half of it with the mean of two rows as the baseline, reward and KL alike."""
    weight = 0.0 if kl is None else ALPHA
    settings = {"kl_weight": weight, "kl": kl or "path", "ratio": ratio, "num_steps": num_steps}
    loss = objective_of(group_size=2, baseline=baseline, **settings)
    share = 1.0 if baseline == "leave_one_out" else 0.5
    for got in expected_gradients(loss, num_steps):
        torch.testing.assert_close(got, share * exact_gradient(loss, num_steps, weight))


@pytest.mark.parametrize("baseline", ["leave_one_out", "group"])
@pytest.mark.parametrize("kl", ["path", "reward"])
def test_equal_rewards_leave_the_divergence_as_it_is_weighed(kl, baseline):
    """Normalised, they would otherwise be divided by a spread that is the KL's own noise."""
    loss = objective_of(kl=kl, group_size=2, baseline=baseline, normalize=True)
    flat = exact_gradient(loss, None, ALPHA) - exact_gradient(loss, None, 0.0)
    share = loss.settings.share(2)
    for got in expected_gradients(loss, None, lambda x: torch.ones(len(x), dtype=x.dtype)):
        torch.testing.assert_close(got, share * flat)


def test_exact_gradient_by_paths_is_that_of_the_exact_law():
    loss = objective_of()
    law, other = (ExactLaw.of(d) for d in (loss.denoiser, loss.reference))
    j = (law.p * REWARDS).sum() - ALPHA * law.path_kl(other)
    (got,) = torch.autograd.grad(j, loss.denoiser.network.logits)
    torch.testing.assert_close(got, exact_gradient(loss, None, ALPHA))


def gradients(loss, draws, rows):
    """Of independent batches, flattened ``[draws, ...]``."""
    found = []
    for seed in range(draws):
        out = loss({"index": torch.arange(rows)}, seeded(seed))
        (one,) = torch.autograd.grad(out.loss.mean(), loss.denoiser.network.logits)
        found.append(-one.flatten())
    return torch.stack(found)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kl": "reward"},
        {"grad_states": 1},
        {"kl": "reward", "grad_states": 2, "num_steps": 2},
        {"baseline": "mean"},
    ],
)
def test_gradient_of_drawn_batches_is_unbiased(settings):
    loss = objective_of(**settings)
    got = gradients(loss, 100, 128)
    exact = exact_gradient(loss, settings.get("num_steps"), ALPHA).flatten()
    error = (got.mean(0) - exact) / (got.std(0) / 100**0.5).clamp_min(1e-4)
    assert error.abs().max() < 4.5 + (1 if settings.get("baseline") else 0)
    assert torch.cosine_similarity(got.mean(0), exact, dim=0) > 0.97


def test_what_reduces_variance_does():
    spread = {
        name: gradients(objective_of(**settings), 40, 16).var(0).sum().item()
        for name, settings in (
            ("path", {}),
            ("to_go", {"kl": "reward"}),
            ("sequence", {"kl": "reward", "ratio": "sequence"}),
            ("one_state", {"grad_states": 1}),
        )
    }
    assert spread["path"] < spread["to_go"] < spread["sequence"]
    assert spread["path"] < spread["one_state"]


def test_infinite_kl_weight_leaves_the_reference():
    loss = objective_of(seed=2, reference_seed=2, kl_weight=1e6)
    out = loss({"index": torch.arange(32)}, seeded())
    assert out.metrics["kl"].abs() < 1e-8
    start = objective_of(kl_weight=100.0)
    optimizer = torch.optim.Adam([start.denoiser.network.logits], lr=0.1)
    for step in range(80):
        optimizer.zero_grad()
        start({"index": torch.arange(32)}, seeded(step)).loss.mean().backward()
        optimizer.step()
    with torch.no_grad():
        law, other = (ExactLaw.of(d) for d in (start.denoiser, start.reference))
    assert (law.p - other.p).abs().sum() / 2 < 0.02


def test_learns_towards_the_optimum():
    loss = objective_of(seed=2, kl_weight=0.5)
    optimizer = torch.optim.Adam([loss.denoiser.network.logits], lr=0.05)
    for step in range(120):
        optimizer.zero_grad()
        loss({"index": torch.arange(64)}, seeded(step)).loss.mean().backward()
        optimizer.step()
    with torch.no_grad():
        law, other = (ExactLaw.of(d) for d in (loss.denoiser, loss.reference))
    best = (other.p.log() + REWARDS / 0.5).softmax(0)
    assert (best * (best / other.p).log()).sum() > 0.4
    assert (best * (best / law.p).log()).sum() < 0.02


def test_ratios_are_clipped_as_in_ppo():
    loss = objective_of(kl_weight=0.0, epochs=2, rows=2, clip=0.1)
    tokens, groups, _ = all_paths(2, 3)
    rollout = rollout_of(loss.denoiser, loss.reference, tokens[:2], groups[:2], 3)
    shift = torch.tensor([[0.2, -0.2, 0.05], [0.2, -0.2, 0.05]])
    old = rollout._replace(log_p=(rollout.log_p - shift).detach())
    advantage = torch.tensor([[1.0] * 3, [-1.0] * 3])
    play = Play(old, torch.zeros(2), advantage, torch.zeros(2))
    out = loss.surrogate(play, seeded())
    low, high, near = (torch.tensor(v).exp().item() for v in (-0.2, 0.2, 0.05))
    expected = [-(1.1 + low + near), high + 0.9 + near]
    assert out.loss.tolist() == pytest.approx(expected)
    assert out.metrics["clip_fraction"].item() == pytest.approx(2 / 3)


def test_kept_rollout_serves_its_epochs_and_a_resumed_run_is_the_same():
    def run(loss, optimizer, first, last):
        history = []
        for step in range(first, last):
            optimizer.zero_grad()
            out = loss({"index": torch.arange(16)}, seeded(step))
            out.loss.mean().backward()
            optimizer.step()
            loss.after_step()
            history.append(out.metrics["reward"].item())
        return history

    settings = {"epochs": 3, "rows": 16, "num_steps": 2}
    straight = objective_of(**settings)
    optimizer = torch.optim.SGD([straight.denoiser.network.logits], lr=0.5)
    history = run(straight, optimizer, 0, 7)
    assert len(set(history)) == 3
    assert history[0] == history[1] == history[2] != history[3]
    first = objective_of(**settings)
    run(first, torch.optim.SGD([first.denoiser.network.logits], lr=0.5), 0, 4)
    second = objective_of(seed=5, **settings)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, torch.optim.SGD([second.denoiser.network.logits], lr=0.5), 4, 7)
    assert torch.equal(second.denoiser.network.logits, straight.denoiser.network.logits)


def test_groups_share_a_condition_and_are_normalised():
    loss = objective_of(
        kl_weight=0.0, baseline="group", group_size=4, normalize=True, cond_dim=1, ratio="sequence"
    )
    play = loss.draw(8, torch.tensor([[0.0], [3.0]]).repeat_interleave(4, 0), seeded())
    groups = play.advantage[:, 0].view(2, 4).float()
    torch.testing.assert_close(groups.mean(1), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(groups.std(1, correction=0), torch.ones(2))
    out = loss({"index": torch.arange(8), "cond": torch.randn(8, 1)}, seeded())
    assert out.loss.shape == (8,)
    assert set(out.metrics) == {"reward", "entropy", "clip_fraction"}


def test_reward_may_be_a_black_box_and_is_called_once_per_rollout():
    calls = []

    def black_box(x):
        calls.append(x.shape)
        return torch.tensor([float(row.argmax(-1).sum()) for row in x.numpy()])

    loss = PolicyGradientLoss(table_denoiser(), None, black_box, PolicyGradient(epochs=2, rows=4))
    for step in range(4):
        loss({"index": torch.arange(4)}, seeded(step)).loss.mean().backward()
        loss.after_step()
    assert calls == [(4, 3, 2)] * 2


def test_evaluation_mode_draws_anew_and_keeps_the_state():
    loss = objective_of(epochs=4, rows=4).eval()
    before = {k: v.clone() for k, v in loss.state_dict().items()}
    with torch.no_grad():
        loss({"index": torch.arange(6)}, seeded())
    assert all(torch.equal(v, before[k]) for k, v in loss.state_dict().items())


def test_state_space_order_is_that_of_the_rewards():
    assert StateSpace(2, 3).index(sequences(2, 3)).tolist() == list(range(8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl": "total"}, "unknown kl 'total'"),
        ({"kl_weight": -1.0}, "kl_weight must be at least 0"),
        ({"baseline": "group"}, "needs group_size=N"),
        ({"baseline": "mean", "group_size": 2}, "use baseline='group'"),
        ({"group_size": 1}, "group_size must be at least 2"),
        ({"grad_states": 1, "ratio": "sequence"}, "needs all its states"),
        ({"grad_states": 0}, "grad_states must be"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PolicyGradient(**settings)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match=r"grad_states must be in \[1, 3\]"):
        objective_of(grad_states=4)
    with pytest.raises(ValueError, match="group_size=3 must divide the batch of 4"):
        objective_of(group_size=3)({"index": torch.arange(4)}, seeded())
    with pytest.raises(ValueError, match="rows=4 must be the batch size, which is 6"):
        objective_of(epochs=2, rows=4)({"index": torch.arange(6)}, seeded())
    with pytest.raises(ValueError, match="at least 2 rows"):
        objective_of()({"index": torch.arange(1)}, seeded())
    with pytest.raises(ValueError, match="needs num_steps=K"):
        PolicyGradientLoss(table_denoiser(time_free=False), None, reward, PolicyGradient())
    with pytest.raises(ValueError, match="epochs > 1 keeps a rollout of rows"):
        PolicyGradientLoss(table_denoiser(), None, reward, PolicyGradient(epochs=2))
