"""The command line: help, imports, errors, and a whole run with tiny settings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diffpolicy import cli
from diffpolicy.config import load_run, load_train
from diffpolicy.config_compose import (
    compose,
    config_dir,
    experiment_values,
    group_choices,
    read_yaml,
)
from diffpolicy.data.store import EpisodeStore
from diffpolicy.training.identity import ResumeWarning

HEAVY = ("torch", "hydra", "mujoco", "gymnasium", "stable_baselines3", "zarr")


def run(*arguments: str) -> int:
    return cli.main(arguments)


def result_of(output: str) -> dict:
    last = output.strip().splitlines()[-1]
    assert last.startswith("RESULT "), output[-2000:]
    return json.loads(last.removeprefix("RESULT "))


@pytest.mark.parametrize(
    "code", ["from diffpolicy.cli import main; main(['--help'])", "import diffpolicy"]
)
def test_help_and_import_load_nothing_heavy(code):
    probe = f"import sys; {code}; print('LOADED', [m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("LOADED []")


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_explains_itself(command, capsys):
    assert run(command, "--help") == 0
    text = capsys.readouterr().out
    assert f"usage: diffpolicy {command}" in text


def test_help_lists_every_group_choice_with_a_sentence(capsys):
    run("train", "--help")
    run("tune", "--help")
    text = capsys.readouterr().out
    for group, choices in group_choices().items():
        for choice, sentence in choices.items():
            assert sentence, f"{group}/{choice}.yaml has no first comment"
            assert choice in text


def test_unknown_command(capsys):
    assert run("trian") == 2
    assert "unknown command 'trian'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "path", sorted((config_dir() / "experiment").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_experiment_composes(path):
    command = experiment_values(path.stem).get("run", "train").split()[0]
    needed = ["task.kwargs.file=gb1.npz"] if path.stem == "gb1" else []
    config = load_run(command, [f"experiment={path.stem}", *needed])
    assert config.name == path.stem


def test_an_experiment_of_the_other_command_names_it(capsys):
    assert run("train", "experiment=dna_drakes") == 1
    assert "diffpolicy tune experiment=dna_drakes" in capsys.readouterr().err
    assert run("tune", "experiment=demo") == 1
    assert "diffpolicy train experiment=demo" in capsys.readouterr().err


def test_demo_is_fetch_pick_place():
    demo, pick = (load_train([f"experiment={n}"]) for n in ("demo", "fetch_pick_place"))
    demo.name, demo.run_dir = pick.name, pick.run_dir
    assert demo == pick


def test_dashes_are_accepted():
    assert compose("train", ["--policy.horizon=9"])["policy"]["horizon"] == 9


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("experiment=dmo", "unknown experiment 'dmo'.*did you mean 'demo'"),
        ("sampler=unpc", "unknown sampler 'unpc'.*did you mean 'unipc'"),
        ("trainer.stps=3", "trainer.stps"),
        ("polcy.horizon=3", "polcy"),
        ("data=store", "give data.path=STORE, or data.mix="),
        ("evaluation.seed=5", "evaluation seeds start at 100,000"),
        ("evaluation.seed=200010", "test seeds start at 300,000"),
        ("evaluation.val_seed=300000", "validation seeds lie in"),
        ("evaluation.episodes=-3", "evaluation.episodes must be at least 0"),
        ("evaluation.num_envs=0", "evaluation.num_envs must be at least 1"),
    ],
)
def test_bad_overrides(override, message):
    with pytest.raises(ValueError, match=message):
        load_train([override])


TINY = [
    "experiment=pointmaze_umaze",
    "data.collect.episodes=4",
    "trainer.steps=30",
    "trainer.eval_every=15",
    "trainer.batch_size=32",
    "trainer.warmup_steps=5",
    "network.width=32",
    "network.depth=1",
    "evaluation.val_episodes=2",
    "evaluation.episodes=3",
    "evaluation.video_episodes=0",
    "env.max_episode_steps=150",
    "evaluation.num_workers=0",
]


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """One whole run from the environment's expert to the scores."""
    pytest.importorskip("gymnasium_robotics", reason="needs the robotics extra")
    folder = tmp_path_factory.mktemp("cli")
    arguments = [*TINY, f"data.path={folder}/demos.zarr", f"run_dir={folder}/run"]
    done = subprocess.run(
        [sys.executable, "-m", "diffpolicy.cli", "train", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


@pytest.mark.mujoco
def test_train_leaves_a_run_and_a_result(tiny_run):
    folder, output = tiny_run
    result = result_of(output)
    assert result["task"] == "pointmaze_umaze"
    assert result["episodes"] == 3
    assert result["nfe"] == 10
    assert {"success", "ms_per_plan", "train_s", "total_s"} <= set(result)
    for name in (
        "config.yaml",
        "metrics.csv",
        "curve.png",
        "eval.json",
        "checkpoints/last",
        "checkpoints/best",
    ):
        assert (folder / "run" / name).is_file(), name
    assert not (folder / "outputs").exists()


@pytest.mark.mujoco
def test_eval_repeats_the_score_and_takes_another_sampler(tiny_run, capsys):
    folder, output = tiny_run
    common = [f"checkpoint={folder}/run", "evaluation.episodes=3", "evaluation.num_workers=0"]
    assert run("eval", *common) == 0
    again = result_of(capsys.readouterr().out)
    assert again["return"] == result_of(output)["return"]
    assert run("eval", *common, "sampler.solver=heun", "sampler.num_steps=3") == 0
    assert result_of(capsys.readouterr().out)["nfe"] == 5


@pytest.mark.mujoco
def test_a_run_is_not_overwritten_and_a_finished_one_resumes_to_the_same_score(tiny_run, capsys):
    folder, output = tiny_run
    assert run("train", *TINY, f"data.path={folder}/demos.zarr", f"run_dir={folder}/run") == 1
    assert "already holds a run" in capsys.readouterr().err
    config, note = folder / "run" / "config.yaml", folder / "run" / "checkpoints" / "notes.txt"
    note.write_text("mine")
    before = config.read_bytes()
    more = (f"data.path={folder}/demos.zarr", f"run_dir={folder}/run", "overwrite=true")
    assert run("train", *TINY, *more, "trainer.steps=7") == 1
    assert "notes.txt" in capsys.readouterr().err
    assert config.read_bytes() == before  # of the run that is still there
    note.unlink()
    metrics = (folder / "run" / "metrics.csv").read_bytes()
    assert run("resume", f"{folder}/run") == 0
    assert result_of(capsys.readouterr().out)["return"] == result_of(output)["return"]
    assert (folder / "run" / "metrics.csv").read_bytes() == metrics


SHORT = [
    *("env=pointmaze_umaze", "evaluation=none", "network.width=8", "network.depth=1"),
    *("trainer.steps=6", "trainer.batch_size=8", "trainer.progress=false", "threads=1"),
]


def write_numbers(path: Path) -> None:
    """A store of three episodes of noise."""
    rng = np.random.default_rng(0)
    fields = {"obs": rng.uniform(-1, 1, (60, 3)), "action": rng.uniform(-1, 1, (60, 2))}
    fields = {name: rows.astype(np.float32) for name, rows in fields.items()}
    EpisodeStore.from_arrays(fields, [20, 40, 60], path=path)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps on numbers."""
    folder = tmp_path_factory.mktemp("short")
    write_numbers(folder / "demos.zarr")
    where = ["data=store", f"data.path={folder / 'demos.zarr'}", f"run_dir={folder / 'run'}"]
    assert run("train", *where, *SHORT) == 0
    return folder / "run"


@pytest.mark.parametrize("name", ["a=b", "a b", "a,b", "~a", "é{x}", "it's", "[1] (2)"])
def test_paths_may_have_any_characters(name, tmp_path, capsys):
    store, folder = tmp_path / name / "demos.zarr", tmp_path / name / "run"
    store.parent.mkdir()
    write_numbers(store)
    assert run("train", "data=store", f"data.path={store}", f"run_dir={folder}", *SHORT) == 0
    assert read_yaml(folder / "config.yaml")["data"]["path"] == str(store)
    assert run("resume", str(folder)) == 0


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_run("train", ["data=store", "data.path=~/demos.zarr", "run_dir=~/run"])
    assert config.data.path == f"{tmp_path}/demos.zarr"
    assert config.run_dir == f"{tmp_path}/run"


def test_a_sweep_runs_every_combination(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_numbers(tmp_path / "demos.zarr")
    swept = ["seed=0,1", "trainer.lr=1e-3,x", "name=swept"]
    given = ["data=store", f"data.path={tmp_path / 'demos.zarr'}", *SHORT]
    assert run("train", "--multirun", *given, *swept) == 1  # a rate of x is refused
    said = capsys.readouterr()
    assert "trainer.lr must be float" in said.err
    runs = tmp_path / "runs"
    for seed in (0, 1):
        assert read_yaml(runs / f"swept_seed{seed}_lr0.001" / "config.yaml")["seed"] == seed
    assert {p.name for p in runs.iterdir()} == {
        *(f"swept_seed{seed}_lr0.001" for seed in (0, 1)),
        "multirun",
    }


def test_a_run_goes_on_for_longer_and_at_another_rate(short, capsys):
    recorded = (short / "config.yaml").read_bytes()
    with pytest.warns(ResumeWarning) as said:
        assert run("resume", str(short), "trainer.steps=9", "trainer.lr=1e-4") == 0
    text = " ".join(str(warning.message) for warning in said)
    assert "steps=9" in text
    assert "lr=0.0001" in text
    assert "goes on with trainer.steps=9 (it was 6)" in capsys.readouterr().out
    trainer = read_yaml(short / "config.yaml")["trainer"]
    assert (trainer["steps"], trainer["lr"]) == (9, 1e-4)
    assert (short / "checkpoints" / "last").read_text() == "0000009\n"
    kept = (short / "config.yaml").read_bytes()
    assert kept != recorded
    assert run("resume", str(short)) == 0  # which knows, and has nothing to say
    for argument, message in (
        ("trainer.steps=6", "has done 9 steps already"),
        ("trainer.steps=many", "trainer.steps must be int"),
        ("trainer.batch_size=4", "what may is trainer.steps, trainer.lr"),
        ("trainer.step=12", "did you mean 'trainer.steps'"),
        ("policy.horizon=8", "policy.horizon cannot change"),
    ):
        capsys.readouterr()
        assert run("resume", str(short), argument) == 1
        assert message in capsys.readouterr().err
        assert (short / "config.yaml").read_bytes() == kept  # what was refused is not recorded


@pytest.mark.mujoco
def test_data_commands(tiny_run, capsys):
    folder, _ = tiny_run
    store = str(folder / "demos.zarr")
    assert run("data", "info", store) == 0
    assert json.loads(capsys.readouterr().out)
    assert run("data", "check", store) == 0
    assert run("data", "info", str(folder / "nothing")) == 1
    assert "no store at" in capsys.readouterr().err


@pytest.mark.mujoco
@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["env.score=bogus"], "unknown env.score"),
        (["trainer.grad_clip=0"], "grad_clip must be positive"),
        (["sampler.guidance_scale=2"], "needs a policy trained with cond_dropout > 0"),
        (["policy.n_action_steps=20"], "n_action_steps=20 is too large"),
        (["sampler.solver=dimm"], "unknown solver 'dimm'"),
        (["network.widht=3"], "widht"),
        (["env.id=diffpolicy_envs:diffpolicy/PointMazeUmaze-v0"], "PointMazeUMaze-v0"),
        (
            ["env.id=diffpolicy_envs:diffpolicy/FetchReach-v0"],
            "convert or collect the data for this one",
        ),
        (["data.path=nothing_here.zarr"], "no episode store at"),
    ],
)
def test_bad_input_fails_before_training(tiny_run, capsys, tmp_path, extra, message):
    folder, _ = tiny_run
    tiny = [a for a in TINY if not a.startswith("data.")]
    given = [
        *tiny,
        "data.collect=null",
        f"data.path={folder}/demos.zarr",
        f"run_dir={tmp_path}/run",
    ]
    assert run("train", *given, *extra) == 1
    assert message in capsys.readouterr().err
    assert not Path(tmp_path, "run", "checkpoints").exists()


@pytest.mark.mujoco
def test_a_changed_byte_is_refused(tiny_run, capsys, tmp_path):
    import shutil

    folder, _ = tiny_run
    shutil.copytree(folder / "run", tmp_path / "run")
    last = (tmp_path / "run" / "checkpoints" / "best").read_text().strip()
    weights = tmp_path / "run" / "checkpoints" / last / "policy" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    assert (
        run(
            "eval",
            f"checkpoint={tmp_path}/run",
            "evaluation.episodes=1",
            "evaluation.num_workers=0",
        )
        == 1
    )
    assert "model.safetensors" in capsys.readouterr().err


def test_doctor_without_probes(capsys):
    assert run("doctor", "probe=false") in (0, 1)
    assert "torch" in capsys.readouterr().out
