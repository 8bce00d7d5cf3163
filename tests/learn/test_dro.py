"""Diffusion-DRO: where its gradient vanishes, what its negatives are, and what it learns."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from tuning_exact_policies import gaussian_policy, table_of
from tuning_tables import sequences, table_denoiser

from diffpolicy.core import AnalyticDenoiser, Denoiser, make_process, prior_start, sample
from diffpolicy.learn.adapters import add_adapters
from diffpolicy.learn.preferences.dro import DRO, DROLoss
from diffpolicy.learn.preferences.negatives import Contrast, contrast_plans, contrast_sequences
from diffpolicy.learn.reference import frozen_copy
from diffpolicy.learn.reward.rollouts import draw_rollout
from diffpolicy.networks import make_network
from diffpolicy.sequences.exact import ExactLaw
from diffpolicy.training.settings import TrainerConfig
from diffpolicy.training.trainer import Trainer

NOISED = {"negative": "noised", "margin": None}
LINEAR = {"margin": None, "sync_every": 3}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def demonstrations(size, mean=1.0, std=0.3, seed=0):
    z = torch.randn(size, 1, 1, dtype=torch.float64, generator=seeded(seed))
    return {"obs": torch.zeros(size, 1, 1, dtype=torch.float64), "action": mean + std * z}


def gradient(loss, out, weights=None):
    total = out.loss.mean() if weights is None else (weights * out.loss).sum()
    parameters = list(loss.denoiser.parameters())
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    pairs = zip(parameters, found, strict=True)
    return torch.cat([(torch.zeros_like(p) if f is None else f).flatten() for p, f in pairs])


def normal_nodes(count):
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())


# Where the gradient vanishes


@pytest.mark.parametrize("settings", [{}, {"sync_every": 3}, LINEAR, NOISED])
def test_gradient_vanishes_exactly_where_a_gaussian_policy_is_the_expert(settings):
    """In expectation over expert and noise, by quadrature, at several levels."""
    policy = gaussian_policy(0.7, 0.4)
    loss = DROLoss(policy, DRO(**settings))
    nodes, weights = normal_nodes(6)
    x0, noise, t = (
        v.reshape(-1, 1, 1)
        for v in torch.meshgrid(
            0.7 + 0.4 * nodes, nodes, torch.tensor([0.2, 0.6, 0.9]).double(), indexing="ij"
        )
    )
    weight = (weights[:, None, None] * weights[None, :, None]).expand(6, 6, 3).flatten() / 3
    x = policy.process.add_noise(x0, t, noise)
    with torch.no_grad():
        goal = x0 if loss.settings.negative == "noised" else policy.raw(x, t)
    other = Contrast(x, t, goal, None)
    pairs = Contrast(torch.cat([x, x]), torch.cat([t, t]), torch.cat([x0, other.target]), None)
    out = loss.rank(pairs, len(x0))
    assert gradient(loss, out, weight).abs().max() < 1e-12
    assert out.metrics["saturated"] == 0


def test_gradient_points_to_the_expert_elsewhere():
    policy = gaussian_policy(0.0, 0.5)
    for settings in ({}, LINEAR, NOISED):
        loss = DROLoss(policy, DRO(**settings))
        slope = gradient(loss, loss(demonstrations(512), seeded()))
        assert slope[0] < -0.05


LAW = torch.randn(8, generator=seeded(5), dtype=torch.float64).softmax(0)


@pytest.mark.parametrize("settings", [{}, LINEAR, NOISED])
def test_gradient_vanishes_exactly_where_a_masked_policy_is_the_expert(settings):
    """In expectation over all sequences and masks."""
    policy, every = table_of(LAW), sequences(2, 3)
    torch.testing.assert_close(ExactLaw.of(policy).p, LAW)
    loss = DROLoss(policy, DRO(num_steps=None, **settings))
    masks = torch.tensor([m for m in itertools.product([True, False], repeat=3) if any(m)])
    size = len(every) * len(masks)
    tokens = every.repeat_interleave(len(masks), 0)
    hidden = masks.repeat(len(every), 1)
    weight = LAW.repeat_interleave(len(masks)) / len(masks)
    x, t = torch.where(hidden, 2, tokens), torch.ones(size, 1, 1)
    target = torch.nn.functional.one_hot(tokens, 2).double().log()
    with torch.no_grad():
        own = policy.log_probs(x, t) if loss.settings.negative == "prediction" else target
    pairs = Contrast(torch.cat([x, x]), torch.cat([t, t]), torch.cat([target, own]), None)
    assert gradient(loss, loss.rank(pairs, size), weight).abs().max() < 1e-12


@pytest.mark.parametrize("num_steps", [None, 2])
def test_noised_gradient_vanishes_in_expectation_for_what_the_sampler_makes(num_steps):
    """Whatever the denoiser: demonstrations drawn from the policy leave nothing to learn."""
    policy = table_denoiser(seed=3, dtype=torch.float64)
    loss = DROLoss(policy, DRO(num_steps=num_steps, states=2, **NOISED))
    found = []
    for seed in range(60):
        own = draw_rollout(policy, 64, generator=seeded(1000 + seed), num_steps=num_steps)
        found.append(gradient(loss, loss({"tokens": own.tokens}, seeded(seed))))
    grads = torch.stack(found)
    error = grads.mean(0) / (grads.std(0) / 60**0.5).clamp_min(1e-5)
    assert error.abs().max() < 4.5
    expert = {"tokens": torch.zeros(64, 3, dtype=torch.long)}
    pushed = torch.stack([gradient(loss, loss(expert, seeded(s))) for s in range(10)])
    assert pushed.mean(0).norm() > 10 * grads.mean(0).norm()


def test_own_error_is_zero_with_no_gradient_where_the_copy_is_the_policy():
    policy = gaussian_policy(0.0, 0.5)
    once, kept = (DROLoss(policy, DRO(sync_every=n)) for n in (1, 2))
    batch = demonstrations(32)
    outs = [loss(batch, seeded()) for loss in (once, kept)]
    assert all(out.metrics["error_own"] == 0 for out in outs)
    torch.testing.assert_close(outs[0].loss, outs[1].loss)
    torch.testing.assert_close(*(gradient(*v) for v in zip((once, kept), outs, strict=True)))
    # The rest of it is behaviour cloning at the chain's levels.
    pairs = once.draw(batch, seeded()).demonstrations()
    cloning = (policy.raw(pairs.x, pairs.t) - pairs.target).square().mean((1, 2))
    grads = torch.autograd.grad(cloning.mean(), list(policy.parameters()))
    expected = torch.cat([v.flatten() for v in grads])
    torch.testing.assert_close(gradient(once, once(batch, seeded())), expected)


def test_published_loss_of_four_errors():
    policy, reference = gaussian_policy(0.4, 0.5), gaussian_policy(0.0, 0.6)
    loss = DROLoss(policy, DRO(sync_every=2, margin=0.05), reference=reference)
    with torch.no_grad():
        policy.network.mean += 0.2  # the copy stays behind
    pairs = loss.draw(demonstrations(64), seeded())
    (x, other), (t, _), (goal, own) = (v.chunk(2) for v in pairs[:3])
    errors = [
        (d.raw(at, t) - to).square().flatten()
        for d in (policy, reference)
        for at, to in ((x, goal), (other, own))
    ]
    diff = (errors[0] - errors[2]) - (errors[1] - errors[3])
    out = loss.rank(pairs, 64)
    torch.testing.assert_close(out.loss, (diff + 0.05).clamp_min(0))
    torch.testing.assert_close(out.metrics["gap"], -diff.mean())
    torch.testing.assert_close(
        out.metrics["saturated"], (diff <= -0.05).double().mean(), check_dtype=False
    )
    assert 0.1 < out.metrics["saturated"] < 0.9
    torch.testing.assert_close(own, loss.own.raw(other, t))
    loss.after_step()
    assert loss.own.network.mean != policy.network.mean
    loss.after_step()
    assert loss.own.network.mean == policy.network.mean


def test_updates_between_synchronisations_are_one_of_a_larger_rate():
    moved = []
    for updates, rate in ((4, 0.01), (1, 0.04)):
        policy = gaussian_policy(0.0, 0.5)
        policy.network.log_std.requires_grad = False
        loss = DROLoss(policy, DRO(margin=None, sync_every=4))
        optimizer = torch.optim.SGD([policy.network.mean], lr=rate)
        for _ in range(updates):
            optimizer.zero_grad()
            loss(demonstrations(64), seeded()).loss.mean().backward()
            optimizer.step()
            loss.after_step()
        moved.append(policy.network.mean.item())
    assert moved[0] == pytest.approx(moved[1], rel=1e-9)
    assert moved[0] > 0.02


# Negatives


def test_states_are_those_of_the_policys_chain_at_the_demonstrations_levels():
    policy, batch = gaussian_policy(0.3, 0.4), demonstrations(16)
    sampler = DRO(num_steps=4, solver="ddim", states=4, jitter=False)
    pairs = contrast_plans(policy, sampler, batch["action"], None, seeded())
    start = prior_start(policy.process, torch.randn(16, 1, 1).double())  # its shape
    noise = policy.process.draw_noise(start.x.shape, seeded(), start.x)
    begin = prior_start(policy.process, noise)
    solver, grid = sampler.make(), sampler.grid(policy.process)
    with torch.no_grad():
        path = sample(policy, solver, begin, grid, record=True)
    expected = torch.stack([row.x for row in path.transitions], 1).flatten(0, 1)
    t = grid[:-1, 0, 0, 0].repeat(16)
    demos, own = pairs.x.chunk(2)
    torch.testing.assert_close(own, expected)
    torch.testing.assert_close(pairs.t.flatten(), torch.cat([t, t]))
    x0 = batch["action"].repeat_interleave(4, 0)
    torch.testing.assert_close(pairs.target.chunk(2)[0], x0)
    implied = (demos - (1 - t).view(-1, 1, 1) * x0) / t.view(-1, 1, 1)
    assert abs(implied.mean()) < 0.5
    assert 0.7 < implied.std() < 1.3
    sampler = replace(sampler, negative="noised")
    noised = contrast_plans(policy, sampler, batch["action"], None, seeded())
    torch.testing.assert_close(noised.target.chunk(2)[1], path.x0.repeat_interleave(4, 0))
    shared = (noised.x.chunk(2)[1] - (1 - t).view(-1, 1, 1) * noised.target.chunk(2)[1]) / t.view(
        -1, 1, 1
    )
    torch.testing.assert_close(shared, implied)


@pytest.mark.parametrize("process", ["flow", "ddpm_cosine", "vp_cosine", "edm"])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "dpmpp_2m_sde", "unipc"])
def test_jittered_levels_cover_the_clock_and_stay_finite(process, solver):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = make_network({"type": "mlp", "width": 8, "depth": 1, "horizon": 2, "dim": 1})
    kind = make_process(process)
    policy = Denoiser(network, kind, "x0" if process != "edm" else "edm")
    sampler = DRO(num_steps=5, solver=solver, states=2)
    x0 = torch.randn(400, 2, 1, generator=seeded())
    pairs = contrast_plans(policy, sampler, x0, None, seeded())
    assert all(bool(v.isfinite().all()) for v in pairs[:3])
    t = pairs.t.chunk(2)[0].flatten()
    shares = torch.histc(t, 4, 0, 1) / len(t)
    assert shares[:3].min() > 0.1
    torch.testing.assert_close(kind.snap(t), t)
    assert t.min() > 0


def test_masks_of_demonstrations_are_those_of_the_chains_states():
    policy = table_denoiser(seed=1)
    loss = DROLoss(policy, DRO(num_steps=None, states=3))
    tokens = sequences(2, 3).repeat(8, 1)
    pairs = loss.draw({"tokens": tokens}, seeded())
    demos, own = pairs.x.chunk(2)
    assert torch.equal(demos == 2, own == 2)
    assert sorted(set((own == 2).sum(1).tolist())) == [1, 2, 3]
    shown = demos != 2
    assert torch.equal(demos[shown], tokens.repeat_interleave(3, 0)[shown])
    torch.testing.assert_close(pairs.target.chunk(2)[1], policy.log_probs(own, pairs.t[:1]))
    settings = replace(loss.settings, negative="noised")
    hard = contrast_sequences(policy, settings, tokens, None, seeded())
    drawn = hard.target.chunk(2)[1].argmax(-1)
    assert torch.equal(drawn[shown], own[shown])


# Learning


def learned(policy, settings, *, expert=(1.0, 0.3), steps=120, lr=0.05, reference=None, size=128):
    loss = DROLoss(policy, settings, reference=reference)
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for step in range(steps):
        optimizer.zero_grad()
        loss(demonstrations(size, *expert, seed=9999 + step), seeded(step)).loss.mean().backward()
        optimizer.step()
        schedule.step()
        loss.after_step()
    return policy.network.mean.item(), policy.network.log_std.exp().item()


@pytest.mark.parametrize("settings", [LINEAR, {"margin": 10.0}])
def test_a_policy_off_the_expert_moves_onto_it(settings):
    mean, std = learned(gaussian_policy(0.0, 0.6), DRO(num_steps=5, **settings))
    assert mean == pytest.approx(1.0, abs=0.05)
    assert std == pytest.approx(0.3, abs=0.05)


def test_the_margin_says_how_far_a_policy_goes():
    means = [
        learned(gaussian_policy(0.0, 0.5), DRO(margin=m, num_steps=4), steps=80, size=64)[0]
        for m in (0.001, 0.2)
    ]
    assert 0 < means[0] < 0.35
    assert means[0] + 0.15 < means[1] < 0.9


def law_of_sampler(policy, sampler, count=20_000):
    start = prior_start(policy.process, torch.randn(count, 1, 1, generator=seeded(1)).double())
    with torch.no_grad():
        x0 = sample(
            policy,
            sampler.make(),
            start,
            sampler.grid(policy.process),
            generator=seeded(2),
        )
    return x0.mean().item(), x0.std().item()


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_noised_negatives_give_a_two_step_sampler_the_experts_law(solver):
    """Two steps of the right denoiser make a third of its standard deviation."""
    settings = DRO(num_steps=2, solver=solver, jitter=False, **NOISED)
    right = gaussian_policy(1.0, 0.3)
    assert law_of_sampler(right, settings)[1] < 0.12
    policy = gaussian_policy(0.5, 0.3)
    learned(policy, settings, steps=200, size=256)
    mean, std = law_of_sampler(policy, settings)
    assert mean == pytest.approx(1.0, abs=0.05)
    assert std == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("settings", [{"margin": None, "sync_every": 2}, NOISED, {"margin": 10.0}])
def test_a_masked_policy_off_the_expert_moves_onto_it(settings):
    policy = table_denoiser(seed=2, dtype=torch.float64)
    loss = DROLoss(policy, DRO(num_steps=None, states=3, **settings))
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 100)
    every = sequences(2, 3)

    def distance():
        with torch.no_grad():
            return float((ExactLaw.of(policy).p - LAW).abs().sum() / 2)

    assert distance() > 0.3
    for step in range(100):
        rows = torch.multinomial(LAW, 256, replacement=True, generator=seeded(step))
        optimizer.zero_grad()
        loss({"tokens": every[rows]}, seeded(step)).loss.mean().backward()
        optimizer.step()
        schedule.step()
        loss.after_step()
    assert distance() < 0.05


# Wiring


class Source:
    def __len__(self):
        return 32

    def gather(self, indices):
        return {
            "obs": torch.ones(len(indices), 2, 1),
            "action": torch.linspace(-1, 1, 32).view(-1, 1, 1).expand(-1, 3, 2)[indices],
        }


def conditional(**settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = {"type": "mlp", "width": 16, "depth": 2, "horizon": 3, "dim": 2, "cond_dim": 2}
        return Denoiser(make_network({**config, **settings}), make_process("vp_cosine"), "eps")


def test_trains_and_resumes_with_its_copy(tmp_path):
    def trained(folder, steps, resume=False):
        loss = DROLoss(conditional(), DRO(num_steps=4, sync_every=3, margin=0.1))
        config = TrainerConfig(
            steps=steps, batch_size=8, progress=False, checkpoint_every=4, lr_schedule="constant"
        )
        Trainer(loss, Source(), config, tmp_path / folder, resume=resume).fit()
        return loss.state_dict()

    whole = trained("whole", 8)
    trained("parts", 4)
    again = trained("parts", 8, resume=True)
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    assert int(whole["age"]) == 2


def test_adapters_switched_off_are_the_reference():
    policy = conditional()
    add_adapters(policy, {"type": "lora", "rank": 2})
    loss = DROLoss(policy, DRO(num_steps=4, sync_every=2))
    assert loss.reference is None
    out = loss(Source().gather(torch.arange(16)), seeded())
    torch.testing.assert_close(
        out.metrics["error_expert"], out.metrics["error_expert_reference"], rtol=1e-6, atol=0
    )
    out.loss.mean().backward()
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    with torch.no_grad():
        for p in trained:
            p.add_(0.1)
    loss.after_step(), loss.after_step()
    later = loss(Source().gather(torch.arange(16)), seeded())
    assert later.metrics["error_own"] == 0
    assert later.metrics["error_own_reference"] > 0


def test_bad_settings():
    for values, message in (
        ({"negative": "own"}, "unknown negative 'own'"),
        ({"margin": -1.0}, "margin must be at least 0"),
        ({"states": 0}, "at least 1"),
        ({"sync_every": 0}, "at least 1"),
        ({"states": 11}, r"states must be in \[1, 10\]"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"solver": "euler_a"}, "unknown solver"),
        ({"spacing": "x"}, "unknown spacing"),
    ):
        with pytest.raises(ValueError, match=message):
            DRO(**values)


def test_bad_denoisers_and_batches():
    policy = gaussian_policy()
    for settings, message in (
        ({"num_steps": None}, "of plans give num_steps"),
        ({"solver": "heun"}, "more than once a step"),
    ):
        with pytest.raises(ValueError, match=message):
            DROLoss(policy, DRO(**settings))
    masked = table_denoiser(time_free=False)
    with pytest.raises(ValueError, match="needs num_steps"):
        DROLoss(masked, DRO(num_steps=None))
    with pytest.raises(ValueError, match=r"states must be in \[1, 3\]"):
        DROLoss(table_denoiser(), DRO(states=5))
    with pytest.raises(ValueError, match="takes a Denoiser or a MaskedDenoiser"):
        DROLoss(AnalyticDenoiser(make_process("flow"), lambda x, t, cond: x), DRO())
    assert DROLoss(policy, DRO(**NOISED), reference=frozen_copy(policy)).reference is None
    with pytest.raises(ValueError, match="shares weights"):
        DROLoss(policy, reference=policy)
    dropping = Denoiser(nn.Sequential(nn.Dropout(0.1)), policy.process, "x0")
    with pytest.raises(ValueError, match="dropout"):
        DROLoss(dropping)
    with pytest.raises(ValueError, match="needs a batch with obs and action; got \\['tokens'\\]"):
        DROLoss(policy)({"tokens": torch.zeros(2, 3)}, seeded())
    with pytest.raises(ValueError, match="repeats a training level"):
        DROLoss(
            Denoiser(policy.network, make_process({"type": "ddpm_cosine", "num_steps": 5}), "x0"),
            DRO(num_steps=8, jitter=False),
        )
