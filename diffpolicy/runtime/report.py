"""What a control loop did: latencies in bounded memory, counts, JSON.

``python scripts/executor_figure.py REPORT.json`` draws the histograms.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

from diffpolicy.files import write_json

_PER_OCTAVE = 128  # buckets per factor of 2: quantiles are exact to 0.6 %
_LOWEST_NS, _OCTAVES = 16.0, 44  # 16 ns .. 78 hours
_SCALE = _PER_OCTAVE / math.log(2)


@dataclass(frozen=True)
class LatencySummary:
    """Quantiles of a latency in milliseconds; all 0 when ``count`` is 0.

    Attributes:
        count: how many were measured.
        mean_ms: their mean.
        p50_ms: median; like the other quantiles exact to 0.6 %.
        p99_ms: 99 % are not above it.
        p999_ms: 99.9 % are not above it.
        max_ms: the longest, exact.
    """

    count: int = 0
    mean_ms: float = 0.0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    p999_ms: float = 0.0
    max_ms: float = 0.0


class LatencyHistogram:
    """Counts of latencies in buckets of equal ratio, so that a loop may run for months."""

    def __init__(self) -> None:
        self._buckets = [0] * (_PER_OCTAVE * _OCTAVES + 1)
        self.count, self._total, self._longest = 0, 0, 0

    def add(self, latency_ns: int) -> None:
        """Count one latency in nanoseconds."""
        self.count += 1
        self._total += latency_ns
        if latency_ns > self._longest:
            self._longest = latency_ns
        if latency_ns <= _LOWEST_NS:
            self._buckets[0] += 1
        else:
            bucket = int(math.log(latency_ns / _LOWEST_NS) * _SCALE)
            self._buckets[min(bucket, _PER_OCTAVE * _OCTAVES)] += 1

    def quantile_ms(self, q: float) -> float:
        """The latency that a fraction ``q`` in [0, 1] of them does not exceed (nearest rank)."""
        rank = max(math.ceil(q * self.count), 1)
        if rank >= self.count:  # the last one is the longest, which is known exactly
            return self._longest / 1e6
        index = bisect_left(list(accumulate(self._buckets)), rank)
        middle = _LOWEST_NS * math.exp((index + 0.5) / _SCALE) if index else 0.0
        return min(middle, self._longest) / 1e6

    def summary(self) -> LatencySummary:
        """Mean, quantiles and maximum."""
        mean = self._total / max(self.count, 1) / 1e6
        p50, p99, p999 = (self.quantile_ms(q) for q in (0.5, 0.99, 0.999))
        return LatencySummary(self.count, mean, p50, p99, p999, self._longest / 1e6)

    def bars(self) -> Iterator[tuple[float, float, int]]:
        """Buckets with anything in them: (from, to, count), milliseconds."""
        for index, number in enumerate(self._buckets):
            if number:
                low = _LOWEST_NS * math.exp(index / _SCALE) / 1e6 if index else 0.0
                yield low, _LOWEST_NS * math.exp((index + 1) / _SCALE) / 1e6, number


Bars = tuple[tuple[float, float, int], ...]


@dataclass(frozen=True)
class ExecutorReport:
    """Counts and latencies of a control loop since its executor was made.

    Attributes:
        rate_hz: ticks per second that were asked for.
        budget_ms: time within which a plan should be there.
        ladder: what is sent while no plan is there, in this order.
        hold_ticks: for how many ticks in a row an action is held, at most.
        ticks: actions given.
        plans: plans that came from the worker, good or not.
        nfe: network evaluations of the good ones and of refinements.
        missed_deadlines: plans that were not there within the budget.
        starved_ticks: ticks for which no plan had an action left.
        late_ticks: ticks that began too late.
        skipped_ticks: ticks that did not take place because the loop had stalled.
        rejected_actions: actions of a plan that were not finite or out of bounds, at their tick.
        rejected_plans: plans that were thrown away because they were not usable.
        stale_plans: plans that were thrown away because all their ticks had passed.
        worker_crashes: plans that raised.
        refinements: one-evaluation plans made within a tick.
        refine_failures: those that raised or were not usable.
        holds_ended: times that an action was held for ``hold_ticks`` ticks and let go, for the next
            rung.
        bad_observations: observations that were not finite or had the wrong shape.
        sources: ticks by where their action came from.
        plan_latency: of plans with a warm start.
        cold_latency: of plans without one.
        refine_latency: of refinements.
        tick_overhead: time within a tick apart from the policy and from waiting for it.
        lateness: how late ticks began.
        warm_up_ms: latencies of the plans made before the loop began, in order.
        errors: the last few messages of what went wrong.
        plan_bars: histogram of ``plan_latency``: (from, to, count), milliseconds.
        overhead_bars: histogram of ``tick_overhead``.
    """

    rate_hz: float
    budget_ms: float
    ladder: tuple[str, ...]
    hold_ticks: int
    ticks: int
    plans: int
    nfe: int
    missed_deadlines: int
    starved_ticks: int
    late_ticks: int
    skipped_ticks: int
    rejected_actions: int
    rejected_plans: int
    stale_plans: int
    worker_crashes: int
    refinements: int
    refine_failures: int
    holds_ended: int
    bad_observations: int
    sources: Mapping[str, int]
    plan_latency: LatencySummary
    cold_latency: LatencySummary
    refine_latency: LatencySummary
    tick_overhead: LatencySummary
    lateness: LatencySummary
    warm_up_ms: tuple[float, ...] = ()
    errors: tuple[str, ...] = ()
    plan_bars: Bars = field(default=(), repr=False)
    overhead_bars: Bars = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)

    def to_json(self, path: str | Path) -> Path:
        """Write the report, all or nothing.

        Returns:
            ``path``.
        """
        return write_json(path, self.to_dict())


class Meter:
    """Counts what happens in a loop, in memory that does not grow.

    Attributes:
        counts: the integers of :class:`ExecutorReport`, by name.
        sources: ticks by where their action came from.
        latencies: the histograms that it summarises, by name.
        warm_up_ms: latencies of the plans made before the loop began.
    """

    def __init__(self, sources: tuple[str, ...]) -> None:
        self.counts: Counter[str] = Counter()
        self.sources = dict.fromkeys(sources, 0)
        names = (f.name for f in fields(ExecutorReport) if f.type == "LatencySummary")
        self.latencies = {name: LatencyHistogram() for name in names}
        self.warm_up_ms: list[float] = []
        self._errors: deque[str] = deque(maxlen=10)

    def failed(self, kind: str, message: str) -> None:
        """Count a failure and keep its message."""
        self.counts[kind] += 1
        self._errors.append(message[:500])

    def report(self, **settings: Any) -> ExecutorReport:
        """Everything so far, under the ``settings`` of the loop."""
        names = [f.name for f in fields(ExecutorReport) if f.type == "int"]
        known: dict[str, Any] = {n: self.counts[n] for n in names if n not in settings}
        known |= {name: histogram.summary() for name, histogram in self.latencies.items()}
        return ExecutorReport(
            **settings,
            **known,
            sources=dict(self.sources),
            warm_up_ms=tuple(self.warm_up_ms),
            errors=tuple(self._errors),
            plan_bars=tuple(self.latencies["plan_latency"].bars()),
            overhead_bars=tuple(self.latencies["tick_overhead"].bars()),
        )
