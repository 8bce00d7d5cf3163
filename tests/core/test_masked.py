"""Denoisers of masked sequences: their parameterisation, inputs, guidance and records."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffpolicy.core import (
    Ancestral,
    Cosine,
    LogLinear,
    MaskedDenoiser,
    Scheduled,
    VPCosine,
    levels,
    one_by_one,
    one_hot,
    prior_start,
    sample,
    truncated_start,
)
from diffpolicy.guidance import ClassifierFreeGuidance
from diffpolicy.networks import make_network

V, L = 4, 6


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def shaken(network, seed=0, scale=0.2):
    """Random weights everywhere: fresh networks answer 0."""
    g = seeded(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(scale * torch.randn(p.shape, generator=g))
    return network.eval()


def denoiser_of(kind="mlp", *, process=None, time_free=False, cond_dim=0, **settings):
    sizes = {"horizon": L, "dim": V + 1, "cond_dim": cond_dim}
    torch.manual_seed(0)
    network = make_network({"type": kind, **sizes, **settings})
    return MaskedDenoiser(shaken(network), process or LogLinear(), V, time_free=time_free)


SMALL = {
    "mlp": {"width": 16, "depth": 1},
    "transformer": {"width": 16, "depth": 1, "heads": 2},
    "sequence_cnn": {"width": 16, "kernel_size": 3, "dilations": (1, 2)},
}
networks = pytest.mark.parametrize("kind", list(SMALL))


@pytest.fixture
def states():
    tokens = torch.randint(0, V + 1, (3, L), generator=seeded(5))
    return tokens, one_hot(tokens, V)


@networks
def test_masks_are_filled_and_tokens_carried_over(kind, states):
    tokens, x = states
    out = denoiser_of(kind, **SMALL[kind])(x, torch.full((3, 1, 1), 0.4))
    log_p = out.aux["log_p"]
    assert log_p.shape == (3, L, V)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(3, L))
    masked = tokens == V
    assert masked.any()
    assert torch.equal(out.x0_hat[~masked], x[~masked])
    torch.testing.assert_close(out.x0_hat[masked][:, :-1], log_p.exp()[masked])
    assert (out.x0_hat[..., -1] == 0).all()


@networks
def test_integers_and_one_hot_states_have_one_answer(kind, states):
    tokens, x = states
    denoiser, t = denoiser_of(kind, **SMALL[kind]), torch.full((3, 1, 1), 0.4)
    torch.testing.assert_close(denoiser.log_probs(tokens, t), denoiser.log_probs(x, t))


@networks
def test_time_free_denoisers_ignore_the_level(kind, states):
    _, x = states
    early, late = torch.full((3, 1, 1), 0.1), torch.full((3, 1, 1), 0.9)
    free = denoiser_of(kind, time_free=True, **SMALL[kind])
    assert torch.equal(free.log_probs(x, early), free.log_probs(x, late))
    sees = denoiser_of(kind, **SMALL[kind])
    assert not torch.allclose(sees.log_probs(x, early), sees.log_probs(x, late))
    zero = torch.zeros(3, 1, 1)
    torch.testing.assert_close(free.log_probs(x, late), sees.log_probs(x, zero))


@networks
@pytest.mark.parametrize("time_free", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_on_a_grid_it_answers_the_same(kind, time_free, rows, states):
    _, x = states
    denoiser = denoiser_of(kind, time_free=time_free, **SMALL[kind])
    t = torch.rand(4, rows, 1, 1, generator=seeded(2), dtype=torch.float64)
    on_grid = denoiser.on_grid(t)
    for row in range(4):
        direct = denoiser(x, t[row].float().expand(3, 1, 1))
        answer = on_grid(row, x, None)
        close = {"rtol": 1e-4, "atol": 1e-4}  # float32 levels, embedded as t * 1000
        torch.testing.assert_close(answer.x0_hat, direct.x0_hat, **close)
        torch.testing.assert_close(answer.aux["log_p"], direct.aux["log_p"], **close)


def test_relaxed_states_give_the_expectation_over_independent_draws():
    denoiser = denoiser_of(**SMALL["mlp"])
    x = torch.rand(2, L, V + 1, generator=seeded()).softmax(-1)
    out = denoiser(x, torch.full((2, 1, 1), 0.5))
    expected = x[..., :-1] + x[..., -1:] * out.aux["log_p"].exp()
    torch.testing.assert_close(out.x0_hat[..., :-1], expected)
    torch.testing.assert_close(out.x0_hat.sum(-1), torch.ones(2, L))


class TestGuidance:
    cond = torch.tensor([[1.0, -0.5], [0.3, 2.0], [0.0, 1.0]])
    t = torch.full((3, 1, 1), 0.4)

    def guided(self, scale, x, **settings):
        denoiser = denoiser_of(cond_dim=2, **SMALL["mlp"])
        guidance = ClassifierFreeGuidance(denoiser, scale, **settings)
        return guidance(x, self.t, self.cond)

    def plain(self, x, cond):
        return denoiser_of(cond_dim=2, **SMALL["mlp"])(x, self.t, cond)

    def test_scale_1_is_the_conditional_and_0_the_unconditional(self, states):
        _, x = states
        conditional, none = self.plain(x, self.cond), self.plain(x, torch.zeros(3, 2))
        assert not torch.allclose(conditional.x0_hat, none.x0_hat, atol=1e-3)
        torch.testing.assert_close(self.guided(1.0, x).x0_hat, conditional.x0_hat)
        torch.testing.assert_close(self.guided(0.0, x).x0_hat, none.x0_hat)

    def test_null_condition_may_be_another(self, states):
        _, x = states
        null = torch.tensor([0.5, 0.5])
        expected = self.plain(x, null.expand(3, 2)).aux["log_p"]
        found = self.guided(0.0, x, null_cond=null).aux["log_p"]
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("scale", [0.3, 2.5])
    def test_between_and_beyond_it_is_a_line_in_log_probabilities(self, scale, states):
        tokens, x = states
        out = self.guided(scale, x)
        c, u = (self.plain(x, v).aux["log_p"] for v in (self.cond, torch.zeros(3, 2)))
        powers = (scale * c + (1 - scale) * u).exp()
        expected = powers / powers.sum(-1, keepdim=True)
        torch.testing.assert_close(out.aux["log_p"].exp(), expected)
        torch.testing.assert_close(out.x0_hat.sum(-1), torch.ones(3, L))
        assert torch.equal(out.x0_hat[tokens != V], x[tokens != V])

    @pytest.mark.parametrize("rows", [1, 3])
    def test_runs_on_a_grid(self, rows, states):
        _, x = states
        guidance = ClassifierFreeGuidance(denoiser_of(cond_dim=2, **SMALL["mlp"]), 1.7)
        t = torch.rand(2, rows, 1, 1, generator=seeded(), dtype=torch.float64)
        answer = guidance.on_grid(t)(1, x, self.cond)
        direct = guidance(x, t[1].float(), self.cond)
        torch.testing.assert_close(answer.aux["log_p"], direct.aux["log_p"], rtol=1e-4, atol=1e-4)

    def test_needs_a_condition(self, states):
        guidance = ClassifierFreeGuidance(denoiser_of(cond_dim=2, **SMALL["mlp"]), 2.0)
        with pytest.raises(ValueError, match="needs cond"):
            guidance(states[1], self.t)


@pytest.mark.parametrize("solver", ["ancestral", "scheduled"])
def test_record_holds_the_law_of_the_next_state(solver):
    denoiser = denoiser_of(time_free=True, **SMALL["mlp"])
    start = prior_start(denoiser.process, torch.zeros(5, L, V + 1))
    grid = levels(start, L)
    groups = one_by_one(torch.ones(5, L, dtype=torch.bool), seeded())
    how = Ancestral() if solver == "ancestral" else Scheduled(groups)
    with torch.no_grad():
        out = sample(denoiser, how, start, grid, generator=seeded(1), record=True)
    assert len(out.transitions) == L
    for k, step in enumerate(out.transitions):
        assert step.std is None
        torch.testing.assert_close(step.mean.sum(-1), torch.ones(5, L))
        assert ((step.x_next * step.mean).sum(-1) > 0).all()  # what happened was possible
        p, masked = step.denoised.aux["log_p"].exp(), step.x[..., -1:]
        reveal = denoiser.process.reveal(grid[k], grid[k + 1]).float()
        if solver == "scheduled":
            reveal = (groups == k).float().unsqueeze(-1)
        mean = step.x[..., :-1] + masked * reveal * p
        torch.testing.assert_close(step.mean[..., :-1], mean)
        torch.testing.assert_close(step.mean[..., -1:], masked * (1 - reveal))
        following = out.x0 if k + 1 == L else out.transitions[k + 1].x
        assert torch.equal(step.x_next, following)


def test_what_was_given_is_never_changed():
    denoiser = denoiser_of(process=Cosine(), **SMALL["mlp"])
    given = one_hot(torch.randint(0, V, (40, L), generator=seeded()), V)
    noise = denoiser.process.draw_noise(given.shape, seeded(1), given)
    t = torch.linspace(0.2, 0.9, 40).view(-1, 1, 1)
    start = truncated_start(denoiser.process, given, t, noise)
    kept = start.x[..., -1] == 0
    assert 0.1 < kept.float().mean() < 0.9
    with torch.no_grad():
        x0 = sample(denoiser, Ancestral(), start, levels(start, 5), generator=seeded(2))
    assert torch.equal(x0[kept], given[kept])
    assert (x0[..., -1] == 0).all()
    assert not torch.equal(x0, given)


class Wide(nn.Module):
    dim = 7


@pytest.mark.parametrize(
    ("network", "process", "vocab_size", "message"),
    [
        (Wide(), LogLinear(), 1, "vocab_size must be at least 2, got 1"),
        (Wide(), LogLinear(), 4, "4 tokens and the mask need dim=5, got dim=7"),
        (Wide(), VPCosine(), 6, "tokens need a masking process.*got VPCosine"),
    ],
)
def test_what_does_not_fit_is_named(network, process, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        MaskedDenoiser(network, process, vocab_size)


def test_mask_is_the_token_after_the_last():
    assert denoiser_of(**SMALL["mlp"]).mask_id == V


@pytest.mark.parametrize("shape", [(1, L, 1), (1, 1)])
def test_levels_are_per_row(shape):
    with pytest.raises(ValueError, match=r"one level per row, t \[B, 1, 1\]"):
        denoiser_of(**SMALL["mlp"]).check_t(torch.ones(shape))
