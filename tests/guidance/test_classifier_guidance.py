"""Guidance of masked sequences by a reward, against enumeration."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffpolicy.core import (
    AnalyticDenoiser,
    Ancestral,
    LogLinear,
    MaskedDenoiser,
    VPCosine,
    levels,
    one_hot,
    prior_start,
    sample,
)
from diffpolicy.guidance import ClassifierFreeGuidance
from diffpolicy.guidance.reward import RewardGuidance, single_site_changes

V, L = 3, 4
WEIGHTS = torch.randn(L, V, generator=torch.Generator().manual_seed(1))
STATE = torch.tensor([[V, 0, V, V], [2, V, 1, V], [V, V, V, V]])
T = torch.full((1, 1, 1), 0.7)


class Head(nn.Module):
    """Logits that depend on every position of the state and on the condition."""

    dim = V + 1

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(L * (V + 1), L * (V + 1))

    def forward(self, x, t, cond=None):
        shift = 0 if cond is None else cond[:, :1, None]
        return (self.linear(x.flatten(1)).view(-1, L, V + 1) + x[..., :1] * shift).tanh()


def linear(x):
    return (x * WEIGHTS.to(x)).sum((1, 2))


def curved(x):
    return linear(x) + (x[:, 0] * x[:, 1].roll(1, -1)).sum(-1) + linear(x) ** 2


@pytest.fixture
def denoiser():
    return MaskedDenoiser(Head(), LogLinear(), V)


@pytest.fixture
def x():
    return one_hot(STATE, V)


def test_scale_zero_is_the_denoiser_and_asks_for_no_reward(denoiser, x):
    def never(x):
        raise AssertionError

    guided, plain = RewardGuidance(denoiser, never, 0.0)(x, T), denoiser(x, T)
    assert torch.equal(guided.x0_hat, plain.x0_hat)
    assert guided.aux.keys() == plain.aux.keys()


@pytest.mark.parametrize("mode", ["clean", "exact"])
def test_a_linear_reward_tilts_each_position_by_its_weights(denoiser, x, mode):
    out = RewardGuidance(denoiser, linear, 2.5, mode=mode)(x, T)
    plain = denoiser(x, T)
    expected = (plain.aux["log_p"] + 2.5 * WEIGHTS).log_softmax(-1)
    torch.testing.assert_close(out.aux["log_p"], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.aux["log_p_unguided"], plain.aux["log_p"])
    torch.testing.assert_close(out.aux["reward"], linear(plain.x0_hat[..., :-1]))
    assert torch.equal(out.x0_hat[1, 0], x[1, 0])  # what is revealed is carried over
    torch.testing.assert_close(out.x0_hat.sum(-1), torch.ones(3, L))


def test_exact_mode_is_every_single_site_completion(denoiser, x):
    clean = denoiser(x, T).x0_hat[..., :-1]
    value, change = single_site_changes(curved, clean)
    for i in range(L):
        for a in range(V):
            other = clean.clone()
            other[:, i] = torch.eye(V)[a]
            torch.testing.assert_close(change[:, i, a], curved(other) - value)


def test_exact_mode_in_chunks(denoiser, x, monkeypatch):
    want = RewardGuidance(denoiser, curved, 1.0, mode="exact")(x, T)
    monkeypatch.setattr("diffpolicy.guidance.reward.MAX_ROWS", 20)  # two positions at a time
    got = RewardGuidance(denoiser, curved, 1.0, mode="exact")(x, T)
    torch.testing.assert_close(got.aux["log_p"], want.aux["log_p"])


def test_clean_mode_is_the_first_order_of_the_exact_one(denoiser, x):
    clean = denoiser(x, T).x0_hat[..., :-1].detach().requires_grad_()
    (slope,) = torch.autograd.grad(curved(clean).sum(), clean)
    eps = 1e-3
    for a in range(V):
        moved = clean.detach().clone()
        moved[:, 2] += eps * (torch.eye(V)[a] - moved[:, 2])
        difference = (curved(moved) - curved(clean)) / eps
        first = slope[:, 2, a] - (slope[:, 2] * clean[:, 2]).sum(-1)
        torch.testing.assert_close(difference, first.detach(), atol=2e-2, rtol=2e-2)
    out = RewardGuidance(denoiser, curved, 1.5)(x, T)
    expected = (denoiser(x, T).aux["log_p"] + 1.5 * slope).log_softmax(-1)
    torch.testing.assert_close(out.aux["log_p"], expected)


def test_state_mode_differentiates_through_the_network(denoiser, x):
    denoiser, x = denoiser.double(), x.double()
    out = RewardGuidance(denoiser, curved, 1.0, mode="state")(x, T.double())
    shift = out.aux["log_p"] - out.aux["log_p_unguided"]
    eps = 1e-6
    for i in range(L):
        slope = []
        for a in range(V):
            values = []
            for sign in (1, -1):
                moved = x.clone()
                moved[:, i, a] += sign * eps
                values.append(curved(denoiser(moved, T.double()).x0_hat[..., :-1]))
            slope.append((values[0] - values[1]) / (2 * eps))
        slope = torch.stack(slope, -1)
        got = shift[:, i] - shift[:, i, :1]
        torch.testing.assert_close(got, slope - slope[:, :1], atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("mode", ["clean", "state"])
def test_no_graph_without_gradients_and_one_with_them(denoiser, x, mode):
    guided = RewardGuidance(denoiser, curved, 1.0, mode=mode)
    with torch.no_grad():
        out = guided(x, T)
    assert not any(v.requires_grad for v in (out.x0_hat, *out.aux.values()))
    guided(x, T).x0_hat[..., 0].sum().backward()
    assert denoiser.network.linear.weight.grad.abs().sum() > 0


def test_inference_mode_is_refused_where_a_gradient_is_needed(denoiser, x):
    with torch.inference_mode():
        with pytest.raises(ValueError, match=r"torch.no_grad\(\)"):
            RewardGuidance(denoiser, curved, 1.0)(x, T)
        RewardGuidance(denoiser, curved, 1.0, mode="exact")(x, T)


def test_in_the_loop_and_around_other_guidance(denoiser):
    guided = RewardGuidance(ClassifierFreeGuidance(denoiser, 2.0), linear, 8.0, mode="clean")
    start = prior_start(denoiser.process, torch.zeros(400, L, V + 1))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        x0 = sample(
            guided,
            Ancestral(),
            start,
            levels(start, 6),
            cond=torch.ones(400, 1),
            generator=generator,
        )
    assert (x0.argmax(-1) == WEIGHTS.argmax(-1)).float().mean() > 0.9


def test_rewards_per_evaluation(denoiser):
    calls = [
        RewardGuidance(denoiser, curved, 1.0, mode=m).reward_calls(L, V)
        for m in ("clean", "state", "exact")
    ]
    assert calls == [1, 1, L * V + 1]
    assert RewardGuidance(denoiser, curved, 0.0).reward_calls(L, V) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "soft"}, "unknown mode 'soft'"),
        (
            {"denoiser": AnalyticDenoiser(VPCosine(), lambda x, t, cond: x)},
            "not VPCosine states: use ValueGuidance",
        ),
    ],
)
def test_refused_at_construction(denoiser, change, message):
    with pytest.raises(ValueError, match=message):
        RewardGuidance(**{"denoiser": denoiser, "reward": linear, "scale": 1.0, **change})


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda x: x.argmax(-1).sum(-1).float(), "has no gradient; use"),
        (lambda x: x.sum(-1), r"one number per row, \[3\]; got \(3, 4\)"),
        (lambda x: 1.0, "got float"),
    ],
)
def test_refused_rewards(denoiser, x, reward, message):
    with pytest.raises(ValueError, match=message):
        RewardGuidance(denoiser, reward, 1.0)(x, T)
