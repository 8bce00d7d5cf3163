"""Scores of every task, of groups of tasks, and what they are computed from."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from tasks_fake_env import TASKS

from diffpolicy.rollout.env_spec import EnvSpec, EnvSpecError, describe
from diffpolicy.rollout.evaluate import VideoOptions, evaluate
from diffpolicy.rollout.intervals import mean_interval, mean_over, wilson_interval
from diffpolicy.rollout.pool.supervisor import Workers
from diffpolicy.rollout.record.experts import collect
from diffpolicy.rollout.results import EpisodeRecord, EvalResult, summarise

MANY = EnvSpec("tasks_fake_env:tasks_fake/Many-v0")
GROUPS = {"easy": [TASKS[0], TASKS[1]], "hard": [TASKS[2], "drawer"], "none": ["x"]}


def _run(policy, seeds=range(9), spec=MANY, workers=None, **more):
    workers = Workers(num_envs=3, num_workers=0) if workers is None else workers
    return evaluate(policy, spec, seeds, workers=workers, progress=False, **more)


def test_the_mean_over_tasks_squares_and_adds():
    parts = [wilson_interval(5, 10), wilson_interval(10, 10)]
    both = mean_over(parts)
    below = math.hypot(*(part.value - part.low for part in parts)) / 2
    above = math.hypot(*(part.high - part.value for part in parts)) / 2
    assert both == pytest.approx((0.75, 0.75 - below, 0.75 + above, 20))
    assert mean_over(parts[:1]) == pytest.approx(parts[0])
    assert math.isnan(mean_over([parts[0], mean_interval([1.0])]).low)  # one value has no interval
    # Of equal normal estimates it is the usual interval of a mean of K: narrower by sqrt(K).
    alike = mean_over([mean_interval([1.0, 2.0, 4.0])] * 4)
    single = mean_interval([1.0, 2.0, 4.0])
    assert alike.high - alike.value == pytest.approx((single.high - single.value) / 2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_task_is_counted_exactly(fake_policy, num_workers):
    result = _run(fake_policy, range(12), workers=Workers(num_envs=4, num_workers=num_workers))
    assert [record.task for record in result.episodes] == [TASKS[seed % 3] for seed in range(12)]
    found = result.summary["tasks"]
    assert list(found["tasks"]) == list(TASKS)
    counts = {task: (row["n_episodes"], row["n_errors"]) for task, row in found["tasks"].items()}
    assert counts == dict.fromkeys(TASKS, (4, 0))
    # push is seeds 1, 4, 7, 10: two of them odd.
    rates = [row["success"] for row in found["tasks"].values()]
    assert rates == [wilson_interval(k, 4).to_dict() for k in (4, 2, 0)]
    assert [row["return"]["value"] for row in found["tasks"].values()] == [4, 8, 12]
    assert found["mean"]["n_tasks"] == 3
    assert found["mean"]["success"]["value"] == pytest.approx(0.5)
    assert found["mean"]["return"]["value"] == pytest.approx(8)


def test_groups_are_those_that_the_environment_declares(fake_policy):
    result = _run(fake_policy)
    groups = result.summary["tasks"]["groups"]
    assert list(groups) == ["easy", "hard"]  # nothing was run of the third
    assert (groups["easy"]["n_tasks"], groups["easy"]["missing"]) == (2, [])
    assert groups["easy"]["success"]["value"] == pytest.approx((1 + 2 / 3) / 2)  # of 1, 4 and 7 two
    assert (groups["hard"]["n_tasks"], groups["hard"]["missing"]) == (1, ["drawer"])
    assert groups["hard"]["success"]["value"] == 0
    assert result.env["task_groups"] == GROUPS
    with pytest.raises(EnvSpecError, match=r"metadata\['task_groups'\].*lists of task names"):
        describe(EnvSpec(MANY.id, {"groups": {"easy": "reach"}}))


def test_an_unequal_number_of_episodes_weighs_every_task_the_same():
    def record(seed, task, success):
        return EpisodeRecord(seed, 1.0, 1.0, 5, success, success, False, True, task=task)

    records = [record(0, "a", True), *(record(i, "b", False) for i in range(1, 10))]
    summary = summarise(records)
    assert summary["success"]["value"] == pytest.approx(0.1)
    assert summary["tasks"]["mean"]["success"]["value"] == pytest.approx(0.5)


def test_errors_are_failures_of_their_task(fake_policy):
    with pytest.warns(RuntimeWarning, match="3 of 9 episodes failed"):
        result = _run(fake_policy, spec=EnvSpec(MANY.id, {"broken": [0, 3], "broken_reset": [5]}))
    rows = result.summary["tasks"]["tasks"]
    assert (rows[TASKS[0]]["n_episodes"], rows[TASKS[0]]["n_errors"]) == (3, 2)
    assert rows[TASKS[0]]["success"] == wilson_interval(1, 3).to_dict()
    assert rows[TASKS[0]]["return"]["n"] == 1
    assert rows[TASKS[2]]["n_episodes"] == 2  # seed 5 never said what it was
    assert any("1 episodes failed before they told their task" in note for note in result.notes)
    # A task of errors alone has failed, and has no return; nor has then the mean of all tasks.
    with pytest.warns(RuntimeWarning, match="failed"):
        result = _run(fake_policy, spec=EnvSpec(MANY.id, {"broken": [0, 3, 6]}))
    found = result.summary["tasks"]
    assert found["tasks"][TASKS[0]]["success"]["value"] == 0
    assert found["tasks"][TASKS[0]]["return"]["value"] is None
    assert found["mean"]["return"]["value"] is None
    assert found["mean"]["success"]["value"] == pytest.approx((0 + 2 / 3 + 0) / 3)


def test_one_clip_of_every_task_however_many_rows(fake_policy):
    options = VideoOptions(episodes=0, per_task=1, frames=2)
    plain = _run(fake_policy)
    for rows in (1, 4):
        result = _run(fake_policy, workers=Workers(num_envs=rows, num_workers=0), video=options)
        assert [video.seed for video in result.videos] == [0, 1, 2]
        assert result.videos[0].frames[:, 0, 0, 0].tolist() == [20, 40]  # every second step
        assert result.episodes == plain.episodes
    later = _run(fake_policy, [3, 6, 4, 0, 5], video=VideoOptions(episodes=1, per_task=1))
    assert [video.seed for video in later.videos] == [3, 4, 5]
    with pytest.raises(ValueError, match="per_task must be at least 0"):
        VideoOptions(per_task=-1)


def test_results_come_back_from_their_file(fake_policy, tmp_path):
    with pytest.warns(RuntimeWarning, match="failed"):
        result = _run(fake_policy, spec=EnvSpec(MANY.id, {"broken": [4]}))
    result.save(tmp_path / "run" / "eval")
    read = EvalResult.load(tmp_path / "run")  # as `diffpolicy eval RUN` leaves it
    assert read.episodes[4].error == result.episodes[4].error
    assert [replace(e, error=None) for e in read.episodes if e.seed != 4] == [
        e for e in result.episodes if e.seed != 4
    ]
    assert json.dumps(read.to_dict()) == json.dumps(result.to_dict())


def test_a_file_from_before_there_were_tasks_is_read():
    old = Path(__file__).parents[2] / "docs" / "results" / "pusht_state_small_seed0.json"
    assert "task" not in json.loads(old.read_text())["episodes"][0]
    result = EvalResult.load(old)
    assert {record.task for record in result.episodes} == {None}
    assert summarise(result.episodes)["success"] == result.summary["success"]
    assert "tasks" not in summarise(result.episodes)


def test_what_is_no_evaluation_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no evaluation at"):
        EvalResult.load(tmp_path)
    (tmp_path / "eval.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"eval\.json is no evaluation"):
        EvalResult.load(tmp_path)


def test_demonstrations_keep_their_task(tmp_path):
    workers = Workers(num_envs=2, num_workers=0)
    store = collect(MANY, range(6), tmp_path / "demos.zarr", workers=workers, progress=False)
    tasks = [(attrs["seed"], attrs["task"]) for attrs in store.episode_attrs]
    assert tasks == [(0, TASKS[0]), (1, TASKS[1]), (3, TASKS[0])]
