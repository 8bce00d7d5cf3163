"""Plans made beside a control loop: begun, received, timed, refused, refined."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from diffpolicy.policies.base import Array, ChunkedPolicy, PolicyState
from diffpolicy.runtime.clock import NS_PER_MS, Clock, Outcome
from diffpolicy.runtime.report import Meter
from diffpolicy.runtime.tracks import Track, TrackMaker

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
        if not 0 < self.rate_hz < math.inf:
            raise ValueError(f"rate_hz must be a positive number, got {self.rate_hz}")
        if self.budget_ms is not None and not 0 < self.budget_ms < math.inf:
            raise ValueError(f"budget_ms must be a positive number, got {self.budget_ms}")
        if not 0 <= self.wait_ms < 1e3 / self.rate_hz:
            raise ValueError(
                f"wait_ms must be in [0, {1e3 / self.rate_hz:g}), less than the period at "
                f"{self.rate_hz:g} Hz; got {self.wait_ms}"
            )
        if self.replan_after is not None and self.replan_after < 1:
            raise ValueError(f"replan_after must be at least 1, got {self.replan_after}")
        if self.late_ms is not None and not 0 <= self.late_ms < math.inf:
            raise ValueError(f"late_ms must be a number >= 0, got {self.late_ms}")

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
        self._clear()

    def reset(self, seed: int | None = None) -> None:
        """Another episode; a plan under way is dropped when it comes."""
        memory = self._memory
        if self._request is not None:  # its noise is used up
            memory = replace(memory, counter=memory.counter + 1)
        self._memory = self._cold(memory, seed)
        self._episode += 1
        self._clear()

    def _clear(self) -> None:
        self.track: Track | None = None
        self.degraded, self._overdue, self._failures = False, False, 0

    def update(self, tick: int, trail: Sequence[Array], *, seen: bool) -> None:
        """Takes over a plan that has come, begins one if due, and watches the deadline.

        Args:
            tick: of now.
            trail: the last observations, oldest first.
            seen: the last one is of this tick, so a plan may be begun from it.
        """
        if self._request is not None:
            self._receive(tick, self._wait_ns if self._exhausted(tick) else 0)
        if self._request is None and seen and self._due(tick):
            warm = self.track is not None and self._failures < _COLD_AFTER
            self._request = _Request(self.clock.now_ns(), warm, self._episode)
            self._overdue = False
            self.runner.submit(self._job(self.track, tuple(trail), tick, warm=warm))
            self._receive(tick, self._wait_ns)
        request = self._request
        if request is None or self._overdue or request.episode != self._episode:
            return
        if self.clock.now_ns() - request.submitted_ns > self._budget_ns:
            self._overdue = self.degraded = True
            self.meter.counts["missed_deadlines"] += 1

    def refine(self, tick: int, trail: Sequence[Array], left_ns: int) -> Track | None:
        """A one-evaluation plan, made now, if its usual time is not above ``left_ns``."""
        track = self.track
        if self.refiner is None or track is None:
            return None
        if self._refine_ns > left_ns:
            self._refine_ns *= 0.9  # one long refinement is no reason never to try again
            return None
        outcome = self.runner.call(self._refinement(self.refiner, track, tuple(trail), tick))
        self.meter.counts["refinements"] += 1
        self.meter.refine.add(outcome.latency_ns)
        self._refine_ns = float(outcome.latency_ns)
        refined: Track | None = outcome.value
        if refined is None or not refined.finite or not refined.good[0]:
            what = outcome.error or "a refinement that is not finite or out of bounds"
            self.meter.failed("refine_failures", f"tick {tick}: {what}")
            return None
        self.meter.counts["nfe"] += refined.nfe
        self.track, self._memory = refined, refined.state
        return refined

    def warm_up(self, obs: Array, plans: int) -> tuple[float, ...]:
        """Makes a cold plan, warm ones and a refinement, and forgets them; see the executor."""
        memory = self._memory
        seen = self.maker.policy.observe(np.asarray(obs, np.float32)[None], memory).history[0, -1]
        track, taken = None, []
        if self._request is not None:
            self.runner.poll(_FOREVER_NS)
            self._request = None
        self.reset()
        for _ in range(plans):
            self.runner.submit(self._job(track, (seen,), 0, warm=track is not None))
            outcome = self.runner.poll(_FOREVER_NS)
            assert outcome is not None
            self._expected[int(track is not None)] = self._ticks(outcome.latency_ns)
            track = _usable(outcome, "the policy")
            taken.append(outcome.latency_ns / NS_PER_MS)
        if self.refiner is not None and track is not None:
            for _ in range(2):  # the first may be slow
                outcome = self.runner.call(self._refinement(self.refiner, track, (seen,), 0))
                _usable(outcome, "refine")
                self._refine_ns = float(outcome.latency_ns)
        self._memory = memory  # the stream of noise goes on where it was
        self.reset()
        self.meter.warm_up_ms.extend(taken)
        return tuple(taken)

    def _exhausted(self, tick: int) -> bool:
        return self.track is None or tick - self.track.start >= len(self.track.actions)

    def _due(self, tick: int) -> bool:
        track = self.track
        return track is None or track.refined or tick - track.start >= self._replan_after

    def _job(
        self, track: Track | None, trail: Sequence[Array], tick: int, *, warm: bool
    ) -> Callable[[], Track]:
        """Planning from ``trail``; all it needs is bound here, for it runs in another thread."""
        maker, failures = self.maker, self._failures
        delay = min(self._expected[int(warm)], maker.length)
        memory = self._memory if track is None else track.state
        since = tick - track.start if track is not None and warm else None

        def job() -> Track:
            start = memory if track is None or warm else self._cold(memory)
            snapshot = maker.snapshot(start, since, trail, delay=delay, failures=failures)
            return maker.make(snapshot, tick)

        return job

    def _refinement(
        self, refiner: TrackMaker, track: Track, trail: Sequence[Array], tick: int
    ) -> Callable[[], Track]:
        def job() -> Track:
            snapshot = self.maker.snapshot(track.state, tick - track.start, trail)
            made = refiner.make(snapshot, tick)
            # The policy goes on from this plan with its own memory, not with the refiner's.
            state = replace(made.state, memory=snapshot.memory)
            return replace(made, state=state, refined=True)

        return job

    def _cold(self, state: PolicyState, seed: int | None = None) -> PolicyState:
        policy: ChunkedPolicy = self.maker.policy
        return policy.forget(state, np.ones(1, bool), seeds=None if seed is None else [seed])

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
        (meter.plan if warm else meter.cold).add(latency_ns)
        self._expected[int(warm)] = self._ticks(latency_ns)
        if latency_ns > self._budget_ns and not self._overdue:
            meter.counts["missed_deadlines"] += 1
        if outcome.error is not None:
            message = f"{type(outcome.error).__name__}: {outcome.error}"
            self._failed(tick, "worker_crashes", message)
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
                self.track, self._memory = track, track.state
        elif not track.good[age]:
            message = f"a plan that is out of bounds: {track.actions[age]} after clipping"
            self._failed(tick, "rejected_plans", message)
        else:
            self.track, self._memory = track, track.state
            self.degraded, self._failures = False, 0

    def _failed(self, tick: int, kind: str, message: str) -> None:
        self.meter.failed(kind, f"tick {tick}: {message}")
        self.degraded = True
        self._failures += 1

    def _ticks(self, latency_ns: int) -> int:
        return 0 if latency_ns <= self._wait_ns else -(-latency_ns // self._period_ns)


def _usable(outcome: Outcome, name: str) -> Track:
    if outcome.error is not None:
        raise RuntimeError(f"warming up: {name} failed") from outcome.error
    track: Track = outcome.value
    if not (track.finite and track.good[0]):
        raise RuntimeError(
            f"warming up: {name} gives an action that is not finite or not within the bounds of "
            f"ActionLimits (after clipping: {track.actions[0]})"
        )
    return track
