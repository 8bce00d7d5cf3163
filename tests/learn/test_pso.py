"""PSO: densities of moves, known values of the loss, and the laws that it leads to."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from tuning_exact_policies import gaussian_policy, shift_policy, table_of
from tuning_tables import sequences, table_denoiser

from diffpolicy.core import AnalyticDenoiser, Denoiser, make_process, prior_start, sample
from diffpolicy.learn.adapters import add_adapters
from diffpolicy.learn.preferences.few_step import FewStep, Moves, PlanSteps, rows_alone
from diffpolicy.learn.preferences.formulas import pso_loss
from diffpolicy.learn.preferences.items import Items
from diffpolicy.learn.preferences.pso import PSO, PSOLoss
from diffpolicy.learn.reference import frozen_copy
from diffpolicy.networks import make_network
from diffpolicy.sequences.exact import ExactLaw
from diffpolicy.training.settings import TrainerConfig
from diffpolicy.training.trainer import Trainer

REWARDS = torch.randn(8, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
STOCHASTIC = (
    {"solver": "ddpm"},
    {"solver": "ddim", "options": {"eta": 0.5}},
    {"solver": "ddpm", "options": {"variance": "large"}},
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def table_reward(x):
    """Of sequences of 3 tokens of 2."""
    return REWARDS[(x.argmax(-1) * torch.tensor([4, 2, 1])).sum(-1)]


def network(process="vp_cosine", *, seed=0, scale=1.0):
    """A small conditional denoiser of plans ``[3, 2]``, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = {"type": "mlp", "width": 16, "depth": 2, "horizon": 3, "dim": 2, "cond_dim": 4}
        made = make_network(config).double()
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=0.3 * scale)
    return Denoiser(made, make_process(process), "x0")


def plan_pairs(size=6, windows=2, seed=0):
    """Pairs of segments of windows, the last of which is padding in half of them."""
    g = seeded(seed)
    batch = {}
    for name in ("chosen", "rejected"):
        batch[f"{name}_obs"] = torch.randn(size, windows, 2, 2, generator=g).double()
        batch[f"{name}_action"] = torch.randn(size, windows, 3, 2, generator=g).double()
        steps = torch.ones(size, windows, 3, dtype=torch.bool)
        steps[::2, -1] = False
        steps[:, :, 0] = False
        batch[f"{name}_steps"] = steps
    return batch


def swapped(batch):
    turn = {"chosen": "rejected", "rejected": "chosen"}
    return {k.replace(k.split("_")[0], turn[k.split("_")[0]]): v for k, v in batch.items()}


def gradient(loss, out):
    found = torch.autograd.grad(out.loss.mean(), list(loss.denoiser.parameters()))
    return torch.cat([v.flatten() for v in found])


def token_pairs(size=16, seed=0):
    tokens = torch.randint(0, 2, (2, size, 3), generator=seeded(seed))
    return {"chosen": tokens[0], "rejected": tokens[1]}


# Moves and their densities


@pytest.mark.parametrize("settings", STOCHASTIC)
@pytest.mark.parametrize("process", ["flow", "vp_cosine", "ddpm_cosine", "edm"])
def test_log_probability_is_that_of_the_samplers_gaussian(process, settings):
    policy, other = (network(process, seed=s) for s in (0, 1))
    sampler = FewStep(num_steps=4, **settings)
    steps = PlanSteps(policy.process, sampler)
    assert (len(steps), steps.nfe) == (3, 4)
    z, cond = torch.randn(5, 3, 2, generator=seeded(3)).double(), torch.ones(5, 4).double()
    scored = torch.tensor([[True, True, False]] * 4 + [[False] * 3])
    paths = steps.draw(policy, z, seeded(4), cond=cond, steps=scored)
    noise = policy.process.draw_noise((4, *z.shape), seeded(4), z)
    start = prior_start(policy.process, z)
    grid, solver = sampler.grid(policy.process), sampler.make()
    path = sample(policy, solver, start, grid, cond=cond, noise=noise, record=True)
    torch.testing.assert_close(paths.items.x0, path.x0.detach())
    for denoiser in (policy, other):
        found = steps.log_prob(denoiser, paths)
        for k, row in enumerate(path.transitions[:3]):
            answer = denoiser.on_grid(torch.stack([row.t]))(0, row.x, cond).x0_hat
            mean = row.mean + steps.rows[k].b[0] * (answer - row.denoised.x0_hat)
            law = torch.distributions.Normal(mean, row.std)
            expected = (law.log_prob(row.x_next).sum(-1) * scored).sum(-1)
            torch.testing.assert_close(found.log_p[:, k], expected)
    assert found.entries.tolist() == [[4.0] * 3] * 4 + [[0.0] * 3]


def test_windows_of_an_item_add_up_and_padding_does_not_count():
    steps = PlanSteps(make_process("flow"), FewStep(num_steps=3))
    policy = network("flow")
    x0, cond = torch.randn(4, 3, 2, generator=seeded()).double(), torch.ones(4, 4).double()
    noise = torch.randn(3, 4, 3, 2, generator=seeded(1)).double()
    scored = torch.tensor([[True] * 3, [True, False, False], [True] * 3, [False] * 3])
    alone = steps.log_prob(policy, steps.bridge(rows_alone(x0, cond, scored), noise))
    items = Items(x0, cond, scored, torch.tensor([0, 0, 1, 1]), 2)
    both = steps.log_prob(policy, steps.bridge(items, noise))
    torch.testing.assert_close(both.log_p, alone.log_p.view(2, 2, -1).sum(1))
    assert both.entries.tolist() == [[8.0, 8.0], [6.0, 6.0]]


@pytest.mark.parametrize("settings", STOCHASTIC)
@pytest.mark.parametrize("process", ["flow", "vp_cosine", "ddpm_linear", "edm"])
def test_bridges_have_the_forward_law_at_every_level(process, settings):
    """Exactly: their states are linear in the plan and in the noise of every step."""
    kind = make_process(process)
    steps = PlanSteps(kind, FewStep(num_steps=5, **settings))
    count = len(steps) + 1
    levels = steps.levels[:count].flatten()
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    means = steps.bridge(rows_alone(one, None, None), torch.zeros(count, 1, 1, 1).double())
    states = torch.cat([means.x, means.x_next[-1:]]).flatten()
    torch.testing.assert_close(states, kind.alpha(levels))
    noise = torch.eye(count, dtype=torch.float64).view(count, count, 1, 1)
    zero = torch.zeros(count, 1, 1, dtype=torch.float64)
    spread = steps.bridge(rows_alone(zero, None, None), noise)
    states = torch.cat([spread.x, spread.x_next[-1:]])
    torch.testing.assert_close(states.square().sum((1, 2, 3)), kind.sigma(levels).square())
    if settings == STOCHASTIC[0]:  # q(x_s | x_t, x0) of the Markov chain: cov = a_t/a_s s_s^2
        a, s = kind.alpha(levels), kind.sigma(levels)
        cov = (states[1:] * states[:-1]).sum((1, 2, 3))
        torch.testing.assert_close(cov, a[:-1] / a[1:] * s[1:].square())


def test_a_denoiser_is_evaluated_at_the_samplers_levels_alone():
    policy = shift_policy(4)
    loss = PSOLoss(policy, PSO(num_steps=4, anchor_weight=1.0))
    policy.network.seen.clear()
    batch = {f"{n}_action": torch.ones(8, 1, 1, 1).double() for n in ("chosen", "rejected")}
    loss(batch, seeded())
    assert {round(t / 1000, 9) for t in policy.network.seen} <= {1.0, 0.75, 0.5, 0.25}


# Values of the loss


def offline(compare="step", masked=False, **settings):
    """An objective at its reference, and a batch of pairs."""
    settings = {"compare": compare, "num_steps": 3, **settings}
    denoiser = table_denoiser(seed=1, dtype=torch.float64) if masked else network()
    batch = token_pairs() if masked else plan_pairs()
    return PSOLoss(denoiser, PSO(**settings)), batch


@pytest.mark.parametrize("compare", ["step", "path"])
@pytest.mark.parametrize("masked", [False, True])
def test_at_the_reference_the_loss_is_log_2_and_swapping_flips_its_gradient(compare, masked):
    loss, batch = offline(compare, masked)
    out, other = loss(batch, seeded()), loss(swapped(batch), seeded())
    torch.testing.assert_close(out.loss, torch.full_like(out.loss, math.log(2)))
    first, second = gradient(loss, out), gradient(loss, other)
    assert first.abs().max() > 1e-3
    torch.testing.assert_close(first, -second, rtol=1e-9, atol=1e-12)
    assert out.metrics["accuracy"] == 0.5
    assert out.metrics["saturated"] == 0
    torch.testing.assert_close(out.metrics["error_chosen"], out.metrics["error_chosen_reference"])


def moves(ratio, entries=2.0):
    """Policy and reference of which the log-ratios are these."""
    zero = torch.zeros_like(ratio)
    entries = torch.full_like(ratio, entries)
    return Moves(ratio, entries), Moves(zero, entries)


def test_published_loss_of_mean_log_probabilities():
    """Means over D entries, beta = 50 and a clamp of 0.1 are kl_beta = 50 / D here."""
    ratio, d = 2 * torch.randn(8, 3, generator=seeded()).double(), 12
    rho = (ratio / d).exp().clamp(0.9, 1.1)
    chosen, rejected = rho.log().chunk(2)
    expected = -torch.nn.functional.logsigmoid(50 * (chosen - rejected)).mean(1)
    out = pso_loss(PSO(kl_beta=50 / d, num_steps=4), *moves(ratio, d))
    torch.testing.assert_close(out.loss, expected)
    outside = ((ratio / d).exp() - 1).abs() > 0.1
    torch.testing.assert_close(out.metrics["saturated"].double(), outside.double().mean())
    assert 0 < out.metrics["saturated"] < 1


def test_beyond_the_clamp_there_is_no_gradient():
    ratio = torch.tensor([[1.0, 0.1], [-0.1, 1.0]], requires_grad=True)
    settings = PSO(kl_beta=1.0, clip=0.1)
    out = pso_loss(settings, *moves(ratio))
    (slope,) = torch.autograd.grad(out.loss.sum(), ratio)
    assert slope.tolist()[0][0] == 0
    assert slope.tolist()[1][1] == 0
    assert slope[0, 1] < 0 < slope[1, 0]
    assert out.metrics["saturated"] == 0.5
    free = pso_loss(PSO(clip=None), *moves(ratio))
    assert torch.autograd.grad(free.loss.sum(), ratio)[0].abs().min() > 0.05
    assert free.metrics["saturated"] == 0


def test_limits_of_kl_beta():
    ratio = torch.randn(6, 1, generator=seeded()).double().requires_grad_()
    gap = (ratio[:3] - ratio[3:]).squeeze(1)
    small = pso_loss(PSO(kl_beta=1e-6, clip=None), *moves(ratio))
    torch.testing.assert_close(small.loss, torch.full_like(gap, math.log(2)), atol=1e-5, rtol=0)
    (slope,) = torch.autograd.grad(small.loss.sum() / 1e-6, ratio)
    torch.testing.assert_close(slope[:3], torch.full_like(slope[:3], -0.5), atol=1e-5, rtol=0)
    large = pso_loss(PSO(kl_beta=1e4, clip=None), *moves(ratio))
    torch.testing.assert_close(large.loss / 1e4, (-gap).clamp_min(0), atol=1e-4, rtol=0)


def test_paths_add_up_steps_and_empty_steps_do_not_count():
    ratio = torch.tensor([[0.3, 0.0], [0.1, 0.0]])
    policy, reference = moves(ratio)
    entries = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    policy, reference = policy._replace(entries=entries), reference._replace(entries=entries)
    for compare in ("step", "path"):
        out = pso_loss(PSO(compare=compare, clip=None), policy, reference)
        assert out.loss.item() == pytest.approx(math.log1p(math.exp(-0.2)))
    many = torch.tensor([[0.3, 0.4], [0.1, -0.1]])
    out = pso_loss(PSO(compare="path", clip=None), *moves(many))
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(-0.7)))
    assert out.metrics["gap"].item() == pytest.approx(0.7)
    assert out.metrics["log_ratio"].item() == pytest.approx(0.35)


def test_uncertain_labels_have_the_expected_loss_and_ties_none_to_prefer():
    ratio = torch.randn(8, 2, generator=seeded()).double()
    settings, turned = PSO(clip=None), torch.cat(ratio.chunk(2)[::-1])
    chance = torch.tensor([0.5, 0.7, 0.9, 1.0]).double()
    out = pso_loss(settings, *moves(ratio), chance)
    there, back = (pso_loss(settings, *moves(r)).loss for r in (ratio, turned))
    torch.testing.assert_close(out.loss, chance * there + (1 - chance) * back)
    tie = moves(ratio[:2].repeat_interleave(1, 0).detach().requires_grad_())
    tied = pso_loss(settings, *tie, torch.tensor([0.5]))
    (slope,) = torch.autograd.grad(tied.loss.sum(), tie[0].log_p)
    lead = tie[0].log_p[0] - tie[0].log_p[1]
    assert torch.equal(slope[0].sign(), lead.sign())  # to equality


# Online and offline


@pytest.mark.parametrize("compare", ["step", "path"])
def test_online_is_offline_where_pairs_coincide(compare):
    """Sequences that the policy drew, as a data set: the same orders, loss and gradient."""
    denoiser, reference = (table_denoiser(seed=s, dtype=torch.float64) for s in (1, 2))
    common = {"compare": compare, "num_steps": None, "clip": None}
    online = PSOLoss(denoiser, PSO(online=True, **common), reward=table_reward, reference=reference)
    given = PSOLoss(denoiser, PSO(**common), reference=frozen_copy(reference))
    batch = {"index": torch.arange(32)}
    paths, reward = online.draw(batch, seeded())
    first, second = paths.tokens.chunk(2)
    lead = reward.chunk(2)[0] - reward.chunk(2)[1]
    turn = (lead < 0).unsqueeze(1)
    pairs = {
        "chosen": torch.where(turn, second, first),
        "rejected": torch.where(turn, first, second),
    }
    outs = online(batch, seeded()), given(pairs, seeded())
    unlike = lead != 0  # a tie is no pair of a data set
    assert 8 < unlike.sum() < 32
    torch.testing.assert_close(outs[0].loss[unlike], outs[1].loss[unlike])
    slopes = [
        torch.autograd.grad(out.loss[unlike].sum(), denoiser.network.logits)[0] for out in outs
    ]
    torch.testing.assert_close(*slopes)
    assert slopes[0].abs().max() > 1e-3


def test_a_bridge_is_the_chain_of_a_denoiser_that_knows_its_end():
    policy, steps = shift_policy(3), PlanSteps(make_process("flow"), FewStep(num_steps=3))
    policy.network.shift.data[:] = 0.7
    z = torch.randn(16, 1, 1, generator=seeded()).double()
    paths = steps.draw(policy, z, seeded(1))
    noise = torch.cat([z[None], policy.process.draw_noise((3, 16, 1, 1), seeded(1), z)[:-1]])
    end = rows_alone(torch.full_like(z, 0.7), None, None)
    bridged = steps.bridge(end, noise)
    torch.testing.assert_close(bridged.x, paths.x)
    torch.testing.assert_close(bridged.x_next, paths.x_next)
    loss = PSOLoss(policy, PSO(num_steps=3), reference=shift_policy(3))
    outs = [loss.compare(one) for one in (paths, bridged)]
    torch.testing.assert_close(outs[0].loss, outs[1].loss)
    torch.testing.assert_close(*(gradient(loss, out) for out in outs))


def test_chains_of_a_pair_share_their_start_and_condition():
    policy, seen = network(), []

    def reward(plan, cond):
        seen.append((plan, cond))
        return plan.sum((1, 2))

    settings = {"online": True, "num_steps": 3}
    cond = torch.randn(4, 4, generator=seeded()).double()
    loss = PSOLoss(policy, PSO(**settings), reward=reward)
    paths, value = loss.draw({"cond": cond}, seeded())
    first, second = paths.x[0].chunk(2)
    assert torch.equal(first, second)
    assert not torch.equal(*paths.x_next[0].chunk(2))
    assert torch.equal(seen[0][1], torch.cat([cond, cond]))
    torch.testing.assert_close(value, seen[0][0].sum((1, 2)), check_dtype=False)
    apart = PSOLoss(policy, PSO(shared_start=False, **settings), reward=reward)
    assert not torch.equal(*apart.draw({"cond": cond}, seeded())[0].x[0].chunk(2))
    from_obs = loss.draw({"obs": cond.view(4, 2, 2)}, seeded())[0]
    assert torch.equal(from_obs.x_next, paths.x_next)
    out = loss({"cond": cond}, seeded())
    assert out.loss.shape == (4,)
    assert out.metrics["ties"] == 0
    torch.testing.assert_close(out.metrics["reward"], value.mean())


# Learning


def train(loss, batch, steps, lr):
    parameters = [p for p in loss.denoiser.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for step in range(steps):
        optimizer.zero_grad()
        out = loss(batch, seeded(step))
        out.loss.mean().backward()
        optimizer.step()
        schedule.step()
    return out


def test_two_steps_reach_the_known_optimum():
    """One move with a density: its mean goes to that of ``p_ref exp(r / (s kl_beta))``.

    With the move ``N(a x + b shift, g^2)`` and a reward ``c x_next`` the optimum is ``b shift = g^2
    c / (s kl_beta)``; the last step of this policy does not look at its state, so r is read there.
    """
    policy = shift_policy(2)
    settings = PSO(
        online=True, num_steps=2, kl_beta=0.5, clip=None, label_scale=2.0, compare="path"
    )
    loss = PSOLoss(policy, settings, reward=lambda plan: plan.sum((1, 2)))
    row = loss.steps.rows[0]
    drawn = loss.draw

    def judged(batch, generator):
        paths, _ = drawn(batch, generator)
        return paths, 1.5 * paths.x_next[0].flatten()

    loss.draw = judged
    train(loss, {"index": torch.arange(256)}, 80, 0.15)
    b, g = row.b[0].item(), row.g.item()
    expected = g**2 * 1.5 / (2.0 * 0.5) / b
    assert policy.network.shift[0].item() == pytest.approx(expected, rel=0.05)
    assert policy.network.shift[1].item() == 0  # the last step has no density


@pytest.mark.parametrize("num_steps", [2, 4])
def test_a_gaussian_policy_moves_to_the_preferred_side(num_steps):
    policy = gaussian_policy(0.0, 0.5)
    policy.network.log_std.requires_grad = False
    loss = PSOLoss(policy, PSO(online=True, num_steps=num_steps), reward=lambda x: x.sum((1, 2)))
    out = train(loss, {"index": torch.arange(64)}, 60, 0.02)
    assert policy.network.mean > 0.15
    assert out.metrics["reward"] > 0.1
    assert 0 < out.metrics["saturated"] < 1  # which is what ends it
    assert out.metrics["accuracy"] > 0.5


@pytest.mark.parametrize("online", [True, False])
def test_masked_paths_lead_to_the_exact_tilted_law(online):
    """Of a reference whose law does not depend on the order of reveals."""
    before = torch.randn(8, generator=seeded(5), dtype=torch.float64).softmax(0)
    policy = table_of(before)
    common = {"num_steps": None, "kl_beta": 0.5, "clip": None, "compare": "path"}
    target = before * (REWARDS / 0.5).exp()
    target /= target.sum()
    assert (before - target).abs().sum() / 2 > 0.25
    if online:
        settings = PSO(online=True, label_scale=1.0, **common)
        loss = PSOLoss(policy, settings, reward=table_reward)
        train(loss, {"index": torch.arange(256)}, 100, 0.1)
    else:  # all pairs of sequences, labelled by many judges
        loss = PSOLoss(policy, PSO(**common))
        first, second = torch.combinations(torch.arange(8)).repeat(8, 1).unbind(1)
        chance = (REWARDS[first] - REWARDS[second]).sigmoid()
        pairs = {"chosen": sequences(2, 3)[first], "rejected": sequences(2, 3)[second]}
        loss.forward = lambda batch, g: loss.compare(loss.bridge(batch, g), chance)
        train(loss, pairs, 100, 0.1)
    with torch.no_grad():
        after = ExactLaw.of(policy).p
    assert (after - target).abs().sum() / 2 < 0.05


@pytest.mark.parametrize("time_free", [True, False])
def test_masked_steps_raise_the_reward(time_free):
    policy = table_denoiser(seed=2, time_free=time_free, dtype=torch.float64)
    settings = PSO(online=True, num_steps=2, kl_beta=2.0, clip=0.5)
    loss = PSOLoss(policy, settings, reward=table_reward)
    batch = {"index": torch.arange(256)}
    before = loss(batch, seeded(1)).metrics["reward"]
    out = train(loss, batch, 30, 0.1)
    assert out.metrics["reward"] > before + 0.2
    assert 0 < out.metrics["ties"] < 1


# Wiring


def test_anchor_is_the_denoising_error_of_demonstrations_or_of_chosen_items():
    policy = network()
    settings = {"anchor_weight": 0.5, "num_steps": 3}
    loss, batch = PSOLoss(policy, PSO(**settings)), plan_pairs()
    out = loss(batch, seeded())
    assert (out.loss > math.log(2)).all()
    assert out.loss.mean().item() == pytest.approx(math.log(2) + 0.5 * out.metrics["anchor"].item())
    demos = {"anchor_obs": batch["chosen_obs"][:, 0], "anchor_action": batch["chosen_action"][:, 0]}
    other = loss({**batch, **demos}, seeded())  # all positions of these count
    assert other.metrics["anchor"] != out.metrics["anchor"]
    for anchor in ("chosen", "both"):
        loss = PSOLoss(policy, PSO(**settings, anchor=anchor))
        found = loss({**batch, **demos}, seeded()).metrics["anchor"]
        if anchor == "chosen":
            assert found == out.metrics["anchor"]
        else:
            assert found > max(out.metrics["anchor"], other.metrics["anchor"])
    online = PSOLoss(policy, PSO(online=True, **settings), reward=lambda x, cond: x.sum((1, 2)))
    windows = {"obs": demos["anchor_obs"], "action": demos["anchor_action"]}
    assert online(windows, seeded()).metrics["anchor"] > 0
    with pytest.raises(ValueError, match="needs a batch with anchor_obs and anchor_action"):
        online({"cond": torch.zeros(3, 4).double()}, seeded())
    masked = PSOLoss(table_denoiser(), PSO(**settings))
    assert masked(token_pairs(), seeded()).metrics["anchor"] > 0


def test_adapters_switched_off_are_the_reference():
    policy = network()
    add_adapters(policy, {"type": "lora", "rank": 2})
    loss, batch = PSOLoss(policy), plan_pairs()
    assert loss.reference is None
    out = loss(batch, seeded())
    torch.testing.assert_close(out.loss, torch.full_like(out.loss, math.log(2)))
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p += 0.3
    moved = loss(batch, seeded()).metrics
    assert moved["error_chosen"] != moved["error_chosen_reference"]
    torch.testing.assert_close(moved["error_chosen_reference"], out.metrics["error_chosen"])


class Source:
    def __len__(self):
        return 16

    def gather(self, indices):
        return {"index": indices, "cond": torch.ones(len(indices), 4).double()}


def test_trains_online_with_the_trainer(tmp_path):
    policy = network()
    before = frozen_copy(policy)
    loss = PSOLoss(policy, PSO(online=True, num_steps=2), reward=lambda x, cond: x.sum((1, 2)))
    config = TrainerConfig(steps=3, batch_size=8, progress=False)
    Trainer(loss, Source(), config, tmp_path).fit()
    old, new = (next(p.parameters()) for p in (before, policy))
    assert not torch.equal(old, new)
    assert torch.equal(next(loss.reference.parameters()), old)
    assert not loss.reference.training
    assert "saturated" in (tmp_path / "metrics.csv").read_text()


def test_bad_settings():
    for values, message in (
        ({"kl_beta": 0.0}, "kl_beta must be positive"),
        ({"kl_beta": math.inf}, "kl_beta must be positive"),
        ({"clip": 1.0}, "clip must be in"),
        ({"compare": "chain"}, "unknown compare 'chain'"),
        ({"online": True, "label_scale": 0.0}, "label_scale must be positive"),
        ({"anchor_weight": -1.0}, "anchor_weight must be at least 0"),
        ({"solver": "ddpm", "options": {"order": 2}}, "has no setting 'order'"),
        ({"spacing": "even"}, "unknown spacing"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            PSO(**values)


def test_samplers_without_a_density_are_refused():
    policy = gaussian_policy()
    for values, message in (
        ({"solver": "ddim"}, "have no density: .*use solver='ddpm'"),
        ({"solver": "heun"}, "have no density"),
        ({"solver": "dpmpp_2m_sde"}, "or have a memory"),
        ({"num_steps": 1}, "num_steps of at least 2"),
        ({"num_steps": None}, "of plans give num_steps=K"),
    ):
        with pytest.raises(ValueError, match=message):
            PSOLoss(policy, PSO(**values))
    masked = table_denoiser(time_free=False)
    with pytest.raises(ValueError, match="needs num_steps=K"):
        PSOLoss(masked, PSO(num_steps=None))
    dropping = Denoiser(nn.Sequential(nn.Dropout(0.1)), policy.process, "x0")
    with pytest.raises(ValueError, match="dropout"):
        PSOLoss(dropping)
    with pytest.raises(ValueError, match="shares weights"):
        PSOLoss(policy, reference=policy)


def test_bad_batches_and_rewards():
    policy = gaussian_policy()
    with pytest.raises(ValueError, match="give reward"):
        PSOLoss(policy, PSO(online=True))
    online = PSOLoss(policy, PSO(online=True), reward=lambda x: x.sum())
    with pytest.raises(ValueError, match="one number per item, \\[8\\]; got \\[\\]"):
        online({"index": torch.arange(4)}, seeded())
    given = PSOLoss(policy)
    with pytest.raises(ValueError, match="pairs of plans need chosen_obs"):
        given({"index": torch.arange(4)}, seeded())
    plans = torch.zeros(4, 2, 1, 1).double()
    with pytest.raises(ValueError, match="pad the shorter segments"):
        given({"chosen_action": plans, "rejected_action": plans[:, :1]}, seeded())
    analytic = AnalyticDenoiser(make_process("flow"), lambda x, t, cond: x)
    with pytest.raises(ValueError, match="attributes horizon and dim"):
        PSOLoss(analytic, PSO(online=True), reward=lambda x: x.sum((1, 2)))
