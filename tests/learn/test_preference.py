"""The preference objective: shared noise, references, anchors, and what training with it finds."""

from __future__ import annotations

import math

import pytest
import torch
from tuning_preferences import (
    GaussianDenoiser,
    consistent_denoiser,
    gaussian_kl,
    labelled_pairs,
    plan_batch,
    pointwise,
)
from tuning_tables import table_denoiser
from tuning_tilted_mixture import MixtureDenoiser, one_dimensional

from diffpolicy.core import Denoiser, VPCosine
from diffpolicy.learn.adapters import add_adapters
from diffpolicy.learn.preferences.dpo import PreferenceLoss
from diffpolicy.learn.preferences.formulas import Preference
from diffpolicy.learn.preferences.scores import DenoisingScore, MaskedScore
from diffpolicy.learn.reference import frozen_copy
from diffpolicy.networks.mlp import MLP
from diffpolicy.sequences.exact import ExactLaw, divergence, optimum


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------ the objective


def token_batch(count=8, single=False, vocab_size=3, length=3):
    tokens = torch.randint(vocab_size, (2, count, length), generator=seeded(4))
    if single:
        return {"tokens": tokens[0], "good": torch.arange(count) % 2 == 0}
    return {"chosen": tokens[0], "rejected": tokens[1]}


CASES = [
    (lambda: pointwise(), plan_batch, DenoisingScore()),
    (lambda: pointwise(prediction="v"), plan_batch, DenoisingScore("elbo", draws=2)),
    (lambda: pointwise(prediction="x0"), plan_batch, DenoisingScore(levels=(1.0, 0.5))),
    (lambda: table_denoiser(3, 3), token_batch, MaskedScore()),
    (lambda: table_denoiser(3, 3, time_free=False), token_batch, MaskedScore(draws=2)),
]


@pytest.mark.parametrize(("make", "batch", "score"), CASES)
def test_an_untouched_policy_has_no_gap(make, batch, score):
    """Exactly: noise is shared by the policy and its reference."""
    for kind, value in (("dpo", math.log(2)), ("ipo", 0.25)):
        loss = PreferenceLoss(make(), Preference(kind, 100.0), score)
        out = loss(batch(), seeded())
        assert float(out.metrics["gap"]) == 0
        torch.testing.assert_close(out.loss, torch.full_like(out.loss, value))
        for name in ("chosen", "rejected"):
            ours, theirs = (out.metrics[f"error_{name}{end}"] for end in ("", "_reference"))
            assert torch.equal(ours, theirs)
    loss = PreferenceLoss(make(), Preference("kto", 100.0), score)
    out = loss(batch(single=True), seeded())
    assert torch.equal(out.loss, torch.full_like(out.loss, 0.5))


@pytest.mark.parametrize(("make", "batch", "score"), CASES)
def test_an_item_against_itself_has_no_gap(make, batch, score):
    """Noise is shared by the chosen and the rejected item."""
    loss = PreferenceLoss(make(), None, score)
    with torch.no_grad():
        for parameter in loss.denoiser.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=seeded(1))
    batch = batch()
    same = {k: batch[k.replace("rejected", "chosen")] for k in batch}
    with torch.no_grad():
        value = loss(same, seeded()).loss
        torch.testing.assert_close(value, torch.full_like(value, math.log(2)))
        assert (loss(batch, seeded()).loss - math.log(2)).abs().max() > 1e-3


@pytest.mark.parametrize(("make", "batch", "score"), CASES)
def test_swapping_chosen_and_rejected_flips_the_gradient(make, batch, score):
    loss = PreferenceLoss(make(), None, score)
    batch = batch()
    flipped = {"chosen": "rejected", "rejected": "chosen"}
    swapped = {flipped[k.split("_")[0]] + k[len(k.split("_")[0]) :]: v for k, v in batch.items()}
    one, two = (
        torch.autograd.grad(loss(b, seeded()).loss.mean(), list(loss.denoiser.parameters()))
        for b in (batch, swapped)
    )
    assert max(float(g.abs().max()) for g in one) > 1e-4
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, -b, atol=1e-6, rtol=1e-4)


def test_windows_of_padding_have_no_influence():
    loss = PreferenceLoss(pointwise(), Preference(kl_beta=1.0))
    with torch.no_grad():
        loss.denoiser.network.outward += 0.1
    batch = plan_batch()
    for side in ("chosen", "rejected"):
        batch[f"{side}_steps"][:, 1] = False
    before = loss(batch, seeded()).loss
    batch["chosen_action"][:, 1], batch["rejected_obs"][:, 1] = 9.0, -9.0
    assert torch.equal(loss(batch, seeded()).loss, before)


def test_the_reference_is_a_frozen_copy_that_takes_no_gradient():
    denoiser = pointwise()
    loss = PreferenceLoss(denoiser).train()
    assert not loss.reference.training
    assert not any(p.requires_grad for p in loss.reference.parameters())
    loss(plan_batch(), seeded()).loss.sum().backward()
    assert all(p.grad is None for p in loss.reference.parameters())
    assert all(p.grad is not None for p in denoiser.parameters())


def test_adapters_switched_off_are_the_reference():
    torch.manual_seed(0)
    denoiser = Denoiser(MLP(4, 2, 3, width=16, depth=1), VPCosine())
    reference, batch = frozen_copy(denoiser), plan_batch()
    add_adapters(denoiser, {"type": "lora", "rank": 2})
    loss = PreferenceLoss(denoiser, Preference(kl_beta=2.0))
    assert loss.reference is None
    assert torch.equal(loss(batch, seeded()).loss, torch.full((6,), 2.0).log())
    g = seeded(2)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=g)
    other = PreferenceLoss(denoiser, Preference(kl_beta=2.0), reference=reference)
    got, wanted = (o(batch, seeded()) for o in (loss, other))
    torch.testing.assert_close(got.loss, wanted.loss)
    assert (got.loss.detach() - math.log(2)).abs().max() > 1e-3
    got.loss.sum().backward()
    trained = [p for p in denoiser.parameters() if p.requires_grad]
    assert max(p.grad.abs().max() for p in trained) > 0


def test_margin_evaluates_no_reference():
    denoiser = table_denoiser(3, 3)
    loss = PreferenceLoss(denoiser, Preference("margin"))
    out = loss(token_batch(), seeded())
    assert loss.reference is None
    assert denoiser.network.rows == 16
    assert "error_chosen" in out.metrics
    assert "error_chosen_reference" not in out.metrics


def test_anchor_is_the_error_of_the_chosen_items():
    plain, anchored = (PreferenceLoss(pointwise(), Preference(anchor_weight=w)) for w in (0.0, 0.7))
    a, b = plain(plan_batch(), seeded()), anchored(plan_batch(), seeded())
    assert "anchor" not in a.metrics
    assert torch.equal(b.metrics["anchor"], a.metrics["error_chosen"])
    torch.testing.assert_close((b.loss - a.loss).mean(), 0.7 * b.metrics["anchor"])


def test_anchors_of_both_add_up():
    batch = plan_batch()
    given = batch | {
        "anchor_obs": batch["chosen_obs"][:, 0] * 0,
        "anchor_action": batch["chosen_action"][:, 0] * 0,
    }
    found = {}
    for anchor in ("demonstrations", "chosen", "both"):
        loss = PreferenceLoss(pointwise(), Preference(anchor_weight=0.7, anchor=anchor))
        found[anchor] = loss(given, seeded()).metrics
    assert torch.equal(found["chosen"]["anchor"], found["chosen"]["error_chosen"])
    assert found["demonstrations"]["anchor"] != found["chosen"]["anchor"]
    total = found["demonstrations"]["anchor"] + found["chosen"]["anchor"]
    torch.testing.assert_close(found["both"]["anchor"], total)


def test_anchor_of_good_items_and_of_demonstrations():
    settings = Preference("kto", anchor_weight=1.0)
    batch = plan_batch(single=True)
    out = PreferenceLoss(pointwise(), settings)(batch, seeded())
    torch.testing.assert_close(out.metrics["anchor"], out.metrics["error_good"])
    assert bool((out.loss[~batch["good"]] == 0.5).all())
    bad = batch | {"good": torch.zeros(6, dtype=torch.bool)}
    out = PreferenceLoss(pointwise(), settings)(bad, seeded())
    assert float(out.metrics["anchor"]) == 0
    given = {"anchor_obs": batch["obs"][:, 0] * 0, "anchor_action": batch["action"][:, 0] * 0}
    out = PreferenceLoss(pointwise(), settings)(bad | given, seeded())
    assert float(out.metrics["anchor"]) > 0.1
    tokens = token_batch() | {"anchor_tokens": torch.zeros(8, 3, dtype=torch.long)}
    loss = PreferenceLoss(table_denoiser(3, 3), Preference(anchor_weight=1.0))
    assert loss(tokens, seeded()).metrics["anchor"] > 0.1


def test_conditions_and_segments_reach_the_network():
    denoiser = table_denoiser(2, 3, cond_dim=1)
    loss = PreferenceLoss(denoiser, Preference("margin", 1.0))
    batch = token_batch(vocab_size=2)
    plain = loss(batch | {"cond": torch.zeros(8, 1)}, seeded()).loss
    assert not torch.equal(loss(batch | {"cond": torch.ones(8, 1)}, seeded()).loss, plain)


# ------------------------------------------------------------------------------ learning


def train(loss, batches, steps, lr):
    parameters = [p for p in loss.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    g = seeded(3)
    for _ in range(steps):
        optimizer.zero_grad()
        out = loss(batches(g), g)
        out.loss.mean().backward()
        optimizer.step()
        schedule.step()
    return out


VOCAB, LENGTH = 3, 2
SEQUENCE_REWARD = torch.randn(9, generator=seeded(8), dtype=torch.float64)


def tuned_sequences(settings, *, time_free=True, steps=150, lr=0.05):
    """Laws: of the reference, and after tuning by labels on its own sequences."""
    law = torch.randn(9, generator=seeded(5), dtype=torch.float64).softmax(0)
    denoiser, space = consistent_denoiser(law, VOCAB, LENGTH)
    denoiser.time_free = time_free
    tokens = space.states[space.sequences]

    def batches(g):
        first, second = law.float().multinomial(256, replacement=True, generator=g).chunk(2)
        if settings.paired:
            rewards = SEQUENCE_REWARD[first].float(), SEQUENCE_REWARD[second].float()
            chosen, rejected = labelled_pairs(first, second, *rewards, g)
            return {"chosen": tokens[chosen], "rejected": tokens[rejected]}
        good = torch.rand(128, generator=g) < SEQUENCE_REWARD[first].sigmoid()
        return {"tokens": tokens[first], "good": good}

    train(PreferenceLoss(denoiser, settings, MaskedScore(draws=4)), batches, steps, lr)
    denoiser.time_free = True  # the table does not look at the level
    with torch.no_grad():
        return law, ExactLaw.of(denoiser, space).p


@pytest.mark.parametrize(
    ("kind", "time_free"), [("dpo", True), ("dpo", False), ("ipo", True), ("margin", True)]
)
def test_sequences_approach_the_optimum_of_each_loss(kind, time_free):
    kl_beta = 0.3 if kind == "ipo" else 1.0  # chances to win differ by less than rewards
    law, found = tuned_sequences(Preference(kind, kl_beta), time_free=time_free)
    wins = ((SEQUENCE_REWARD[:, None] - SEQUENCE_REWARD).sigmoid() * law).sum(1)
    best = {
        "dpo": optimum(law, SEQUENCE_REWARD, kl_beta),
        "ipo": optimum(law, wins, kl_beta),
        "margin": (SEQUENCE_REWARD / kl_beta).softmax(0),
    }[kind]
    assert divergence(law, best) > 0.05
    assert divergence(found, best) < 0.1 * divergence(law, best)


def test_sequences_labelled_good_take_over_with_kto():
    law, found = tuned_sequences(Preference("kto", 1.0))
    good = SEQUENCE_REWARD > 0
    assert found[good].sum() > 0.85 > 0.3 > law[good].sum()


@pytest.mark.parametrize("kind", ["dpo", "margin"])
def test_a_gaussian_approaches_the_optimum_of_each_loss(kind):
    """``N(mean, std^2)`` tilted by ``-a (x - c)^2 / 2 / kl_beta`` is Gaussian again."""
    mean, std, a, c, kl_beta = -0.3, 0.5, 2.0, 0.4, 0.5
    denoiser = GaussianDenoiser(VPCosine(), mean, std)

    def batches(g):
        first, second = (mean + std * torch.randn(512, 1, 1, 1, generator=g)).chunk(2)
        rewards = [-0.5 * a * (x.flatten() - c).square() for x in (first, second)]
        chosen, rejected = labelled_pairs(first, second, *rewards, g)
        return {"chosen_action": chosen, "rejected_action": rejected}

    loss = PreferenceLoss(denoiser, Preference(kind, kl_beta), DenoisingScore("elbo", draws=8))
    train(loss, batches, 200, 0.03)
    prior = 1 / std**2 if kind == "dpo" else 0.0
    precision = prior + a / kl_beta
    best = (prior * mean + a / kl_beta * c) / precision, precision**-0.5
    start, end = gaussian_kl((mean, std), best), gaussian_kl(denoiser.law, best)
    assert start > 0.5
    assert end < 0.05 * start


def test_a_gaussian_mixture_approaches_the_tilted_one():
    problem = one_dimensional(kl_weight=0.5)
    denoiser = MixtureDenoiser(VPCosine(), problem.prior)

    def batches(g):
        first, second = problem.prior.draw(128, g).chunk(2)
        rewards = problem.reward(first), problem.reward(second)
        chosen, rejected = labelled_pairs(first, second, *rewards, g)
        return {"chosen_action": chosen.unsqueeze(1), "rejected_action": rejected.unsqueeze(1)}

    loss = PreferenceLoss(denoiser, Preference("dpo", 0.5), DenoisingScore("elbo", draws=8))
    train(loss, batches, 60, 0.06)
    with torch.no_grad():
        assert problem.progress(denoiser.law) > 0.9


@pytest.mark.parametrize("kind", ["dpo", "ipo", "margin"])
def test_a_network_learns_to_rank_plans_by_its_own_error(kind):
    """Windows of two, unscored positions, published weighting: chosen plans lie to the right."""
    settings = Preference(kind, 0.3, anchor_weight=0.1)
    loss = PreferenceLoss(pointwise(), settings)

    def batches(g):
        batch = plan_batch(32, seed=int(torch.randint(1000, (1,), generator=g)))
        for side, shift in (("chosen", 0.7), ("rejected", -0.7)):
            batch[f"{side}_action"] = 0.3 * batch[f"{side}_action"] + shift
        return batch

    train(loss, batches, 150, 0.02)
    loss.score = DenoisingScore(draws=16)
    metrics = loss(batches(seeded()), seeded()).metrics
    assert float(metrics["accuracy"]) > 0.9
    assert float(metrics["gap"]) > 0


# ------------------------------------------------------------------------------ bad input


def test_objectives_that_cannot_work():
    denoiser = pointwise()
    with pytest.raises(ValueError, match="shares weights"):
        PreferenceLoss(denoiser, reference=denoiser)
    with pytest.raises(ValueError, match="sequences take MaskedScore"):
        PreferenceLoss(table_denoiser(), score=DenoisingScore())
    denoiser.network.drop = torch.nn.Dropout(0.1)
    with pytest.raises(ValueError, match=r"dropout=0\.1 in Dropout"):
        PreferenceLoss(denoiser)


@pytest.mark.parametrize(
    ("kind", "masked", "batch", "message"),
    [
        ("kto", False, plan_batch(), "loss='kto' needs a batch with obs, action and good; got"),
        ("dpo", False, plan_batch(single=True), "chosen_obs, chosen_action"),
        ("dpo", True, plan_batch(), "pairs of sequences need chosen"),
        ("kto", True, {"tokens": torch.zeros(2, 3).long()}, "tokens and good"),
    ],
)
def test_batches_of_another_kind(kind, masked, batch, message):
    loss = PreferenceLoss(table_denoiser() if masked else pointwise(), Preference(kind))
    with pytest.raises(ValueError, match=message):
        loss(batch, seeded())


def test_pairs_of_different_lengths():
    batch = plan_batch()
    batch |= {k: v[:, :1] for k, v in batch.items() if k.startswith("rejected")}
    with pytest.raises(ValueError, match="pad the shorter segments"):
        PreferenceLoss(pointwise())(batch, seeded())
