"""Preference losses as functions of scores: exact values, limits, and optima of their own."""

from __future__ import annotations

import math

import pytest
import torch

from diffpolicy.learn.preferences.formulas import Preference, feedback_loss, preference_loss
from diffpolicy.sequences.exact import divergence, optimum

REWARD = torch.tensor([1.5, 0.0, -1.0, 0.5, 2.0, -0.5], dtype=torch.float64)
REFERENCE = torch.tensor([0.1, 0.3, 0.2, 0.15, 0.05, 0.2], dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------ exact values


def at_reference(loss, **settings):
    s = torch.tensor([3.0, -1.0])
    chosen, rejected = s.clone().requires_grad_(), s.flip(0).clone().requires_grad_()
    settings = Preference(loss, **settings)
    references = (s, s.flip(0)) if settings.needs_reference else ()
    if not references:
        rejected = s.clone().requires_grad_()
    out = preference_loss(settings, chosen, rejected, *references)
    out.loss.sum().backward()
    return out, chosen.grad, rejected.grad


@pytest.mark.parametrize(
    ("loss", "settings", "value"),
    [
        ("dpo", {}, math.log(2)),
        ("dpo", {"label_smoothing": 0.2}, math.log(2)),
        ("dpo", {"kl_beta": 1e4}, math.log(2)),
        ("ipo", {}, 0.25),
        ("margin", {}, math.log(2)),
        ("margin", {"margin": 1.0}, math.log(1 + math.e)),
    ],
)
def test_value_and_gradient_where_policy_is_reference(loss, settings, value):
    out, chosen, rejected = at_reference(loss, **settings)
    torch.testing.assert_close(out.loss, torch.full((2,), value))
    assert (chosen < 0).all()
    assert torch.equal(chosen, -rejected)  # so that swapping the two flips it
    assert float(out.metrics["gap"]) == 0
    assert float(out.metrics["accuracy"]) == 0.5
    assert float(out.metrics["saturated"]) == 0


def test_values_away_from_the_reference():
    scores = [torch.tensor([v], dtype=torch.float64) for v in (2.0, 1.0, 1.5, 1.2)]
    gap = (2.0 - 1.5) - (1.0 - 1.2)
    for settings, value in (
        (Preference("dpo", 3.0), math.log(1 + math.exp(-3 * gap))),
        (
            Preference("dpo", 3.0, label_smoothing=0.1),
            0.9 * math.log(1 + math.exp(-3 * gap)) + 0.1 * math.log(1 + math.exp(3 * gap)),
        ),
        (Preference("ipo", 3.0), (3 * gap - 0.5) ** 2),
    ):
        out = preference_loss(settings, *scores)
        assert float(out.loss) == pytest.approx(value)
        assert float(out.metrics["gap"]) == pytest.approx(gap)
        assert float(out.metrics["accuracy"]) == 1
    out = preference_loss(Preference("margin", 3.0, margin=0.4), *scores[:2])
    assert float(out.loss) == pytest.approx(math.log(1 + math.exp(0.4 - 3)))


@pytest.mark.parametrize("loss", ["dpo", "margin"])
def test_limits_of_kl_beta(loss):
    gap = torch.tensor([-2.0, -0.5, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros_like(gap).detach()
    references = (zero, zero) if loss == "dpo" else ()
    for kl_beta in (1e-6, 1e4):
        settings = Preference(loss, kl_beta)
        value = preference_loss(settings, gap, zero, *references).loss
        (slope,) = torch.autograd.grad(value.sum(), gap)
        if kl_beta < 1:  # linear ranking: every pair counts alike, whatever its gap
            torch.testing.assert_close(value, torch.full_like(gap, math.log(2)), atol=1e-5, rtol=0)
            torch.testing.assert_close(
                slope / kl_beta, torch.full_like(gap, -0.5), atol=1e-5, rtol=0
            )
        else:  # a hinge: only pairs in the wrong order count
            torch.testing.assert_close(value / kl_beta, (-gap).relu())
            torch.testing.assert_close(slope / kl_beta, -(gap < 0).double())


def test_saturation_counts_pairs_without_a_slope():
    gap = torch.tensor([-10.0, 0.0, 3.0, 10.0])
    zero = torch.zeros(4)
    out = preference_loss(Preference("dpo", 1.0), gap, zero, zero, zero)
    assert float(out.metrics["saturated"]) == 0.25
    out = preference_loss(Preference("ipo", 1.0), gap / 6, zero, zero, zero)
    assert float(out.metrics["saturated"]) == 0.25  # 3 / 6: there


def test_feedback_values():
    policy = torch.tensor([1.0, 2.0, -1.0, 0.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.5, 0.5, 0.5, 0.5], dtype=torch.float64)
    good = torch.tensor([True, False, True, False])
    settings = Preference("kto", 2.0, good_weight=3.0, bad_weight=0.5)
    out = feedback_loss(settings, policy, reference, good)
    point = max(0.0, 2 * (0.5 + 1.5 - 1.5 - 0.5) / 4)
    sides = [2 * 0.5 - point, point - 2 * 1.5, 2 * -1.5 - point, point + 2 * 0.5]
    wanted = [w / (1 + math.exp(s)) for w, s in zip((3, 0.5, 3, 0.5), sides, strict=True)]
    torch.testing.assert_close(out.loss, torch.tensor(wanted, dtype=torch.float64))
    assert float(out.metrics["accuracy"]) == 0.5
    assert float(out.metrics["gap"]) == pytest.approx((0.5 - 1.5) / 2 - (1.5 - 0.5) / 2)
    out.loss.sum().backward()
    assert (policy.grad[good] < 0).all()
    assert (policy.grad[~good] > 0).all()


def test_feedback_at_the_reference_and_its_point():
    s = torch.randn(4, generator=seeded())
    good = torch.tensor([True, False, True, False])
    settings = Preference("kto", good_weight=3.0)
    out = feedback_loss(settings, s, s, good)
    torch.testing.assert_close(out.loss, torch.tensor([1.5, 0.5, 1.5, 0.5]))
    # The point does not follow what is below it, and has no gradient.
    below = feedback_loss(Preference("kto", 1.0), s - 1, s, good).loss
    torch.testing.assert_close(below, torch.where(good, 1 - 1 / (1 + math.e), 1 / (1 + math.e)))
    one_kind = feedback_loss(settings, s, s + 1, torch.ones(4, dtype=torch.bool))
    assert float(one_kind.metrics["gap"]) == 0


# ------------------------------------------------------------------------------ optima


def fitted(objective, steps=60):
    """The law and its logits, of free scores, that minimise ``objective(log_p)``."""
    logits = REFERENCE.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=steps, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = objective(logits.log_softmax(0))
        value.backward()
        return value

    for _ in range(5):
        optimizer.step(closure)
    return logits.detach().log_softmax(0)


def expected_loss(settings):
    """The mean loss over all pairs of items and the answers of a Bradley-Terry judge."""
    first, second = torch.cartesian_prod(torch.arange(6), torch.arange(6)).T
    chance = (REWARD[first] - REWARD[second]).sigmoid()
    ref = REFERENCE.log()

    def objective(log_p):
        references = (ref[first], ref[second]) if settings.needs_reference else ()
        loss = preference_loss(settings, log_p[first], log_p[second], *references).loss
        return (chance * loss).sum()

    return objective


@pytest.mark.parametrize("kl_beta", [0.3, 1.0, 5.0])
def test_dpo_finds_the_tilted_law(kl_beta):
    found = fitted(expected_loss(Preference("dpo", kl_beta)))
    best = optimum(REFERENCE, REWARD, kl_beta)
    assert divergence(best, REFERENCE) > 0.01
    torch.testing.assert_close(found.exp(), best, atol=1e-4, rtol=0)


def test_smoothed_dpo_expects_wrong_labels():
    """Its optimum for certain answers: a gap of logit(1 - e), not an infinite one."""
    e, kl_beta = 0.1, 0.7
    gap = torch.zeros((), dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    settings = Preference("dpo", kl_beta, label_smoothing=e)
    optimizer = torch.optim.LBFGS([gap], line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        value = preference_loss(settings, gap.view(1), zero, zero, zero).loss.sum()
        value.backward()
        return value

    optimizer.step(closure)
    assert kl_beta * float(gap.detach()) == pytest.approx(math.log((1 - e) / e), abs=1e-4)


def test_ipo_finds_the_chance_to_win():
    kl_beta = 0.4
    found = fitted(expected_loss(Preference("ipo", kl_beta)))
    wins = (REWARD[:, None] - REWARD).sigmoid().mean(1)
    torch.testing.assert_close(found.exp(), optimum(REFERENCE, wins, kl_beta), atol=1e-5, rtol=0)


def test_margin_forgets_the_reference():
    found = fitted(expected_loss(Preference("margin", 0.8)))
    torch.testing.assert_close(found.exp(), (REWARD / 0.8).softmax(0), atol=1e-5, rtol=0)
    pushed = fitted(expected_loss(Preference("margin", 0.8, margin=2.0)))
    assert torch.equal(pushed.argsort(), REWARD.argsort())
    assert (pushed.sort().values.diff() > found.sort().values.diff()).all()


def test_kto_sorts_rather_than_tilts():
    """Where good answers outweigh bad ones the ratio rises, elsewhere it falls."""
    chance = REWARD.sigmoid()
    settings = Preference("kto", 1.0, good_weight=1.0, bad_weight=1.3)
    wanted = chance > 1.3 * (1 - chance)
    assert 0 < wanted.sum() < 6
    ref = REFERENCE.log()
    good = torch.tensor([True] * 6 + [False] * 6)
    scores = ref.clone().requires_grad_()

    def slope():
        loss = feedback_loss(settings, scores.repeat(2), ref.repeat(2), good).loss
        return torch.autograd.grad((torch.cat([chance, 1 - chance]) * loss).sum(), scores)[0]

    assert torch.equal(slope() < 0, wanted)
    torch.testing.assert_close(slope(), (1.3 * (1 - chance) - chance) / 4)
    with torch.no_grad():
        for _ in range(300):
            with torch.enable_grad():
                step = slope()
            scores -= 5 * step
    law = (scores.detach()).softmax(0)
    assert law[wanted].sum() > 0.99


# ------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"loss": "slic"}, "unknown loss 'slic'"),
        ({"kl_beta": 0}, "kl_beta must be positive, got 0"),
        ({"kl_beta": math.inf}, "kl_beta must be positive"),
        ({"label_smoothing": 0.5}, "label_smoothing must be in"),
        ({"anchor_weight": -1}, "anchor_weight must be at least 0"),
    ],
)
def test_settings_that_cannot_work(config, message):
    with pytest.raises(ValueError, match=message):
        Preference(**config)


def test_losses_take_their_own_scores():
    s = torch.zeros(2)
    with pytest.raises(ValueError, match="use feedback_loss"):
        preference_loss(Preference("kto"), s, s, s, s)
    with pytest.raises(ValueError, match="use preference_loss"):
        feedback_loss(Preference("dpo"), s, s, s > 0)
    with pytest.raises(ValueError, match="takes both scores of the reference, got 0"):
        preference_loss(Preference("dpo"), s, s)
    with pytest.raises(ValueError, match="takes no score of the reference, got 2"):
        preference_loss(Preference("margin"), s, s, s, s)
