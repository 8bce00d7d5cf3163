"""Tables of tasks, evaluations paired task by task, and the page of an evaluation."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from tasks_fake_env import TASKS

from diffpolicy import DiffusionPolicy, cli
from diffpolicy.data.store import EpisodeStore
from diffpolicy.report import page as pages
from diffpolicy.report.page import write_page
from diffpolicy.report.tasks import compare_evaluations, task_table
from diffpolicy.rollout.intervals import mean_over, paired_difference, wilson_interval
from diffpolicy.rollout.results import EpisodeRecord, EpisodeVideo, EvalResult, summarise

GROUPS = {"easy": ["a", "b"], "hard": ["c", "d"]}


def evaluation(successes, *, env="Fake-v0", first=300_000, errors=(), tasks="abc", **env_more):
    """Episodes whose task is their seed's place in ``tasks``; the return is ten times the place."""
    records = tuple(
        EpisodeRecord(first + i, task=tasks[i % len(tasks)] if tasks else None, error="broke")
        if i in errors
        else EpisodeRecord(
            first + i, 10.0 * i, 1.0, 5, won, won, False, True, task=tasks[i % len(tasks)] or None
        )
        for i, won in enumerate(successes)
    )
    labels = {"id": env, "kwargs": {}, "max_episode_steps": 5, "task_groups": GROUPS, **env_more}
    return EvalResult(records, summarise(records, task_groups=GROUPS), env=labels, settings={})


A = [True, False, False, True, False, False]
B = [True, True, False, True, True, True]


def saved(folder, **results):
    return [str(result.save(folder / f"{name}.json")) for name, result in results.items()]


def rows_of(report):
    return {
        row["task"]: row for row in json.loads((report.parent / "report.json").read_text())["rows"]
    }


def test_the_table_has_a_line_per_task_then_the_means():
    lines = task_table(evaluation(B, errors=[0]).summary).splitlines()
    assert lines[0] == "| task | episodes | success | final success | max reward | return |"
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]]
    assert names == ["a", "b", "c", "mean of 3 tasks", "mean of easy (2 tasks)",
                     "mean of hard (1 of 2 tasks)"]  # fmt: skip
    assert "| 2 (1 could not be run) | 0.500 [" in lines[2]
    assert "| 2 | 1.000 [0.342, 1.000] |" in lines[3]
    plain = task_table(evaluation(B, tasks=[""]).summary).splitlines()
    assert plain[2].startswith("| all episodes | 6 | 0.833 [")


def test_two_evaluations_are_paired_task_by_task(tmp_path):
    files = saved(tmp_path, plain=evaluation(A), wide=evaluation(B))
    report = compare_evaluations(files, tmp_path / "out")
    rows = rows_of(report)
    assert list(rows) == ["a", "b", "c", "mean of 3 tasks", "mean of easy (2 tasks)",
                          "mean of hard (1 tasks)"]  # fmt: skip
    pairs = {"a": ([1, 1], [1, 1]), "b": ([1, 1], [0, 0]), "c": ([0, 1], [0, 0])}
    differences = {task: paired_difference(b, a) for task, (b, a) in pairs.items()}
    for task, (b, a) in pairs.items():
        scores = [wilson_interval(sum(own), 2).to_dict() for own in (a, b)]
        assert rows[task]["score"] == scores
        assert rows[task]["minus_first"] == [differences[task].to_dict()]
    mean = mean_over(list(differences.values()))
    assert rows["mean of 3 tasks"]["minus_first"] == [mean.to_dict()]
    assert mean.value == pytest.approx(0.5)
    assert "| task | episodes | A | B | B minus A |" in report.read_text()


def test_only_shared_episodes_are_compared(tmp_path):
    files = saved(tmp_path, a=evaluation(A, errors=[3]), b=evaluation(B[:4]))
    rows = rows_of(compare_evaluations(files, tmp_path / "rates"))
    assert [rows[task]["episodes"] for task in "abc"] == [2, 1, 1]  # an error is a failure
    report = compare_evaluations(files, tmp_path / "returns", score="return")
    assert [rows_of(report)[task]["episodes"] for task in "abc"] == [1, 1, 1]  # it has no return
    assert "3 episodes are not in all of them" in report.read_text()


def test_evaluations_without_tasks_are_compared_as_a_whole(tmp_path):
    old = Path(__file__).parents[2] / "docs" / "results"
    files = [old / f"pusht_state_small_seed{seed}.json" for seed in (0, 1)]
    report = compare_evaluations(files, tmp_path / "out", score="max_reward")
    (row,) = rows_of(report).values()
    first, second = (EvalResult.load(file).summary["max_reward"] for file in files)
    assert (row["task"], row["episodes"]) == ("all episodes", 50)
    assert row["score"] == [pytest.approx(first), pytest.approx(second)]
    assert row["minus_first"][0]["value"] == pytest.approx(second["value"] - first["value"])


def test_what_cannot_be_compared_is_refused(tmp_path):
    a, b, other, later, mixed = saved(
        tmp_path,
        a=evaluation(A),
        b=evaluation(B),
        other=evaluation(B, env="Other-v0"),
        later=evaluation(B, first=400_000),
        mixed=evaluation(B, tasks="bca"),
    )
    out = tmp_path / "out"
    for files, message in (
        ([a], "two or more different evaluations"),
        ([a, a], "two or more different evaluations"),
        ([a, other], "evaluations of one environment"),
        ([a, later], "share no episode"),
        ([a, mixed], "seed 300000 is an episode of a and of b"),
    ):
        with pytest.raises(ValueError, match=message):
            compare_evaluations(files, out)
    with pytest.raises(ValueError, match=r"unknown score 'sucess'.*did you mean 'success'"):
        compare_evaluations([a, b], out, score="sucess")
    assert not out.exists()


def test_what_else_differs_is_said(tmp_path):
    files = saved(tmp_path, a=evaluation(A), b=evaluation(B, kwargs={"size": 3}))
    assert "differ in the environment's kwargs" in (
        compare_evaluations(files, tmp_path / "out").read_text()
    )


# ------------------------------------------------------------------------------------ the page


class Links(HTMLParser):
    """What a page asks for, and which elements it has."""

    def __init__(self, text):
        super().__init__()
        self.links, self.tags = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]


def with_videos(result):
    frames = np.zeros((3, 16, 16, 3), np.uint8)
    films = tuple(EpisodeVideo(r.seed, r.success, frames) for r in result.episodes[:4])
    return EvalResult(result.episodes, result.summary, result.env, {}, films, ("said <b>so</b>",))


def test_a_page_has_a_clip_of_every_task_and_no_script(tmp_path):
    pytest.importorskip("imageio_ffmpeg", reason="needs the media extra")
    result = with_videos(evaluation(B, tasks=("<script>alert(1)</script>", "../b", "c")))
    file, notes = write_page(tmp_path, result, title="A & B")
    found = Links(text := file.read_text())
    assert notes == ()
    assert found.links == ["clips/00_script-alert-1-script.mp4", "clips/01_b.mp4", "clips/02_c.mp4"]
    assert all((tmp_path / link).stat().st_size > 0 for link in found.links)
    assert "script" not in found.tags
    assert "b" not in found.tags
    for shown in ("A &amp; B", "&lt;script&gt;alert(1)", "said &lt;b&gt;so", "mean of 3 tasks"):
        assert shown in text
    assert not re.search(r"https?://", text)


@pytest.mark.parametrize("fault", ["missing", "raises"])
def test_a_page_without_clips_has_the_tables_and_says_why(tmp_path, monkeypatch, fault):
    result = with_videos(evaluation(B))
    if fault == "missing":
        monkeypatch.setattr(pages, "can_film", lambda: False)
        result = EvalResult(result.episodes, result.summary, result.env, {})
        expected = 'pip install "diffpolicy[media]"'
    else:
        monkeypatch.setattr(pages, "write_mp4", lambda *_, **__: 1 / 0)
        expected = "no clips: division by zero"
    file, notes = write_page(tmp_path, result, title="x")
    assert expected in notes[0]
    assert "no clip of a, b, c" in notes[1]
    assert "mean of easy" in file.read_text()
    assert "<video" not in file.read_text()


# -------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory of an untrained policy for an environment of three tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    arrays = {name: rng.uniform(-1, 1, (40, n)).astype(np.float32) for name, n in
              (("obs", 3), ("action", 2))}  # fmt: skip
    store = EpisodeStore.from_arrays(arrays, [20, 40], path=folder / "demos.zarr")
    spec = {"horizon": 4, "n_action_steps": 2, "network": {"type": "mlp", "width": 8, "depth": 1}}
    spec |= {"sampler": {"num_steps": 1}, "env_id": "tasks_fake_env:tasks_fake/Many-v0"}
    DiffusionPolicy.from_dataset(store, spec=spec).save(folder / "run" / "policy")
    return str(folder / "run")


def test_eval_prints_the_table_writes_the_page_and_compares(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DIFFPOLICY_TRUST_ENVS", "tasks_fake_env")
    both = [str(tmp_path / name) for name in "ab"]
    common = ["evaluation.episodes=6", "evaluation.num_workers=0"]
    assert cli.main(["eval", run, *common, f"output={both[0]}", "report=true"]) == 0
    printed = capsys.readouterr().out
    # 300000 is a multiple of three: two episodes of each task, push in one odd seed.
    assert "| push <hard> | 2 | 0.500 [" in printed
    assert "| mean of 3 tasks | 6 | 0.500 [" in printed
    said = json.loads(printed.strip().splitlines()[-1].removeprefix("RESULT "))
    assert (said["tasks"], said["success_over_tasks"]) == (3, 0.5)
    page = Path(both[0], "report.html").read_text()
    assert "door|open" in page
    assert cli.main(["eval", run, *common, f"output={both[1]}"]) == 0
    assert not Path(both[1], "report.html").exists()
    capsys.readouterr()
    assert cli.main(["eval", "compare", *both, f"output={tmp_path / 'out'}"]) == 0
    assert f"| {TASKS[0]} | 2 | 1.000 [" in capsys.readouterr().out
    assert cli.main(["eval", "compare", both[0], f"output={tmp_path / 'out'}"]) == 1
    assert "usage: diffpolicy eval compare RUN RUN" in capsys.readouterr().err
