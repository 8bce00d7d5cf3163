"""Time and background work of a control loop: a real clock with a thread, a virtual one without.

Both count integer nanoseconds, so that a tick and a deadline at the same instant are told apart by
the rules and not by rounding.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from diffpolicy.settings import check_range

NS_PER_MS = 1_000_000
Job = Callable[[], Any]


class Outcome(NamedTuple):
    """What became of a job.

    Attributes:
        value: what it returned, ``None`` if it raised.
        error: what it raised, ``None`` if it returned.
        latency_ns: from its submission to its end.
    """

    value: Any
    error: BaseException | None
    latency_ns: int


class RealClock:
    """The monotonic clock of the machine, and a worker thread.

    Args:
        spin_ms: how long before a tick sleeping gives way to spinning, which is exact but takes a
            core (and gives the interpreter to the worker thread when that asks for it).

    Raises:
        ValueError: a negative or non-finite ``spin_ms``.
    """

    def __init__(self, *, spin_ms: float = 0.2) -> None:
        check_range("[0, inf)", spin_ms=spin_ms)
        self._spin_ns = int(spin_ms * NS_PER_MS)

    def now_ns(self) -> int:
        """The time, from any origin."""
        return time.perf_counter_ns()

    def sleep_until(self, at_ns: int) -> None:
        """Return at ``at_ns``, at once if that has passed."""
        while (left := at_ns - time.perf_counter_ns()) > 0:
            time.sleep(max(left - self._spin_ns, 0) * 1e-9)

    def runner(self) -> ThreadRunner:
        """A runner whose jobs take this clock's time."""
        return ThreadRunner()


class ThreadRunner:
    """Runs one job at a time beside the control loop, in a daemon thread.

    Attributes:
        blocked_ns: real time that callers spent inside :meth:`poll` and :meth:`call` so far, for
            jobs or waiting for them.
    """

    def __init__(self) -> None:
        self.blocked_ns = 0
        self._jobs: queue.SimpleQueue[tuple[Job, int] | None] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._outcome: Outcome | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, job: Job) -> None:
        """Begin a job; the one before it must have been polled."""
        if self._closed:
            raise RuntimeError("this runner is closed; make a new executor")
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="diffpolicy-plan", daemon=True)
            self._thread.start()
        self._ended.clear()
        self._jobs.put((job, time.perf_counter_ns()))

    def poll(self, wait_ns: int = 0) -> Outcome | None:
        """The outcome of the submitted job if it has one within ``wait_ns``, once."""
        if wait_ns > 0:
            began = time.perf_counter_ns()
            self._ended.wait(wait_ns * 1e-9)
            self.blocked_ns += time.perf_counter_ns() - began
        if not self._ended.is_set():
            return None
        outcome, self._outcome = self._outcome, None
        self._ended.clear()
        return outcome

    def call(self, job: Job) -> Outcome:
        """Run a job at once, in the caller's time."""
        began = time.perf_counter_ns()
        outcome = _attempt(job, began)
        self.blocked_ns += outcome.latency_ns
        return outcome

    def close(self, timeout_s: float = 5.0) -> bool:
        """End the background work; whether it ended in time."""
        self._closed = True
        if self._thread is None:
            return True
        self._jobs.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            self._outcome = _attempt(*item, BaseException)  # not even an exit ends the thread
            self._ended.set()


class VirtualClock:
    """A clock that moves when the loop sleeps or waits, and background work of given latency.

    There is no thread: a job runs where it is submitted, and its outcome is there ``latency``
    later. The same latencies give the same run, as fast as the machine can.

    Args:
        latency_ms: of the plans, in order; when they are used up they begin again.
        call_ms: of the jobs run in the caller's time (one-evaluation refinements), likewise.

    Raises:
        ValueError: no latency, or one that is negative or not finite.
    """

    def __init__(
        self, latency_ms: Iterable[float] = (0.0,), *, call_ms: Iterable[float] = (0.0,)
    ) -> None:
        self._now = 0
        self._latencies = _forever("latency_ms", latency_ms)
        self._calls = _forever("call_ms", call_ms)

    def now_ns(self) -> int:
        return self._now

    def sleep_until(self, at_ns: int) -> None:
        self._now = max(self._now, at_ns)

    def runner(self) -> VirtualRunner:
        return VirtualRunner(self, self._latencies, self._calls)


class VirtualRunner:
    """Runs jobs where they are submitted and keeps their outcomes until their time has come."""

    def __init__(
        self, clock: VirtualClock, latencies_ns: Iterator[int], calls_ns: Iterator[int]
    ) -> None:
        self.blocked_ns = 0
        self._clock, self._latencies, self._calls = clock, latencies_ns, calls_ns
        self._ready_ns = 0
        self._outcome: Outcome | None = None

    def submit(self, job: Job) -> None:
        self._outcome = self._run(job, next(self._latencies))
        self._ready_ns = self._clock.now_ns() + self._outcome.latency_ns

    def poll(self, wait_ns: int = 0) -> Outcome | None:
        outcome, now = self._outcome, self._clock.now_ns()
        if outcome is None:
            return None
        if self._ready_ns > now + wait_ns:
            if wait_ns > 0:
                self._clock.sleep_until(now + wait_ns)
            return None
        if self._ready_ns > now:
            self._clock.sleep_until(self._ready_ns)
        self._outcome = None
        return outcome

    def call(self, job: Job) -> Outcome:
        outcome = self._run(job, next(self._calls))
        self._clock.sleep_until(self._clock.now_ns() + outcome.latency_ns)
        return outcome

    def close(self, timeout_s: float = 5.0) -> bool:
        self._outcome = None
        return True

    def _run(self, job: Job, latency_ns: int) -> Outcome:
        began = time.perf_counter_ns()
        outcome = _attempt(job, began)
        self.blocked_ns += outcome.latency_ns
        return outcome._replace(latency_ns=latency_ns)


Clock = RealClock | VirtualClock


def _attempt(job: Job, submitted_ns: int, caught: type[BaseException] = Exception) -> Outcome:
    error: BaseException | None
    try:
        value, error = job(), None
    except caught as raised:  # whatever a policy raises is told, and the loop goes on
        value, error = None, raised
    return Outcome(value, error, time.perf_counter_ns() - submitted_ns)


def _forever(name: str, values_ms: Iterable[float]) -> Iterator[int]:
    values = [float(value) for value in values_ms]
    if not values:
        raise ValueError(f"{name} must be at least one number of milliseconds")
    for value in values:
        check_range("[0, inf)", **{name: value})
    return itertools.cycle([round(value * NS_PER_MS) for value in values])
