"""Rollouts: their states, log-probabilities and divergences against sums over all paths."""

from __future__ import annotations

import math

import pytest
import torch
from tuning_tables import all_paths, rollout_of, sequences, table_denoiser

from diffpolicy.core import Cosine, MaskedDenoiser
from diffpolicy.learn.reward.replay import Replay, remask
from diffpolicy.learn.reward.rollouts import (
    at_reveal,
    draw_rollout,
    state_log_probs,
    step_kl,
)
from diffpolicy.learn.reward.sequence_tuning import SequenceTuning, shared_cond
from diffpolicy.networks import make_network
from diffpolicy.sequences.exact import ExactLaw


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("num_steps", [None, 2])
def test_mean_of_both_divergences_is_the_path_kl(num_steps):
    denoiser, reference = (table_denoiser(seed=s, dtype=torch.float64) for s in (1, 2))
    tokens, groups, order = all_paths(2, 3, num_steps)
    rollout = rollout_of(denoiser, reference, tokens, groups, num_steps or 3)
    chance = order * rollout.log_p.sum(1).exp()
    assert chance.sum().item() == pytest.approx(1)
    by_ratio, by_steps = ((chance * v).sum().item() for v in (rollout.log_ratio, rollout.path_kl))
    assert by_steps == pytest.approx(by_ratio)
    if num_steps is None:
        exact = ExactLaw.of(denoiser).path_kl(ExactLaw.of(reference)).item()
        assert by_steps == pytest.approx(exact)


def test_closed_form_divergence_varies_less():
    denoiser, reference = table_denoiser(seed=1), table_denoiser(seed=2)
    with torch.no_grad():
        rollout = draw_rollout(denoiser, 2000, reference=reference, generator=seeded())
    assert rollout.path_kl.std() < 0.7 * rollout.log_ratio.std()
    assert rollout.path_kl.mean().item() == pytest.approx(rollout.log_ratio.mean().item(), abs=0.1)


def test_law_of_drawn_sequences_is_the_exact_one():
    denoiser = table_denoiser(3, 2, seed=4)
    rollout = draw_rollout(denoiser, 20_000, generator=seeded())
    with torch.no_grad():
        exact = ExactLaw.of(denoiser).p
    counts = (rollout.tokens[:, None] == sequences(3, 2)).all(-1).double().mean(0)
    assert (counts - exact).abs().sum().item() / 2 < 0.015


def test_a_state_hides_what_is_revealed_later():
    rollout = draw_rollout(table_denoiser(3, 3), 5, generator=seeded())
    assert rollout.nfe == 3
    for k in range(3):
        state = rollout.states()[:, k]
        assert ((state == 3).sum(1) == 3 - k).all()
        assert (state[state < 3] == rollout.tokens[state < 3]).all()
    some = torch.tensor([[2], [0], [1], [2], [0]])
    torch.testing.assert_close(rollout.states(some)[1, 0], rollout.states()[1, 0])


@pytest.mark.parametrize(("num_steps", "time_free"), [(None, True), (2, True), (4, False)])
def test_evaluated_again_log_probs_are_those_of_the_draw(num_steps, time_free):
    torch.manual_seed(0)
    network = make_network({"type": "mlp", "horizon": 4, "dim": 4, "cond_dim": 2, "width": 16})
    torch.nn.init.normal_(network.outward.weight)
    denoiser = MaskedDenoiser(network, Cosine(), 3, time_free=time_free)
    cond = torch.randn(6, 2, generator=seeded())
    kept = draw_rollout(
        denoiser,
        6,
        num_steps=num_steps,
        reference=denoiser,
        cond=cond,
        generator=seeded(),
        graph=True,
    )
    assert kept.log_p.requires_grad
    assert not kept.log_reference.requires_grad
    again = at_reveal(state_log_probs(denoiser, kept), kept)
    torch.testing.assert_close(again, kept.log_p)
    torch.testing.assert_close(kept.log_ratio, torch.zeros(6), atol=1e-5, rtol=0)
    mine, theirs = (
        torch.cat([g.flatten() for g in torch.autograd.grad(v.sum(), network.outward.parameters())])
        for v in (kept.log_p, again)
    )
    torch.testing.assert_close(mine, theirs)
    bare = draw_rollout(denoiser, 6, num_steps=num_steps, cond=cond, generator=seeded())
    assert not bare.log_p.requires_grad
    torch.testing.assert_close(bare.tokens, kept.tokens)


def test_time_free_rollouts_skip_evaluations_and_stack_the_others():
    denoiser = table_denoiser(2, 3)
    rollout = draw_rollout(denoiser, 50, num_steps=64, generator=seeded())
    assert rollout.nfe <= 3
    assert denoiser.network.rows == 50 * rollout.nfe
    denoiser.network.rows = 0
    some = torch.zeros(50, 1, dtype=torch.long)
    assert state_log_probs(denoiser, rollout, some).shape == (50, 1, 3, 2)
    assert denoiser.network.rows == 50


def test_divergence_at_given_steps_is_that_of_all():
    denoiser, reference = table_denoiser(seed=1), table_denoiser(seed=2)
    rollout = draw_rollout(denoiser, 4, num_steps=2, reference=reference, generator=seeded())
    steps = torch.tensor([[1], [0], [1], [0]])
    parts = [state_log_probs(d, rollout, steps) for d in (denoiser, reference)]
    chosen = step_kl(*parts, rollout, steps)
    torch.testing.assert_close(chosen, rollout.step_kl.gather(1, steps))


def test_remasking_weights_make_the_bound_without_bias():
    """Mean over masks of ``L / k sum log p`` against the sum over all orders."""
    denoiser = table_denoiser(2, 3, seed=3)
    tokens, groups, _ = all_paths(2, 3)
    here = (tokens == torch.tensor([1, 0, 1])).all(1)
    with torch.no_grad():
        exact = rollout_of(denoiser, denoiser, tokens[here], groups[here], 3).log_p.sum(1).mean()
        masked, t, weight = remask(denoiser, 2000, 3, seeded())
        state = torch.where(masked, 2, torch.tensor([1, 0, 1]))
        log_p = denoiser.log_probs(state, t).gather(
            -1, torch.tensor([[[1], [0], [1]]]).expand(6000, -1, -1)
        )
    mean = (weight * (log_p.squeeze(-1) * masked).sum(1)).mean()
    assert mean.item() == pytest.approx(exact.item(), rel=0.02)
    counts = masked.sum(1).view(2000, 3)
    assert (counts == torch.tensor([1, 2, 3])).all()  # stratified: one draw of each
    torch.testing.assert_close(weight, 3 / masked.sum(1))


def test_levels_of_remasking_hide_the_fraction_that_is_masked():
    denoiser = MaskedDenoiser(
        make_network({"type": "mlp", "horizon": 6, "dim": 3, "width": 8}), Cosine(), 2
    )
    masked, t, _ = remask(denoiser, 4, 5, seeded())
    share = denoiser.process.mask_probability(t).flatten()
    torch.testing.assert_close(share, masked.float().mean(1), atol=1e-5, rtol=0)


def test_replay_replaces_the_oldest_and_survives_saving():
    columns = {"x": ((2,), torch.float32), "n": ((), torch.long)}
    replay = Replay(4, 2, 3, columns)
    assert replay.due() == 4
    replay.write({"x": torch.zeros(4, 2), "n": torch.arange(4)})
    assert replay.due() == 0
    for _ in range(3):
        replay.tick()
    assert replay.due() == 2
    replay.write({"x": torch.ones(2, 2), "n": torch.tensor([7, 8])})
    assert replay["n"].tolist() == [7, 8, 2, 3]
    other = Replay(4, 2, 3, columns)
    other.load_state_dict(replay.state_dict())
    other.write({"x": torch.ones(2, 2), "n": torch.tensor([9, 10])})
    assert other["n"].tolist() == [7, 8, 9, 10]


def test_conditions_are_shared_within_groups():
    cond = torch.tensor([[1.0], [2.0], [3.0]])
    assert shared_cond({"cond": cond}, 8, 2).flatten().tolist() == [1, 1, 2, 2, 3, 3, 1, 1]
    assert shared_cond({}, 8, 2) is None


def test_bad_input_is_refused():
    denoiser = table_denoiser()
    with pytest.raises(ValueError, match="give one, such as"):
        draw_rollout(table_denoiser(time_free=False), 2)
    with pytest.raises(ValueError, match="without reference"):
        draw_rollout(denoiser, 2).log_ratio  # noqa: B018
    with pytest.raises(ValueError, match="must divide buffer"):
        Replay(4, 3, 1, {})
    with pytest.raises(ValueError, match="shares weights"):
        SequenceTuning(denoiser, denoiser, torch.sum)
    with pytest.raises(ValueError, match="vocab_size=2, the reference 3"):
        SequenceTuning(denoiser, table_denoiser(3, 3), torch.sum)
    with pytest.raises(ValueError, match=r"one number per item, \[2\]; got \[\]"):
        SequenceTuning(denoiser, None, torch.sum).score(torch.zeros(2, 3, dtype=torch.long))


def test_reference_is_frozen_and_stays_in_evaluation_mode():
    tuning = SequenceTuning(table_denoiser(), None, lambda x: x.sum((1, 2)))
    tuning.train()
    assert tuning.denoiser.training
    assert not tuning.reference.training
    assert [n for n, p in tuning.named_parameters() if p.requires_grad] == [
        "denoiser.network.logits"
    ]
    assert math.isclose(tuning.score(torch.zeros(2, 3, dtype=torch.long)).sum().item(), 6)
