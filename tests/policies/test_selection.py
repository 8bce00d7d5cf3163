"""Best of N: the candidates are the policy's own plans, and the critic's favourite is executed."""

from __future__ import annotations

import numpy as np
import pytest

from diffpolicy.policies.best_of_n import Selection, Selector, backward_distance
from diffpolicy.policies.chunking import RealTimeChunking
from diffpolicy.policies.ensemble import TemporalEnsemble
from diffpolicy.policies.rows import neighbour, row_noise
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


# Search: the same budget spent in another order.


def searched(make_planner, settings, verifier, rows=5):
    """The plans of a search, with the network rows that it took."""
    planner, calls = make_planner(clip=False), []
    planner.denoiser.network.register_forward_hook(lambda m, given, out: calls.append(len(out)))
    state = planner.observe(OBS[:rows], planner.initial_state(range(rows)))
    before, keep = len(calls), []
    planner.selector = Selector(settings, lambda seen, plans: keep.append(plans) or verifier(plans))
    after = planner.replan(state, range(rows))
    return after, sum(calls[before:]), np.concatenate(
        [part.reshape(rows, -1, *part.shape[1:]) for part in keep], 1
    )  # fmt: skip


def near_target(plans):
    return -np.square(plans - 0.2).mean((1, 2))


@pytest.mark.parametrize("count", [1, 4, 10, 11])
@pytest.mark.parametrize("search", ["best_of_n", "zero_order"])
def test_a_search_spends_its_budget_and_never_more(make_planner, search, count):
    settings = Selection(count, search=search, neighbours=4, verifier="cost")
    rows, steps = 5, 4
    if count == 1:
        planner = make_planner()
        state = planner.observe(OBS, planner.initial_state(range(5)))
        assert Selector(settings, near_target).choose(
            planner.make_plans, state, deterministic=False
        )[1].tolist() == [steps] * 5  # fmt: skip
        return
    after, network_rows, plans = searched(make_planner, settings, near_target)
    assert network_rows == rows * count * steps
    assert plans.shape[1] == count
    batches = 1 if search == "best_of_n" else -(-count // 4)
    assert after.nfe.tolist() == [steps * batches] * rows
    scores = near_target(plans.reshape(-1, *plans.shape[2:])).reshape(rows, count)
    np.testing.assert_array_equal(after.plan, plans[np.arange(rows), scores.argmax(1)])


def test_zero_order_search_stays_near_the_best_and_gains(make_planner):
    found = {}
    for search in ("best_of_n", "zero_order"):
        settings = Selection(24, search=search, neighbours=4, verifier="cost")
        after, _, _ = searched(make_planner, settings, near_target)
        found[search] = near_target(after.plan).mean()
    assert found["zero_order"] > found["best_of_n"]


def test_neighbours_of_noise_are_noise_at_a_fixed_angle():
    rng = np.random.default_rng(0)
    pivot, fresh = rng.standard_normal((2, 20_000, 3, 4))
    near = neighbour(pivot, fresh)
    dot = (pivot * near).sum((1, 2)) / np.square(pivot).sum((1, 2))
    np.testing.assert_allclose(dot, 0.95)
    assert abs(near.mean()) < 0.01
    np.testing.assert_allclose(np.cov(near.reshape(-1, 12).T), np.eye(12), atol=0.04)
    np.testing.assert_allclose(
        np.linalg.norm(near, axis=(1, 2)), np.linalg.norm(pivot, axis=(1, 2))
    )
    # A line of streams is a function of its row alone; an ended one is its pivot.
    lines = np.array([[3, 5, -1], [3, -1, -1], [3, 5, 7]])
    same = np.zeros(3, np.int64)
    a, b, c = row_noise(same, same, (2, 2), lines)
    assert np.array_equal(b, row_noise(same[:1], same[:1], (2, 2), np.array([3]))[0])
    fifth, seventh = row_noise(same[:2], same[:2], (2, 2), np.array([5, 7]))
    np.testing.assert_array_equal(a, neighbour(b[None], fifth[None])[0])
    np.testing.assert_array_equal(c, neighbour(a[None], seventh[None])[0])


def test_the_best_of_n_uniform_rewards(make_planner):
    count, many = 3000, 9
    planner = make_planner()
    state = planner.observe(np.zeros((count, 3), np.float32), planner.initial_state(range(count)))
    values = np.random.default_rng(0).uniform(size=(count * many))

    def fake(expanded, *, deterministic):
        return values[:, None, None].astype(np.float32), np.ones(len(expanded), np.int64)

    best = Selector(Selection(many), lambda seen, plans: plans[:, 0, 0])
    kept = best.choose(fake, state, deterministic=False)[0]
    assert abs(kept.mean() - many / (many + 1)) < 0.005


def test_coherence_keeps_what_is_left_of_the_last_plan(make_planner):
    settings = Selection(8, verifier="none", coherence=1.0, decay=0.5)
    planner = make_planner(selection=settings, n_action_steps=2)
    _, state = planner.act(OBS, planner.initial_state(range(5)))
    _, state = planner.act(OBS, state)  # both actions are executed
    plans = candidates_of(planner, state, 8)
    weight = 0.5 ** np.arange(5)  # positions 1 to 5 were 3 to 7 of the last plan
    gap = np.square(plans[:, :, 1:6] - state.plan[:, None, 3:]).mean(-1)
    expected = (gap * weight).sum(-1) / weight.sum()
    np.testing.assert_allclose(backward_distance(plans, state, 0.5), expected, rtol=1e-6)
    kept = planner.replan(state, range(5)).plan
    np.testing.assert_allclose(kept, plans[np.arange(5), expected.argmin(1)], rtol=1e-6)
    cold = planner.observe(OBS, planner.initial_state(range(5)))
    assert not backward_distance(plans, cold, 0.5).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"verifier": "none"}, "give it a weight"),
        ({"search": "zero_order", "rank": "softmax"}, "rank='argmax'"),
        ({"search": "zero-order"}, "did you mean 'zero_order'"),
        ({"coherence": -1.0}, "at least 0"),
    ],
)
def test_searches_that_exclude_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Selection(**settings)
