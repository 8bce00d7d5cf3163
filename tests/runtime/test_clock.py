from __future__ import annotations

import threading

import numpy as np
import pytest

from diffpolicy.runtime.clock import RealClock, VirtualClock
from diffpolicy.runtime.report import LatencyHistogram

MS = 1_000_000


def test_virtual_latencies_are_exact_and_repeat():
    clock = VirtualClock([3.0, 0.0, 1.5])
    runner = clock.runner()
    for latency in (3.0, 0.0, 1.5, 3.0):
        began = clock.now_ns()
        runner.submit(lambda: "plan")
        if latency:
            assert runner.poll() is None
            clock.sleep_until(began + round(latency * MS) - 1)
            assert runner.poll() is None
        clock.sleep_until(began + round(latency * MS))
        outcome = runner.poll()
        assert (outcome.value, outcome.error) == ("plan", None)
        assert outcome.latency_ns == latency * MS
        assert runner.poll() is None  # once


def test_waiting_moves_the_virtual_clock():
    clock = VirtualClock([5.0])
    runner = clock.runner()
    runner.submit(lambda: 1)
    assert runner.poll(2 * MS) is None
    assert clock.now_ns() == 2 * MS
    assert runner.poll(100 * MS).value == 1
    assert clock.now_ns() == 5 * MS


def test_inline_jobs_take_virtual_time():
    clock = VirtualClock(call_ms=[7.0])
    runner = clock.runner()
    assert runner.call(lambda: 2).latency_ns == 7 * MS
    assert clock.now_ns() == 7 * MS
    assert runner.blocked_ns > 0


def test_a_virtual_clock_never_goes_back():
    clock = VirtualClock()
    clock.sleep_until(10)
    clock.sleep_until(5)
    assert clock.now_ns() == 10


@pytest.mark.parametrize("make", [VirtualClock, RealClock])
def test_errors_are_outcomes(make):
    runner = make().runner()

    def broken():
        raise ValueError("no plan")

    runner.submit(broken)
    outcome = runner.poll(10**9)
    assert outcome.value is None
    assert str(outcome.error) == "no plan"
    assert isinstance(runner.call(broken).error, ValueError)
    runner.submit(lambda: 3)  # and the next one is fine
    assert runner.poll(10**9).value == 3
    assert runner.close()


def test_the_thread_survives_an_exit():
    runner = RealClock().runner()

    def leave():
        raise SystemExit(3)

    runner.submit(leave)
    assert isinstance(runner.poll(10**9).error, SystemExit)
    runner.submit(threading.current_thread)
    assert runner.poll(10**9).value.name == "diffpolicy-plan"
    assert runner.close()


def test_a_busy_thread_is_reported_on_closing():
    runner, gate = RealClock().runner(), threading.Event()
    runner.submit(gate.wait)
    assert runner.poll() is None
    assert not runner.close(timeout_s=0.01)
    gate.set()
    assert runner.close()
    with pytest.raises(RuntimeError, match="closed"):
        runner.submit(gate.wait)


def test_closing_an_unused_runner():
    assert RealClock().runner().close()
    assert VirtualClock().runner().close()


def test_the_real_clock_does_not_return_early():
    clock = RealClock(spin_ms=0.1)
    for wait in (0, MS // 2, 3 * MS):
        target = clock.now_ns() + wait
        clock.sleep_until(target)
        assert clock.now_ns() >= target


@pytest.mark.parametrize("bad", [[], [-1.0], [float("nan")], [float("inf")]])
def test_bad_latencies(bad):
    with pytest.raises(ValueError, match="latency_ms must be at least"):
        VirtualClock(bad)
    with pytest.raises(ValueError, match="call_ms must be at least"):
        VirtualClock(call_ms=bad)


def test_bad_spin():
    with pytest.raises(ValueError, match="spin_ms"):
        RealClock(spin_ms=-1)


def test_quantiles_against_numpy():
    values = np.random.default_rng(0).lognormal(np.log(5e6), 1.0, 20_000).astype(np.int64)
    histogram = LatencyHistogram()
    for value in values.tolist():
        histogram.add(value)
    summary = histogram.summary()
    for name, q in (("p50_ms", 50), ("p99_ms", 99), ("p999_ms", 99.9)):
        exact = np.percentile(values, q, method="inverted_cdf") / 1e6
        assert getattr(summary, name) == pytest.approx(exact, rel=0.006)
    assert summary.max_ms == values.max() / 1e6
    assert summary.mean_ms == pytest.approx(values.mean() / 1e6)
    assert sum(count for *_, count in histogram.bars()) == summary.count == len(values)


def test_extreme_latencies():
    histogram = LatencyHistogram()
    assert histogram.summary().count == 0
    for value in (0, 1, 10**18):
        histogram.add(value)
    assert histogram.summary().max_ms == 10**12
    assert histogram.summary().p50_ms == 0
