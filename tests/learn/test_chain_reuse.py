"""Hard steps of a network that does not look at the level: equal states are evaluated once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffpolicy.core.masked_denoiser import MaskedDenoiser
from diffpolicy.core.masking import LogLinear
from diffpolicy.core.reveal import Ancestral, Relaxation
from diffpolicy.core.starts import levels, prior_start
from diffpolicy.learn.reward import chains
from diffpolicy.learn.reward.chains import chain_with_kl, masked_step_kl
from diffpolicy.networks import make_network

L, V, B = 4, 3, 6


def made(seed, cond_dim=0, dropout=0.0, *, time_free=True, kind="sequence_cnn"):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = {"horizon": L, "dim": V + 1, "cond_dim": cond_dim, "width": 8}
        extra = {"dropout": dropout} if dropout else {}
        network = make_network({"type": kind, **sizes, **extra})
        nn.init.normal_(network.outward.weight, std=0.5)
    return MaskedDenoiser(network, LogLinear(), V, time_free=time_free).double()


def run(denoiser, reference, *, steps=24, soft=3, cond=None, kl_steps=None):
    """End, divergence, gradients and rows that the network was asked for."""
    rows = []
    handle = denoiser.network.register_forward_pre_hook(
        lambda _, inputs: rows.append(len(inputs[0]))
    )
    start = prior_start(denoiser.process, torch.zeros(B, L, V + 1, dtype=torch.float64))
    noise = denoiser.process.draw_noise(
        (steps, B, L, V + 1), torch.Generator().manual_seed(4), start.x
    )
    result = chain_with_kl(
        denoiser,
        reference,
        Ancestral(Relaxation(relaxed_steps=soft)),
        start,
        levels(start, steps),
        step_kl=masked_step_kl,
        noise=noise,
        cond=cond,
        grad_steps=soft,
        kl_steps=kl_steps,
    )
    handle.remove()
    loss = result.kl.mean() + result.x0[..., 0].sum(1).mean()
    found = torch.autograd.grad(loss, list(denoiser.parameters()), allow_unused=True)
    return result, [g for g in found if g is not None], sum(rows)


@pytest.mark.parametrize("cond_dim", [0, 2])
@pytest.mark.parametrize("soft", [1, 3, 23])
def test_states_divergence_and_gradient_are_those_of_all_rows_in_step(cond_dim, soft, monkeypatch):
    denoiser, reference = made(0, cond_dim), made(1, cond_dim)
    cond = torch.linspace(-1, 1, B * 2, dtype=torch.float64).view(B, 2) if cond_dim else None
    ours, gradient, asked = run(denoiser, reference, soft=soft, cond=cond)
    monkeypatch.setattr(chains, "_reusable", lambda *_: False)
    plain, wanted, all_rows = run(denoiser, reference, soft=soft, cond=cond)
    torch.testing.assert_close(ours.x0, plain.x0)
    torch.testing.assert_close(ours.kl, plain.kl)
    for a, b in zip(gradient, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert all_rows == 24 * B
    if soft < 23:
        # A row of 4 positions is in at most 5 different states.
        assert asked <= 5 * B + soft * B
    if soft == 23:
        assert asked == 23 * B + (B if cond_dim else 1)  # all masks, in every row


def test_rows_that_are_alike_share_an_evaluation():
    denoiser, reference = made(0), made(1)
    sizes = []
    hook = lambda _, inputs: sizes.append(len(inputs[0]))  # noqa: E731
    handle = reference.network.register_forward_pre_hook(hook)
    run(denoiser, reference)
    handle.remove()
    assert sizes[0] == 1
    assert sizes[-3:] == [B] * 3


@pytest.mark.parametrize(
    "other",
    [{"time_free": False}, {"dropout": 0.5}],
    ids=["looks at the level", "drops at random"],
)
def test_answers_that_differ_are_not_reused(other):
    denoiser = made(0, **other).train()
    assert run(denoiser, made(1))[2] == 24 * B
    if "dropout" in other:
        assert run(denoiser.eval(), made(1))[2] < 24 * B


def test_a_reference_that_looks_at_the_level_is_asked_at_every_one():
    assert run(made(0), made(1, time_free=False))[2] == 24 * B
    assert run(made(0), made(1), kl_steps=[0, 5, 23])[2] == 24 * B
