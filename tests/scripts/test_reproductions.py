"""Published rows by name: the table is true, its commands parse, and a tiny one runs end to end."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest

from diffpolicy.commands import data as data_commands
from diffpolicy.config import load_eval, load_run
from diffpolicy.rollout.intervals import mean_interval, wilson_interval
from diffpolicy.settings import ConfigError
from reproduce import steps, studies
from reproduce.figures import figure_at, tolerance_of, values_at
from reproduce.studies import Step, chosen, read_studies, read_study

ROOT = Path(__file__).parents[2]
OURS = read_studies()
PAGE = (ROOT / "docs" / "results.md").read_text()


def script():
    """scripts/reproduce.py; the package beside it has the same name."""
    spec = importlib.util.spec_from_file_location("reproduce_rows", ROOT / "scripts/reproduce.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------- figures


def test_a_path_stands_for_all_that_match():
    tree = {"cells": {"a|x": {"scores": [1, 0]}, "b|x": {"scores": [1, 1]}, "a|y": {"n": None}}}
    assert values_at(tree, ["cells", "*|x", "scores", "*"]) == {"a|x": [1, 0], "b|x": [1, 1]}
    assert figure_at(tree, ["cells", "*|x", "scores", "*"]) == 0.75
    rows = [{"m": "dpo", "w": 0.1, "p": 3}, {"m": "dpo", "w": 0.1, "p": 4}, {"m": "bc", "p": 9}]
    assert values_at(rows, [{"m": "dpo", "w": "0.1"}, "p"]) == {"0": [3], "1": [4]}
    assert figure_at([*rows, {"m": "dpo", "w": 0.1, "p": 8}], [{"m": "dpo"}, "p"], "median") == 4
    for path in (["cells", "*|z", "scores"], ["cells", "a|y", "n"], ["rows"], ["cells", "a|x"]):
        with pytest.raises(LookupError, match="nothing at"):
            figure_at(tree, path)


def test_tolerances_are_intervals_of_differences():
    wilson = wilson_interval(3, 4)
    one_run = math.sqrt(2) * (wilson.value - wilson.low)
    tree = {"a": [1, 0], "b": [1, 1]}
    assert tolerance_of({"rate": 4}, 0.75, None, []) == pytest.approx(one_run)
    # Two seeds with means 0.5 and 1: 4.303 (Student, two degrees) times sd 0.354 times sqrt(2/2).
    spread = 4.302653 * 0.3535534
    assert tolerance_of("seeds", 0.75, tree, ["*", "*"]) == pytest.approx(spread)
    assert tolerance_of("episodes", 0.75, tree, ["*", "*"]) == pytest.approx(max(spread, one_run))
    values = [0.2, 0.4, 0.9]
    mean = mean_interval(values)
    alone = tolerance_of("episodes", mean.value, {"x": values}, ["x", "*"])
    assert alone == pytest.approx(math.sqrt(2) * (mean.high - mean.value))
    known = {"value": 1.0, "low": 0.9, "high": 1.0}
    assert tolerance_of("interval", 1.0, known, ["value"]) == pytest.approx(math.sqrt(2) * 0.1)
    assert tolerance_of({"relative": 0.5}, -3.0, None, []) == 1.5
    assert tolerance_of(0.2, 1.0, None, []) == 0.2
    with pytest.raises(ConfigError, match="seeds"):
        tolerance_of("seeds", 1.0, {"x": 0.5}, ["x"])
    with pytest.raises(ConfigError, match="'guess' is no rule"):
        tolerance_of("guess", 1.0, {}, [])


# ------------------------------------------------------------------------------------ the table


@pytest.mark.parametrize("name", OURS)
def test_recorded_figures_are_those_of_the_files(name):
    study = OURS[name]
    assert f"## {study.section}\n" in PAGE
    tree = study.recorded
    for row, one in study.rows.items():
        assert study.tolerance(row) > 0, row
        if tree is None:
            continue
        found = study.figure_in(tree, row, study.recorded_path(row))
        assert found == pytest.approx(one.recorded, abs=0.5001 * 10**-study.digits), row
    if tree is None:  # docs/results.md alone has them
        for row, one in study.rows.items():
            assert f"{one.recorded:.{study.digits}f}" in PAGE, row


def test_every_file_of_results_has_a_name():
    files = set()
    for study in OURS.values():
        recorded = study.recorded_in
        files |= set(recorded.values() if isinstance(recorded, dict) else [recorded])
    kept = {file.name for file in (ROOT / "docs" / "results").glob("*.json")}
    assert kept == files - {None}


FILES = dict.fromkeys((name for study in OURS.values() for name in study.needs), "some/file.npz")


def every_command():
    """All commands of all studies, those that differ in numbers alone once."""
    seen = {}
    for name, study in OURS.items():
        for step in study.steps:
            words = steps.command_of(step.expanded()[0], study, list(study.rows), FILES)
            seen.setdefault(
                re.sub(r"\d+|umaze|medium|runs/\w+", "", " ".join(words)), (name, words)
            )
    return list(seen.values())


def keys(words):
    return {word.partition("=")[0] for word in words if "=" in word}


def check_script(words):
    """A script exists, and it or its package knows the options."""
    file = ROOT / words[0]
    words = words[1:]
    packages = {"generate": "generators", "eth_ucy": "pedestrians", "bench": "benches"}
    folder = ROOT / "scripts" / packages.get(file.stem, "reproduce")
    text = file.read_text() + "".join(f.read_text() for f in folder.glob("*.py"))
    for key in keys(words):
        assert f'"{key}"' in text or f"{key}=" in text or f"{key}:" in text, (words, key)


def test_every_command_parses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _, words in every_command():
        assert not any("{" in word and "={" not in word for word in words), words
        program, command, *rest = words
        if program == "python":
            check_script([command, *rest])
        elif command == "eval":
            load_eval(rest)
        elif command == "data":
            check_data(rest)
        else:
            load_run(command, rest)


def check_data(words):
    text = data_commands.help_text()
    if words[0] == "prefs":
        from diffpolicy.commands import prefs

        text = prefs.help_text() if hasattr(prefs, "help_text") else text
    for key in keys(words[1:]) - {"obs.image", "obs.agent_pos"}:
        assert f"{key}=" in text, (words, key)


def test_names_choose_rows():
    assert chosen(OURS, "demo") == {"demo": ["success"]}
    assert chosen(OURS, "realtime_fetch/rti3") == {"realtime_fetch": ["rti3"]}
    assert list(chosen(OURS, "planners_*/ddim20")) == ["planners_medium", "planners_umaze"]
    with pytest.raises(ConfigError, match=r"no row 'realtime_fech'; did you mean 'realtime_fetch'"):
        chosen(OURS, "realtime_fech")


def test_a_row_asks_for_its_own_work_alone():
    study = OURS["realtime_fetch"]
    *_, last = study.commands(["rti3", "ddim10"])
    assert steps.command_of(last, study, ["rti3", "ddim10"], {})[-1] == "methods=rti3,ddim10"
    one = [step.run for step in OURS["pusht_state_small"].commands(["seed1"])]
    assert len(one) == 2
    assert "seed=1" in one[1]
    assert len(OURS["pusht_state_small"].commands(["mean"])) == 4


# ----------------------------------------------------------------------------------- a tiny row

TINY = """
section: Pick-and-place, 50 unseen episodes
about: a point that learns to stay near the origin
hours: 0.01
needs:
  extra: {file: extra.txt, about: from nobody}
steps:
  - run: >-
      diffpolicy train env=fetch_reach env.name=point env.id=cli_fake_env:cli_fake/Point-v0
      data=collect data.path=data/point.zarr data.collect.episodes=8 network=mlp network.width=16
      network.depth=1 policy.horizon=4 policy.n_action_steps=2 sampler.num_steps=2 trainer.steps=4
      trainer.batch_size=16 trainer.warmup_steps=1 trainer.eval_every=null trainer.progress=false
      evaluation.val_episodes=0 evaluation.episodes=3 evaluation.num_workers=0 threads=1
      run_dir=runs/tiny_{seed} seed={seed}
    makes: runs/tiny_{seed}/eval.json
    each: {seed: [0, 1]}
    rows: ["*/{seed}"]
results: {"0": runs/tiny_0/eval.json, "1": runs/tiny_1/eval.json}
rows:
  steps/0: {recorded: 10, at: ["{1}", summary, length, value], tolerance: 0.5, why: the step limit}
  wrong/0: {recorded: 7, at: ["{1}", summary, length, value], tolerance: 1, why: it is wrong}
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A table with one tiny study, in a folder of its own."""
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "tiny.yaml").write_text(TINY)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "extra.txt").touch()
    monkeypatch.setattr(studies, "ROWS", rows)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "helpers"))
    monkeypatch.setenv("DIFFPOLICY_TRUST_ENVS", "cli_fake_env")
    return script()


def test_a_tiny_row_from_data_to_verdict(tiny, tmp_path, capfd, monkeypatch):
    assert tiny.run(["tiny", "--dry-run"]) == 0
    shown = capfd.readouterr().out.splitlines()
    assert [line.split()[:2] for line in shown] == [["diffpolicy", "train"]]  # seed 1 has no row
    assert not (tmp_path / "runs").exists()
    assert tiny.run(["tiny", "work=work"]) == 1  # one row is outside
    printed = capfd.readouterr().out
    assert "tiny/steps/0: ours 10.000, recorded 10.000, tolerance 0.500: within" in printed
    assert "tiny/wrong/0: ours 10.000, recorded 7.000, tolerance 1.000: outside" in printed
    kept = json.loads((tmp_path / "work" / "reproduced.json").read_text())
    assert kept["tiny/steps/0"]["within"] is True
    assert kept["tiny/wrong/0"] == {
        "ours": 10.0,
        "recorded": 7.0,
        "tolerance": 1.0,
        "reason": "it is wrong",
        "within": False,
    }
    # Again: what is done is not run, and one row alone is judged by itself.
    monkeypatch.setattr(steps, "run_command", lambda *_: pytest.fail("it was done"))
    assert tiny.run(["tiny/steps/0", "work=work"]) == 0
    assert "# done: diffpolicy train" in capfd.readouterr().out


def test_an_interrupted_training_goes_on(tmp_path):
    words = ["diffpolicy", "train", "experiment=demo", "run_dir=runs/demo"]
    assert steps.going_on(words, tmp_path) == words
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "config.yaml").touch()
    assert steps.going_on(words, tmp_path) == ["diffpolicy", "resume", "runs/demo"]
    other = ["python", "scripts/pad.py", "seeds=1"]
    assert steps.going_on(other, tmp_path) == other


def test_what_is_missing_or_broken_is_said(tiny, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(steps.subprocess, "run", lambda *_, **__: type("D", (), {"returncode": 3}))
    with pytest.raises(
        ConfigError, match=r"diffpolicy train .* ended with status 3.*goes on there"
    ):
        tiny.run(["tiny"])
    (tmp_path / "data" / "extra.txt").unlink()
    with pytest.raises(ConfigError, match=r"needs extra.txt, which is not in .*: from nobody"):
        tiny.run(["tiny"])
    assert tiny.run(["--list"]) == 0
    shown = capfd.readouterr().out
    assert "needs extra.txt: from nobody" in shown
    assert "tiny/wrong/0: 7.000, tolerance 1.000" in shown
    for arguments, message in (
        ([], "name a row"),
        (["tinny"], "did you mean 'tiny'"),
        (["tiny", "wrok=x"], "did you mean 'work'"),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny.run(arguments)
    with pytest.raises(ConfigError, match="check that commit out"):
        steps.reproduce(OURS["pusht_preferences_rollouts"], [], tmp_path, tmp_path)


def test_a_wrong_table_is_refused_at_once(tmp_path):
    file = tmp_path / "mine.yaml"
    for change, message in (
        (("hours", "hour"), r"mine.yaml: unknown key 'hour'; did you mean 'hours'"),
        (("recorded: 7", "record: 7"), r"mine.yaml: unknown key 'rows\.wrong/0\.record'"),
        ((", why: it is wrong", ""), r"say why the tolerance is 1"),
        (("each: {seed", "each: seed: {"), "mine.yaml is no YAML"),
    ):
        file.write_text(TINY.replace(*change))
        with pytest.raises(ConfigError, match=message):
            read_study(file)


def test_every_combination_is_a_command():
    step = Step(
        "train seed={s} method={m}", "runs/{m}_{s}", {"m": ["a", "b"], "s": [1, 2]}, ("{m}",)
    )
    found = [(one.run, one.makes, one.rows) for one in step.expanded()]
    assert found[1] == ("train seed=2 method=a", "runs/a_2", ("a",))
    assert len(found) == 4
