"""A control loop that keeps its rate whatever the policy does.

Every tick gives an action. Plans are made beside the loop; what is sent while none is there is
declared beforehand (the ladder), and nothing that is not finite or not within bounds is ever sent.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffpolicy.data.observation import Obs, as_seen, each, to_fields
from diffpolicy.policies.base import Array, ChunkedPolicy
from diffpolicy.policies.holding import hold_limit, holds
from diffpolicy.runtime.clock import NS_PER_MS, Clock, RealClock
from diffpolicy.runtime.planner import Planning, Timing
from diffpolicy.runtime.report import ExecutorReport, Meter
from diffpolicy.runtime.schedule import ActionLimits, TrackMaker

RUNGS = ("rest", "refine", "hold", "safe")


class Decision(NamedTuple):
    """What to do in a tick.

    Attributes:
        action: ``[A]``, environment units, read-only, finite and within bounds.
        source: ``"plan"``; or the rung of the ladder: ``"rest"`` of an old plan, ``"refine"``,
            ``"hold"`` of the last action, ``"safe"``.
        age_ticks: ticks since the observation behind it; ``None`` for ``"hold"`` and ``"safe"``.
        late_ms: how late the tick began.
        tick: its number.
        missed: a plan's deadline has passed, or plans failed, and no good one came since.
    """

    action: Array
    source: str
    age_ticks: int | None
    late_ms: float
    tick: int
    missed: bool


class RealTimeExecutor:
    """Runs a policy at a fixed rate, with inference beside the loop.

    A tick takes the observation, takes over a plan that has come, begins the next when one is due
    and none is under way, and gives an action:

    - the running plan's, aligned in time (``"plan"``);
    - when a deadline was missed or a plan failed, the first rung of the ladder that has one:
      ``"rest"`` (of the plan before), ``"refine"`` (a plan of ``refine``, made within the tick if
      its usual time still fits, executed until a full plan comes), ``"hold"`` (the last action,
      for at most ``hold_ticks`` ticks in a row) or ``"safe"``.

    A plan that comes late skips the actions whose tick has passed; if that is all of them, it is
    dropped. The first plan after :meth:`reset` starts when it is there: until then the robot has
    been given the safe action (or, after :meth:`warm_up`, the plan made there). A plan that has the
    wrong shape or type, is not finite, or whose next action is out of bounds is thrown away, as if
    it had raised; after three failures in a row the next is made cold.

    Until :meth:`close`, :meth:`tick` and :meth:`reset` do not raise and do not wait for the policy,
    whatever it does and whatever the observation is: it runs in a worker thread (``refine`` alone
    runs in the loop's, which waits for it).

    Args:
        policy: what is executed.
        timing: rate and budgets.
        limits: bounds of actions, and the safe one.
        ladder: some of ``RUNGS``, in their order; the last is ``"hold"`` or ``"safe"``. Below
            ``"hold"`` there is always the safe action: when there is nothing to hold, and when
            it was held for ``hold_ticks``. ``"refine"`` is passed over without a ``refine``.
        hold_ticks: for how many ticks in a row an action is held, at most; ticks that a stalled
            loop skipped count, for the robot held it then too. Default: the actions of
            two plans, so that one plan may be lost and the next come late; after that the policy
            is taken for dead.
        refine: makes a plan from the last one in one evaluation; same shapes and normaliser as
            ``policy``. Called in the loop's thread, maybe while ``policy`` runs in the other.
        clock: :class:`~diffpolicy.runtime.clock.RealClock` by default.
        seed: stream of the policy's randomness.
        deterministic: as in ``ChunkedPolicy.act``.

    Raises:
        TypeError: a policy that is no ``ChunkedPolicy``.
        ValueError: an unknown or unfinished ladder, a negative ``hold_ticks``, a ``refine`` or
            limits of other shapes.
    """

    def __init__(
        self,
        policy: ChunkedPolicy,
        timing: Timing,
        limits: ActionLimits,
        *,
        ladder: Sequence[str] = ("rest", "refine", "hold"),
        hold_ticks: int | None = None,
        refine: ChunkedPolicy | None = None,
        clock: Clock | None = None,
        seed: int = 0,
        deterministic: bool = False,
    ) -> None:
        self.policy, self.timing, self.limits = policy, timing, limits
        self.ladder = _checked_ladder(ladder)
        maker, refiner = TrackMaker(policy, limits, deterministic=deterministic), None
        if refine is not None:
            refiner = TrackMaker(refine, limits, deterministic=deterministic)
            _check_alike(policy, refine)
        self.hold_ticks = hold_limit(policy, hold_ticks)
        self._clock = RealClock() if clock is None else clock
        self._meter = Meter(("plan", *RUNGS))
        parts: dict[str, Any] = {"clock": self._clock, "meter": self._meter}
        self._planning = Planning(maker, refiner, timing, **parts, seed=seed)
        self._period_ns, self._late_ns = timing.period_ns, timing.late_ns
        self._trail: deque[Obs] = deque(maxlen=maker.trail_length)
        self._clear()

    def __enter__(self) -> RealTimeExecutor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self, timeout_s: float = 5.0) -> bool:
        """End the worker thread; ``False`` if a plan is still running after ``timeout_s``."""
        return self._planning.runner.close(timeout_s)

    def reset(self, seed: int | None = None) -> None:
        """Begin another episode: no plan, no history; a plan under way is dropped when it comes.

        The policy's own memory is made anew with the next plan, in the worker thread; a policy that
        raises there, or hangs, costs plans and not the loop.

        Args:
            seed: a new stream of randomness; ``None`` goes on in the old one.
        """
        self._planning.reset(seed)
        self._clear()

    def _clear(self) -> None:
        self._trail.clear()
        self._last, self._last_tick = self.limits.safe, -1  # a tick below 0: nothing to hold
        self._source = "safe"
        self._tick, self._epoch_ns = -1, -1

    def warm_up(self, obs: Obs, plans: int = 3, *, keep: bool = True) -> tuple[float, ...]:
        """Make plans before time starts, so that caches, threads and compilers are ready.

        The first is cold, the others are warm; then the refinement, if there is one. Begins another
        episode, in which the first plan is kept: it is executed from the first tick on, as if it
        had been made there in no time. So call this right before the loop, with what the robot
        sees; a :meth:`reset` afterwards drops the plan. Takes the clock's time.

        Args:
            obs: the observation (``[O]``, or arrays by name) that the robot begins with.
            plans: how many.
            keep: ``False`` drops the first plan too and leaves its randomness unused, for an
                observation that is not the robot's.

        Returns:
            Milliseconds of each plan; they are in the report apart from those of the loop.

        Raises:
            ValueError: a bad observation.
            RuntimeError: the policy raises (its error is the cause) or its plan cannot be used.
        """
        taken = self._planning.warm_up(obs, plans, keep=keep)
        self._clear()
        return taken

    def run(
        self,
        read_obs: Callable[[], Any],
        send_action: Callable[[Array], Any],
        *,
        ticks: int | None = None,
        duration_s: float | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> ExecutorReport:
        """Run the loop from an episode's start until one of the ends given.

        It begins with :meth:`warm_up`'s plan, if that was just called.

        Args:
            read_obs: the latest observation ``[O]``, or ``None`` if there is none.
            send_action: takes an action ``[A]``.
            ticks: so many periods.
            duration_s: so long.
            stop: asked before every tick, e.g. ``threading.Event().is_set``.

        Returns:
            The report since the executor was made.

        Raises:
            ValueError: no end was given.
            Exception: what ``read_obs``, ``send_action`` or ``stop`` raise ends the loop.
        """
        if ticks is None and duration_s is None and stop is None:
            raise ValueError("say when to stop: ticks=, duration_s= or stop=")
        ends = [math.inf if ticks is None else ticks]
        if duration_s is not None:
            ends.append(math.ceil(duration_s * self.timing.rate_hz))
        last, sleep_until = min(ends) - 1, self._clock.sleep_until
        if self._tick >= 0:
            self.reset()
        self._epoch_ns = self._clock.now_ns()
        while self._tick < last and not (stop is not None and stop()):
            sleep_until(self._epoch_ns + (self._tick + 1) * self._period_ns)
            send_action(self.tick(read_obs()).action)
        return self.report()

    def tick(self, obs: Any) -> Decision:
        """The action for now, for those who own the loop and call this at the rate.

        Args:
            obs: observation ``[O]``; ``None``, a wrong shape or numbers that are not finite count
                as bad: the plan goes on, and none is begun from it.
        """
        runner = self._planning.runner
        entered, blocked = time.perf_counter_ns(), runner.blocked_ns
        tick, late_ns = self._advance()
        seen = self._observe(obs)
        self._planning.update(tick, self._trail, seen=seen)
        action, source, age = self._choose(tick, seen)
        if source not in ("hold", "safe"):
            self._last, self._last_tick = action, tick
        self._meter.counts["holds_ended"] += source == "safe" and self._source == "hold"
        self._meter.sources[source] += 1
        self._source = source
        spent = time.perf_counter_ns() - entered - (runner.blocked_ns - blocked)
        self._meter.latencies["tick_overhead"].add(spent)
        missed = self._planning.degraded
        return Decision(action, source, age, late_ns / NS_PER_MS, tick, missed)

    def report(self) -> ExecutorReport:
        """What happened since the executor was made."""
        return self._meter.report(
            rate_hz=self.timing.rate_hz,
            budget_ms=self.timing.budget_ns / NS_PER_MS,
            ladder=self.ladder,
            hold_ticks=self.hold_ticks,
        )

    def _advance(self) -> tuple[int, int]:
        """The number of this tick, and how late it is in nanoseconds."""
        now = self._clock.now_ns()
        if self._epoch_ns < 0:
            self._epoch_ns = now
        tick, counts = self._tick + 1, self._meter.counts
        late = now - self._epoch_ns - tick * self._period_ns
        if late >= self._period_ns:  # the loop stalled: plans are aligned to time, not to calls
            skipped = late // self._period_ns
            tick, late = tick + skipped, late - skipped * self._period_ns
            counts["skipped_ticks"] += skipped
            if self._trail:
                gap = min(skipped, self._trail.maxlen or 0)
                self._trail.extend([self._trail[-1]] * gap)
        elif late < 0:
            late = 0
        self._tick = tick
        counts["ticks"] += 1
        self._meter.latencies["lateness"].add(late)
        if late > self._late_ns:
            counts["late_ticks"] += 1
        return tick, late

    def _observe(self, obs: Any) -> bool:
        """Append an observation; whether it is a good one."""
        try:
            seen = each(np.array, as_seen(obs, self.policy.observed, lead=()))
            real = [array for array in to_fields(seen).values() if array.dtype.kind == "f"]
            good = all(math.isfinite(value) for a in real for value in a.ravel().tolist())
        except Exception:  # whatever a sensor sends, the loop goes on
            good = False
        if good:
            self._trail.append(seen)
            return True
        self._meter.counts["bad_observations"] += 1
        if self._trail:
            self._trail.append(self._trail[-1])
        return False

    def _choose(self, tick: int, seen: bool) -> tuple[Array, str, int | None]:
        track, degraded = self._planning.track, self._planning.degraded
        if track is None or tick - track.start >= len(track.actions):
            self._meter.counts["starved_ticks"] += 1
        elif not degraded or "rest" in self.ladder:
            index = tick - track.start
            if track.good[index]:
                source = "refine" if track.refined else "rest" if degraded else "plan"
                return track.actions[index], source, tick - track.tick
            self._meter.counts["rejected_actions"] += 1
        held = self._last_tick >= 0 and holds(tick - self._last_tick, self.hold_ticks)
        for rung in self.ladder:
            if rung == "refine" and seen:
                left_ns = self._epoch_ns + (tick + 1) * self._period_ns - self._clock.now_ns()
                refined = self._planning.refine(tick, self._trail, left_ns)
                if refined is not None:
                    return refined.actions[0], "refine", 0
            elif rung == "hold" and held:
                return self._last, "hold", None
        return self.limits.safe, "safe", None


def _checked_ladder(ladder: Sequence[str]) -> tuple[str, ...]:
    rungs = tuple(ladder)
    in_order = rungs == tuple(rung for rung in RUNGS if rung in rungs)
    if not in_order or not rungs or rungs[-1] not in ("hold", "safe"):
        form = f"is made of {list(RUNGS)} in this order and ends in 'hold' or 'safe'"
        raise ValueError(f"a ladder {form}; got {list(rungs)}")
    return rungs if rungs[-1] == "safe" else (*rungs, "safe")


def _check_alike(policy: ChunkedPolicy, refine: ChunkedPolicy) -> None:
    names = ("obs_dim", "action_dim", "horizon", "n_obs_steps", "observed")
    mine, other = ([getattr(p, name) for name in names] for p in (policy, refine))
    if mine != other:
        raise ValueError(f"refine needs the policy's {names} {mine}, it has {other}")
