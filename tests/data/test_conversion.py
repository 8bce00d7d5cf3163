"""Conversion of Diffusion Policy replay buffers and robomimic files."""

import json
import sys

import numpy as np
import pytest

from diffpolicy.data import EpisodeStore, check_store, convert
from diffpolicy.data.formats import FORMATS
from diffpolicy.data.formats.robomimic import LOW_DIM_KEYS


@pytest.fixture
def replay_arrays():
    rng = np.random.default_rng(0)
    return {
        "state": rng.normal(size=(50, 5)).astype(np.float32),
        "keypoint": rng.normal(size=(50, 9, 2)),
        "action": rng.normal(size=(50, 2)).astype(np.float32),
        "img": rng.integers(0, 255, (50, 8, 8, 3), dtype=np.uint8),
    }


@pytest.mark.parametrize("name", ["r.zarr", "r.zarr.zip"])
def test_replay_buffers_are_read_as_they_are(tmp_path, name, write_replay, replay_arrays):
    write_replay(tmp_path / name, replay_arrays, [20, 37, 50])
    with EpisodeStore.open(tmp_path / name) as store:
        assert store.num_episodes == 3
        assert not store.is_native
        for key, values in replay_arrays.items():
            np.testing.assert_array_equal(store.read(key), values)
            np.testing.assert_array_equal(store.episode(1)[key], values[20:37])
        assert store.episode_attrs == [{}, {}, {}]
        with pytest.raises(ValueError, match=r"no statistics.*data convert"):
            _ = store.statistics
    with pytest.raises(ValueError, match=r"only read"):
        EpisodeStore.open(tmp_path / name, "a")


@pytest.mark.parametrize("name", ["r.zarr", "r.zarr.zip"])
def test_replay_buffer_conversion(tmp_path, name, write_replay, replay_arrays):
    write_replay(tmp_path / name, replay_arrays, [20, 37, 50])
    target = tmp_path / "out.zarr"
    store = convert(tmp_path / name, target, attrs={"env_id": "PushT"})
    np.testing.assert_array_equal(store.read("obs.img"), replay_arrays["img"])
    np.testing.assert_array_equal(store.read("obs.state"), replay_arrays["state"])
    np.testing.assert_array_equal(store.read("action"), replay_arrays["action"])
    np.testing.assert_array_equal(store.episode_ends, [20, 37, 50])
    assert store.statistics["obs.state"]["count"] == 50
    assert store.attrs["env_id"] == "PushT"
    assert store.attrs["source"] == {"name": name, "format": "replay_zarr"}
    assert check_store(target) == []
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_fields_transform_and_limit(tmp_path, write_replay, replay_arrays):
    write_replay(tmp_path / "r.zarr", replay_arrays, [20, 37, 50])
    store = convert(
        tmp_path / "r.zarr",
        tmp_path / "out.zarr",
        fields={"obs": ["keypoint", "state"], "img": "img"},
        transform=lambda obs: obs[:, :20] * 2,
        max_episodes=2,
    )
    want = np.concatenate(
        [replay_arrays["keypoint"].reshape(50, 18), replay_arrays["state"]], axis=1
    )[:37, :20]
    np.testing.assert_array_equal(store.read("obs"), (want.astype(np.float32) * 2))
    np.testing.assert_array_equal(store.read("img"), replay_arrays["img"][:37])
    assert store.num_episodes == 2


def test_push_t_golden(pusht_zip, tmp_path):
    def features(state):
        return np.concatenate([state[:, :4], np.cos(state[:, 4:]), np.sin(state[:, 4:])], axis=1)

    store = convert(pusht_zip, tmp_path / "p.zarr", transform=features)
    assert (store.num_episodes, store.num_steps) == (206, 25_650)
    assert store.fields["obs"].shape == (6,)
    assert store.statistics["action"]["min"] == [12, 25]
    assert store.statistics["action"]["max"] == [511, 511]
    assert store.episode_lengths.min() == 49
    assert store.episode_lengths.max() == 246
    with EpisodeStore.open(pusht_zip) as source:
        np.testing.assert_array_equal(store.read("obs"), features(source.read("state")))
        np.testing.assert_array_equal(store.read("action"), source.read("action"))


@pytest.fixture
def robomimic_file(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "low_dim.hdf5"
    rng = np.random.default_rng(0)
    sizes = {"object": 10, "robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2}
    want = {}
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1})
        for number in (10, 2, 0):  # names sort as 0, 10, 2
            demo = data.create_group(f"demo_{number}")
            length = 5 + number
            parts = {k: rng.normal(size=(length, n)) for k, n in sizes.items()}
            for key, values in parts.items():
                demo.create_dataset(f"obs/{key}", data=values)
            actions = rng.uniform(-1, 1, (length, 7))
            demo.create_dataset("actions", data=actions)
            demo.create_dataset("dones", data=np.zeros(length, np.int64))
            want[number] = (np.concatenate([parts[k] for k in LOW_DIM_KEYS], 1), actions)
        file.create_group("mask").create_dataset("train", data=[b"demo_0"])
    return path, want


def test_robomimic(robomimic_file, tmp_path):
    path, want = robomimic_file
    store = convert(path, tmp_path / "out.zarr")
    assert store.num_episodes == 3
    assert [a["demo"] for a in store.episode_attrs] == ["demo_0", "demo_2", "demo_10"]
    for index, number in enumerate((0, 2, 10)):
        obs, actions = want[number]
        np.testing.assert_array_equal(store.episode(index)["obs"], obs.astype(np.float32))
        np.testing.assert_array_equal(store.episode(index)["action"], actions.astype(np.float32))
    assert store.attrs["env_args"] == {"env_name": "Lift", "type": 1}
    assert check_store(tmp_path / "out.zarr", action_low=-1, action_high=1) == []
    chosen = convert(
        path,
        tmp_path / "chosen.zarr",
        format="robomimic",
        fields={"obs": ["robot0_eef_pos", "object"], "done": "dones"},
    )
    assert chosen.fields["obs"].shape == (13,)
    assert chosen.fields["done"].dtype == "int64"


def test_robomimic_bad_files(robomimic_file, tmp_path, monkeypatch):
    import h5py

    path, _ = robomimic_file
    with pytest.raises(ValueError, match=r"has no field \['eef'\]; it has \['actions'"):
        convert(path, tmp_path / "o.zarr", fields={"obs": ["eef"]})
    with h5py.File(path, "a") as file:
        del file["data/demo_2/obs/object"]
    with pytest.raises(ValueError, match=r"demo_2 has no 'obs/object'; under obs/ it has"):
        convert(path, tmp_path / "o.zarr")
    with h5py.File(path, "a") as file:
        del file["data/demo_0/obs/object"]
    with pytest.raises(ValueError, match="does not say what 'obs' is; choose of its fields"):
        convert(path, tmp_path / "o.zarr")
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file.create_dataset("observations", data=np.zeros(3))
    with pytest.raises(ValueError, match="looks like none of the formats"):
        convert(tmp_path / "other.hdf5", tmp_path / "o.zarr")
    (tmp_path / "cut.hdf5").write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="not a whole HDF5 file"):
        convert(tmp_path / "cut.hdf5", tmp_path / "o.zarr")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r'pip install "diffpolicy\[hdf5\]"'):
        convert(path, tmp_path / "o.zarr")
    assert not (tmp_path / "o.zarr").exists()


def test_bad_input(tmp_path, write_replay, replay_arrays):
    source, target = tmp_path / "r.zarr", tmp_path / "out.zarr"
    replay_arrays["state"][30, 2] = np.nan
    write_replay(source, replay_arrays, [20, 37, 50])
    with pytest.raises(ValueError, match=r"r.zarr, episode 1: field .obs.state. .* at row 10"):
        convert(source, target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.zarr"]
    with pytest.raises(ValueError, match=r"unknown format 'rlds'; expected one of auto"):
        convert(source, target, format="rlds")
    with pytest.raises(ValueError, match="max_episodes"):
        convert(source, target, max_episodes=0)
    with pytest.raises(ValueError, match=r"episode 0: transform must turn \[T, O\] = \[20, 5\]"):
        convert(source, target, transform=lambda obs: obs[0])
    with pytest.raises(FileNotFoundError, match="nothing to convert"):
        convert(tmp_path / "nowhere", target)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="looks like none of the formats"):
        convert(tmp_path / "notes.txt", target)
    convert(source, target, max_episodes=1).close()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        convert(source, target)
    with pytest.raises(ValueError, match="not finite"):
        convert(source, target, overwrite=True)
    assert EpisodeStore.open(target).num_episodes == 1  # a failure leaves the old store
    assert convert(source, target, fields={"obs": "action"}, overwrite=True).num_episodes == 3


def test_formats_are_registered():
    known = ["arrays", "d4rl", "lerobot", "minari", "ogbench", "replay_zarr", "robomimic"]
    assert sorted(FORMATS) == known
