"""Reports on tuned policies: paired differences, by hand."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

import diffpolicy
from diffpolicy.report.compare import compare_tunings
from diffpolicy.report.tables import read_report
from diffpolicy.report.tuning import FORMAT, episode_scores, without_failures, write_tuning_report
from diffpolicy.rollout.intervals import paired_difference
from diffpolicy.rollout.results import EpisodeRecord, EvalResult, summarise


def result_of(scores, error_at=None):
    records = tuple(
        EpisodeRecord(
            seed=300_000 + i,
            episode_return=10 * value,
            max_reward=value,
            length=20,
            success=value > 0.5,
            final_success=value > 0.5,
            terminated=False,
            truncated=True,
            nfe=10,
            plans=1,
            error="it broke" if i == error_at else None,
        )
        for i, value in enumerate(scores)
    )
    return EvalResult(records, summarise(records), env={}, settings={})


def report_of(folder, method, seed, before, after):
    scores = {"before": {"4": result_of(before)}, "after": {"4": result_of(after)}}
    return write_tuning_report(
        folder,
        method=method,
        task="push",
        seed=seed,
        score="max_reward",
        scores=scores,
        training={"rounds": [{"steps": 7}], "train_s": 3.0},
        settings={},
    )


@pytest.fixture
def scores():
    rng = np.random.default_rng(0)
    return {name: rng.random(12) for name in ("base_1", "base_2", "a_1", "a_2", "b_1", "b_2")}


def test_a_report_pairs_episodes(tmp_path, scores):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.csv").write_text("step,loss,accuracy\n1,0.7,0.5\n2,0.6,0.7\n")
    report = report_of(folder, "dpo", 1, scores["base_1"], scores["a_1"])
    expected = paired_difference(scores["a_1"], scores["base_1"])
    assert report["difference"]["4"]["value"] == pytest.approx(expected.value)
    assert report["difference"]["4"]["low"] == pytest.approx(expected.low)
    assert read_report(folder, FORMAT) == report
    assert report["pictures"] == ["curves.png", "score_by_nfe.png"]
    assert all((folder / name).is_file() for name in report["pictures"])


def test_methods_are_compared_seed_by_seed(tmp_path, scores):
    runs = []
    for method in ("a", "b"):
        for seed in (1, 2):
            folder = tmp_path / f"{method}_{seed}"
            folder.mkdir()
            after = scores[f"{method}_{seed}"]
            report_of(folder, method, seed, scores[f"base_{seed}"], after)
            runs.append(folder)
    text = compare_tunings(runs, tmp_path / "out", baseline="a").read_text()
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["before", "a", "b"]
    a, b = (np.concatenate([scores[f"{m}_{s}"] for s in (1, 2)]) for m in "ab")
    expected = paired_difference(b, a)
    assert rows[2]["minus_baseline"]["4"]["value"] == pytest.approx(expected.value)
    assert f"{expected.value:+.3f}" in text
    assert rows[0]["score"]["4"]["n"] == 24
    assert rows[1]["updates"] == 7
    without = compare_tunings(runs[:2], tmp_path / "alone", baseline="c").read_text()
    assert "| a | 2 | 7 |" in without


def test_episodes_that_failed_have_no_score(scores):
    found = episode_scores(result_of([0.4, 0.9], error_at=1), "max_reward")
    assert found[0] == 0.4
    assert np.isnan(found[1])
    assert episode_scores(result_of([0.4, 0.9]), "return") == pytest.approx([4.0, 9.0])
    with pytest.raises(ValueError, match="no 'coverage'"):
        episode_scores(result_of([0.4]), "coverage")


def test_a_failed_episode_has_the_worst_score_of_the_report(tmp_path):
    """Returns below 0: nothing (0) would be the best of all."""
    scores = {
        "before": {"4": result_of([-0.4, -0.9, -0.1], error_at=0)},
        "after": {"4": result_of([-0.2, -0.3, -0.8], error_at=2)},
    }
    report = write_tuning_report(
        tmp_path,
        method="a",
        task="swing",
        seed=0,
        score="return",
        scores=scores,
        training={"rounds": [], "train_s": 1.0},
        settings={},
    )
    assert report["episodes"]["before"]["4"] == pytest.approx([-9, -9, -1])
    assert report["episodes"]["after"]["4"] == pytest.approx([-2, -3, -9])
    assert report["failed"] == {"before": {"4": 1}, "after": {"4": 1}}
    assert "2 episodes could not be run" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("score", "own", "expected"),
    [
        ("success", [1.0, np.nan], [1.0, 0.0]),
        ("final_success", [1.0, np.nan], [1.0, 0.0]),
        ("return", [np.nan, np.nan], [0.0, 0.0]),
        ("return", [3.0, np.nan], [3.0, 2.0]),
    ],
)
def test_failures_by_score(score, own, expected):
    other = own if np.isnan(own).all() else [2.0, 5.0]
    values = {"before": {"1": other}, "after": {"1": own}}
    assert without_failures(values, score)["after"]["1"] == expected


def test_a_report_says_what_it_was_made_with(tmp_path, scores):
    before, after = (
        replace(
            result_of(scores[name]),
            env={"id": "Push", "versions": {"numpy": "2"}},
            settings={"machine": {"cpus": 2}},
        )
        for name in ("base_1", "a_1")
    )
    report = write_tuning_report(
        tmp_path,
        method="a",
        task="push",
        seed=0,
        score="return",
        scores={"before": {"4": before}, "after": {"4": after}},
        training={"rounds": [], "train_s": 1.0, "wall_s": 9.0},
        settings={},
    )
    made = report["made_with"]
    assert made["command"] == sys.argv
    assert made["diffpolicy"] == diffpolicy.__version__
    assert made["env"]["versions"] == {"numpy": "2"}
    assert made["machine"] == {"cpus": 2}
    assert report["training"]["wall_s"] == 9.0
    assert report["evaluation"]["after"]["4"]["nfe_per_plan"] == 10


def test_what_all_runs_have_is_compared(tmp_path, scores):
    """More episodes of one run are left out, so that differences stay paired."""
    for name, count in (("a", 20), ("b", 5)):
        (tmp_path / name).mkdir()
        whole, after = scores["base_1"][:count], scores[f"{name}_1"][:count]
        report_of(tmp_path / name, name, 1, whole, after)
    path = compare_tunings([tmp_path / "a", tmp_path / "b"], tmp_path / "out", baseline="a")
    found = json.loads(path.with_suffix(".json").read_text())
    assert found["episodes"] == 5
    rows = {row["method"]: row for row in found["rows"]}
    nfe = next(iter(rows["b"]["score"]))
    wanted = (scores["b_1"][:5] - scores["a_1"][:5]).mean()
    assert rows["b"]["minus_baseline"][nfe]["value"] == pytest.approx(wanted)
    assert rows["a"]["score"][nfe]["value"] == pytest.approx(scores["a_1"][:5].mean())


def test_what_cannot_be_compared_is_said(tmp_path, scores):
    folder = tmp_path / "run"
    folder.mkdir()
    report_of(folder, "a", 1, scores["base_1"], scores["a_1"])
    with pytest.raises(ValueError, match="two reports are of 'a' with seed 1"):
        compare_tunings([folder, folder], tmp_path / "out")
    other = tmp_path / "other"
    other.mkdir()
    report_of(other, "b", 1, scores["base_1"][:5], scores["b_1"][:5])
    whole = json.loads((folder / "report.json").read_text())
    for name, changes, message in (
        ("seeds", {"seeds": [seed + 1000 for seed in whole["seeds"]]}, "these share none"),
        (
            "nfe",
            {"before": {"1": whole["before"]["4"]}},
            r"'a' has nfe=\[4\] and 'c' has nfe=\[1\]",
        ),
        ("unscored", {"before": {}, "after": {}, "seeds": []}, "was not scored"),
    ):
        changed = tmp_path / f"{name}.json"
        changed.write_text(json.dumps({**whole, **changes, "method": "c"}))
        with pytest.raises(ValueError, match=message):
            compare_tunings([folder, changed], tmp_path / "out")
    with pytest.raises(ValueError, match=r"was not scored \(evaluation.episodes=0\)"):
        compare_tunings([changed], tmp_path / "out")
    with pytest.raises(ValueError, match="no reports"):
        compare_tunings([], tmp_path / "out")
    with pytest.raises(ValueError, match="no report at"):
        read_report(tmp_path, FORMAT)
