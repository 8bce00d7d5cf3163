"""Denoisers on a base: guidance where nothing is learned, enumeration, and what is not trained."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from diffpolicy.core import LogLinear, MaskedDenoiser, one_hot
from diffpolicy.guidance import ResidualDenoiser, RewardGuidance

V, L = 3, 4
T = torch.zeros(1, 1, 1)
STATE = torch.tensor([[V, 0, V, V], [2, V, 1, V], [V, V, V, V], [V, 0, V, V]])
WEIGHTS = torch.randn(L, V, generator=torch.Generator().manual_seed(2))
LINEAR = sum(WEIGHTS[i].view([-1 if j == i else 1 for j in range(L)]) for i in range(L))
TABLE = (0.5 * LINEAR).exp()  # positions reinforce each other


class Head(nn.Module):
    """Logits of independent positions, and nothing else."""

    dim, horizon = V + 1, L

    def __init__(self, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.logits = nn.Parameter(torch.randn(L, V + 1, generator=g))

    def forward(self, x, t, cond=None):
        return self.logits.expand(len(x), -1, -1)


def reward(x):
    return torch.einsum("abcd,na,nb,nc,nd->n", TABLE.to(x), *x.unbind(1))


def denoiser(seed=0):
    return MaskedDenoiser(Head(seed), LogLinear(), V, time_free=True)


def residual(**settings):
    return ResidualDenoiser(denoiser(), RewardGuidance(denoiser(), reward, 2.0, **settings))


@pytest.mark.parametrize("mode", ["clean", "state", "exact"])
@pytest.mark.parametrize("order", [1, 2])
@torch.no_grad()
def test_untuned_it_is_guidance(mode, order):
    if (mode, order) == ("state", 2):
        with pytest.raises(ValueError, match="order=2 needs mode 'clean' or 'exact'"):
            residual(mode=mode, order=order)
        return
    on = residual(mode=mode, order=order)
    want = on.base(one_hot(STATE, V), T)
    for x in (STATE, one_hot(STATE, V)):
        torch.testing.assert_close(on.log_probs(x, T), want.aux["log_p"])
    torch.testing.assert_close(on(one_hot(STATE, V), T).x0_hat, want.x0_hat)
    grid = on.on_grid(torch.linspace(1, 0, 3)[:2].view(2, 1, 1, 1))
    torch.testing.assert_close(grid(0, one_hot(STATE, V), None).x0_hat, want.x0_hat)


@torch.no_grad()
def test_second_order_is_closer_to_the_tilted_law():
    """Against ``p(x_i = a) E[exp(s r) | x_i = a]``, by enumeration of independent positions."""
    plain, x = denoiser(), one_hot(torch.full((1, L), V), V)
    log_p = plain.log_probs(x, T)[0]
    joint = sum(log_p[i].view([-1 if j == i else 1 for j in range(L)]) for i in range(L))
    for scale in (0.1, 0.3):
        tilted = (joint + scale * TABLE).flatten().softmax(0).view(TABLE.shape)
        errors = []
        for order in (1, 2):
            found = RewardGuidance(plain, reward, scale, order=order)(x, T).aux["log_p"][0].exp()
            want = torch.stack([tilted.sum([j for j in range(L) if j != i]) for i in range(L)])
            errors.append(float((found - want).abs().sum()))
        assert errors[1] < 0.7 * errors[0]


def test_the_base_stays_and_the_network_learns():
    on = residual(order=2)
    assert on.state_dict().keys() == denoiser().state_dict().keys()
    before = copy.deepcopy(on.base.state_dict())
    log_p = on.log_probs(STATE, T)
    log_p[..., 0].sum().backward()
    assert on.network.logits.grad.abs().sum() > 0
    assert all(not p.requires_grad for p in on.base.parameters())
    assert on.double().base.denoiser.weight.dtype == torch.float64  # both move together
    on.float()
    torch.testing.assert_close(on.base.state_dict(), before)


def test_gradients_by_the_state_are_those_of_differences():
    """A relaxed state moves the slope too: reward back-propagation sees the whole of it."""
    on, g = residual(order=2).double(), torch.Generator().manual_seed(0)
    weights = torch.randn(1, L, V, generator=g, dtype=torch.float64)
    soft = torch.rand(1, L, V + 1, generator=g, dtype=torch.float64).softmax(-1)

    def value(x):
        return (on.log_probs(x, T.double()) * weights).sum()

    assert torch.autograd.gradcheck(value, (soft.requires_grad_(),))


def test_equal_states_are_asked_about_once():
    on = residual()
    with torch.no_grad():
        on.log_probs(STATE, T)
    assert on.reward_calls == 3
    assert residual(order=2).with_reward(reward).base.order == 2


def test_a_base_of_another_size_is_refused():
    class Short(Head):
        horizon = L - 1

    other = MaskedDenoiser(Short(), LogLinear(), V, time_free=True)
    with pytest.raises(ValueError, match=r"= \(3, 3, True\), the denoiser \(3, 4, True\)"):
        ResidualDenoiser(denoiser(), RewardGuidance(other, reward, 1.0))
