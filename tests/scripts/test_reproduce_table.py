"""Intervals over seeds and episodes, facts of the data, and the rows of the table."""

import sys
from types import ModuleType

import numpy as np
import pytest
from scipy.stats import trim_mean

from diffpolicy.data.d4rl.catalogue import DATASETS
from diffpolicy.data.store import EpisodeStore
from reproduce import intervals
from reproduce.datasets import Dataset, best_episodes, facts_of, settings_of
from reproduce.table import aggregates_of, published_scores, rows_of, text


def test_iqm_is_the_one_of_single_samples():
    values = np.random.default_rng(0).normal(size=(5, 11))
    expected = trim_mean(values, 0.25, axis=1)
    assert intervals.iqm_of(values) == pytest.approx(expected)


def test_the_crossed_bootstrap_of_constants_and_of_two_seeds_is_known():
    flat = intervals.crossed_bootstrap(np.full((3, 7), 2.5), intervals.iqm_of)
    assert (flat.value, flat.low, flat.high, flat.n) == (2.5, 2.5, 2.5, 21)
    # Episodes alike, seeds 0 and 1: means are 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4.
    seeds = intervals.crossed_bootstrap(np.repeat([[0.0], [1.0]], 7, axis=1))
    assert (seeds.value, seeds.low, seeds.high) == (0.5, 0.0, 1.0)
    # Seeds alike: resampling whole episodes does not shrink with more seeds.
    episodes = np.random.default_rng(0).normal(size=40)
    means = np.random.default_rng(1).choice(episodes, (10_000, 40)).mean(axis=1)
    many = intervals.crossed_bootstrap(np.tile(episodes, (5, 1)))
    assert (many.low, many.high) == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.03)


def test_the_crossed_bootstrap_covers_the_true_mean():
    """Normal effects of seed, episode and both; it must not cover much less than 95 %."""
    rng, hits = np.random.default_rng(1), 0
    for _ in range(200):
        scores = rng.normal(size=(10, 1)) + rng.normal(size=(1, 20)) + rng.normal(size=(10, 20))
        found = intervals.crossed_bootstrap(scores, resamples=300)
        hits += found.low <= 0 <= found.high
    assert hits / 200 > 0.87  # percentile intervals of ten seeds are a little short


def test_rliable_is_used_where_it_is_installed(monkeypatch):
    scores = np.array([[1.0, 10.0], [3.0, 30.0]])
    monkeypatch.setitem(sys.modules, "rliable", None)
    monkeypatch.setitem(sys.modules, "rliable.library", None)
    own, program = intervals.iqm_over_datasets(scores)
    assert own.value == 6.5  # (3 + 10) / 2
    assert 1.0 <= own.low < own.value < own.high <= 30.0
    assert "not installed" in program

    library, metrics = ModuleType("rliable.library"), ModuleType("rliable.metrics")
    metrics.aggregate_iqm = lambda x: intervals.iqm_of(x.reshape(-1))

    def get_interval_estimates(scores, statistic, reps):
        value = statistic(scores["method"])
        return {"method": value}, {"method": np.stack([value - 1, value + 1])}

    library.get_interval_estimates = get_interval_estimates
    monkeypatch.setitem(sys.modules, "rliable", ModuleType("rliable"))
    monkeypatch.setitem(sys.modules, "rliable.library", library)
    monkeypatch.setitem(sys.modules, "rliable.metrics", metrics)
    found, program = intervals.iqm_over_datasets(scores)
    assert (found.value, found.low, found.high, program) == (6.5, 5.5, 7.5, "rliable")

    def broken(name):
        raise TypeError("a dependency's")

    monkeypatch.setattr(intervals.importlib, "import_module", broken)
    assert intervals.iqm_over_datasets(scores) == (
        own,
        "diffpolicy (rliable does not import: TypeError)",
    )


def test_facts_are_of_untransformed_rewards_and_whole_episodes(tmp_path):
    reward = np.array([1, 1, 5, 5, 6, 6, 99], np.float32)
    arrays = {"obs": np.zeros((7, 2)), "action": np.zeros((7, 1)), "reward": 0.5 * reward - 1}
    specs = {"obs": (2,), "action": (1,), "reward": ()}
    attrs = {"reward_scale": 0.5, "reward_shift": -1.0}
    store = EpisodeStore.create(tmp_path / "x.zarr", specs, attrs=attrs)
    store.extend(arrays, [2, 4, 6, 7], [{}, {}, {}, {"partial": True}])
    facts = facts_of(Dataset("some_medium_expert", None, ()), store)
    assert (facts["episodes"], facts["mean_return"]) == (3, 8.0)
    assert facts["expert_return"] == 11.0  # above (2 + 12) / 2
    sources = [{"file": "a.npz", "return_mean": 2.0}, {"file": "b.npz", "return_mean": 9.5}]
    store.update_attrs({"metadata": {"sources": sources}})
    named = facts_of(Dataset("some_medium_expert", None, ()), store)
    assert (named["expert_return"], named["expert_rule"]) == (9.5, "the episodes of b.npz")
    best, rule = best_episodes(np.array([1.0, 2.0, 3.0, 100.0]), "hopper-medium-v2")
    assert (best.tolist(), rule) == ([3.0, 100.0], "the better half of the episodes")
    assert facts_of(Dataset("x", "hopper-medium-v2", ()), None)["mean_return"] is None


def test_published_figures_are_of_known_datasets_and_name_their_source():
    figures = published_scores()
    assert figures["hopper-medium-expert-v2", "diffuser"].score == 103.3
    assert figures["halfcheetah-medium-replay-v2", "idql"].score == 45.9
    assert {dataset for dataset, _ in figures} <= set(DATASETS)
    assert all(figure.source for figure in figures.values())
    # No figure that could not be checked: these algorithms have none.
    assert {a for _, a in figures} == {"bc", "diffuser", "diffusion_ql", "idql"}
    assert settings_of("hopper-medium-v2", "diffuser")["policy.value_scale"] == 0.3
    assert settings_of("maze2d_umaze", "diffuser") == {}


def cell(dataset, algorithm, seed, scores, **changes):
    return {
        "dataset": dataset,
        "algorithm": algorithm,
        "seed": seed,
        "status": "done",
        "metric": "normalized",
        "scores": scores,
        "returns": [10 * s for s in scores],
        "episode_seeds": list(range(len(scores))),
        "nfe": 5.0,
        "ms_per_plan": 1.0 + seed,
        "candidates": 1,
        "steps": 100,
        "train_s": 60.0,
        "comparable": True,
        **changes,
    }


def table():
    cells = [
        cell(dataset, algorithm, seed, [base + seed, base + seed + 4])
        for dataset, extra in (("hopper-medium-v2", 0), ("walker2d-medium-v2", 100))
        for algorithm, base in (("bc", extra), ("idql", extra + 3))
        for seed in (0, 1)
    ]
    cells.append(cell("hopper-medium-v2", "edp", 0, [5, 5]))
    cells.append(cell("walker2d-medium-v2", "edp", 0, [5, 5], status="failed", reason="broke"))
    states = {f"{c['dataset']}/{c['algorithm']}/{c['seed']}": c for c in cells}
    facts = {
        name: {"d4rl": name, "mean_return": 50.0, "expert_return": -1.0, "label": "X-v4"}
        | {"episodes": 9, "expert_rule": "the best"}
        for name in ("hopper-medium-v2", "walker2d-medium-v2")
    }
    return states, facts, rows_of(states, facts, ("bc", "idql", "edp"), "bc")


def test_rows_hold_means_fractions_and_paired_differences():
    _, _, rows = table()
    bc, idql, edp = rows[:3]
    assert bc["score"] == {"mean": 2.5, "std": pytest.approx(0.5**0.5), "by_seed": [2.0, 3.0]}
    assert (bc["return"], bc["of_data"], bc["of_expert"]) == (25.0, 0.5, None)
    assert (bc["minus_baseline"], bc["ms_per_plan"]) == (None, 1.5)
    difference = {"value": 3.0, "low": 3.0, "high": 3.0, "n": 4, "seeds": [0, 1], "better": True}
    assert idql["minus_baseline"] == difference  # the same episodes: the spread cancels
    assert idql["published"]["score"] == 65.4
    assert edp["minus_baseline"]["seeds"] == [0]
    assert (edp["score"]["std"], edp["published"]) == (None, None)


def test_episodes_of_other_seeds_are_not_paired():
    states = {
        "a": cell("x", "bc", 0, [1, 2]),
        "b": cell("x", "edp", 0, [1, 2], episode_seeds=[5, 6]),
    }
    rows = rows_of(states, {"x": {"d4rl": None}}, ("bc", "edp"), "bc")
    assert rows[1]["minus_baseline"] is None


def test_aggregates_are_of_algorithms_that_have_every_dataset():
    states, facts, rows = table()
    found = aggregates_of(rows, list(facts))
    assert list(found) == ["bc", "idql"]
    assert found["bc"]["mean"] == 52.5
    assert found["idql"]["published"] == pytest.approx((65.4 + 82.5) / 2)
    assert aggregates_of(rows, ["hopper-medium-v2"]) == {}
    report = {"settings": {"baseline": "bc", "toy": False}, "table": rows, "aggregate": found}
    shown = text({**report, "datasets": facts, "cells": states})
    widths = {line.count("|") for line in shown.splitlines() if line.startswith("|")}
    assert len(widths) == 1
    assert "| mean of 2 | idql | 55.5 |" in shown
    assert "walker2d-medium-v2/edp/0: failed: broke" in shown
