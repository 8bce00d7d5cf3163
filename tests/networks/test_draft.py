"""Drafts: rollouts are teacher forcing on what they wrote themselves."""

from __future__ import annotations

import pytest
import torch

from diffpolicy.networks.draft import Draft


def draft(base, *, returns=True, n_obs_steps=2, depth=2):
    """All layers random, the last one too, so that every path carries signal."""
    torch.manual_seed(0)
    head = Draft(
        3, 9, n_obs_steps, returns=returns, base=base, width=16, depth=depth, heads=2
    ).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return head


@pytest.mark.parametrize("base", ["gru", "transformer"])
@pytest.mark.parametrize("returns", [False, True])
@pytest.mark.parametrize("n_obs_steps", [1, 2])
def test_a_rollout_is_teacher_forcing_on_its_own_states(base, returns, n_obs_steps):
    """Step by step with a memory, or the whole sequence anew for every state: the same plan."""
    head = draft(base, returns=returns, n_obs_steps=n_obs_steps)
    history = torch.randn(4, n_obs_steps, 3, dtype=torch.float64)
    target = torch.rand(4, 1, dtype=torch.float64) if returns else None
    with torch.no_grad():
        plans = head.rollout(history, target)
        states = history
        told = None if target is None else target[:, None].expand(-1, n_obs_steps, -1)
        while states.shape[1] < 9:
            following, of_return = head(states, told)
            states = torch.cat([states, following[:, -1:]], 1)
            told = None if told is None else torch.cat([told, of_return[:, -1:]], 1)
    assert plans.shape == (4, 9, 3)
    torch.testing.assert_close(plans, states, rtol=0, atol=1e-9)
    assert torch.equal(plans[:, :n_obs_steps], history)
    assert (plans[:, -1] - plans[:, n_obs_steps - 1]).abs().max() > 0.1


@pytest.mark.parametrize("base", ["gru", "transformer"])
def test_predictions_are_causal(base):
    head = draft(base)
    states = torch.randn(2, 9, 3, dtype=torch.float64)
    told = torch.randn(2, 9, 1, dtype=torch.float64)
    before, _ = head(states, told)
    states[:, 5:] += 1
    told[:, 5:] -= 1
    after, _ = head(states, told)
    torch.testing.assert_close(after[:, :5], before[:, :5], rtol=0, atol=1e-12)
    assert not torch.allclose(after[:, 5:], before[:, 5:])


@pytest.mark.parametrize("base", ["gru", "transformer"])
def test_an_untrained_draft_stays_where_it_is(base):
    head = Draft(3, 6, 1, base=base, width=16)
    history = torch.randn(2, 1, 3)
    assert torch.equal(head.rollout(history), history.expand(-1, 6, -1))


@pytest.mark.parametrize("base", ["gru", "transformer"])
def test_the_return_that_it_is_told_matters_and_rows_are_independent(base):
    head = draft(base)
    history = torch.randn(3, 2, 3, dtype=torch.float64)
    low, high = torch.zeros(3, 1).double(), torch.tensor([[0.0], [5.0], [0.0]]).double()
    with torch.no_grad():
        one, two = head.rollout(history, low), head.rollout(history, high)
    torch.testing.assert_close(one[[0, 2]], two[[0, 2]], rtol=0, atol=1e-12)
    assert not torch.allclose(one[1], two[1])


@pytest.mark.parametrize("base", ["gru", "transformer"])
def test_a_rollout_can_be_differentiated(base):
    head = draft(base, returns=False, n_obs_steps=1)
    history = torch.randn(2, 1, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(head.rollout, (history,), fast_mode=True)


def test_errors():
    with pytest.raises(ValueError, match="unknown base of a draft 'lstm'"):
        Draft(3, 9, 1, base="lstm")
    with pytest.raises(ValueError, match="horizon must be larger, got 2"):
        Draft(3, 2, 2)
    with pytest.raises(ValueError, match="multiple of heads, got 18 and 4"):
        Draft(3, 9, 1, base="transformer", width=18)
    head = Draft(3, 9, 2, returns=True, width=16)
    with pytest.raises(ValueError, match=r"history must be \[B, 2, 3\], got \[1, 1, 3\]"):
        head.rollout(torch.zeros(1, 1, 3), torch.zeros(1, 1))
    with pytest.raises(ValueError, match="returns=True: pass returns"):
        head.rollout(torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="returns=False: pass none"):
        Draft(3, 9, 2).rollout(torch.zeros(1, 2, 3), torch.zeros(1, 1))
    with pytest.raises(ValueError, match=r"T must be in \[1, 9\], got 10"):
        head(torch.zeros(1, 10, 3), torch.zeros(1, 10, 1))
    with pytest.raises(ValueError, match=r"returns must be \[1, 9, 1\], got \[1, 9\]"):
        head(torch.zeros(1, 9, 3), torch.zeros(1, 9))
