"""The table of D4RL scores: a whole run at toy size, its resumption and its failures."""

import json
import signal

import pytest
import torch

from diffpolicy.settings import ConfigError
from reproduce import (
    cells as reproduce_cells,
)
from reproduce import (
    datasets as reproduce_data,
)
from reproduce import (
    running as reproduce_run,
)
from reproduce import (
    table_of_cells as reproduce,
)
from reproduce.cells import ALGORITHMS, LOCOMOTION, Reproduction, plan, state_of

HOPPER = "hopper-medium-expert-v2"


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_datasets(tmp_path_factory, monkeypatch):
    """No D4RL files, whatever this machine has, and a working directory without stores."""
    empty = tmp_path_factory.mktemp("empty")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(empty))
    monkeypatch.chdir(empty)


def trained(monkeypatch):
    """Cells that were trained, in order; nothing else changes."""
    seen, real = [], reproduce_run.run_cell
    monkeypatch.setattr(reproduce_run, "run_cell", lambda c: (seen.append(c.run_dir), real(c))[1])
    return seen


# -- planning ----------------------------------------------------------------------------------


def test_an_id_is_its_experiment_or_made_of_its_environment():
    ours = reproduce_data.resolve(HOPPER)
    assert (ours.d4rl, ours.overrides) == (HOPPER, ("experiment=d4rl_hopper_medium_expert",))
    older = reproduce_data.resolve("hopper-medium-expert-v0")  # the experiment is of version 2
    assert older.d4rl == "hopper-medium-expert-v0"
    assert 'env.id="Hopper-v4"' in older.overrides
    assert reproduce_data.resolve("sb3_hopper_medium_expert").d4rl is None
    assert "SUMO" in reproduce_data.resolve("flow-ring-random-v0").problem
    with pytest.raises(ConfigError, match=r"did you mean [^?]*hopper-medium-v2"):
        reproduce_data.resolve("hoper-medium-v2")


def test_a_generic_id_composes_with_its_environment(tmp_path):
    wanted = Reproduction(("maze2d-umaze-dense-v1",), ("bc",), (3,))
    (cell,) = plan(wanted, tmp_path)
    assert cell.config.env.kwargs == {
        "stop_at_goal": False,
        "simulator_id": "PointMaze_UMazeDense-v3",
    }
    assert cell.config.env.max_episode_steps == 300
    assert cell.config.data.transforms == ["split_goals"]
    assert cell.config.seed == 3
    assert cell.config.run_dir == str(tmp_path / "maze2d-umaze-dense-v1" / "bc" / "3")


def test_planners_get_their_published_settings_and_no_checkpoint_is_chosen(tmp_path):
    wanted = Reproduction(("halfcheetah-medium-v2",), ("decision_diffuser",), (0, 1))
    first, second = plan(wanted, tmp_path)
    policy = first.config.policy
    assert (policy["returns"]["target"], policy["horizon"]) == (1.1, 32)
    assert first.config.sampler["guidance_scale"] == 3.2
    assert first.config.evaluation.val_episodes == 0
    assert first.config.trainer["eval_every"] is None
    assert second.config.seed == 1
    mine = Reproduction(
        ("halfcheetah-medium-v2",), ("diffuser",), (0,), ("policy.value_scale=0.5",)
    )
    assert plan(mine, tmp_path)[0].config.policy["value_scale"] == 0.5


def test_overrides_that_no_cell_takes_are_an_error_and_others_are_reported(tmp_path):
    with pytest.raises(ConfigError, match="speed"):
        plan(Reproduction((HOPPER,), ("bc",), (0,), ("trainer.speed=1",)), tmp_path)
    wanted = Reproduction((HOPPER,), ("bc", "diffuser"), (0,), ("network.width=8",))
    fine, wrong = plan(wanted, tmp_path)
    assert fine.config.network["width"] == 8
    assert wrong.config is None
    assert state_of(wrong)["status"] == "missing"


def test_options():
    wanted, options = reproduce.parse_options(
        [
            f"datasets=[{HOPPER},sb3_hopper_medium_expert]",
            *("algorithms=bc,edp", "seeds=2", "only=[*/bc/*]"),
            *("trainer.steps=10", "output=x.json"),
        ]
    )
    assert wanted.datasets == (HOPPER, "sb3_hopper_medium_expert")
    assert (wanted.algorithms, wanted.seeds, wanted.only) == (("bc", "edp"), (0, 1), ("*/bc/*",))
    assert (wanted.overrides, options["output"]) == (("trainer.steps=10",), "x.json")
    whole, _ = reproduce.parse_options(["seeds=[4]"])
    assert (whole.datasets, whole.algorithms, whole.seeds) == (LOCOMOTION, ALGORITHMS, (4,))
    for wrong, message in (
        (["toy"], "key=value"),
        (["algorithms=bcc"], "unknown algorithm 'bcc'"),
        (["seeds=x"], "how many"),
        (["seeds=0"], "seeds must be at least one"),
        (["jobs=many"], "jobs must be a number"),
        (["jobs=0"], "jobs must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            reproduce.parse_options(wrong)


def test_absolute_paths_are_cut_to_their_last_part():
    said = {"a": ["run=/home/me/x/y.json", "runs/d4rl"], "b": "no file at /tmp/z.hdf5 (mine)"}
    assert reproduce.portable(said) == {
        "a": ["run=y.json", "runs/d4rl"],
        "b": "no file at z.hdf5 (mine)",
    }
    for kept in ("diffpolicy_envs:diffpolicy/PointMaze-v0", "~/.d4rl/datasets", "ms/plan", "1 / 2"):
        assert reproduce.portable(kept) == kept


# -- running -----------------------------------------------------------------------------------


def test_missing_data_are_reported_and_everything_else_goes_on(tmp_path, monkeypatch, capsys):
    seen = trained(monkeypatch)
    names = f"datasets=[{HOPPER},flow-ring-random-v0,sb3_hopper_medium_expert]"
    code = reproduce.main(
        [names, "algorithms=bc", "seeds=1", f"runs={tmp_path}/r", f"output={tmp_path}/o.json"]
    )
    report = json.loads((tmp_path / "o.json").read_text())
    reasons = [cell["reason"] for cell in report["cells"].values()]
    assert (code, seen, report["table"]) == (1, [], [])
    assert {cell["status"] for cell in report["cells"].values()} == {"missing"}
    assert "hopper_medium_expert-v2.hdf5" in reasons[0]
    assert "no maintained simulator" in reasons[1]
    assert "no file at data/hopper_medium_expert.hdf5" in reasons[2]
    assert "You do not need the d4rl package" in capsys.readouterr().out
    assert str(tmp_path) not in (tmp_path / "o.json").read_text()


@pytest.mark.slow
@pytest.mark.mujoco
def test_every_algorithm_at_toy_size_and_a_second_run_reads_what_is_done(
    tmp_path, monkeypatch, capsys
):
    pytest.importorskip("mujoco")
    pytest.importorskip("h5py")
    seen = trained(monkeypatch)
    arguments = ["toy=true", f"runs={tmp_path}/runs", f"output={tmp_path}/out.json"]
    assert reproduce.main(arguments) == 0
    assert len(seen) == len(ALGORITHMS)
    report = json.loads((tmp_path / "out.json").read_text())
    rows = {row["algorithm"]: row for row in report["table"]}
    assert list(rows) == list(ALGORITHMS)
    for row in rows.values():
        assert (row["metric"], row["comparable"], row["steps"]) == ("normalized", False, 4)
        assert row["iqm"]["low"] <= row["iqm"]["value"] <= row["iqm"]["high"]
    assert rows["bc"]["minus_baseline"] is None
    assert rows["edp"]["minus_baseline"]["n"] == 2
    cell = report["cells"][f"{HOPPER}/edp/0"]
    assert cell["episode_seeds"] == [300_000, 300_001]
    assert cell["checkpoint"] == "last"
    assert cell["label"]["env"]["max_episode_steps"] == reproduce_data.TOY_STEPS
    assert str(tmp_path) not in (tmp_path / "out.json").read_text()
    assert "A toy: noise" in capsys.readouterr().out

    # A second run trains what is missing and nothing else.
    (tmp_path / "runs" / HOPPER / "bc" / "0" / "eval.json").unlink()
    assert reproduce.main([*arguments, "algorithms=bc,edp"]) == 0
    assert len(seen) == len(ALGORITHMS) + 1
    again = json.loads((tmp_path / "out.json").read_text())
    assert again["table"][0]["score"] == rows["bc"]["score"]

    # Other settings do not mix with those of the run.
    assert reproduce.main([*arguments, "algorithms=bc,edp", "trainer.lr=0.1"]) == 1
    other = json.loads((tmp_path / "out.json").read_text())["cells"][f"{HOPPER}/bc/0"]
    assert other["status"] == "other settings"
    assert "trainer.lr=0.0003 (now: 0.1)" in other["reason"]
    assert len(seen) == len(ALGORITHMS) + 1


@pytest.mark.mujoco
def test_an_interrupt_keeps_what_is_done_and_only_chooses(tmp_path, monkeypatch):
    pytest.importorskip("mujoco")
    pytest.importorskip("h5py")
    real = reproduce_run.run_cell

    def stopped(config):
        return 128 + signal.SIGINT if "/edp/" in config.run_dir else real(config)

    monkeypatch.setattr(reproduce_run, "run_cell", stopped)
    arguments = ["toy=true", "algorithms=bc,edp,idql", f"runs={tmp_path}", "only=*/bc/0,*/edp/0"]
    assert reproduce.main([*arguments, f"output={tmp_path}/out.json"]) == 130
    cells = json.loads((tmp_path / "out.json").read_text())["cells"]
    assert [cell["status"] for cell in cells.values()] == ["done", "to do", "to do"]

    def broken(config):
        raise ValueError("no such thing")

    monkeypatch.setattr(reproduce_run, "run_cell", broken)
    assert reproduce.main([*arguments, f"output={tmp_path}/out.json"]) == 1
    cells = json.loads((tmp_path / "out.json").read_text())["cells"]
    assert [cell["status"] for cell in cells.values()] == ["done", "failed", "to do"]
    assert cells[f"{HOPPER}/edp/0"]["reason"] == "ValueError: no such thing"


@pytest.mark.slow
@pytest.mark.mujoco
def test_jobs_are_processes_of_their_own(tmp_path):
    pytest.importorskip("mujoco")
    pytest.importorskip("h5py")
    arguments = ["toy=true", "algorithms=bc,edp", "jobs=2", f"runs={tmp_path}"]
    assert reproduce.main([*arguments, f"output={tmp_path}/out.json"]) == 0
    assert "RESULT" in (tmp_path / HOPPER / "edp" / "0" / "log.txt").read_text()


def test_a_cell_whose_episodes_failed_is_not_done(tmp_path):
    wanted = Reproduction((HOPPER,), ("bc",), (0,))
    (cell,) = plan(wanted, tmp_path)
    episode = {"seed": 300_000, "return": None, "error": "it broke"}
    found = reproduce_cells._evaluated(cell, cell.config, written(tmp_path, [episode]))
    assert found == {"status": "interrupted", "reason": "1 of 1 episodes failed: it broke"}


def written(folder, episodes):
    (folder / "eval.json").write_text(json.dumps({"episodes": episodes}))
    return folder
