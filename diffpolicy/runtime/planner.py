"""Plans made beside a control loop: begun, received, timed, refused, refined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from diffpolicy.data.observation import Obs, each, take
from diffpolicy.policies.base import ChunkedPolicy, PolicyState
from diffpolicy.runtime.clock import NS_PER_MS, Clock, Outcome
from diffpolicy.runtime.report import Meter
from diffpolicy.runtime.schedule import Track, TrackMaker, UnusablePlanError
from diffpolicy.settings import check_range

_COLD_AFTER = 3  # unusable plans in a row after which the old plan is no longer started from
_FOREVER_NS = 10**17


@dataclass(frozen=True)
class Timing:
    """Rates and budgets of a control loop.

    Args:
        rate_hz: ticks per second.
        budget_ms: a plan should be there so long after the tick that asked for it; one that is not
            is a missed deadline. May exceed the period, then plans are made ahead. Default: the
            period.
        wait_ms: so long a tick waits for the plan it asked for, or when it has no action at all.
            0 never waits; less than the period. With it, a fast plan is executed in its own tick.
        replan_after: actions of a plan after which the next is begun; default: the policy's
            ``n_action_steps``. 1 plans all the time.
        late_ms: a tick that begins later than this counts as late. Default: a tenth of the period.

    Raises:
        ValueError: numbers that are not positive, or a wait as long as the period.
    """

    rate_hz: float
    budget_ms: float | None = None
    wait_ms: float = 0.0
    replan_after: int | None = None
    late_ms: float | None = None

    def __post_init__(self) -> None:
        check_range("(0, inf)", rate_hz=self.rate_hz, budget_ms=self.budget_ms)
        check_range(f"[0, {1e3 / self.rate_hz:g})", wait_ms=self.wait_ms)  # less than the period
        check_range("[1, inf)", replan_after=self.replan_after)
        check_range("[0, inf)", late_ms=self.late_ms)

    @property
    def period_ns(self) -> int:
        """Nanoseconds between two ticks."""
        return round(1e9 / self.rate_hz)

    @property
    def budget_ns(self) -> int:
        """The budget in nanoseconds."""
        return self.period_ns if self.budget_ms is None else round(self.budget_ms * NS_PER_MS)

    @property
    def late_ns(self) -> int:
        """From when on a tick is late, in nanoseconds."""
        return self.period_ns // 10 if self.late_ms is None else round(self.late_ms * NS_PER_MS)


class _Request(NamedTuple):
    submitted_ns: int
    warm: bool
    episode: int


class Planning:
    """The plans of one control loop; its methods are called in the loop's thread.

    Args:
        maker: makes plans.
        refiner: makes one-evaluation plans, if there are any.
        timing: rate and budgets.
        clock: the loop's clock.
        meter: where everything is counted.
        seed: stream of the policy's randomness.

    Attributes:
        track: the plan that is executed, ``None`` before the first.
        degraded: a deadline was missed or plans failed, and no good one came since.
    """

    def __init__(
        self,
        maker: TrackMaker,
        refiner: TrackMaker | None,
        timing: Timing,
        *,
        clock: Clock,
        meter: Meter,
        seed: int,
    ) -> None:
        self.maker, self.refiner, self.clock, self.meter = maker, refiner, clock, meter
        self.runner = clock.runner()
        self._period_ns, self._budget_ns = timing.period_ns, timing.budget_ns
        self._wait_ns = round(timing.wait_ms * NS_PER_MS)
        self._replan_after = timing.replan_after or maker.policy.n_action_steps
        self._expected = [0, 0]  # ticks that a cold and a warm plan take
        self._refine_ns = 0.0  # how long a refinement usually takes
        self._request: _Request | None = None
        self._episode = 0
        self._memory = maker.policy.initial_state([seed])
        self._seed: int | None = None  # of the episode, where it was given
        self._used = 0  # draws of its stream by plans that were never adopted
        self._clear()

    def reset(self, seed: int | None = None) -> None:
        """Another episode; a plan under way is dropped when it comes.

        The policy is not called: its memory is made cold by the job that plans from it.
        """
        if seed is not None:
            self._seed, self._used = seed, 0
        elif self._request is not None:  # its noise is used up
            self._used += 1
        if self._request is not None:  # what the new episode waits for is late from now on
            self._request = self._request._replace(submitted_ns=self.clock.now_ns())
        self._episode += 1
        self._clear()

    def _clear(self) -> None:
        self.track: Track | None = None
        self.degraded, self._overdue, self._failures = False, False, 0

    def _keep(self, track: Track) -> None:
        """Adopt a plan; what the episode's memory begins with is that of the plan from now on."""
        self.track, self._memory = track, track.state
        self._seed, self._used = None, 0

    def update(self, tick: int, trail: Sequence[Obs], *, seen: bool) -> None:
        """Take over a plan that has come, begin one if due, and watch the deadline.

        Args:
            tick: of now.
            trail: the last observations, oldest first.
            seen: the last one is of this tick, so a plan may be begun from it.
        """
        if self._request is not None:
            self._receive(tick, self._wait_ns if self._exhausted(tick) else 0)
        track = self.track
        due = track is None or track.refined or tick - track.start >= self._replan_after
        if self._request is None and seen and due:
            warm = track is not None and self._failures < _COLD_AFTER
            self._request = _Request(self.clock.now_ns(), warm, self._episode)
            self._overdue = False
            self.runner.submit(self._job(track, tuple(trail), tick, warm=warm))
            self._receive(tick, self._wait_ns)
        request = self._request
        if request is None or self._overdue:
            return
        if self.clock.now_ns() - request.submitted_ns > self._budget_ns:
            self._overdue = self.degraded = True
            self.meter.counts["missed_deadlines"] += 1

    def refine(self, tick: int, trail: Sequence[Obs], left_ns: int) -> Track | None:
        """A one-evaluation plan, made now, if its usual time is not above ``left_ns``."""
        track = self.track
        if self.refiner is None or track is None:
            return None
        if self._refine_ns > left_ns:
            self._refine_ns *= 0.9  # one long refinement is no reason never to try again
            return None
        outcome = self.runner.call(self._refinement(self.refiner, track, tuple(trail), tick))
        self.meter.counts["refinements"] += 1
        self.meter.latencies["refine_latency"].add(outcome.latency_ns)
        self._refine_ns = float(outcome.latency_ns)
        refined: Track | None = outcome.value
        if refined is None or not refined.finite or not refined.good[0]:
            what = "a refinement that is not finite or out of bounds"
            what = what if outcome.error is None else told(outcome.error)
            self.meter.failed("refine_failures", f"tick {tick}: {what}")
            return None
        self.meter.counts["nfe"] += refined.nfe
        self._keep(refined)
        return refined

    def warm_up(self, obs: Obs, plans: int, *, keep: bool) -> tuple[float, ...]:
        """Make a cold plan, which is kept, warm ones and a refinement; see the executor."""
        seen = self.maker.policy.observe(take(each(np.asarray, obs), None), self._memory)
        trail = (take(seen.history, (0, -1)),)
        track, first, taken = None, None, []
        if self._request is not None:
            self.runner.poll(_FOREVER_NS)
            self._request = None
        self.reset()
        for _ in range(plans):
            self.runner.submit(self._job(track, trail, 0, warm=track is not None))
            outcome = self.runner.poll(_FOREVER_NS)
            assert outcome is not None
            self._expected[int(track is not None)] = self._ticks(outcome.latency_ns)
            track = _usable(outcome, "the policy")
            first = first or track
            taken.append(outcome.latency_ns / NS_PER_MS)
        if self.refiner is not None and track is not None:
            for _ in range(2):  # the first may be slow
                outcome = self.runner.call(self._refinement(self.refiner, track, trail, 0))
                _usable(outcome, "refine")
                self._refine_ns = float(outcome.latency_ns)
        if keep and first is not None:
            self._keep(first)
        self.meter.warm_up_ms.extend(taken)
        return tuple(taken)

    def _exhausted(self, tick: int) -> bool:
        return self.track is None or tick - self.track.start >= len(self.track.actions)

    def _job(
        self, track: Track | None, trail: Sequence[Obs], tick: int, *, warm: bool
    ) -> Callable[[], Track]:
        """Planning from ``trail``; all it needs is bound here, for it runs in another thread."""
        maker, failures = self.maker, self._failures
        delay = min(self._expected[int(warm)], maker.length)
        memory, since = self._memory if track is None else track.state, None
        if track is not None and warm:
            since = tick - track.start
        seed, used = (self._seed, self._used) if track is None else (None, 0)

        def job() -> Track:
            start = memory if since is not None else self._cold(memory, seed, used)
            snapshot = maker.snapshot(start, since, trail, delay=delay, failures=failures)
            return maker.make(snapshot, tick)

        return job

    def _refinement(
        self, refiner: TrackMaker, track: Track, trail: Sequence[Obs], tick: int
    ) -> Callable[[], Track]:
        def job() -> Track:
            snapshot = self.maker.snapshot(track.state, tick - track.start, trail)
            made = refiner.make(snapshot, tick)
            # The policy goes on from this plan with its own memory, not with the refiner's.
            state = replace(made.state, memory=snapshot.memory)
            return replace(made, state=state, refined=True)

        return job

    def _cold(self, state: PolicyState, seed: int | None, used: int) -> PolicyState:
        policy: ChunkedPolicy = self.maker.policy
        cold = policy.forget(state, np.ones(1, bool), seeds=None if seed is None else [seed])
        return replace(cold, counter=cold.counter + used) if used else cold

    def _receive(self, tick: int, wait_ns: int) -> None:
        outcome = self.runner.poll(wait_ns)
        request = self._request
        if outcome is None or request is None:
            return
        self._request = None
        if request.episode != self._episode:
            return
        meter, latency_ns = self.meter, outcome.latency_ns
        meter.counts["plans"] += 1
        warm = request.warm and (outcome.value is None or outcome.value.warm)
        meter.latencies["plan_latency" if warm else "cold_latency"].add(latency_ns)
        self._expected[int(warm)] = self._ticks(latency_ns)
        if latency_ns > self._budget_ns and not self._overdue:
            meter.counts["missed_deadlines"] += 1
        if outcome.error is not None:
            refused = isinstance(outcome.error, UnusablePlanError)
            kind = "rejected_plans" if refused else "worker_crashes"
            self._failed(tick, kind, told(outcome.error))
        else:
            self._adopt(tick, outcome.value)

    def _adopt(self, tick: int, track: Track) -> None:
        self.meter.counts["nfe"] += track.nfe
        if self.track is None:
            track = replace(track, start=tick)  # the robot has waited for it
        age = tick - track.start
        if not track.finite:
            self._failed(tick, "rejected_plans", "a plan that is not finite")
        elif age >= len(track.actions):
            self.meter.counts["stale_plans"] += 1
            self.degraded = True
            if self._exhausted(tick):  # of two plans that are over, the later is the better start
                self._keep(track)
        elif not track.good[age]:
            message = f"a plan that is out of bounds: {track.actions[age]} after clipping"
            self._failed(tick, "rejected_plans", message)
        else:
            self._keep(track)
            self.degraded, self._failures = False, 0

    def _failed(self, tick: int, kind: str, message: str) -> None:
        self.meter.failed(kind, f"tick {tick}: {message}")
        self.degraded = True
        self._failures += 1

    def _ticks(self, latency_ns: int) -> int:
        return 0 if latency_ns <= self._wait_ns else -(-latency_ns // self._period_ns)


def told(error: BaseException) -> str:
    """An error's type and message; its message is made by the policy's code, and may raise."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def _usable(outcome: Outcome, name: str) -> Track:
    if outcome.error is not None:
        raise RuntimeError(f"warming up: {name} failed") from outcome.error
    track: Track = outcome.value
    if not (track.finite and track.good[0]):
        what = "not finite or not within the bounds of ActionLimits"
        raise RuntimeError(f"warming up: {name} gives {track.actions[0]} (clipped), {what}")
    return track
