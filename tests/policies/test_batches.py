from __future__ import annotations

import numpy as np
import pytest

from diffpolicy.policies.base import ChunkedPolicy
from diffpolicy.policies.ensemble import TemporalEnsemble
from diffpolicy.policies.rows import in_batches, row_noise, usual_batch


class Placed(ChunkedPolicy):
    """Plans that tell the batch that they were made in: its size, and the row's place in it."""

    def __init__(self):
        super().__init__(obs_dim=1, action_dim=2, horizon=4, n_obs_steps=1, n_action_steps=2)
        self.kinds = []

    def make_plans(self, state, *, deterministic):
        self.kinds.append(sorted(set(self.plan_kinds(state).tolist())))
        plans = np.zeros((len(state), 4, 2), np.float32)
        plans[..., 0], plans[..., 1] = len(state), np.arange(len(state))[:, None]
        return plans, np.ones(len(state), np.int64)

    def to_actions(self, normalised):
        return normalised


def test_every_batch_has_one_size_one_kind_and_every_row_its_place():
    policy = Placed().with_plan_batch(4)
    seeds = [3, 8, 7, 0, 13]
    state = policy.initial_state(seeds)
    obs = np.zeros((5, 1), np.float32)
    for step in range(5):
        actions, state = policy.act(obs, state)
        np.testing.assert_array_equal(actions, [[4, seed % 4] for seed in seeds])
        if step == 2:  # from here on two rows are cold while the others are warm
            state = policy.forget(state, np.array([True, False, False, True, False]))
    assert all(len(kinds) == 1 for kinds in policy.kinds)
    assert {kind for kinds in policy.kinds for kind in kinds} == {False, True}
    assert Placed().plan_batch is None
    with pytest.raises(ValueError, match="plan_batch must be at least 1"):
        policy.with_plan_batch(0)


def test_rows_come_back_in_their_order():
    state = Placed().initial_state([5, 5, 2, 9, 1])
    kinds = np.array([1, 0, 1, 1, 0])
    (got,) = in_batches(lambda part: (row_noise(part.seed, part.counter, (2,)),), state, kinds, 3)
    np.testing.assert_array_equal(got, row_noise(state.seed, state.counter, (2,)))


def test_a_policy_that_wraps_another_passes_the_size_on():
    wrapped = TemporalEnsemble(Placed()).with_plan_batch(8)
    state = wrapped.initial_state([11])
    actions, _ = wrapped.act(np.zeros((1, 1), np.float32), state)
    np.testing.assert_array_equal(actions, [[8, 3]])
    assert usual_batch(wrapped) == 8
