from __future__ import annotations

import json
import math
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

import executor_figure
from diffpolicy.policies.base import ChunkedPolicy
from diffpolicy.policies.rows import row_noise
from diffpolicy.rollout.latency import DelayedPolicy
from diffpolicy.runtime.clock import RealClock, VirtualClock
from diffpolicy.runtime.executor import RealTimeExecutor
from diffpolicy.runtime.planner import Timing
from diffpolicy.runtime.schedule import ActionLimits

TO, TA, H = 2, 4, 8
LENGTH = H - TO + 1  # actions of a plan from its own tick on
LIMITS = ActionLimits([-1, -1], low=-1, high=2e6)
TICK = 20.0  # milliseconds


class Encoded(ChunkedPolicy):
    """Actions are (tick of the observation, tick they are meant for); observations are (tick,).

    ``fault(number)`` says what is wrong with the n-th plan: None, "nan", "inf", "bounds", "raise".
    """

    def __init__(self, fault=lambda number: None, nfe=3):
        super().__init__(obs_dim=1, action_dim=2, horizon=H, n_obs_steps=TO, n_action_steps=TA)
        self.fault, self.nfe_each = fault, nfe
        self.calls = []
        self._steps = np.arange(H) - (TO - 1)

    def make_plans(self, state, *, deterministic):
        tick = state.history[0, -1, 0]
        plan = np.full((1, H, 2), tick, np.float32)
        plan[0, :, 1] += self._steps
        told = int(tick), int(state.cursor[0]), int(state.delay[0]), bool(state.warm[0])
        self.calls.append(told)
        kind = self.fault(len(self.calls) - 1)
        if kind == "raise":
            raise RuntimeError("a broken policy")
        if kind is not None:
            plan[0, -1 if kind == "inf" else slice(None)] = {
                "nan": math.nan,
                "inf": math.inf,
                "bounds": 3e6,
            }[kind]
        return plan, np.array([self.nfe_each])

    def to_actions(self, normalised):
        return normalised


class Noisy(Encoded):
    """Plans depend on history, last plan and randomness."""

    def make_plans(self, state, *, deterministic):
        noise = row_noise(state.seed, state.counter, (H, 2))
        shift = int(self.executed(state)[0])
        base = 0.5 * np.roll(state.plan, -shift, axis=1) + state.history.sum() * 1e-3
        return (base + noise).astype(np.float32), np.array([1])


class Averaging(Noisy):
    """Executes a running average, so that it cannot be decoded without living through it."""

    def initial_state(self, seeds):
        return (
            super()
            .initial_state(seeds)
            .remember(
                mean=np.zeros((len(seeds), 2), np.float32), seen=np.zeros(len(seeds), np.float32)
            )
        )

    def observe(self, obs, state):
        state = super().observe(obs, state)
        return state.remember(seen=state.memory["seen"] + state.history[:, -1, 0])

    def execute(self, state):
        actions, state = super().execute(state)
        mean = (0.5 * state.memory["mean"] + 0.5 * actions).astype(np.float32)
        return mean, state.remember(mean=mean)

    def make_plans(self, state, *, deterministic):
        plan, nfe = super().make_plans(state, deterministic=deterministic)
        return plan + 1e-3 * state.memory["seen"][0], nfe


def make(policy, latency=(0.0,), *, call_ms=(0.0,), limits=LIMITS, timing=None, **options):
    clock = VirtualClock(latency, call_ms=call_ms)
    timing = timing or Timing(1e3 / TICK)
    return RealTimeExecutor(policy, timing, limits, clock=clock, **options), clock


def drive(executor, clock, ticks, *, start=0):
    """Decisions of ``ticks`` ticks at the executor's rate."""
    decisions = []
    for tick in range(start, start + ticks):
        clock.sleep_until(tick * executor.timing.period_ns)
        decisions.append(executor.tick([float(tick)]))
    return decisions


def sources(decisions):
    letters = {"plan": "p", "rest": "r", "refine": "f", "hold": "h", "safe": "s"}
    return "".join(letters[decision.source] for decision in decisions)


# Known answers -----------------------------------------------------------------------------------


def test_without_latency_it_is_the_policy():
    for kind in (Noisy, Averaging):
        policy = kind()
        state, expected = policy.initial_state([5]), []
        for tick in range(30):
            action, state = policy.act(np.full((1, 1), tick, np.float32), state)
            expected.append(action[0])
        executor, clock = make(policy, limits=ActionLimits([0, 0]), seed=5)
        decisions = drive(executor, clock, 30)
        np.testing.assert_array_equal([d.action for d in decisions], expected)
        assert sources(decisions) == "p" * 30
        assert executor.report().missed_deadlines == 0


@pytest.mark.parametrize("kind", [Noisy, Averaging, Encoded])
def test_with_latency_it_is_the_delayed_policy_of_the_evaluator(kind):
    latencies = [0.0, *np.random.default_rng(1).uniform(0, 8 * TICK, 40).tolist()]
    executor, clock = make(kind(), latencies, limits=ActionLimits([0, 0]), seed=3)
    decisions = drive(executor, clock, 60)
    policy = DelayedPolicy(kind(), lambda r: np.array(latencies)[r.number], TICK)
    state, expected = policy.initial_state([3]), []
    for tick in range(60):
        action, state = policy.act(np.full((1, 1), tick, np.float32), state)
        expected.append(action[0])
    held = [d.source == "hold" for d in decisions]
    np.testing.assert_allclose([d.action for d in decisions], expected, rtol=1e-6, atol=1e-6)
    assert executor.report().starved_ticks == sum(held) == state.totals["starved"][0] > 0


def test_a_late_plan_is_adopted_aligned_in_time():
    # 35 ms = 2 ticks. The first plan starts when it is there; later ones skip what has passed.
    executor, clock = make(Encoded(), [35.0])
    decisions = drive(executor, clock, 13)
    assert sources(decisions) == "ss" + "pppppp" + "pppp" + "p"
    assert [d.action[0] for d in decisions] == [-1, -1, 0, 0, 0, 0, 0, 0, 6, 6, 6, 6, 10]
    assert [d.action[1] for d in decisions[8:]] == [8, 9, 10, 11, 12]
    assert [d.age_ticks for d in decisions[:9]] == [None, None, 2, 3, 4, 5, 6, 7, 2]
    report = executor.report()
    assert (report.plans, report.missed_deadlines) == (3, 3)
    assert report.sources["safe"] == report.starved_ticks == 2


def test_ladder_order():
    # The second plan never comes; budget 30 ms; Ta = 4, 7 actions. Refinement fails, then works.
    refine = Encoded(lambda number: "raise" if number == 0 else None, nfe=1)
    executor, clock = make(Encoded(), [0.0, 1e6], refine=refine, timing=Timing(50, budget_ms=30))
    decisions = drive(executor, clock, 12)
    # Asked for at tick 4, overdue at 6; ticks 0..6 are in the plan; 7 fails to refine and holds.
    assert sources(decisions) == "ppppppr" + "h" + "ffff"
    assert [d.missed for d in decisions] == [False] * 6 + [True] * 6
    assert decisions[7].action.tolist() == decisions[6].action.tolist() == [0, 6]
    assert [d.action.tolist() for d in decisions[8:]] == [[8, 8], [8, 9], [8, 10], [8, 11]]
    assert refine.calls[1] == (8, TO - 1 + 8, 0, True)  # from the old plan, shifted by 8 ticks
    report = executor.report()
    assert (report.missed_deadlines, report.refinements, report.refine_failures) == (1, 2, 1)
    assert report.starved_ticks == 2  # ticks 7 and 8: no plan had an action left
    assert report.nfe == 3 + 1
    assert "a broken policy" in report.errors[-1]


@pytest.mark.parametrize(
    ("ladder", "expected"),
    [
        (("rest", "safe"), "ppppppr" + "sssss"),
        (("rest", "hold"), "ppppppr" + "hhhhh"),
        (("hold",), "pppppp" + "hhhhhh"),
        (("safe",), "pppppp" + "ssssss"),
        (("refine", "hold"), "pppppp" + "ffffff"),
        (("rest", "refine", "safe"), "ppppppr" + "fffff"),
    ],
)
def test_declared_ladders(ladder, expected):
    executor, clock = make(
        Encoded(), [0.0, 1e6], refine=Encoded(), ladder=ladder, timing=Timing(50, budget_ms=30)
    )
    decisions = drive(executor, clock, 12)
    assert sources(decisions) == expected


def test_a_refinement_that_takes_too_long_is_put_off():
    executor, clock = make(
        Encoded(), [0.0, 1e6], call_ms=[50.0], refine=Encoded(), ladder=("refine", "hold")
    )
    decisions = drive(executor, clock, 9)
    report = executor.report()
    # Overdue at tick 6; the refinement takes 2.5 periods, so the next ticks are late or skipped.
    assert report.refinements == 1
    assert report.skipped_ticks + report.late_ticks > 0
    assert sources(decisions)[6] == "f"
    assert set(sources(decisions)[7:]) == {"h"}


def test_waiting_for_a_plan_executes_it_in_its_own_tick():
    executor, clock = make(Encoded(), [5.0], timing=Timing(50, wait_ms=8.0, replan_after=1))
    decisions = drive(executor, clock, 6)
    assert [d.action.tolist() for d in decisions] == [[tick, tick] for tick in range(6)]
    report = executor.report()
    assert report.missed_deadlines == report.starved_ticks == report.late_ticks == 0
    executor, clock = make(Encoded(), [9.0], timing=Timing(50, wait_ms=8.0, replan_after=1))
    decisions = drive(executor, clock, 2)  # waits in vain, and has it in the next tick
    assert (sources(decisions), decisions[1].action.tolist()) == ("sp", [0, 0])


def test_stale_plans_are_dropped():
    executor, clock = make(Encoded(), [0.0, LENGTH * TICK, 0.0])
    decisions = drive(executor, clock, 13)
    # Begun at 4, there at 11 with nothing left; another is begun and adopted at once.
    assert [d.action[0] for d in decisions] == [0] * 11 + [11, 11]
    report = executor.report()
    assert (report.stale_plans, report.plans, report.starved_ticks) == (1, 3, 4)


def test_a_stalled_loop_skips_the_actions_that_have_passed():
    executor, clock = make(Encoded())
    drive(executor, clock, 2)
    clock.sleep_until(round(5.3 * TICK * 1e6))  # instead of tick 2
    executor2 = executor.tick([5.0])
    assert (executor2.tick, executor2.late_ms) == (5, pytest.approx(0.3 * TICK))
    assert executor2.action[1] == 5
    report = executor.report()
    assert (report.ticks, report.skipped_ticks, report.late_ticks) == (3, 3, 1)


def test_planning_is_told_where_the_old_plan_stands_and_what_delay_to_expect():
    policy = Encoded()
    executor, clock = make(policy, [35.0])
    drive(executor, clock, 13)
    # The first plan started at tick 2, so it is 4 ticks in at tick 6.
    assert policy.calls == [
        (0, 0, 0, False),
        (6, TO - 1 + 4, 0, True),
        (10, TO - 1 + 4, 2, True),
    ]


# Faults ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nan", "inf", "bounds", "raise"])
def test_faulty_plans_never_leave(kind):
    policy = Encoded(lambda number: kind if number == 1 else None)
    executor, clock = make(policy)
    decisions = drive(executor, clock, 8)
    # The plan of tick 4 fails; the old one goes on; that of tick 5 is good.
    assert sources(decisions) == "pppprppp"
    assert [d.action.tolist() for d in decisions[3:6]] == [[0, 3], [0, 4], [5, 5]]
    report = executor.report()
    assert report.worker_crashes == (kind == "raise")
    assert report.rejected_plans == (kind != "raise")
    assert len(report.errors) == 1
    assert report.missed_deadlines == 0


def test_single_actions_out_of_bounds_are_rejected_at_their_tick():
    class Edge(Encoded):
        def make_plans(self, state, *, deterministic):
            plan, nfe = super().make_plans(state, deterministic=deterministic)
            plan[0, TO + 1] = 5e6
            return plan, nfe

    executor, clock = make(Edge())
    decisions = drive(executor, clock, 6)
    assert sources(decisions) == "pphppp"
    assert decisions[2].action.tolist() == [0, 1]
    assert executor.report().rejected_actions == 1


def test_a_policy_that_always_fails_gives_safe_actions_and_is_made_cold():
    policy = Encoded(lambda number: None if number == 0 else "raise")
    executor, clock = make(policy, ladder=("rest", "safe"))
    decisions = drive(executor, clock, 12)
    assert sources(decisions) == "pppprrr" + "sssss"
    assert [call[3] for call in policy.calls] == [False] + [True] * 3 + [False] * 5
    never, clock = make(Encoded(lambda number: "nan"))
    assert sources(drive(never, clock, 5)) == "sssss"
    assert never.report().rejected_plans == 5


@pytest.mark.parametrize("end", ["raise", "hang", "no sensor", "stall"])
def test_a_dead_policy_holds_for_a_while_and_then_is_safe(end):
    policy = Encoded(lambda number: "raise" if number and end == "raise" else None)
    executor, clock = make(policy, [0.0, 1e9 if end == "hang" else 0.0], hold_ticks=3)
    blind = end in ("no sensor", "stall")
    decisions = drive(executor, clock, 4)
    for tick in range(4, 1000):
        if end != "stall" or tick not in (
            7,
            8,
        ):  # the ticks that a stalled loop skips are held ones too
            clock.sleep_until(tick * executor.timing.period_ns)
            decisions.append(executor.tick(None if blind else [float(tick)]))
    told = sources(decisions)
    assert told.lstrip("pr") == ("h" if end == "stall" else "hhh") + "s" * (1000 - LENGTH - 3)
    assert decisions[-1].action.tolist() == [-1, -1]
    report = executor.report()
    assert (report.hold_ticks, report.holds_ended) == (3, 1)
    assert report.ladder == ("rest", "refine", "hold", "safe")
    assert report.sources["safe"] == 990


def test_an_action_is_not_held_for_ever_by_default():
    executor, clock = make(Encoded(lambda number: "raise" if number else None))
    decisions = drive(executor, clock, 100)
    assert sources(decisions).strip("pr") == "h" * 2 * LENGTH + "s" * (100 - 3 * LENGTH)
    report = json.loads(json.dumps(executor.report().to_dict()))
    assert report["hold_ticks"] == 2 * LENGTH


class Foreign(Encoded):
    """Its second plan is what ``made`` makes of a good one."""

    def __init__(self, made):
        super().__init__()
        self.made = made

    def make_plans(self, state, *, deterministic):
        plan, nfe = super().make_plans(state, deterministic=deterministic)
        return (plan if len(self.calls) != 2 else self.made(plan)), nfe


@pytest.mark.parametrize(
    "made",
    [
        lambda plan: plan[:, :-1],
        lambda plan: np.concatenate([plan, plan], 1),
        lambda plan: plan[..., :1],
        lambda plan: plan[0],
        lambda plan: plan[:0],
        lambda plan: plan.astype(np.int64),
        lambda plan: plan.astype(np.complex64),
        lambda plan: plan.astype(object),
        lambda plan: plan > 0,
        lambda plan: plan.tolist(),
        lambda plan: None,
    ],
)
def test_plans_of_another_shape_or_type_are_refused(made):
    executor, clock = make(Foreign(made), limits=ActionLimits([0, 0]))
    assert sources(drive(executor, clock, 8)) == "pppprppp"
    report = executor.report()
    assert (report.rejected_plans, report.worker_crashes) == (1, 0)
    assert "must be a float array [1, 8, 2], got" in report.errors[0]


def test_actions_of_another_shape_are_refused():
    class Short(Encoded):
        def to_actions(self, normalised):
            return normalised[:-1]

    executor, clock = make(Short())
    assert set(sources(drive(executor, clock, 5))) == {"s"}
    assert (
        "actions of a plan must be a float array [7, 2], got float32 [6, 2]"
        in (executor.report().errors[0])
    )


def test_an_error_that_cannot_be_told_is_told_by_its_type():
    class MuteError(Exception):
        def __str__(self):
            raise RuntimeError("not even this")

    def fault(number):
        raise MuteError

    executor, clock = make(Encoded(fault), refine=Encoded(fault))
    assert set(sources(drive(executor, clock, 3))) == {"s"}
    assert executor.report().errors[0] == "tick 0: MuteError"


@pytest.mark.parametrize("bad", [None, [math.nan], [math.inf], [1.0, 2.0], "fog", [[1.0]], [1e300]])
def test_bad_observations_are_counted_and_not_planned_from(bad):
    policy = Encoded()
    executor, clock = make(policy)
    assert executor.tick(bad).source == "safe"
    drive(executor, clock, 4)
    clock.sleep_until(4 * executor.timing.period_ns)
    assert executor.tick(bad).source == "plan"
    assert executor.report().bad_observations == 2
    assert len(policy.calls) == 1


def test_bounds_are_put_right_within_rounding_and_refused_beyond():
    limits = ActionLimits([0.1, 0.0], low=[-0.1, -1], high=[0.1, 1])
    near = np.nextafter(np.float32(0.1), np.float32(1))
    actions, good = limits.check(np.array([[near, 1.0], [0.11, 0.0], [0, np.nan], [0, -np.inf]]))
    assert good == [True, False, False, False]
    assert actions[0].astype(np.float64)[0] <= 0.1
    assert not actions.flags.writeable


# Long runs ---------------------------------------------------------------------------------------


class Quick(Encoded):
    """Plans for 40 ticks, executed for 24; planning without the bookkeeping for many rows."""

    def __init__(self, fault):
        super().__init__(fault)
        self.horizon, self.n_action_steps = 41, 24
        self.calls, self._steps = Calls(), np.arange(41) - (TO - 1)
        self._blank = np.zeros((1, 41, 2), np.float32)

    def replan(self, state, rows, *, deterministic=False):
        kind = self.fault(len(self.calls))
        self.calls.append(None)
        if kind == "raise":
            raise RuntimeError("a broken policy")
        plan = self._blank + state.history[0, -1, 0]
        plan[0, :, 1] += self._steps
        if kind is not None:
            plan[0, -3:] = {"nan": math.nan, "inf": -math.inf, "bounds": 3e6}[kind]
        return replace(state, plan=plan, cursor=np.array([TO - 1]), warm=np.array([True]))


class GroundTruth:
    """A loop with latencies in whole ticks, written from the documentation alone."""

    def __init__(self, latency_ticks, fault, budget_ticks):
        self.latency, self.fault, self.budget = latency_ticks, fault, budget_ticks
        self.start = self.bad_from = self.coming = None  # coming: (made at, latency, fault)
        self.begun = self.missed = self.crashes = self.rejected = self.stale = 0
        self.starved = self.refused = 0

    def step(self, tick):
        self.receive(tick)
        if self.coming is None and (self.start is None or tick - self.start >= 24):
            self.coming = (
                tick,
                self.latency[self.begun % len(self.latency)],
                self.fault(self.begun),
            )
            self.begun += 1
            self.receive(tick)
        age = None if self.start is None else tick - self.start
        self.starved += age is None or age >= 40
        self.refused += age is not None and self.bad_from <= age < 40

    def receive(self, tick):
        if self.coming is None or tick < self.coming[0] + self.coming[1]:
            return
        (made, taken, fault), self.coming = self.coming, None
        self.missed += taken > self.budget
        start = tick if self.start is None else made
        bad_from = 37 if fault == "bounds" else 40
        if fault == "raise":
            self.crashes += 1
        elif fault in ("nan", "inf"):
            self.rejected += 1
        elif tick - start >= 40:
            self.stale += 1
            if self.start is None or tick - self.start >= 40:
                self.start, self.bad_from = start, bad_from
        elif tick - start >= bad_from:
            self.rejected += 1
        else:
            self.start, self.bad_from = start, bad_from


def test_many_ticks_with_spikes_and_faults():
    ticks = 200_000
    random = np.random.default_rng(0)
    shares = {0: 0.3, 1: 0.3, 2: 0.2, 3: 0.1, 5: 0.04, 9: 0.03, 18: 0.02, 45: 0.01}
    latencies = random.choice(list(shares), p=list(shares.values()), size=9973)
    kinds = random.choice([0, 1, 2, 3, 4], p=[0.9, 0.02, 0.02, 0.04, 0.02], size=10007).tolist()

    def fault(number):
        return (None, "nan", "inf", "bounds", "raise")[kinds[number % 10007]]

    policy = Quick(fault)
    timing = Timing(1e3 / TICK, budget_ms=2 * TICK)
    executor, _ = make(policy, latencies * TICK, timing=timing)
    sent, seen = [], iter(range(ticks))
    report = executor.run(lambda: (next(seen),), sent.append, ticks=ticks)

    truth = GroundTruth(latencies.tolist(), fault, 2)
    for tick in range(ticks):
        truth.step(tick)
    if truth.coming is not None:  # under way at the end, and overdue already
        truth.missed += ticks - 1 - truth.coming[0] > 2
    assert report.missed_deadlines == truth.missed > 500
    assert report.worker_crashes == truth.crashes > 100
    assert report.rejected_plans == truth.rejected > 100
    assert report.stale_plans == truth.stale > 50
    assert report.starved_ticks == truth.starved > 500
    assert report.rejected_actions == truth.refused > 0
    assert len(policy.calls) == truth.begun
    assert report.ticks == sum(report.sources.values()) == len(sent) == ticks
    actions = np.asarray(sent)
    assert np.isfinite(actions).all()
    assert ((actions >= -1) & (actions <= 2e6)).all()
    assert report.late_ticks == report.skipped_ticks == report.bad_observations == 0
    assert report.plan_latency.max_ms == 45 * TICK


class Calls:
    """Only counts, so that a million ticks do not fill the memory."""

    def __init__(self):
        self.count = 0

    def append(self, item):
        self.count += 1

    def __len__(self):
        return self.count


# Running it --------------------------------------------------------------------------------------


def test_run_ends_after_ticks_or_time_or_when_told():
    executor, _ = make(Encoded())
    sent = []
    assert executor.run(lambda: [0.0], sent.append, ticks=7).ticks == 7
    assert executor.run(lambda: [0.0], sent.append, duration_s=5 * TICK / 1e3).ticks == 12
    assert executor.run(lambda: [0.0], sent.append, stop=lambda: len(sent) >= 15).ticks == 15
    with pytest.raises(ValueError, match="say when to stop"):
        executor.run(lambda: [0.0], sent.append)


def test_what_the_callbacks_raise_ends_the_loop():
    executor, _ = make(Encoded())

    def unplugged(action):
        raise OSError("no robot")

    with pytest.raises(OSError, match="no robot"):
        executor.run(lambda: [0.0], unplugged, ticks=5)


def test_reset_begins_a_cold_episode_and_drops_the_plan_under_way():
    policy = Encoded()
    executor, clock = make(policy, [0.0, 50.0, 0.0])
    drive(executor, clock, 5)  # the plan of tick 4 is under way
    executor.reset()
    clock.sleep_until(10**9)
    decision = executor.tick([100.0])
    assert (decision.tick, decision.action.tolist()) == (0, [100, 100])
    assert [call[3] for call in policy.calls] == [False, True, False]
    assert executor.report().plans == 2  # the dropped one is not counted


@pytest.mark.parametrize("name", ["initial_state", "forget"])
def test_a_policy_whose_reset_raises_costs_plans_and_not_the_loop(name):
    policy = Encoded()
    executor, clock = make(policy)
    drive(executor, clock, 3)

    def broken(*arguments, **options):
        raise OSError("no weights")

    setattr(policy, name, broken)
    executor.reset(7)
    start = clock.now_ns()
    for tick in range(3):
        clock.sleep_until(start + tick * executor.timing.period_ns)
        decision = executor.tick([0.0])
        assert (decision.source, decision.missed) == ("safe", True)
    assert executor.report().worker_crashes == 3
    delattr(policy, name)
    executor.reset(7)
    assert executor.tick([5.0]).source == "plan"


def test_a_policy_that_hangs_does_not_stop_reset_or_the_loop():
    release = threading.Event()

    class Hangs(Encoded):
        def forget(self, state, done, seeds=None):
            release.wait(30)
            return super().forget(state, done, seeds)

    with RealTimeExecutor(Hangs(), Timing(200), LIMITS) as executor:
        began = time.perf_counter()
        for _ in range(3):
            executor.reset(1)
            report = executor.run(lambda: [0.0], lambda action: None, ticks=6)
        assert time.perf_counter() - began < 5
        assert report.sources["safe"] == report.ticks
        assert report.missed_deadlines == 3  # what hangs is late in each episode
        release.set()


def test_reset_with_a_seed_repeats_the_episode():
    executor, clock = make(Noisy(), limits=ActionLimits([0, 0]), seed=4)
    first = [d.action for d in drive(executor, clock, 10)]
    executor.reset(4)
    again = []
    for tick in range(10):
        clock.sleep_until(10**9 + tick * executor.timing.period_ns)
        again.append(executor.tick([float(tick)]).action)
    np.testing.assert_array_equal(again, first)


def test_warming_up_is_timed_apart_and_its_plan_is_the_first():
    executor, clock = make(Noisy(), limits=ActionLimits([0, 0]), seed=4)
    plain = [d.action for d in drive(executor, clock, 10)]
    warmed, clock = make(
        Noisy(), [900, 30, 31, 0], limits=ActionLimits([0, 0]), refine=Noisy(), seed=4
    )
    assert warmed.warm_up(np.zeros(1)) == (900.0, 30.0, 31.0)
    start = clock.now_ns()
    actions = []
    for tick in range(4):
        clock.sleep_until(start + tick * warmed.timing.period_ns)
        actions.append(warmed.tick([float(tick)]).action)
    np.testing.assert_array_equal(actions, plain[:4])
    report = warmed.report()
    assert report.warm_up_ms == (900.0, 30.0, 31.0)
    assert (report.plans, report.cold_latency.count, report.plan_latency.count) == (0, 0, 0)
    # Dropped, where the observation is not the robot's: then the loop begins as without it.
    warmed, clock = make(Noisy(), [9, 9, 9, 0], limits=ActionLimits([0, 0]), seed=4)
    warmed.warm_up(np.ones(1), keep=False)
    sent = []
    warmed.run(iter(np.arange(4.0)[:, None]).__next__, sent.append, ticks=4)
    np.testing.assert_array_equal(sent, plain[:4])


def test_the_loop_does_not_begin_with_the_safe_action_after_warming_up():
    executor, _ = make(Encoded(), [35.0])
    executor.warm_up(np.zeros(1))
    sent = []
    report = executor.run(iter(np.arange(9.0)[:, None]).__next__, sent.append, ticks=9)
    assert [a.tolist() for a in sent] == [[0, tick] for tick in range(6)] + [[4, 6], [4, 7], [4, 8]]
    assert report.sources == {"plan": 9, "rest": 0, "refine": 0, "hold": 0, "safe": 0}
    executor.reset()
    assert executor.tick([0.0]).source == "safe"


def test_warming_up_tells_what_is_wrong():
    executor, _ = make(Encoded(lambda number: "raise"))
    with pytest.raises(RuntimeError, match="the policy failed"):
        executor.warm_up(np.zeros(1))
    executor, _ = make(Encoded(lambda number: "bounds"))
    with pytest.raises(RuntimeError, match="not within the bounds of ActionLimits"):
        executor.warm_up(np.zeros(1))
    with pytest.raises(ValueError, match="the observation must be"):
        executor.warm_up(np.zeros(2))


class Slow(Encoded):
    def make_plans(self, state, *, deterministic):
        time.sleep(0.03)
        return super().make_plans(state, deterministic=deterministic)


def test_real_clock_and_thread():
    policy = Slow(lambda number: "raise" if number == 2 else None)
    sent, ticks = [], iter(range(10**6))
    with RealTimeExecutor(policy, Timing(200), LIMITS, clock=RealClock()) as executor:
        report = executor.run(lambda: [float(next(ticks))], sent.append, ticks=120)
        assert executor.close()
    assert report.ticks + report.skipped_ticks in (120, 121)
    assert len(sent) == report.ticks
    assert np.isfinite(sent).all()
    assert report.plans >= 3
    assert report.worker_crashes == 1
    assert report.missed_deadlines >= report.plans
    assert report.tick_overhead.count == report.ticks
    assert not [t for t in threading.enumerate() if t.name == "diffpolicy-plan"]


# The report --------------------------------------------------------------------------------------


def test_report_as_json_and_picture(tmp_path):
    executor, _ = make(Encoded(), [0.0, *[12.0] * 49, 130.0, *[12.0] * 49])
    report = executor.run(lambda: [0.0], lambda action: None, ticks=400)
    path = report.to_json(tmp_path / "deep" / "report.json")
    stored = json.loads(path.read_text())
    assert stored["missed_deadlines"] == report.missed_deadlines == 1
    assert stored["plan_latency"]["p50_ms"] == pytest.approx(12, rel=0.006)
    assert stored["plan_latency"]["max_ms"] == 130
    assert stored["cold_latency"]["count"] == 1
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]
    pytest.importorskip("matplotlib", reason='needs pip install "diffpolicy[media]"')
    assert executor_figure.main([str(path), str(tmp_path / "latency.png")]) == 0
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")


def test_an_empty_report_is_zeros(tmp_path):
    report = make(Encoded())[0].report()
    assert json.loads(report.to_json(tmp_path / "r.json").read_text())["ticks"] == 0


# Bad arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate_hz": 0}, "rate_hz must be positive"),
        ({"rate_hz": 50, "budget_ms": -1}, "budget_ms must be positive"),
        ({"rate_hz": 50, "wait_ms": 20}, "wait_ms must be in"),
        ({"rate_hz": 50, "replan_after": 0}, "at least 1"),
        ({"rate_hz": 50, "late_ms": -1}, "late_ms"),
    ],
)
def test_bad_timing(options, message):
    with pytest.raises(ValueError, match=message):
        Timing(**options)


@pytest.mark.parametrize(
    ("ladder", "message"),
    [
        ((), "ends in 'hold' or 'safe'"),
        (("rest",), "ends in 'hold' or 'safe'"),
        (("hold", "rest", "safe"), "in this order"),
        (("safe", "hold"), "in this order"),
        (("rest", "rest", "hold"), "in this order"),
        (("rest", "stop"), "is made of"),
    ],
)
def test_bad_ladders(ladder, message):
    with pytest.raises(ValueError, match=message):
        make(Encoded(), ladder=ladder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.0, math.nan],), "safe action must be finite"),
        ((3.0,), "safe action must be finite"),
        (([0.0], {"low": 1.0}), "is not within"),
        (([0.0], {"low": 1.0, "high": -1.0}), "action_low must not be above action_high"),
        (([0.0], {"high": [1.0, 2.0]}), "do not fit actions of shape"),
        (([0.0], {"low": math.nan}), "action_low must be numbers.*NaN"),
    ],
)
def test_bad_limits(arguments, message):
    safe, *bounds = arguments
    with pytest.raises(ValueError, match=message):
        ActionLimits(safe, **(bounds[0] if bounds else {}))


@pytest.mark.parametrize("ticks", [-1, 2.5, True, math.inf])
def test_bad_hold_ticks(ticks):
    with pytest.raises(ValueError, match="hold_ticks must be a number of ticks >= 0"):
        make(Encoded(), hold_ticks=ticks)


def test_parts_that_do_not_fit():
    with pytest.raises(ValueError, match="3 dimensions, the policy's actions have 2"):
        make(Encoded(), limits=ActionLimits([0, 0, 0]))
    with pytest.raises(TypeError, match="ChunkedPolicy, got str"):
        make("policy")
    with pytest.raises(TypeError, match="ChunkedPolicy, got str"):
        make(Encoded(), refine="policy")

    class Longer(Encoded):
        def __init__(self):
            super().__init__()
            self.horizon = H + 1

    with pytest.raises(ValueError, match="refine needs the policy's"):
        make(Encoded(), refine=Longer())
    assert replace(Timing(50), rate_hz=100).period_ns == 10_000_000
