"""Best of N: the candidates are the policy's own plans, and the critic's favourite is executed."""

from __future__ import annotations

import numpy as np
import pytest

from diffpolicy.policies.best_of_n import Selection, Selector
from diffpolicy.policies.chunking import RealTimeChunking
from diffpolicy.policies.ensemble import TemporalEnsemble
from diffpolicy.policies.rti import RTI

CRITIC = {"critic": {"type": "q_ensemble", "width": 8, "depth": 1}}
OBS = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)


def candidates_of(planner, state, many):
    """Every candidate's plan ``[n, N, H, A]`` as the selector asks for them."""
    seen = []

    def keep(history, plans):
        seen.append(plans)
        return np.zeros(len(plans))

    Selector(Selection(many), keep).choose(planner.make_plans, state, deterministic=False)
    return seen[0].reshape(len(state), many, *seen[0].shape[1:])


def test_the_best_candidate_is_kept_and_the_first_is_the_policy_s_own_plan(make_planner):
    plain = make_planner(heads=CRITIC, clip=False)
    chosen = make_planner(heads=CRITIC, clip=False, selection=Selection(6))
    state = plain.observe(OBS, plain.initial_state(range(5)))
    plans = candidates_of(plain, state, 6)
    np.testing.assert_allclose(
        plans[:, 0], plain.replan(state, range(5)).plan, rtol=1e-6, atol=1e-6
    )
    assert len(np.unique(plans[0, :, 0, 0].round(5))) == 6
    scores = np.stack([chosen.score(state.history, plans[:, k]) for k in range(6)], 1)
    expected = plans[np.arange(5), scores.argmax(1)]
    after = chosen.replan(state, range(5))
    np.testing.assert_allclose(after.plan, expected, rtol=1e-6, atol=1e-6)
    assert after.nfe.tolist() == [4] * 5  # of all candidates at once
    assert "candidate" not in after.memory


def test_softmax_draws_in_proportion(make_planner):
    count = 4000
    planner = make_planner()
    state = planner.observe(np.zeros((count, 3), np.float32), planner.initial_state(range(count)))
    values = np.tile([0.0, 1.0, 2.0], count)
    kept = []

    def fake(expanded, *, deterministic):
        plans = np.tile(np.arange(3.0, dtype=np.float32), count)[:, None, None]
        return plans, np.ones(len(expanded), np.int64)

    for weight in (0.5, 2.0):
        selector = Selector(Selection(3, "softmax", weight), lambda history, plans: values)
        kept = selector.choose(fake, state, deterministic=False)[0].ravel().astype(int)
        logits = weight * np.arange(3) / np.arange(3).std()
        law = np.exp(logits) / np.exp(logits).sum()
        assert np.abs(np.bincount(kept, minlength=3) / count - law).max() < 0.03
        fixed = selector.choose(fake, state, deterministic=True)[0]
        assert (fixed == 2).all()


def test_a_row_depends_on_its_own_stream_alone(make_planner):
    planner = make_planner(heads=CRITIC, selection=Selection(4, "softmax"))
    order = np.array([3, 1, 4, 0, 2])
    straight, _ = planner.act(OBS, planner.initial_state(range(5)))
    permuted, _ = planner.act(OBS[order], planner.initial_state(order))
    np.testing.assert_allclose(permuted, straight[order], atol=1e-6)


def test_deterministic_candidates_differ_and_repeat(make_planner):
    planner = make_planner(heads=CRITIC, selection=Selection(4))
    first, second = (
        planner.act(OBS, planner.initial_state(range(k, k + 5)), deterministic=True)[0]
        for k in (0, 100)
    )
    assert np.array_equal(first, second)
    alone = make_planner(heads=CRITIC)
    assert not np.array_equal(
        first, alone.act(OBS, alone.initial_state(range(5)), deterministic=True)[0]
    )


def test_every_way_of_planning_can_select(make_planner):
    """Warm starts, chunk blending and ensembles go on from the plan that was chosen."""
    spec = {"heads": CRITIC, "selection": Selection(3), "rti": RTI(0.4, num_steps=2)}
    planner = make_planner(**spec)
    for policy in (planner, RealTimeChunking(planner), TemporalEnsemble(planner)):
        state = policy.initial_state(range(5))
        for _ in range(8):
            actions, state = policy.act(OBS, state)
        assert np.isfinite(actions).all()
        assert (state.nfe < 4 * state.plans).all()  # later plans were warm


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_candidates": 0}, "at least 1"),
        ({"rank": "best"}, "unknown rank"),
        ({"weight": 0.0}, "weight must be positive"),
    ],
)
def test_unusable_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Selection(**settings)


def test_selection_needs_a_head(make_planner):
    with pytest.raises(ValueError, match="selection scores plans with a head critic or value"):
        make_planner(selection=Selection(4))
