"""Actor-critics: exact targets and gradients, then problems whose optimum is known."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from diffpolicy.core import Denoiser, make_process
from diffpolicy.data import EpisodeStore
from diffpolicy.data.transitions import Transitions
from diffpolicy.learn import denoising_error
from diffpolicy.learn.actor_critic.algorithms import ActorCritic
from diffpolicy.learn.actor_critic.loss import (
    ActorCriticLoss,
    SamplingChain,
    denoise_once,
    expectile_error,
    normalized_value,
)
from diffpolicy.networks import make_network
from diffpolicy.networks.critics import QEnsemble, StateValue
from diffpolicy.settings import settings_of

SMALL = {
    "diffusion_ql": ActorCritic("chain", "td", num_steps=2),
    "idql": ActorCritic("bc", "iql"),
    "edp": ActorCritic("one_step", "td", solver="ddim", num_steps=2),
    "edp_iql": ActorCritic("one_step", "iql"),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small gain nothing from threads, and wait for them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def objective(settings, *, obs=1, horizon=1, dim=1, width=32, clip=True, prediction="x0"):
    torch.manual_seed(0)
    shape = {"horizon": horizon, "dim": dim, "cond_dim": obs}
    network = make_network({"type": "mlp", "width": width, "depth": 1, "time_dim": 16, **shape})
    heads = {"critic": QEnsemble(obs, horizon, dim, width=2 * width)}
    if settings.critic == "iql":
        heads["state_value"] = StateValue(obs, width=width)
    denoiser = Denoiser(network, make_process("vp_cosine"), prediction, clip=clip)
    return ActorCriticLoss(denoiser, heads, settings)


def random_batch(count=16, *, obs=1, horizon=1, dim=1, seed=0):
    g = seeded(seed)
    return {
        "obs": torch.randn(count, 1, obs, generator=g),
        "next_obs": torch.randn(count, 1, obs, generator=g),
        "action": torch.rand(count, horizon, dim, generator=g) * 2 - 1,
        "reward": torch.randn(count, generator=g),
        "discount": torch.rand(count, generator=g),
        "valid": torch.rand(count, horizon, generator=g) > 0.2,
    }


def trainable(module):
    return [p for p in module.parameters() if p.requires_grad]


def gradients(module, batch, seed=0):
    module.zero_grad()
    module(batch, seeded(seed)).loss.mean().backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------- exact answers


@pytest.mark.parametrize("expectile", [0.1, 0.5, 0.7, 0.95])
def test_the_expectile_of_a_discrete_distribution(expectile):
    """Of {0, 1} with P(1) = p: v = tau p / (tau p + (1 - tau)(1 - p))."""
    p = 0.3
    exact = expectile * p / (expectile * p + (1 - expectile) * (1 - p))
    values = torch.tensor([0.0, 1.0], dtype=torch.float64)
    chance = torch.tensor([1 - p, p], dtype=torch.float64)
    grid = torch.linspace(0, 1, 100_001, dtype=torch.float64)[:, None]
    loss = (chance * expectile_error(values - grid, expectile)).sum(1)
    assert grid[loss.argmin(), 0].item() == pytest.approx(exact, abs=1e-5)
    v = torch.tensor(exact, dtype=torch.float64, requires_grad=True)
    (chance * expectile_error(values - v, expectile)).sum().backward()
    assert v.grad.item() == pytest.approx(0, abs=1e-12)


def test_a_coin_decides_which_of_the_twins_is_raised():
    values = torch.tensor([[1.0, 3.0], [-4.0, 12.0]])
    answers = {0: values[0] / 8.0, 1: values[1] / 2.0}  # the other's mean absolute value
    seen = set()
    for seed in range(20):
        member = int(torch.randint(2, (1,), generator=seeded(seed)))
        torch.testing.assert_close(normalized_value(values, seeded(seed)), answers[member])
        seen.add(member)
    assert seen == {0, 1}


class Doubling(nn.Module):
    """A network that returns ``gain * x + cond``; its plans can be computed by hand."""

    t_kinds = frozenset({"row"})

    def __init__(self, gain=0.0):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def embed_time(self, t):
        return t[..., 0, :1]

    def forward(self, x, t, cond=None, *, time_emb=None):
        return self.gain * x + cond[:, None, :1]


class Linear(nn.Module):
    """Q1 = cond + 2 sum(chunk), Q2 = 3 - cond sum(chunk); the weight leaves room for gradients."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, cond, chunk):
        total = chunk.sum((1, 2))
        return torch.stack([cond[:, 0] + 2 * total, 3 - cond[:, 0] * total]) * self.weight


def by_hand(settings, gain=0.0):
    denoiser = Denoiser(Doubling(gain), make_process("vp_cosine"), "x0")
    return ActorCriticLoss(denoiser, {"critic": Linear()}, settings)


def test_targets_of_two_step_plans_with_a_terminal_and_a_timed_out_end():
    """The target actor answers a = (s', s'): Q1 = 5 s', Q2 = 3 - 2 s'^2, of which the less."""
    store = EpisodeStore.from_arrays(
        {
            "obs": np.array([[0.1], [0.2], [0.3], [0.4], [0.5], [0.6]], np.float32),
            "action": np.zeros((6, 1), np.float32),
            "reward": np.array([1, 2, 4, 8, 16, 32], np.float32),
            "terminated": np.array([0, 0, 1, 0, 0, 0], bool),
            "truncated": np.array([0, 0, 0, 0, 0, 1], bool),
            "next_obs": np.array([[0.2], [0.3], [9.0], [0.5], [0.6], [2.0]], np.float32),
        },
        np.array([3, 6]),
    )
    batch = Transitions(store, horizon=2, discount=0.5).gather(torch.arange(6))
    loss = by_hand(ActorCritic("one_step", "td", solver="ddim", num_steps=1))
    target = loss.td_target(batch, seeded())
    late = 3 - 2 * 2.0**2  # the second critic is the lower one here and at s' = 0.6
    expected = [
        1 + 0.5 * 2 + 0.25 * 5 * 0.3,
        2 + 0.5 * 4,
        4.0,
        8 + 0.5 * 16 + 0.25 * (3 - 2 * 0.6**2),
        16 + 0.5 * 32 + 0.25 * late,
        32 + 0.5 * late,
    ]
    torch.testing.assert_close(target, torch.tensor(expected))


def test_max_q_backup_takes_the_best_of_fresh_candidates():
    settings = ActorCritic("one_step", "td", solver="ddim", num_steps=1, max_q_backup=5)
    batch = random_batch(7)
    target = by_hand(settings, gain=0.7).td_target(batch, seeded(3))
    noise = torch.randn(1, 35, 1, 1, generator=seeded(3))[0]
    start = make_process("vp_cosine").sigma(torch.ones(1)) * noise
    cond = batch["next_obs"].flatten(1).repeat_interleave(5, 0)
    plans = 0.7 * start + cond[:, None]
    values = Linear()(cond, plans).detach().view(2, 7, 5).max(2).values.min(0).values
    torch.testing.assert_close(target, batch["reward"] + batch["discount"] * values)


@pytest.mark.parametrize("expectile", [0.7, 0.9])
def test_iql_errors_by_hand(expectile):
    settings = ActorCritic("bc", "iql", expectile=expectile)
    loss, batch = objective(settings), random_batch()
    with torch.no_grad():  # so that target and trained critics differ
        for p in loss.target.parameters():
            p.mul_(1.5)
    cond, after = batch["obs"].flatten(1), batch["next_obs"].flatten(1)
    value, critic = loss.heads["state_value"], loss.heads["critic"]
    u = loss.target["critic"](cond, batch["action"]).min(0).values - value(cond)
    y = (batch["reward"] + batch["discount"] * value(after)).detach()
    expected = (expectile - (u < 0).float()).abs() * u**2
    expected = expected + ((critic(cond, batch["action"]) - y) ** 2).sum(0)
    g = seeded()
    t = loss.denoiser.process.sample_t((16, 1, 1), g)
    noise = torch.randn(16, 1, 1, generator=g)
    expected = expected + denoising_error(loss.denoiser, batch["action"], t, noise, cond=cond)
    out = loss(batch, seeded())
    torch.testing.assert_close(out.loss, expected)
    assert set(out.metrics) == {"bc", "td", "v_loss", "q", "v", "target"}
    assert all(m.dim() == 0 and not m.requires_grad for m in out.metrics.values())


@pytest.mark.parametrize("prediction", ["eps", "v", "x0", "edm"])
@pytest.mark.parametrize("clip", [False, True])
def test_one_evaluation_gives_denoising_error_and_estimate(prediction, clip):
    denoiser = objective(SMALL["edp"], dim=2, horizon=3, prediction=prediction, clip=clip).denoiser
    batch, g = random_batch(dim=2, horizon=3), seeded(1)
    t, noise = torch.rand(16, 1, 1, generator=g), torch.randn(16, 3, 2, generator=g)
    given = {"cond": batch["obs"].flatten(1), "valid": batch["valid"]}
    error, x0_hat = denoise_once(denoiser, batch["action"], t, noise, **given)
    expected = denoising_error(denoiser, batch["action"], t, noise, **given)
    torch.testing.assert_close(error, expected)
    x_t = denoiser.process.add_noise(batch["action"], t, noise)
    torch.testing.assert_close(x0_hat, denoiser(x_t, t, given["cond"]).x0_hat)


def test_the_actors_loss_is_denoising_less_eta_times_q():
    settings = replace(SMALL["edp"], eta=3.0, mask_padding=True)
    loss, batch, g = objective(settings), random_batch(), seeded(4)
    t = loss.denoiser.process.sample_t((16, 1, 1), g)
    noise = torch.randn(16, 1, 1, generator=g)
    cond = batch["obs"].flatten(1)
    error, plan = denoise_once(
        loss.denoiser, batch["action"], t, noise, cond=cond, valid=batch["valid"]
    )
    gain = normalized_value(loss.heads["critic"](cond, plan), g)
    td = (loss.heads["critic"](cond, batch["action"]) - loss.td_target(batch, g)).square().sum(0)
    torch.testing.assert_close(loss(batch, seeded(4)).loss, error - 3.0 * gain + td)


# ---------------------------------------------------------------- who learns from what


@pytest.mark.parametrize("name", ["diffusion_ql", "edp", "edp_iql"])
def test_critics_learn_nothing_from_the_actor_nor_the_actor_from_them(name):
    batch = random_batch()
    plain, eager = (
        gradients(objective(replace(SMALL[name], eta=eta)), batch) for eta in (1.0, 100.0)
    )
    rich = gradients(objective(SMALL[name]), {**batch, "reward": batch["reward"] + 50})
    heads = [n for n in plain if n.startswith("heads.")]
    actor = [n for n in plain if n.startswith("denoiser.")]
    assert len(heads) + len(actor) == len(plain)  # nothing reaches a target network
    for n in heads:  # the weight of Q in the actor's loss is nothing to the critics
        assert torch.equal(plain[n], eager[n])
    for n in actor:  # nor the reward, which only the critics see, to the actor
        assert torch.equal(plain[n], rich[n])
    assert any(not torch.equal(plain[n], eager[n]) for n in actor)
    assert any(not torch.equal(plain[n], rich[n]) for n in heads)


def test_the_actor_of_idql_is_behaviour_cloning():
    batch, loss = random_batch(), objective(SMALL["idql"])
    found = gradients(loss, batch)
    loss.zero_grad()
    g = seeded()
    t = loss.denoiser.process.sample_t((16, 1, 1), g)
    noise = torch.randn(16, 1, 1, generator=g)
    cond = batch["obs"].flatten(1)
    denoising_error(loss.denoiser, batch["action"], t, noise, cond=cond).mean().backward()
    for n, p in loss.denoiser.named_parameters():
        torch.testing.assert_close(found[f"denoiser.{n}"], p.grad)


def test_gradients_through_the_chain():
    """All steps by default; checkpointing changes none; fewer steps are another gradient."""
    batch = random_batch()
    settings = replace(SMALL["diffusion_ql"], num_steps=3, eta=10.0)
    variants = {
        "all": settings,
        "three": replace(settings, grad_steps=3),
        "checkpointed": replace(settings, checkpoint=True),
        "last": replace(settings, grad_steps=1),
    }
    found = {k: gradients(objective(v, clip=False), batch) for k, v in variants.items()}
    name = "denoiser.network.outward.weight"
    for other in ("three", "checkpointed"):
        for n, value in found["all"].items():
            torch.testing.assert_close(value, found[other][n])
    assert not torch.allclose(found["all"][name], found["last"][name])
    assert all(torch.equal(v, found["last"][n]) for n, v in found["all"].items() if "heads" in n)


def test_target_networks_follow_at_their_rate():
    loss = objective(replace(SMALL["diffusion_ql"], target_rate=0.25))
    before = {n: p.clone() for n, p in loss.target.named_parameters()}
    with torch.no_grad():
        for p in trainable(loss):
            p.add_(torch.randn_like(p))
    loss.after_step()
    live = {f"denoiser.{n}": p for n, p in loss.denoiser.named_parameters()}
    live |= {f"critic.{n}": p for n, p in loss.heads["critic"].named_parameters()}
    after = dict(loss.target.named_parameters())
    assert set(after) == set(live)
    for n, p in after.items():
        torch.testing.assert_close(p, 0.75 * before[n] + 0.25 * live[n])
        assert not p.requires_grad
    loss.train()
    assert loss.denoiser.training
    assert not any(m.training for m in loss.target.modules())


def test_state_has_the_names_that_policies_read():
    loss = objective(SMALL["idql"])
    roots = {".".join(n.split(".")[:2]) for n in loss.state_dict()}
    assert roots == {"denoiser.network", "heads.critic", "heads.state_value", "target.critic"}
    assert {n.split(".")[1] for n in objective(SMALL["edp"]).state_dict() if "target" in n} == {
        "critic",
        "denoiser",
    }


def train(loss, data, steps, *, first=0, optimizer=None, lr=1e-2, batch=128):
    optimizer = optimizer or torch.optim.Adam(trainable(loss), fused=True)
    for step in range(first, first + steps):
        g = seeded(step)
        rows = torch.randint(len(data["reward"]), (batch,), generator=g)
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 + math.cos(math.pi * step / (first + steps))) / 2
        out = loss({k: v[rows] for k, v in data.items()}, g)
        optimizer.zero_grad()
        out.loss.mean().backward()
        optimizer.step()
        loss.after_step()
    return optimizer


@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_resumed_run_is_the_same_run_bit_for_bit(name):
    data = random_batch(64, obs=2, horizon=2, dim=2)
    shape = {"obs": 2, "horizon": 2, "dim": 2}
    whole, resumed = objective(SMALL[name], **shape), objective(SMALL[name], **shape)
    optimizer = train(whole, data, 3, batch=16)
    resumed.load_state_dict(whole.state_dict())
    again = torch.optim.Adam(trainable(resumed), fused=True)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(whole, data, 3, first=3, optimizer=optimizer, batch=16)
    train(resumed, data, 3, first=3, optimizer=again, batch=16)
    assert all(torch.equal(v, resumed.state_dict()[n]) for n, v in whole.state_dict().items())


@pytest.mark.parametrize("name", sorted(SMALL))
def test_losses_are_per_example_and_repeatable(name):
    shape = {"obs": 3, "horizon": 4, "dim": 2}
    loss, batch = objective(SMALL[name], **shape), random_batch(5, **shape)
    out = loss(batch, seeded(1))
    assert out.loss.shape == (5,)
    assert torch.equal(out.loss, loss(batch, seeded(1)).loss)
    assert not torch.equal(out.loss, loss(batch, seeded(2)).loss)
    with torch.no_grad():  # as validation evaluates it
        torch.testing.assert_close(loss(batch, seeded(1)).loss, out.loss.detach())


# ---------------------------------------------------------------- known optima

DISCOUNT = 0.6
TAU = 0.95
LEARNERS = {
    "diffusion_ql": ActorCritic("chain", "td", eta=20.0, num_steps=2, target_rate=0.05),
    "edp": ActorCritic("one_step", "td", eta=20.0, solver="ddim", num_steps=2, target_rate=0.05),
    "idql": ActorCritic("bc", "iql", expectile=TAU, target_rate=0.05),
}


def acts(loss, obs, count):
    """What the learned policy does, one action per state: the critic's choice among candidates.

    Actors that climb Q need no choice: theirs is the mean of what they sample.
    """
    chain = SamplingChain(loss.denoiser.process, ActorCritic(num_steps=2))
    cond = obs.view(-1, 1).repeat_interleave(count, 0)
    with torch.no_grad():
        plan = chain.run(loss.denoiser, cond, torch.zeros(len(cond), 1, 1), seeded(9))
        score = loss.heads["critic"].score(cond, plan).view(-1, count)
    plan = plan.view(-1, count)
    if loss.settings.actor == "bc":
        return plan.gather(1, score.argmax(1, keepdim=True))[:, 0]
    return plan.mean(1)


def values(loss, obs, action):
    with torch.no_grad():
        return loss.heads["critic"].score(obs.view(-1, 1), action.view(-1, 1, 1))


BASE, SHIFT = torch.tensor([0.0, 1.0]), torch.tensor([0.0, -0.5])


def two_states(count=4096):
    """Action a in [-1, 1], uniform in the data, leads to state 1 with chance (1 + a) / 2."""
    g = seeded()
    state = torch.randint(2, (count,), generator=g)
    action = torch.rand(count, generator=g) * 2 - 1
    after = (torch.rand(count, generator=g) < (1 + action) / 2).float()
    column = (count, 1, 1)
    return {
        "obs": (2.0 * state - 1).view(column),
        "next_obs": (2.0 * after - 1).view(column),
        "action": action.view(column),
        "reward": BASE[state] - 0.5 * (action - SHIFT[state]) ** 2,
        "discount": torch.full((count,), DISCOUNT),
        "valid": torch.ones(count, 1, dtype=torch.bool),
    }


def solved_two_states(backup):
    """Value iteration on a fine grid of actions: V of both states, and their best actions."""
    a = torch.linspace(-1, 1, 2001)
    v = torch.zeros(2)
    for _ in range(100):
        after = (1 + a) / 2 * v[1] + (1 - a) / 2 * v[0]
        q = BASE[:, None] - 0.5 * (a - SHIFT[:, None]) ** 2 + DISCOUNT * after
        v = backup(q)
    return v, a[q.argmax(1)]


def expectiles(q):
    v = q.mean(1, keepdim=True)
    for _ in range(30):  # its own fixed point: the mean under weights tau above it, 1 - tau below
        weight = torch.where(q < v, 1 - TAU, TAU)
        v = (weight * q).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
    return v[:, 0]


@pytest.mark.parametrize("name", sorted(LEARNERS))
def test_two_states_with_known_values_and_actions(name):
    """The best action weighs its own cost against where it leads: 0.26 and -0.24, not 0 and -0.5.

    IDQL's V is exactly the fixed point with the expectile in the maximum's place.
    """
    loss = objective(LEARNERS[name])
    train(loss, two_states(), 300)
    obs = torch.tensor([-1.0, 1.0])
    best_v, best_a = solved_two_states(lambda q: q.max(1).values)
    action = acts(loss, obs, 64)
    torch.testing.assert_close(action, best_a, atol=0.1, rtol=0)
    if name == "idql":
        expected, _ = solved_two_states(expectiles)
        with torch.no_grad():
            found = loss.heads["state_value"](obs[:, None])
        torch.testing.assert_close(found, expected, atol=0.08, rtol=0)
    else:
        torch.testing.assert_close(values(loss, obs, action), best_v, atol=0.08, rtol=0)


def linear_quadratic(count=4096):
    """``s' = 0.9 s + 0.5 a``, reward ``-(s^2 + 0.3 a^2)``; states and actions uniform."""
    g = seeded()
    state, action = (torch.rand(count, 1, 1, generator=g) * 2 - 1 for _ in range(2))
    return {
        "obs": state,
        "next_obs": 0.9 * state + 0.5 * action,
        "action": action,
        "reward": -(state**2 + 0.3 * action**2).flatten(),
        "discount": torch.full((count,), DISCOUNT),
        "valid": torch.ones(count, 1, dtype=torch.bool),
    }


@pytest.mark.parametrize("name", ["diffusion_ql", "edp"])
def test_the_linear_quadratic_regulator(name):
    """``a = -k s`` and ``Q = -p s^2`` of the discounted Riccati equation."""
    p = 0.0
    for _ in range(100):
        k = DISCOUNT * 0.45 * p / (0.3 + DISCOUNT * 0.25 * p)
        p = 1 + 0.3 * k**2 + DISCOUNT * (0.9 - 0.5 * k) ** 2 * p
    loss = objective(LEARNERS[name])
    train(loss, linear_quadratic(), 300, lr=5e-3)
    obs = torch.linspace(-0.8, 0.8, 9)
    action = acts(loss, obs, 64)
    torch.testing.assert_close(action, -k * obs, atol=0.12, rtol=0)
    torch.testing.assert_close(values(loss, obs, action), -p * obs**2, atol=0.05, rtol=0)


# ---------------------------------------------------------------- settings


def test_critics_need_their_heads():
    assert ActorCritic("chain", "td").heads == ("critic",)
    assert ActorCritic("bc", "iql").heads == ("critic", "state_value")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"actor": "sac"}, "unknown actor 'sac'"),
        ({"critic": "cql"}, "unknown critic 'cql'"),
        ({"eta": 0.0}, "eta must be positive, got 0.0"),
        ({"actor": "bc", "critic": "iql", "expectile": 1.0}, r"expectile must be in \(0, 1\)"),
        ({"target_rate": 0.0}, r"target_rate must be in \(0, 1\], got 0.0"),
        ({"max_q_backup": -1}, "max_q_backup must be at least 0"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"grad_steps": 0}, "grad_steps must be at least 1"),
        ({"solver": "magic"}, "unknown solver 'magic'"),
        ({"etta": 1.0}, r"no setting 'etta'; .*did you mean 'eta'"),
    ],
)
def test_bad_settings_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        settings_of(ActorCritic, config, "actor_critic")


def test_bad_parts_are_named():
    loss = objective(SMALL["idql"])
    critic, value = loss.heads["critic"], loss.heads["state_value"]
    with pytest.raises(ValueError, match=r"trains the heads \['critic', 'state_value'\], got"):
        ActorCriticLoss(loss.denoiser, {"critic": critic}, SMALL["idql"])
    with pytest.raises(ValueError, match=r"trains the heads \['critic'\], got"):
        ActorCriticLoss(loss.denoiser, {"critic": critic, "state_value": value}, SMALL["edp"])
    with pytest.raises(ValueError, match="critic has action_dim=2, the actor's network 1"):
        ActorCriticLoss(loss.denoiser, {"critic": QEnsemble(1, 1, 2)}, SMALL["edp"])
    with pytest.raises(ValueError, match=r"grad_steps must be in \[1, 2\]"):
        objective(replace(SMALL["diffusion_ql"], grad_steps=3))
    few = make_process({"type": "ddpm_cosine", "num_steps": 4})
    coarse = Denoiser(loss.denoiser.network, few, "eps")
    with pytest.raises(ValueError, match="repeats a training level"):
        ActorCriticLoss(coarse, {"critic": critic}, ActorCritic(num_steps=9))
