"""Reward gradients through chains of plans: against closed forms, and against each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from tuning_tilted_mixture import MixtureDenoiser, one_dimensional

from diffpolicy.api import DiffusionPolicy
from diffpolicy.core import Denoiser, make_process
from diffpolicy.core.denoiser import BaseDenoiser, Denoised
from diffpolicy.core.masked_denoiser import MaskedDenoiser
from diffpolicy.core.masking import LogLinear
from diffpolicy.data.store import EpisodeStore
from diffpolicy.learn.reward.pathwise import MaskedChain, RewardLoss
from diffpolicy.learn.reward.plan_chain import PlanChain
from diffpolicy.networks import make_network
from diffpolicy.training.settings import TrainerConfig
from diffpolicy.training.trainer import Trainer


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(size, cond=None):
    given = {} if cond is None else {"cond": cond}
    return {"index": torch.arange(size), **given}


def gradient(denoiser, reward, chain, *, size=8, kl_weight=0.0, cond=None, reference=None, seed=0):
    """Loss ``[B]``, gradients by name and metrics of one batch."""
    loss = RewardLoss(denoiser, reward, chain, kl_weight=kl_weight, reference=reference)
    out = loss(batch(size, cond), seeded(seed))
    names, parameters = zip(*denoiser.named_parameters(), strict=True)
    found = torch.autograd.grad(out.loss.mean(), parameters, allow_unused=True)
    return out.loss.detach(), dict(zip(names, found, strict=True)), out.metrics


def same(got, wanted, **tolerance):
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, wanted[name], msg=name, **tolerance)


@pytest.fixture
def network():
    """A small conditional denoiser in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = {"type": "mlp", "width": 16, "depth": 2, "horizon": 3, "dim": 2, "cond_dim": 4}
        made = make_network(config).double()
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=0.3)
    return Denoiser(made, make_process("vp_cosine"), "x0")


COND = torch.linspace(-1, 1, 32, dtype=torch.float64).view(8, 4)


def critic(plan, cond):
    """Prefers plans near the first two numbers of the condition."""
    return -(plan - cond[:, None, :2]).square().sum((1, 2))


# Gradients


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "heun", "dpmpp_2m"])
def test_all_steps_with_a_graph_are_the_full_gradient(network, solver):
    nfe = 7 if solver == "heun" else 4
    full = gradient(network, critic, PlanChain(num_steps=4, solver=solver), cond=COND)
    every = gradient(network, critic, PlanChain.draft_k(nfe, num_steps=4, solver=solver), cond=COND)
    assert torch.equal(every[0], full[0])
    same(every[1], full[1], rtol=0, atol=0)
    fewer = gradient(network, critic, PlanChain.draft_k(1, num_steps=4, solver=solver), cond=COND)
    assert torch.equal(fewer[0], full[0])
    assert any(not torch.equal(fewer[1][name], full[1][name]) for name in full[1])


def test_the_full_gradient_is_the_derivative(network):
    chain, weight = PlanChain(num_steps=4, solver="ddpm"), network.network.inward.weight
    _, found, _ = gradient(network, critic, chain, cond=COND)
    ends = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            weight[0, 0] += step
            loss = RewardLoss(network, critic, chain, kl_weight=0)
            ends.append(loss(batch(8, COND), seeded()).loss.mean().item())
            weight[0, 0] -= step
    wanted = (ends[0] - ends[1]) / 2e-5
    assert found["network.inward.weight"][0, 0].item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"renoise": 2, "grad_steps": 1}, {"solver": "ddpm"}])
def test_checkpointing_changes_no_gradient(network, settings):
    weight = 0.3 if settings.get("solver") else 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        reference = Denoiser(make_network(network.network.config()).double(), network.process, "x0")
    found = [
        gradient(
            network,
            critic,
            PlanChain(num_steps=4, checkpoint=checkpoint, **settings),
            cond=COND,
            kl_weight=weight,
            reference=reference,
        )
        for checkpoint in (False, True)
    ]
    same(found[1][1], found[0][1], rtol=1e-9, atol=1e-12)


def test_draft_lv_averages_copies_of_the_last_step(network):
    n, chain = 3, PlanChain.draft_lv(3, num_steps=4)
    loss, found, _ = gradient(network, critic, chain, cond=COND)
    assert loss.shape == (8,)
    # By hand: the same plans and noise, and the reward of each copy.
    generator = seeded()
    process, like = network.process, torch.zeros(8, 3, 2, dtype=torch.float64)
    noise = process.draw_noise(like.shape, generator, like)
    t = torch.linspace(1, 0, 5, dtype=torch.float64)
    alpha, sigma = process.alpha(t), process.sigma(t)
    x = sigma[0] * noise
    with torch.no_grad():
        for i in range(4):
            x0_hat = network(x, t[i].view(1, 1, 1), COND).x0_hat
            eps = (x - alpha[i] * x0_hat) / sigma[i]
            x = alpha[i + 1] * x0_hat + sigma[i + 1] * eps
    rows = torch.arange(8).repeat_interleave(n)
    again = process.draw_noise((8 * n, 3, 2), generator, like)
    noised = alpha[3] * x[rows] + sigma[3] * again
    rewards = critic(network(noised, t[3].view(1, 1, 1), COND[rows]).x0_hat, COND[rows])
    torch.testing.assert_close(loss, -rewards.view(8, n).mean(1).detach())
    names, parameters = zip(*network.named_parameters(), strict=True)
    wanted = torch.autograd.grad(-rewards.mean(), parameters, allow_unused=True)
    same(found, dict(zip(names, wanted, strict=True)))


def test_more_copies_lower_the_variance(network):
    def spread(n):
        chain = PlanChain.draft_lv(n, num_steps=1)  # from pure noise: copies are independent
        name = "network.inward.weight"
        draws = [gradient(network, critic, chain, cond=COND, seed=s)[1][name] for s in range(30)]
        return torch.stack(draws).var(0).sum().item()

    assert spread(16) < 0.3 * spread(1)


@pytest.mark.parametrize("truncation", ["uniform", "gaussian"])
def test_alignprop_is_the_chain_whose_early_answers_are_detached(network, truncation):
    count, seen = 6, set()
    chain = PlanChain.alignprop(num_steps=count, truncation=truncation, spread=(0.5, 0.3))
    for seed in range(6):
        loss, found, metrics = gradient(network, critic, chain, cond=COND, seed=seed)
        steps = int(metrics["grad_steps"])
        seen.add(steps)
        assert 1 <= steps <= count
        generator = seeded(seed)
        like = torch.zeros(8, 3, 2, dtype=torch.float64)
        x = network.process.draw_noise(like.shape, generator, like)
        noise = network.process.draw_noise((count, *like.shape), generator, like)
        t = torch.linspace(1, 0, count + 1, dtype=torch.float64)
        alpha, sigma = network.process.alpha(t), network.process.sigma(t)
        x = sigma[0] * x
        for i in range(count):  # stochastic DDIM with eta = 1, as printed
            answer = network(x, t[i].view(1, 1, 1), COND).x0_hat
            eps = (x - alpha[i] * answer) / sigma[i]
            eps = eps.detach() if i < count - steps else eps
            answer = (x - sigma[i] * eps) / alpha[i] if alpha[i] > 1e-9 else answer.detach()
            ratio = (alpha[i] / alpha[i + 1]).square()
            std = sigma[i + 1] / sigma[i] * (1 - ratio).sqrt()
            rest = (sigma[i + 1].square() - std.square()).clamp_min(0).sqrt()
            x = alpha[i + 1] * answer + rest * eps + std * noise[i]
        rewards = critic(x, COND)
        torch.testing.assert_close(loss, -rewards.detach(), rtol=1e-6, atol=1e-8)
        names, parameters = zip(*network.named_parameters(), strict=True)
        wanted = torch.autograd.grad(-rewards.mean(), parameters, allow_unused=True)
        same(found, dict(zip(names, wanted, strict=True)), rtol=1e-5, atol=1e-8)
    assert len(seen) > 2


def test_truncation_follows_its_law():
    generator = seeded()
    uniform = PlanChain(num_steps=50, truncation="uniform")
    drawn = torch.tensor([uniform._drawn_steps(50, generator) for _ in range(2000)]).double()
    assert drawn.min() == 1
    assert drawn.max() == 50
    assert drawn.mean().item() == pytest.approx(25.5, abs=1)
    gaussian = PlanChain(num_steps=50, truncation="gaussian", spread=(0.4, 0.1))
    drawn = torch.tensor([gaussian._drawn_steps(50, generator) for _ in range(2000)]).double()
    assert drawn.mean().item() == pytest.approx(20, abs=0.5)
    assert drawn.std().item() == pytest.approx(5, abs=0.3)


# Divergence


class GaussianDenoiser(BaseDenoiser):
    """The exact denoiser of ``N(mean, std^2)``, its mean tunable."""

    def __init__(self, process, mean, std=0.4):
        super().__init__()
        self.process, self.std = process, std
        self.horizon, self.dim = 2, 1
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))

    def forward(self, x_t, t, cond=None):
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        return Denoised(self.mean + gain * (x_t - alpha * self.mean))


@pytest.mark.parametrize("steps", [None, 1, 4])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_gaussian_chains_have_their_divergence_in_closed_form(steps, checkpoint):
    """Both posteriors are Gaussian and ``x0_hat`` differs by the same in every state."""
    process, count, shift, std = make_process("vp_cosine"), 8, 0.3, 0.4
    ours, theirs = GaussianDenoiser(process, 0.5 + shift), GaussianDenoiser(process, 0.5)
    chain = PlanChain(num_steps=count, solver="ddpm", grad_steps=steps, checkpoint=checkpoint)

    def nothing(plan):
        return 0 * plan.sum((1, 2))

    loss, found, metrics = gradient(ours, nothing, chain, kl_weight=2.0, reference=theirs)
    t = torch.linspace(1, 0, count + 1, dtype=torch.float64)
    alpha, sigma = process.alpha(t), process.sigma(t)
    total = 0.0
    for i in range(count - 1):  # the last step adds no noise
        beta = 1 - (alpha[i] / alpha[i + 1]).square()
        weight = alpha[i + 1] * beta / sigma[i].square()  # of x0_hat in the DDPM posterior
        variance = beta * (sigma[i + 1] / sigma[i]).square()
        gain = alpha[i] * std**2 / (alpha[i].square() * std**2 + sigma[i].square())
        apart = weight * (1 - gain * alpha[i])
        total += float(2 * 0.5 * apart.square() / variance)  # two positions
    torch.testing.assert_close(loss, torch.full_like(loss, 2.0 * total * shift**2))
    assert metrics["kl"].item() == pytest.approx(total * shift**2)
    assert found["mean"].item() == pytest.approx(2.0 * total * 2 * shift)
    # It bounds that of the ends: N(0.8, 0.4^2) against N(0.5, 0.4^2), twice.
    assert total * shift**2 > 0.9 * 2 * 0.5 * (shift / std) ** 2


def test_states_in_front_of_the_divergence_are_differentiated_too(network):
    """The divergence of the full graph has the derivative of its value."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        other = Denoiser(make_network(network.network.config()).double(), network.process, "x0")
        nn.init.normal_(other.network.outward.weight, std=0.3)

    def value():
        loss = RewardLoss(
            network, critic, PlanChain(num_steps=4, solver="ddpm"), kl_weight=0.7, reference=other
        )
        return loss(batch(8, COND), seeded()).loss.mean()

    weight = network.network.inward.weight
    (found,) = torch.autograd.grad(value(), weight)
    ends = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            weight[1, 2] += step
        ends.append(value().item())
        with torch.no_grad():
            weight[1, 2] -= step
    assert found[1, 2].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)


# Known optima


def ascend(denoiser, reward, chain, *, kl_weight=0.0, steps=60, rate=0.05, size=64):
    loss = RewardLoss(denoiser, reward, chain, kl_weight=kl_weight)
    optimizer = torch.optim.Adam(denoiser.parameters(), rate, betas=(0.8, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, 2 - 2 * i / steps))
    generator = seeded(3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(batch(size), generator).loss.mean().backward()
        optimizer.step()
        schedule.step()
    return loss


CHAINS = {
    "full": PlanChain(num_steps=8),
    "draft_k": PlanChain.draft_k(3, num_steps=8),
    "draft_lv": PlanChain.draft_lv(2, num_steps=8),
    "alignprop": PlanChain.alignprop(num_steps=8, spread=(0.4, 0.2), checkpoint=False),
}


@pytest.mark.parametrize("name", CHAINS)
def test_without_a_divergence_every_method_reaches_the_reward_s_maximum(name):
    """The maximum is 0, at the target; the prior's reward is -1.2."""
    problem = one_dimensional()
    denoiser = MixtureDenoiser(make_process("vp_cosine"), problem.prior)
    before = problem.expected_reward(problem.prior).item()
    assert before < -1
    ascend(denoiser, problem.reward, CHAINS[name])
    with torch.no_grad():
        generator = seeded(9)
        full = PlanChain(num_steps=30)
        plans = full.run(denoiser, None, 500, None, generator).items
    assert problem.reward(plans).mean().item() > -0.05
    assert problem.reward(plans).min().item() > before


def test_with_the_divergence_of_paths_the_tilted_law_is_reached():
    """Up to the steps: the best chain of 24 is not quite the denoiser of the tilted law."""
    problem = one_dimensional()
    denoiser = MixtureDenoiser(make_process("vp_cosine"), problem.prior)
    chain = PlanChain(num_steps=24, solver="ddpm")
    weight = problem.kl_weight
    ascend(denoiser, problem.reward, chain, kl_weight=weight, steps=26, size=256)
    law, best = denoiser.frozen(), problem.optimum
    assert problem.progress(law) > 0.95  # 24 steps reach 0.975, 12 steps 0.915
    # Of the prior they are 0.60 and 0.84 away.
    torch.testing.assert_close(law.mean(), best.mean(), rtol=0, atol=0.1)
    reward, highest = problem.expected_reward(law), problem.expected_reward(best)
    torch.testing.assert_close(reward, highest, rtol=0, atol=0.12)


def test_a_large_weight_of_the_divergence_keeps_the_prior():
    problem = one_dimensional()
    denoiser = MixtureDenoiser(make_process("vp_cosine"), problem.prior)
    chain = PlanChain(num_steps=8, solver="ddpm")
    loss = RewardLoss(denoiser, problem.reward, chain, kl_weight=1e4)
    optimizer = torch.optim.SGD(denoiser.parameters(), 1e-6)
    for seed in range(5):
        optimizer.zero_grad()
        loss(batch(64), seeded(seed)).loss.mean().backward()
        optimizer.step()
    assert problem.expected_reward(denoiser.frozen()) < problem.worst + 1e-3
    assert loss(batch(4), seeded()).loss.isfinite().all()


# A policy


def reaching(plan, cond):
    """A critic of normalised plans: actions should equal half the last observation's first two."""
    return -(plan - 0.5 * cond[:, None, -2:]).square().sum(-1).mean(-1)


class Observations:
    """Conditions to tune on, in the form of a trainer's source."""

    def __init__(self, cond):
        self.cond = cond

    def __len__(self):
        return len(self.cond)

    def gather(self, indices):
        return {"index": indices, "cond": self.cond[indices]}


def test_a_policy_is_tuned_by_a_critic(tmp_path):
    rng = np.random.default_rng(0)
    obs = rng.uniform(-1, 1, (600, 2)).astype(np.float32)
    action = (0.8 * obs + rng.normal(0, 0.1, obs.shape)).astype(np.float32)  # not what it rewards
    store = EpisodeStore.from_arrays({"obs": obs, "action": action}, np.arange(1, 7) * 100)
    policy = DiffusionPolicy.from_dataset(
        store,
        spec={
            "horizon": 4,
            "n_obs_steps": 1,
            "n_action_steps": 2,
            "network": {"type": "mlp", "width": 48, "depth": 2},
        },
    )
    config = TrainerConfig(steps=150, batch_size=128, lr=2e-3, warmup_steps=10, progress=False)
    policy.learn(store, config, tmp_path / "cloned")
    cond = policy.normalizer.normalize("obs", torch.from_numpy(obs))

    def rewards():
        with torch.no_grad():
            chain = PlanChain(num_steps=10)
            plans = chain.run(policy.denoiser.eval(), None, 256, cond[:256], seeded(5)).items
            return reaching(plans, cond[:256]).mean().item()

    before = rewards()
    loss = RewardLoss(
        policy.denoiser, reaching, PlanChain.draft_k(2, num_steps=5, solver="ddpm"), kl_weight=1e-4
    )
    tuned = TrainerConfig(steps=60, batch_size=64, lr=2e-3, warmup_steps=10, progress=False)
    result = Trainer(loss, Observations(cond), tuned, tmp_path / "tuned").fit()
    assert result.step == 60
    after = rewards()
    assert before < -0.03
    assert after > 0.3 * before
    state = policy.observe(obs[:8], policy.initial_state(range(8)))
    plan, _ = policy.execute(policy.replan(state, range(8)))
    distance = np.abs(plan - 0.5 * obs[:8]).mean()
    assert distance < np.abs(plan - 0.8 * obs[:8]).mean()


# Choices


def test_published_chains_take_changes():
    assert PlanChain.draft_k(3) == PlanChain(grad_steps=3)
    assert PlanChain.draft_lv(2, num_steps=7) == PlanChain(num_steps=7, renoise=2)
    align = PlanChain.alignprop(checkpoint=False)
    assert align == PlanChain(truncation="gaussian", options={"eta": 1.0})


BAD = {
    "spacing": ({"spacing": "even"}, "unknown spacing 'even'"),
    "truncation": ({"truncation": "beta"}, "unknown truncation 'beta'"),
    "solver": ({"solver": "ode45"}, "unknown solver 'ode45'"),
    "option": ({"options": {"order": 2}}, "has no setting 'order'"),
    "num_steps": ({"num_steps": 0}, "num_steps must be at least 1"),
    "grad_steps": ({"grad_steps": 11}, r"grad_steps must be in \[1, 10\]"),
    "none": ({"grad_steps": 0}, r"grad_steps must be in \[1, 10\]"),
    "heun": ({"solver": "heun", "grad_steps": 20}, r"grad_steps must be in \[1, 19\]"),
    "spread": ({"truncation": "gaussian", "spread": (1.5, 0.1)}, "mean_of_spread must be in"),
    "spreads": ({"truncation": "gaussian", "spread": (0.5,)}, r"must be \[2\], got \[1\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings(case):
    settings, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        PlanChain(**settings)


@pytest.mark.parametrize("chain", [PlanChain(), PlanChain(solver="dpmpp_2m_sde")])
def test_a_divergence_needs_noisy_steps_without_memory(network, chain):
    with pytest.raises(ValueError, match="use solver='ddpm'"):
        RewardLoss(network, critic, chain, kl_weight=0.1)


def test_denoisers_that_do_not_fit(network):
    config = {"type": "mlp", "width": 8, "depth": 1, "horizon": 4, "dim": 3}
    masked = MaskedDenoiser(make_network(config), LogLinear(), 2)
    with pytest.raises(ValueError, match="use MaskedChain"):
        PlanChain().check(masked)
    with pytest.raises(ValueError, match="use PlanChain"):
        MaskedChain(num_steps=2).check(network)
    silent = BaseDenoiser()
    silent.process = make_process("vp_cosine")
    with pytest.raises(ValueError, match="attributes horizon and dim"):
        PlanChain().check(silent)


def test_levels_are_those_a_discrete_process_is_trained_at():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = make_network({"type": "mlp", "width": 8, "depth": 1, "horizon": 2, "dim": 1})
    seen = []
    denoiser = Denoiser(made, make_process("ddpm_cosine"), "eps")
    on_grid = denoiser.on_grid
    denoiser.on_grid = lambda t, s: seen.append(t.flatten().clone()) or on_grid(t, s)  # type: ignore
    PlanChain(num_steps=7).run(denoiser, None, 2, None, seeded())
    torch.testing.assert_close(denoiser.process.snap(seen[0]), seen[0])
