"""A ball that goes from goal to goal: rows, trips, resuming."""

import json

import numpy as np
import pytest

from diffpolicy.rollout.env_spec import EnvSpec
from generators.pointmaze import MazeRun, generate_pointmaze, trip_lengths

h5py = pytest.importorskip("h5py", reason="needs the hdf5 extra")
LINE = EnvSpec("generate_fake_envs:GenerateLine-v0")
UMAZE = EnvSpec("diffpolicy_envs:diffpolicy/PointMazeUMaze-v0")


def read(path):
    found = {}
    with h5py.File(path) as file:
        file.visititems(lambda n, d: found.update({n: d[()]}) if hasattr(d, "shape") else None)
        return found, dict(file.attrs)


def make(path, **kwargs):
    run = MazeRun(LINE, **{"steps": 300, "seed": 3, "controller": {"kp": 2.0}, **kwargs})
    return generate_pointmaze(run, path, progress=False)


def test_trip_lengths_by_hand():
    rewards = np.float32([0, 0, 1, 1, 0, 0, 1])
    arrays = {"rewards": rewards, "timeouts": np.arange(7) == 6}
    assert trip_lengths(arrays).tolist() == [3, 1, 3]


def test_rows_are_d4rls_and_every_trip_ends_at_its_goal(tmp_path):
    arrays, attrs = read(make(tmp_path / "line.hdf5"))
    rows = len(arrays["rewards"])
    assert {name: (v.shape, v.dtype.name) for name, v in arrays.items()} == {
        "observations": ((rows, 2), "float32"),
        "actions": ((rows, 1), "float32"),
        "rewards": ((rows,), "float32"),
        "terminals": ((rows,), "bool"),
        "timeouts": ((rows,), "bool"),
        "infos/goal": ((rows, 1), "float32"),
        "infos/qpos": ((rows, 1), "float64"),
        "infos/qvel": ((rows, 1), "float64"),
    }
    assert 300 <= rows < 340
    near = np.abs(arrays["observations"][:, 0] - arrays["infos/goal"][:, 0]) <= 0.45
    assert np.array_equal(near, arrays["rewards"] > 0)  # the reward is of the row's observation
    changes = (np.diff(arrays["infos/goal"][:, 0], append=np.nan) != 0) | arrays["timeouts"]
    assert np.array_equal(changes, near)
    assert not arrays["terminals"].any()
    # The simulator: what a row does leads to the next, but for resets.
    same = ~arrays["timeouts"][:-1]
    moved = arrays["observations"][:-1, 0] + 0.3 * arrays["actions"][:-1, 0]
    np.testing.assert_allclose(moved[same], arrays["observations"][1:, 0][same], atol=1e-5)
    assert json.loads(attrs["controller"]) == {"kp": 2.0, "kd": 1.0, "speed": 4.0}
    assert attrs["trips"] == near.sum()
    assert attrs["seed"] == 3
    assert attrs["episode_steps"] == 40  # the environment's
    assert "not comparable" in attrs["note"]


def test_same_seed_same_file_and_a_killed_run_goes_on(tmp_path, monkeypatch):
    from generators import pointmaze

    whole, attrs = read(make(tmp_path / "whole.hdf5"))
    once, calls = pointmaze._episode, []

    def killed(*args):
        calls.append(args[2])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return once(*args)

    monkeypatch.setattr(pointmaze, "_episode", killed)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "cut.hdf5")
    assert not (tmp_path / "cut.hdf5").exists()
    with pytest.raises(ValueError, match=r"another noise.*'noise': 0.1"):
        make(tmp_path / "cut.hdf5", noise=0.3)
    again, again_attrs = read(make(tmp_path / "cut.hdf5"))
    assert calls[:6] == [0, 1, 2, 3, 3, 4]
    assert again.keys() == whole.keys()
    assert all(np.array_equal(again[name], whole[name]) for name in whole)
    assert again_attrs == attrs
    assert not (tmp_path / "cut.hdf5.partial").exists()
    other, _ = read(make(tmp_path / "other.hdf5", seed=4))
    assert not np.array_equal(other["observations"][:50], whole["observations"][:50])


def test_bad_input_is_explained(tmp_path):
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        MazeRun(LINE, steps=0)
    with pytest.raises(ValueError, match="noise must be 0 or more"):
        MazeRun(LINE, noise=-1.0)
    (tmp_path / "there.hdf5").touch()
    with pytest.raises(FileExistsError, match="exists already"):
        make(tmp_path / "there.hdf5")
    stuck = MazeRun(EnvSpec(LINE.id, {"stuck": True}), trip_steps=50)
    with pytest.raises(ValueError, match="did not reach its goal in 50 steps"):
        generate_pointmaze(stuck, tmp_path / "stuck.hdf5", progress=False)


@pytest.mark.mujoco
def test_the_u_maze(tmp_path):
    pytest.importorskip("gymnasium_robotics", exc_type=ImportError)
    run = MazeRun(UMAZE, steps=500, episode_steps=200)
    arrays, attrs = read(generate_pointmaze(run, tmp_path / "u.hdf5", progress=False))
    assert arrays["observations"].shape[1] == 4
    assert arrays["infos/goal"].shape[1] == 2
    np.testing.assert_array_equal(
        arrays["observations"],
        np.hstack([arrays["infos/qpos"], arrays["infos/qvel"]]).astype(np.float32),
    )
    ends = np.flatnonzero(arrays["rewards"])
    distance = np.linalg.norm(arrays["observations"][:, :2] - arrays["infos/goal"], axis=1)
    assert (distance[ends] <= 0.45).all()
    assert np.delete(distance, ends).min() > 0.45
    # At rest after a reset, and never faster than the controller's speed and some noise.
    starts = np.flatnonzero(np.append(True, arrays["timeouts"][:-1]))
    assert (arrays["observations"][starts, 2:] == 0).all()
    assert np.linalg.norm(arrays["observations"][:, 2:], axis=1).max() < 4.5
    assert json.loads(attrs["versions"])["gymnasium-robotics"]


@pytest.mark.mujoco
def test_our_reader_splits_the_run_at_its_goals(tmp_path):
    pytest.importorskip("gymnasium_robotics", exc_type=ImportError)
    from diffpolicy.data import load_d4rl

    path = generate_pointmaze(MazeRun(UMAZE, steps=300), tmp_path / "u.hdf5", progress=False)
    arrays, _ = read(path)
    with load_d4rl(path) as file:
        assert file.num_episodes == arrays["timeouts"].sum()
        np.testing.assert_array_equal(file.episode(0)["obs"][:9], arrays["observations"][:9])
