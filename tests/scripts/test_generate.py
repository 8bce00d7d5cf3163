"""`python scripts/generate.py`: from the command line to files, and answers to bad input."""

import sys
from pathlib import Path

import numpy as np
import pytest

from diffpolicy.cli import guarded
from generators.command import help_text, run

pytest.importorskip("h5py", reason="needs the hdf5 extra")
FAKES = Path(__file__).parents[1] / "helpers"
ROLLOUTS = Path(__file__).parents[3] / "shared" / "data" / "mujoco_sb3_rollouts"


def generate(*arguments: str) -> int:
    return guarded("generate", run, help_text, arguments)


@pytest.fixture(autouse=True)
def _fakes(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(FAKES), *sys.path])


def test_pointmaze_and_rollouts(tmp_path, capsys):
    for seed in (0, 1):
        target = str(tmp_path / f"{seed}.hdf5")
        options = [
            "env=generate_fake_envs:GenerateLine-v0",
            "steps=100",
            f"seed={seed}",
            'controller={"kp":2}',
        ]
        assert generate("pointmaze", target, *options) == 0
    assert "trip_length_quantiles" in capsys.readouterr().out
    sources = f"sources=[{tmp_path}/0.hdf5,{tmp_path}/1.hdf5]"  # quotes eaten by the shell
    assert generate("rollouts", str(tmp_path / "both.hdf5"), sources) == 0
    out = capsys.readouterr().out
    assert "both.hdf5: 2" in out
    assert "'file': '1.hdf5'" in out


def test_mujoco_trains_collects_and_says_what_it_measured(tmp_path, capsys):
    pytest.importorskip("stable_baselines3", reason="needs the sb3 extra")
    options = [
        *("env=generate_fake_envs:GenerateCorridor-v0", "level=medium", "steps=30"),
        *("train_steps=40", "segment_steps=20", "eval_episodes=1", "expert_return=-3e6"),
        'options={"learning_starts":10,"batch_size":4,"buffer_size":50,'
        '"policy_kwargs":{"net_arch":[4]}}',
    ]
    assert generate("mujoco", str(tmp_path / "m.hdf5"), *options) == 0
    out = capsys.readouterr().out
    assert "m.hdf5: 30 steps" in out or "episodes, return -" in out
    assert "'train_steps': 0" in out  # a target of -1e6 is reached by the untrained agent


def test_bad_input_is_explained(tmp_path, capsys):
    from diffpolicy.settings import ConfigError

    target = str(tmp_path / "x.hdf5")
    for arguments, message in (
        ([], "expected one of"),
        (["mujoco", target], "mujoco needs env="),
        (["mujoco", target, "env=A-v0"], "mujoco needs level="),
        (["mujoco", target, "env=A-v0", "level=medium"], "give target_return="),
        (["pointmaze", target, "controller=5"], "controller must be a JSON object"),
        (["rollouts", target], "sources is empty"),
        (["rollouts", target, "source=a"], "did you mean 'sources'"),
    ):
        assert generate(*arguments) == 1
        assert message in capsys.readouterr().err
    assert issubclass(ConfigError, ValueError)
    assert generate("--help") == 0
    assert "medium-replay" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_shared_rollouts_become_medium_expert(tmp_path, capsys):
    if not ROLLOUTS.is_dir():
        pytest.skip(f"needs {ROLLOUTS.name} in the shared data")
    from generators.rollouts import read_rollouts

    target = tmp_path / "hopper_medium_expert.hdf5"
    names = [str(ROLLOUTS / f"hopper_{level}.npz") for level in ("medium", "expert")]
    assert generate("rollouts", str(target), f"sources=[{','.join(names)}]") == 0
    assert "40933 steps, 72 episodes, return 2076.03" in capsys.readouterr().out
    arrays, attrs = read_rollouts(target)
    assert [source["episodes"] for source in attrs["sources"]] == [49, 23]  # as stats.json says
    assert arrays["terminals"].sum() == 44 + 8
    assert np.array_equal(np.load(names[1])["actions"], arrays["actions"][20235:])
