"""Temporal ensembling against a brute-force average over all stored predictions."""

from __future__ import annotations

import numpy as np
import pytest

from diffpolicy.core.sampler import Sampler
from diffpolicy.policies.base import ChunkedPolicy
from diffpolicy.policies.ensemble import TemporalEnsemble, newest_share
from diffpolicy.policies.rti import RTI


class Scripted(ChunkedPolicy):
    """Plans that are pseudo-random functions of seed and counter; remembers the calls."""

    def __init__(self, horizon=6, n_obs_steps=2):
        super().__init__(
            obs_dim=1, action_dim=2, horizon=horizon, n_obs_steps=n_obs_steps, n_action_steps=3
        )

    def make_plans(self, state, *, deterministic):
        return np.stack(
            [self.plan_of(s, c) for s, c in zip(state.seed, state.counter, strict=True)]
        ), (np.ones(len(state), np.int64))

    def plan_of(self, seed, counter):
        generator = np.random.default_rng([int(seed), int(counter)])
        return generator.standard_normal((self.horizon, 2)).astype(np.float32)

    def to_actions(self, normalised):
        return normalised


def brute_force(policy, seed, plan_steps, step, m):
    """The average at ``step`` of the predictions made at ``plan_steps``, oldest first."""
    now = policy.n_obs_steps - 1
    made = [
        policy.plan_of(seed, i)[step - at + now]
        for i, at in enumerate(plan_steps)
        if at <= step and step - at + now < policy.horizon
    ]
    weights = np.exp(-m * np.arange(len(made)))
    return (np.stack(made) * weights[:, None]).sum(0) / weights.sum()


@pytest.mark.parametrize("m", [0.0, 0.01, 0.7, 50.0, -0.5])
def test_average_of_all_predictions(m):
    inner = Scripted()
    policy = TemporalEnsemble(inner, m)
    state, steps = policy.initial_state([4, 9]), 14
    for step in range(steps):
        actions, state = policy.act(np.zeros((2, 1), np.float32), state)
        for row, seed in enumerate((4, 9)):
            expected = brute_force(inner, seed, range(steps), step, m)
            np.testing.assert_allclose(actions[row], expected, rtol=0, atol=1e-6)
    assert state.plans.tolist() == [steps] * 2


@pytest.mark.parametrize("m", [0.0, 0.3])
def test_rows_that_plan_at_different_times(m):
    """Observe, replan some rows, execute all: as an executor does. Row 1 skips, row 2 is late."""
    inner = Scripted(horizon=7, n_obs_steps=1)
    policy = TemporalEnsemble(inner, m)
    when = [range(20), [0, 3, 4, 9, 11], [0, 5, 6, 13]]
    state = policy.initial_state([0, 1, 2])
    for step in range(18):
        state = policy.observe(np.zeros((3, 1), np.float32), state)
        rows = [row for row in range(3) if step in when[row]]
        state = policy.replan(state, rows)
        actions, state = policy.execute(state)
        for row in range(3):
            if step - max(at for at in when[row] if at <= step) >= 7:
                continue  # beyond the newest plan: its last average is held
            expected = brute_force(inner, row, when[row], step, m)
            np.testing.assert_allclose(actions[row], expected, rtol=0, atol=1e-6)


def test_beyond_the_end_the_last_average_is_held():
    policy = TemporalEnsemble(Scripted())
    state = policy.observe(np.zeros((1, 1), np.float32), policy.initial_state([0]))
    state, seen = policy.replan(state, [0]), []
    for _ in range(9):
        action, state = policy.execute(state)
        seen.append(action[0])
    assert np.array_equal(seen[4], state.plan[0, -1])
    assert np.array_equal(seen[4], seen[8])


def test_extreme_weights_are_the_oldest_and_the_newest_prediction():
    inner = Scripted(n_obs_steps=1)
    for m, at in ((1e6, 0), (-1e6, 5)):
        policy = TemporalEnsemble(inner, m)
        state = policy.initial_state([3])
        for _ in range(6):
            actions, state = policy.act(np.zeros((1, 1), np.float32), state)
        np.testing.assert_allclose(actions[0], inner.plan_of(3, at)[5 - at], rtol=0, atol=1e-6)


def test_share_of_the_newest():
    count = np.arange(5)
    assert newest_share(count, 0.0).tolist() == [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5]
    for m in (0.01, 2.0, -2.0):
        weights = np.exp(-m * count)
        expected = weights / np.cumsum(weights)
        np.testing.assert_allclose(newest_share(count, m), expected, rtol=1e-12)
    assert np.isfinite(newest_share(np.arange(100), 1e4)).all()


def test_reset_clears_one_row_only():
    policy, obs = TemporalEnsemble(Scripted()), np.zeros((2, 1), np.float32)
    state = policy.initial_state([0, 1])
    for _ in range(5):
        _, state = policy.act(obs, state)
    kept, _ = policy.act(obs, state)
    state = policy.forget(state, np.array([True, False]), seeds=[7])
    assert state.memory["count"].any(1).tolist() == [False, True]
    actions, _ = policy.act(obs, state)
    assert np.array_equal(actions[1], kept[1])
    assert np.array_equal(actions[0], policy.policy.plan_of(7, 0)[1])


def test_warm_starts_go_on_from_the_policys_own_plan(make_planner):
    """RTI inside an ensemble: plans equal those of the policy alone replanning at every step."""
    rti = RTI(t_start=0.3, num_steps=2)
    alone = make_planner(rti=rti, n_action_steps=1, sampler=Sampler(num_steps=4))
    inner = make_planner(rti=rti, sampler=Sampler(num_steps=4))
    policy = TemporalEnsemble(inner)
    obs = np.random.default_rng(0).standard_normal((6, 3, 3)).astype(np.float32)
    a, b = policy.initial_state([1, 2, 3]), alone.initial_state([1, 2, 3])
    for row in obs:
        averaged, a = policy.act(row, a)
        plain, b = alone.act(row, b)
        np.testing.assert_allclose(a.plan, b.plan, rtol=0, atol=1e-6)
    assert a.nfe.tolist() == b.nfe.tolist() == [4 + 5 * 2] * 3
    assert np.abs(averaged).max() <= 0.5  # within the action bounds
    assert not np.allclose(averaged, plain)


def test_permuting_environments_permutes_actions(make_planner):
    policy = TemporalEnsemble(make_planner())
    obs = np.random.default_rng(0).standard_normal((5, 4, 3)).astype(np.float32)
    order = np.array([2, 0, 3, 1])

    def run(seeds, rows):
        state = policy.initial_state(seeds)
        for row in rows:
            actions, state = policy.act(row, state)
        return actions

    straight, permuted = run(np.arange(4), obs), run(order, obs[:, order])
    np.testing.assert_allclose(permuted, straight[order], rtol=0, atol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match="m must be a finite number"):
        TemporalEnsemble(Scripted(), float("nan"))
    with pytest.raises(ValueError, match="averages its plans already"):
        TemporalEnsemble(TemporalEnsemble(Scripted()))
