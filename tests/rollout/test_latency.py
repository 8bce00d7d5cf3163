from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from diffpolicy.policies.base import ChunkedPolicy
from diffpolicy.policies.rows import row_noise
from diffpolicy.rollout.latency import DelayedPolicy, LinearLatency
from diffpolicy.runtime.clock import VirtualClock
from diffpolicy.runtime.executor import RealTimeExecutor
from diffpolicy.runtime.planner import Timing
from diffpolicy.runtime.schedule import ActionLimits

TO, TA, H = 2, 4, 8  # 7 actions of a plan can be executed


class EncodedPolicy(ChunkedPolicy):
    """Plans whose action at position i is (tick of the observation, tick it is meant for).

    Observations are (tick,). ``calls`` notes what planning was told, for the tests alone.
    """

    def __init__(self, n_action_steps=TA):
        super().__init__(
            obs_dim=1, action_dim=2, horizon=H, n_obs_steps=TO, n_action_steps=n_action_steps
        )
        self.calls = []

    def make_plans(self, state, *, deterministic):
        for row in range(len(state)):
            seed, tick = int(state.seed[row]), int(state.history[row, -1, 0])
            told = int(state.cursor[row]), int(state.delay[row]), bool(state.warm[row])
            self.calls.append((seed, tick, *told))
        tick = state.history[:, -1, :1]
        meant = tick + np.arange(H) - (TO - 1)
        plan = np.stack([np.broadcast_to(tick, meant.shape), meant], axis=-1)
        return plan.astype(np.float32), np.where(state.warm, 3, 10)

    def to_actions(self, normalised):
        return normalised


class NoisyPolicy(EncodedPolicy):
    """Plans that depend on the history, the last plan, and the row's random stream."""

    def make_plans(self, state, *, deterministic):
        noise = row_noise(state.seed, state.counter, (H, 2))
        base = state.history.sum(axis=(1, 2))[:, None, None]
        return (0.5 * state.plan + base + noise).astype(np.float32), np.full(len(state), 5)


def drive(policy, ticks, seeds=(0,), *, state=None, start=0):
    """Actions ``[ticks, N, 2]`` and the last state; every row sees (tick,)."""
    state = policy.initial_state(seeds) if state is None else state
    actions = []
    for tick in range(start, start + ticks):
        action, state = policy.act(np.full((len(state), 1), tick, np.float32), state)
        actions.append(action)
    return np.stack(actions), state


def by_hand(delays, ticks, *, always=False):
    """(observation tick of the executed action, its index in the plan, starved) for one row.

    Written from the specification: ``delays`` of the plans after the first.
    """
    delays = iter(delays)
    made, coming, begun, held, out = 0, None, False, 0, []
    for tick in range(ticks):
        if coming is not None and tick == coming[1]:
            made, coming = coming[0], None
        if coming is None and (tick - made >= TA or (always and begun)):
            delay = next(delays)
            if delay == 0:
                made = tick
            else:
                coming = (tick, tick + delay)
        begun = True
        held = 0 if tick - made < H - TO + 1 else held + 1
        out.append((made, tick) if not held else out[-1] if held <= 14 else (0, 0))
    return np.array(out, np.float32)


def test_no_latency_is_the_policy_itself():
    for latency in (0, -3.0, {"cold": 0, "warm": 0}, LinearLatency(0, 0)):
        policy = NoisyPolicy()
        expected, plain = drive(policy, 25, seeds=(4, 9))
        got, state = drive(DelayedPolicy(policy, latency, 50), 25, seeds=(4, 9))
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(state.nfe, plain.nfe)
        np.testing.assert_array_equal(state.plans, plain.plans)
        assert state.totals["starved"].sum() == 0


def test_a_plan_arrives_late_and_is_adopted_aligned_in_time():
    # Ta = 4 and d = 2: the plan of tick 4 is there at tick 6, that of tick 8 at 10.
    actions, state = drive(DelayedPolicy(EncodedPolicy(), 100, 50), 12)
    assert actions[:, 0, 0].tolist() == [0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 8, 8]
    assert actions[:, 0, 1].tolist() == list(range(12))  # always the action meant for this tick
    assert (state.nfe[0], state.plans[0]) == (10 + 3 + 3, 3)


def test_a_plan_may_be_executed_from_its_start_late_as_it_is():
    policy = EncodedPolicy()
    actions, _ = drive(DelayedPolicy(policy, 100, 50, arrival="start"), 14)
    # The plan of tick 4 starts at 6; 4 of its actions later, at 10, the next is begun.
    assert actions[:, 0, 0].tolist() == [0] * 6 + [4] * 6 + [10] * 2
    assert actions[:, 0, 1].tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 9, 10, 11]
    assert policy.calls == [(0, 0, 0, 0, False), (0, 4, 5, 0, True), (0, 10, 5, 0, True)]


def test_starved_rows_hold_and_count():
    # Usable: 7 ticks. Begun at 4, d = 5: there at 9, so ticks 7 and 8 are starved.
    policy = DelayedPolicy(EncodedPolicy(), 210, 50)
    actions, state = drive(policy, 11)
    assert actions[:, 0, 1].tolist() == [0, 1, 2, 3, 4, 5, 6, 6, 6, 9, 10]
    assert actions[9, 0, 0] == 4
    stats = policy.statistics(state)
    assert stats["starved_ticks"] == 2
    assert stats["delays"][5] == 2  # the second was begun at tick 9, and is still under way
    assert sum(stats["delays"]) == 2


def test_starved_rows_take_the_safe_action():
    policy = DelayedPolicy(EncodedPolicy(), 250, 50, hold_ticks=0, safe_action=[-1, -2])
    actions, _ = drive(policy, 11)
    assert actions[7:9, 0].tolist() == [[-1, -2], [-1, -2]]
    assert actions[9, 0].tolist() == [4, 9]


def test_plans_that_are_stale_on_arrival_leave_the_row_starved():
    policy = DelayedPolicy(EncodedPolicy(), 50 * 9, 50)
    actions, state = drive(policy, 40)
    # The last action is held for as long as two plans have actions, 14 ticks; then it is safe.
    assert actions[6:, 0, 1].tolist() == [6] * 15 + [0] * 19
    stats = policy.statistics(state)
    assert (stats["starved_ticks"], stats["delays"][-1]) == (33, stats["plans"] - 1)
    assert stats["safe_ticks"] == 19


@pytest.mark.parametrize(("latency_ticks", "hold_ticks"), [(3, None), (5, None), (6, 1), (9, None)])
def test_the_robot_gets_what_the_control_loop_gives(latency_ticks, hold_ticks):
    safe, period = [-1.0, -2.0], 50
    delayed = DelayedPolicy(
        EncodedPolicy(), period * latency_ticks, period, hold_ticks=hold_ticks, safe_action=safe
    )
    simulated, _ = drive(delayed, 40)
    clock = VirtualClock([0.0] + [float(period * latency_ticks)] * 50)
    executor = RealTimeExecutor(
        EncodedPolicy(),
        Timing(1000 / period),
        ActionLimits(safe),
        ladder=("rest", "hold"),
        hold_ticks=hold_ticks,
        clock=clock,
    )
    executor.warm_up(np.zeros(1, np.float32), plans=1)
    ticks = iter(range(40))
    sent = []
    executor.run(lambda: np.array([next(ticks)], np.float32), sent.append, ticks=40)
    np.testing.assert_array_equal(np.stack(sent), simulated[:, 0])


@pytest.mark.parametrize("always", [False, True])
def test_rows_with_different_delays_follow_the_specification(always):
    table = np.random.default_rng(0).integers(0, 11, size=(5, 400))
    table[0], table[1] = 0, 3

    def latency(request):
        return 50.0 * table[request.seed, request.number]

    policy = DelayedPolicy(EncodedPolicy(), latency, 50, replan="always" if always else "due")
    actions, state = drive(policy, 120, seeds=range(5))
    for row in range(5):
        expected = by_hand(table[row, 1:], 120, always=always)
        np.testing.assert_array_equal(actions[:, row], expected, err_msg=f"row {row}")
    np.testing.assert_array_equal(state.totals["ticks"], 120)


def test_resetting_a_row_drops_its_plan_and_touches_no_other():
    policy = DelayedPolicy(NoisyPolicy(), 130, 50)
    whole, _ = drive(policy, 30, seeds=(1, 2))
    first, state = drive(policy, 6, seeds=(1, 2))  # plans are under way at tick 6
    assert (state.wait > 0).all()
    state = policy.forget(state, np.array([False, True]), seeds=[7])
    assert state.wait.tolist() == [2, 0]
    rest, state = drive(policy, 24, state=state, start=6)
    np.testing.assert_array_equal(np.concatenate([first, rest])[:, 0], whole[:, 0])
    alone, _ = drive(policy, 24, seeds=(7,), start=6)
    np.testing.assert_array_equal(rest[:, 1], alone[:, 0])
    assert state.totals["ticks"].tolist() == [30, 30]  # totals go on


def test_a_row_without_a_new_seed_goes_on_in_its_stream():
    policy = DelayedPolicy(NoisyPolicy(), 130, 50)
    _, state = drive(policy, 6, seeds=(1,))
    spent = state.plans.copy(), state.nfe.copy()
    state = policy.forget(state, np.array([True]))
    assert state.running.counter.tolist() == [2]  # the dropped plan's draw is not used twice
    np.testing.assert_array_equal(state.plans, spent[0])
    np.testing.assert_array_equal(state.nfe, spent[1])


def test_order_of_rows_does_not_matter_and_nothing_is_changed():
    policy = DelayedPolicy(NoisyPolicy(), LinearLatency(10, 25), 50)
    _, state = drive(policy, 7, seeds=(3, 5, 8))
    obs = np.arange(3, dtype=np.float32)[:, None]
    kept = state.take(np.arange(3))
    straight, after = policy.act(obs, state)
    order = np.array([2, 0, 1])
    permuted, other = policy.act(obs[order], state.take(order))
    np.testing.assert_array_equal(permuted, straight[order])
    np.testing.assert_array_equal(other.wait, after.wait[order])
    again, _ = policy.act(obs, state)
    np.testing.assert_array_equal(again, straight)
    np.testing.assert_array_equal(kept.running.plan, state.running.plan)
    np.testing.assert_array_equal(kept.wait, state.wait)


def test_take_and_put_are_inverse():
    _, state = drive(DelayedPolicy(NoisyPolicy(), 130, 50), 7, seeds=(3, 5, 8))
    rows = np.array([2, 0])
    back = policy_blank(state).put(rows, state.take(rows))
    for name in ("wait", "expected", "action", "acted"):
        np.testing.assert_array_equal(getattr(back, name)[rows], getattr(state, name)[rows])
    np.testing.assert_array_equal(back.pending.plan[rows], state.pending.plan[rows])
    np.testing.assert_array_equal(back.totals["delays"][rows], state.totals["delays"][rows])
    assert back.action[1].tolist() == [0, 0]


def policy_blank(state):
    return DelayedPolicy(NoisyPolicy(), 130, 50).initial_state([0] * len(state))


def test_planning_is_told_the_delay_and_where_the_old_plan_stands():
    # Begun at ticks 0 (free), 4, 8 (the plan of 4 arrives at 6, is 4 ticks old at 8), ...
    policy = EncodedPolicy()
    drive(DelayedPolicy(policy, 100, 50), 9, seeds=(0,))
    assert policy.calls == [(0, 0, 0, 0, False), (0, 4, 5, 2, True), (0, 8, 5, 2, True)]


def test_the_shift_of_a_warm_start_is_the_ticks_between_two_observations():
    policy = EncodedPolicy()
    drive(DelayedPolicy(policy, 150, 50, replan="always"), 12, seeds=(0,))
    ticks = [call[1] for call in policy.calls]
    shifts = [call[2] - (TO - 1) for call in policy.calls[1:]]
    assert shifts == np.diff(ticks).tolist() == [1, 3, 3, 3]


def test_the_expected_delay_is_the_last_one_measured():
    delays = [0, 3, 1, 2, 5]
    policy = EncodedPolicy()
    drive(DelayedPolicy(policy, lambda r: 50.0 * np.array(delays)[r.number], 50), 17)
    assert [call[3] for call in policy.calls] == [0, 0, 3, 1, 2]


def test_cold_and_warm_plans_have_their_own_latency():
    class Forgetful(EncodedPolicy):
        """Cold again at tick 8, as a policy that mistrusts its last plan would be."""

        def observe(self, obs, state):
            state = super().observe(obs, state)
            return replace(state, warm=state.warm & (state.history[:, -1, 0] != 8))

    policy = Forgetful()
    actions, _ = drive(DelayedPolicy(policy, {"cold": 200, "warm": 50}, 50), 14)
    assert [call[1:] for call in policy.calls] == [
        (0, 0, 0, False),
        (4, 5, 1, True),
        (8, 5, 4, False),
        (12, 5, 1, True),
    ]
    assert actions[:, 0, 0].tolist() == [0] * 5 + [4] * 6 + [4, 8, 12]


def test_latency_by_evaluations():
    # 10 + 3 * 30 = 100 ms: 2 ticks for warm plans, which take 3 evaluations.
    policy = DelayedPolicy(EncodedPolicy(), LinearLatency(10, 30), 50)
    _, state = drive(policy, 12)
    assert state.totals["delays"][0, 2] == 2


@pytest.mark.parametrize(("ms", "ticks"), [(0, 0), (1e-9, 1), (50, 1), (50.01, 2), (150, 3)])
def test_latency_is_rounded_up_to_ticks(ms, ticks):
    _, state = drive(DelayedPolicy(EncodedPolicy(), ms, 50), 5)
    assert np.flatnonzero(state.totals["delays"][0]).tolist() == [ticks]


def test_a_period_that_is_no_binary_fraction_does_not_cost_a_tick():
    for ticks in range(1, 9):
        _, state = drive(DelayedPolicy(EncodedPolicy(), ticks * 0.1, 0.1), 5)
        assert np.flatnonzero(state.totals["delays"][0])[0] == min(ticks, H - TO + 1)


def test_seam_jumps_are_told_from_jumps_within_plans():
    # Within a plan only the second component moves, by 1. At an adoption the first moves by the
    # ticks between the observations as well: 4, so sqrt(17).
    policy = DelayedPolicy(EncodedPolicy(), 100, 50)
    _, state = drive(policy, 12)
    stats = policy.statistics(state)
    assert stats["seam_jump"] == {
        "mean": pytest.approx(17**0.5),
        "max": pytest.approx(17**0.5),
        "count": 2,
    }
    assert stats["plan_jump"] == {"mean": 1.0, "max": 1.0, "count": 9}
    assert stats["adopted"] == stats["plans"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latency_ms": {"cold": 1}}, "exactly 'cold' and 'warm'"),
        ({"latency_ms": np.nan}, "finite number of milliseconds"),
        ({"latency_ms": "fast"}, "finite number of milliseconds"),
        ({"control_ms": 0}, "control_ms must be positive"),
        ({"hold_ticks": -1}, "number of ticks >= 0"),
        ({"safe_action": [1.0]}, r"safe_action must be \[2\], got \[1\]"),
        ({"safe_action": [1.0, np.inf]}, "must be finite numbers"),
        ({"replan": "never"}, "unknown replan 'never'"),
        ({"arrival": "never"}, "unknown arrival 'never'"),
    ],
)
def test_bad_arguments(options, message):
    values = {"latency_ms": 10, "control_ms": 50, **options}
    with pytest.raises(ValueError, match=message):
        DelayedPolicy(EncodedPolicy(), values.pop("latency_ms"), values.pop("control_ms"), **values)


def test_a_latency_function_must_return_a_number_per_plan():
    policy = DelayedPolicy(EncodedPolicy(), lambda request: np.array([1.0, 2.0]), 50)
    with pytest.raises(ValueError, match=r"milliseconds per plan, \[1\]"):
        drive(policy, 1)
