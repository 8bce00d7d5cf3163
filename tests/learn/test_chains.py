"""Chains with divergences against a straightforward implementation that keeps every graph."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from tuning_tables import TableReward, multilinear_denoiser

from diffpolicy.core import (
    Ancestral,
    Denoiser,
    LogLinear,
    MaskedDenoiser,
    Relaxation,
    Scheduled,
    VPCosine,
    levels,
    make_solver,
    one_by_one,
    prepare,
    prior_start,
    sample,
)
from diffpolicy.core.steps import Memory
from diffpolicy.learn.reference import frozen_copy
from diffpolicy.learn.reward.chains import (
    chain_with_kl,
    differentiable_chain,
    gaussian_step_kl,
    masked_step_kl,
)
from diffpolicy.networks import make_network

B, L, V, K = 4, 3, 2, 5


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Problem(NamedTuple):
    """A denoiser, its reference, and what a chain is run with."""

    denoiser: nn.Module
    reference: nn.Module
    reward: TableReward
    solver: object
    start: object
    grid: Tensor
    noise: Tensor

    @property
    def arguments(self):
        return self.denoiser, self.reference, self.solver, self.start, self.grid

    def loss(self, weight=0.7, **settings):
        """Losses ``[B]`` of the driver."""
        done = chain_with_kl(*self.arguments, step_kl=masked_step_kl, noise=self.noise, **settings)
        return weight * done.kl - self.reward(done.x0[..., :-1])

    def gradient(self, loss):
        grads = torch.autograd.grad(loss, list(self.denoiser.parameters()), allow_unused=True)
        return torch.cat([g.flatten() for g in grads if g is not None])


def problem(solver="ancestral", relaxation=None, *, dtype=torch.float64, network=None, seed=0):
    relaxation = relaxation or Relaxation(0.8)
    if network is None:
        denoiser, reference = (
            multilinear_denoiser(V, L, seed=s, dtype=dtype, time_free=solver != "ancestral")
            for s in (1, 2)
        )
        reference = frozen_copy(reference)
    else:
        torch.manual_seed(0)
        sizes = {"horizon": L, "dim": V + 1, "cond_dim": 0}
        denoiser = MaskedDenoiser(make_network({**network, **sizes}), LogLinear(), V)
        for p in denoiser.parameters():
            nn.init.normal_(p, std=0.3)
        reference = frozen_copy(denoiser)
        for p in reference.parameters():
            p.mul_(0.5)
    like = torch.zeros(B, L, V + 1, dtype=dtype)
    start = prior_start(denoiser.process, like)
    if solver == "ancestral":
        how, count = Ancestral(relaxation), K
    else:
        masked = torch.ones(B, L, dtype=torch.bool)
        how, count = Scheduled(one_by_one(masked, seeded(seed + 9)), relaxation), L
    noise = denoiser.process.draw_noise((count, *like.shape), seeded(seed), like)
    return Problem(denoiser, reference, TableReward(V, L), how, start, levels(start, count), noise)


def plain_loss(p, soft, weight=0.7, chosen=None):
    """All graphs kept, a fresh reference and KL at every step; hard states carry no graph."""
    whole = prepare(p.denoiser, p.solver, p.grid, p.start.x)
    count = len(whole.rows)
    chosen = range(count) if chosen is None else chosen
    x, kl = p.start.x, 0.0
    for i, row in enumerate(whole.rows):
        t = row.t.to(x.dtype).expand(len(x), 1, 1)
        out = p.denoiser(x, t)
        if i in chosen:
            kl = kl + count / len(chosen) * masked_step_kl(row, x, out, p.reference(x, t))
        x = row.advance(Memory(x, x, ()), out, p.noise[i])[0].x
        if i < count - soft:
            x = x.detach()
    return weight * kl - p.reward(x[..., :-1])


solvers = pytest.mark.parametrize("solver", ["ancestral", "scheduled"])
RELAXATIONS = [
    Relaxation(0.8, relaxed_steps=2),
    Relaxation(1.5, final_temperature=0.3, relaxed_steps=2),
    Relaxation(0.8, relaxed_steps=2, straight_through=True),
    Relaxation(relaxed_steps=2, straight_through=True, backward="probabilities"),
    Relaxation(relaxed_steps=2, straight_through=True, backward="reinmax"),
]


@solvers
@pytest.mark.parametrize("relaxation", RELAXATIONS, ids=repr)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_losses_and_gradients_are_those_of_the_straightforward_way(solver, relaxation, checkpoint):
    p = problem(solver, relaxation)
    mine, plain = p.loss(grad_steps=2, checkpoint=checkpoint), plain_loss(p, 2)
    torch.testing.assert_close(mine, plain, rtol=0, atol=1e-10)
    found, expected = p.gradient(mine.mean()), p.gradient(plain.mean())
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@solvers
def test_accumulated_parts_of_a_batch_add_up(solver):
    """As the trainer does it: ``loss.mean() / parts`` of each part, into one gradient."""
    parts = [problem(solver, RELAXATIONS[0], seed=s) for s in range(3)]
    denoiser = parts[0].denoiser
    for part in parts:
        (part._replace(denoiser=denoiser).loss(grad_steps=2).mean() / 3).backward()
    whole = torch.cat([plain_loss(p._replace(denoiser=denoiser), 2) for p in parts]).mean()
    expected = parts[0].gradient(whole)
    torch.testing.assert_close(denoiser.network.logits.grad.flatten(), expected)


NETWORKS = [
    {"type": "mlp", "width": 16, "depth": 1},
    {"type": "transformer", "width": 16, "depth": 1, "heads": 2},
    {"type": "sequence_cnn", "width": 16, "kernel_size": 3, "dilations": (1, 2)},
]


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n["type"])
@pytest.mark.parametrize("soft", [2, K])
def test_networks_that_share_time_embeddings_between_steps(network, soft):
    p = problem(network=network, relaxation=Relaxation(relaxed_steps=soft), dtype=torch.float32)
    expected = p.gradient(plain_loss(p, soft).mean())
    assert expected.abs().max() > 1e-2
    for checkpoint in (False, True):
        found = p.gradient(p.loss(grad_steps=soft, checkpoint=checkpoint).mean())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@solvers
def test_last_k_steps_are_all_steps_when_k_is_their_number(solver):
    p = problem(solver)
    count = len(p.noise)
    whole = p.gradient(p.loss().mean())
    for k in (count, count + 3):
        assert torch.equal(p.gradient(p.loss(grad_steps=k).mean()), whole)
    assert not torch.allclose(p.gradient(p.loss(grad_steps=1).mean()), whole)


@solvers
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_checkpointed_and_plain_gradients_agree(solver, dtype, close):
    p = problem(solver, dtype=dtype)
    plain, recomputed = (p.gradient(p.loss(checkpoint=c).mean()) for c in (False, True))
    assert plain.dtype == dtype
    torch.testing.assert_close(recomputed, plain, rtol=0, atol=close)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_subsampled_divergence_is_right_on_average(size):
    p = problem(relaxation=Relaxation(relaxed_steps=2))
    whole = p.loss(grad_steps=2).mean()
    subsets = list(itertools.combinations(range(K), size))
    losses = [p.loss(grad_steps=2, kl_steps=s).mean() for s in subsets]
    one = plain_loss(p, 2, chosen=subsets[-1]).mean()
    torch.testing.assert_close(losses[-1], one)
    mean = sum(losses) / len(subsets)
    torch.testing.assert_close(mean, whole)
    torch.testing.assert_close(p.gradient(mean), p.gradient(whole))


def test_evaluations_are_counted_and_no_more_are_made():
    p, calls = problem(), {"mine": 0, "theirs": 0}
    for name, d in (("mine", p.denoiser), ("theirs", p.reference)):
        d.network.register_forward_hook(lambda *_, n=name: calls.__setitem__(n, calls[n] + 1))
    for steps, asked in ((None, K), ([0, 3], 2)):
        calls.update(mine=0, theirs=0)
        done = chain_with_kl(
            *p.arguments, step_kl=masked_step_kl, noise=p.noise, grad_steps=2, kl_steps=steps
        )
        assert done.reference_nfe == asked
        assert calls == {"mine": K, "theirs": asked}


def test_reference_without_a_graph_gives_the_same_values():
    p = problem()
    full, lean = (p.loss(reference_graph=g) for g in (True, False))
    assert torch.equal(full, lean)
    through_input = p.gradient(full.mean()) - p.gradient(lean.mean())
    assert through_input.abs().max() > 1e-4


def test_divergence_of_hard_steps_trains_without_any_soft_one():
    p = problem(relaxation=Relaxation(relaxed_steps=2))
    done = chain_with_kl(*p.arguments, step_kl=masked_step_kl, noise=p.noise, grad_steps=0)
    assert not done.x0.requires_grad
    expected = p.gradient(plain_loss(p, 0, weight=1.0).mean())
    torch.testing.assert_close(p.gradient(done.kl.mean()), expected)


def test_parameters_that_are_frozen_or_unused_stay_out():
    p = problem(relaxation=Relaxation(relaxed_steps=2))
    p.denoiser.register_parameter("spare", nn.Parameter(torch.ones(3)))
    p.denoiser.register_parameter("frozen", nn.Parameter(torch.ones(3), requires_grad=False))
    p.loss(grad_steps=2).mean().backward()
    assert p.denoiser.spare.grad is None
    assert p.denoiser.frozen.grad is None
    assert p.denoiser.network.logits.grad.abs().max() > 0


def test_without_gradients_it_gives_the_same_values():
    p = problem(relaxation=Relaxation(relaxed_steps=2))
    with torch.no_grad():
        quiet = p.loss(grad_steps=2)
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, p.loss(grad_steps=2).detach())


def test_divergence_to_itself_is_zero_and_flat():
    p = problem(relaxation=Relaxation(relaxed_steps=2))
    p = p._replace(reference=frozen_copy(p.denoiser))
    done = chain_with_kl(*p.arguments, step_kl=masked_step_kl, noise=p.noise, grad_steps=2)
    torch.testing.assert_close(done.kl, torch.zeros(B, dtype=torch.float64))
    assert p.gradient(done.kl.mean()).abs().max() < 1e-12


@pytest.mark.parametrize("soft", [1, 3, None])
def test_continuous_chains_have_the_same_driver(soft):
    torch.manual_seed(0)
    network = make_network({"type": "mlp", "horizon": 2, "dim": 3, "width": 16, "depth": 1})
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    denoiser = Denoiser(network, VPCosine(), "x0").double()
    reference = frozen_copy(denoiser)
    for parameter in reference.parameters():
        parameter.mul_(0.9)
    like = torch.randn(B, 2, 3, generator=seeded(), dtype=torch.float64)
    solver, start = make_solver("ddpm"), prior_start(denoiser.process, like)
    grid, noise = levels(start, 4), torch.randn(4, *like.shape, generator=seeded(1)).double()
    done = chain_with_kl(
        denoiser, reference, solver, start, grid,
        step_kl=gaussian_step_kl, noise=noise, grad_steps=soft,
    )  # fmt: skip
    x, kl = start.x, 0.0
    rows = prepare(denoiser, solver, grid, like).rows
    for i, row in enumerate(rows):
        t = row.t.expand(B, 1, 1)
        out = denoiser(x, t)
        kl = kl + gaussian_step_kl(row, x, out, reference(x, t))
        x = row.advance(Memory(x, x, ()), out, noise[i])[0].x
        if soft is not None and i < 4 - soft:
            x = x.detach()
    torch.testing.assert_close(done.x0, x)
    torch.testing.assert_close(done.kl, kl)
    parameters = list(denoiser.parameters())
    mine, plain = (
        torch.autograd.grad((v - e.square().sum((1, 2))).mean(), parameters)
        for v, e in ((done.kl, done.x0), (kl, x))
    )
    for a, b in zip(mine, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_chain_without_a_divergence_is_the_sampler():
    p = problem()
    arguments = p.denoiser, p.solver, p.start, p.grid
    x0 = differentiable_chain(*arguments, noise=p.noise, grad_steps=2)
    assert torch.equal(x0, sample(*arguments, noise=p.noise))
    lean = differentiable_chain(*arguments, noise=p.noise, grad_steps=2, checkpoint=True)
    one, other = (p.gradient(p.reward(v[..., :-1]).mean()) for v in (x0, lean))
    torch.testing.assert_close(one, other)
    assert not differentiable_chain(*arguments, noise=p.noise, grad_steps=0).requires_grad
