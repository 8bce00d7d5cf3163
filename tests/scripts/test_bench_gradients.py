"""`python scripts/bench.py gradients`: equal gradients, and counts that are right. Nothing is
timed."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benches import reward_gradients
from benches import sampling as bench
from benches.reward_gradients import Case, LiveBytes, difference, gradients, peaks, run
from diffpolicy.settings import ConfigError

SMALL = Case(length=9, width=8, batch=3, steps=5, relaxed=2)


@pytest.mark.parametrize(
    "case", [SMALL, Case(length=12, vocab_size=3, width=8, batch=4, steps=4, relaxed=4)]
)
def test_all_variants_compute_the_same_gradient(case):
    sides = gradients(case)
    wanted = sides["straightforward"]()
    for name in ("fast", "lean"):
        found = sides[name]()
        assert len(found) == len(wanted)
        assert difference(found, wanted) < 1e-5
    assert any(g.abs().max() > 1e-4 for g in wanted)


def test_the_difference_is_relative_to_each_tensor():
    a, b = torch.tensor([1.0, 100.0]), torch.tensor([1e-3, 2e-3])
    assert difference([a, b], [a, b]) == 0
    assert difference([a, b + 1e-4], [a, b]) == pytest.approx(0.05, rel=1e-3)


def test_live_bytes_are_those_of_storages_that_live():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        assert live.now == 4000
        b = a[:500].view(5, 100) + 1  # a view makes no storage, the sum does
        assert live.now == 6000
        a.add_(1)
        del a
        assert live.now == 2000
        c = b.double()
        assert live.now == 6000
        del b, c
    assert (live.now, live.peak) == (0, 6000)


def test_live_bytes_count_graphs_and_backward():
    x = torch.zeros(1000, requires_grad=True)
    with LiveBytes() as live:
        y = x
        for _ in range(10):
            y = y.exp()
        assert live.now >= 40_000
        y.sum().backward()
        kept = live.peak
        del y
        assert live.now == 4000  # the gradient
    assert kept < 60_000


def test_checkpointing_needs_less_memory():
    case = Case(length=20, width=16, batch=8, steps=6, relaxed=6)
    found = {name: peaks(name, case)["tensors"] for name in ("straightforward", "fast", "lean")}
    assert found["fast"] < 0.8 * found["straightforward"]
    assert found["lean"] < 0.5 * found["fast"]


@pytest.mark.skipif(sys.platform != "linux", reason="resident sets are read from /proc")
def test_the_command_measures_prints_and_writes(tmp_path, capsys, monkeypatch):
    apart = []

    def here(variant, case):
        apart.append(variant)
        return peaks(variant, case)

    monkeypatch.setattr(reward_gradients, "measured_apart", here)
    file = tmp_path / "bench" / "f.json"
    small = ["length=9", "width=8", "batch=2", "steps=3", "relaxed=2", "rounds=2"]
    assert bench.run(["gradients", *small, f"json={file}"]) == 0
    assert apart == ["straightforward", "fast", "lean"]
    shown = capsys.readouterr().out
    assert "| lean |" in shown
    assert "target: fast >= 2 x" in shown
    report = json.loads(file.read_text())
    assert report["case"]["steps"] == 3
    assert max(report["gradient_difference"].values()) <= 1e-5
    for figures in ("straightforward_over", "straightforward_over_cpu", "less_memory"):
        assert set(report[figures]) == {"fast", "lean"}
    assert report["peak_mb"]["lean"]["process"] is not None
    assert report["machine"]["threads"] == 1


def test_a_process_of_its_own_reports_its_peaks():
    found = reward_gradients.measured_apart("lean", SMALL)
    assert found["tensors"] > 0
    with pytest.raises(RuntimeError, match="memory of 'quick' failed"):
        reward_gradients.measured_apart("quick", SMALL)


def test_different_gradients_are_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(reward_gradients, "difference", lambda a, b: 0.1)
    monkeypatch.setattr(reward_gradients, "measured_apart", lambda v, c: peaks(v, SMALL))
    assert run(["length=9", "width=8", "batch=2", "steps=3", "relaxed=2", "rounds=1"]) == 1
    assert "not equal" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("relaxed=40", "relaxed=40 is more than the steps=32"),
        ("batch=0", "batch must be a whole number"),
        ("rounds=1.5", "rounds must be a whole number"),
        ("kl_weight=0", "kl_weight must be above 0"),
        ("stepz=3", "did you mean 'steps'"),
    ],
)
def test_bad_options(argument, message):
    with pytest.raises(ConfigError, match=message):
        run([argument])


def test_help_tells_of_it():
    assert "python scripts/bench.py gradients" in bench.help_text()
    assert "relaxed=12" in bench.help_text()
