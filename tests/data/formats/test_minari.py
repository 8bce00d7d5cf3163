"""Minari datasets through the store; the files here have the layout of minari 0.5.4 (and 0.4)."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from diffpolicy.data import check_store, convert
from diffpolicy.data.formats import get_format, minari

h5py = pytest.importorskip("h5py", reason="Minari datasets are HDF5 files")

ID = "mujoco/hopper/medium-v0"
ENV = {"id": "Hopper-v5", "entry_point": "gymnasium.envs.mujoco.hopper_v5:HopperEnv", "kwargs": {}}


def box(*shape: int, dtype: str = "float64") -> dict:
    return {"type": "Box", "dtype": dtype, "shape": list(shape), "low": [], "high": []}


def write_group(group, name: str, values) -> None:
    """Arrays as datasets, dictionaries as groups and tuples as groups of `_index_<i>`."""
    if isinstance(values, tuple):
        values = {f"_index_{i}": v for i, v in enumerate(values)}
    if isinstance(values, dict):
        inner = group.create_group(name)
        for key, value in values.items():
            write_group(inner, key, value)
    else:
        group.create_dataset(name, data=values)


def episode(index: int, *, ended: str = "terminations") -> dict:
    """Episode `index` of 3 + index steps; all its values are functions of the index."""
    rng = np.random.default_rng(index)
    steps = 3 + index
    last = np.arange(steps) == steps - 1
    return {
        "observations": rng.normal(size=(steps + 1, 4)),
        "actions": rng.uniform(-1, 1, (steps, 2)).astype(np.float32),
        "rewards": rng.normal(size=steps),
        "terminations": last & (ended == "terminations"),
        "truncations": last & (ended == "truncations"),
        "infos": {
            "qpos": rng.normal(size=(steps + 1, 6)),
            "deep": {"cost": np.arange(1.0 * steps)},
        },
    }


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


@pytest.fixture
def write(root):
    """Write a dataset; returns its `main_data.hdf5`."""

    def make(episodes, dataset_id=ID, obs_space=None, action_space=None, **metadata) -> Path:
        data = root / dataset_id / "data"
        data.mkdir(parents=True)
        known = {
            "total_episodes": len(episodes),
            "total_steps": sum(len(e["rewards"]) for e in episodes.values()),
            "data_format": "hdf5",
            "observation_space": json.dumps(obs_space or box(4)),
            "action_space": json.dumps(action_space or box(2, dtype="float32")),
            "env_spec": json.dumps(ENV),
            "dataset_id": dataset_id,
            "minari_version": "0.5.4",
        }
        (data / "metadata.json").write_text(json.dumps(known | metadata))
        with h5py.File(data / "main_data.hdf5", "w", track_order=True) as file:
            for number, arrays in episodes.items():
                group = file.create_group(f"episode_{number}")
                group.attrs["id"] = number
                group.attrs["seed"] = 100 + number
                group.attrs["total_steps"] = len(arrays["rewards"])
                for name, values in arrays.items():
                    write_group(group, name, values)
        return data / "main_data.hdf5"

    return make


def test_round_trip(write, tmp_path):
    want = {i: episode(i, ended="truncations" if i % 2 else "terminations") for i in range(11)}
    main = write(want, ref_min_score=-20.0, ref_max_score=3000.0, num_episodes_average_score=100)
    for place in (main, main.parent, main.parents[1]):
        assert get_format("auto", place)[0] == "minari"
    store = convert(main.parents[1], tmp_path / "out.zarr")
    assert store.num_episodes == 11
    assert sorted(store.fields) == [
        "action", "next_obs", "obs", "reward", "terminated", "truncated",
    ]  # fmt: skip
    assert store.fields["terminated"].dtype == "bool"
    for i, arrays in want.items():  # numerically: episode_2 comes before episode_10
        got = store.episode(i)
        obs = arrays["observations"].astype(np.float32)
        assert len(got["obs"]) == 3 + i
        np.testing.assert_array_equal(got["obs"], obs[:-1])
        np.testing.assert_array_equal(got["next_obs"], obs[1:])
        np.testing.assert_array_equal(got["action"], arrays["actions"])
        np.testing.assert_array_equal(got["reward"], arrays["rewards"].astype(np.float32))
        np.testing.assert_array_equal(got["terminated"], arrays["terminations"])
        np.testing.assert_array_equal(got["truncated"], arrays["truncations"])
        assert store.episode_attrs[i] == {"id": i, "seed": 100 + i}
    attrs = store.attrs
    assert attrs["dataset"] == ID
    assert attrs["env_spec"] == ENV
    assert attrs["env_id"] == "Hopper-v5"
    assert attrs["minari_version"] == "0.5.4"
    assert attrs["source"]["format"] == "minari"
    assert attrs["reference_scores"] == {
        "min": -20.0, "max": 3000.0, "episodes": 100, "source": "minari",
    }  # fmt: skip
    assert check_store(tmp_path / "out.zarr", action_low=-1, action_high=1) == []


def test_numbers_of_the_infos_are_fields(write, tmp_path):
    main = write({0: episode(0), 1: episode(1)})
    store = convert(main, tmp_path / "o.zarr", fields={"qpos": "info.qpos", "c": "info.deep.cost"})
    want = episode(1)["infos"]
    np.testing.assert_array_equal(store.episode(1)["qpos"], want["qpos"][:-1].astype(np.float32))
    np.testing.assert_array_equal(store.episode(1)["c"], want["deep"]["cost"].astype(np.float32))


def goal_episode(index: int) -> dict:
    rng = np.random.default_rng(index)
    steps = 5 + index
    goals = {
        "microwave": rng.normal(size=(steps + 1, 1)),
        "kettle": rng.normal(size=(steps + 1, 2)),
    }
    parts = {"observation": rng.normal(size=(steps + 1, 3)), "achieved_goal": goals}
    return episode(index) | {
        "observations": parts,
        "actions": rng.normal(size=(steps, 2)),
        "rewards": np.zeros(steps),
        "terminations": np.zeros(steps, bool),
        "truncations": np.zeros(steps, bool),
        "infos": {},
    }


def test_dictionaries_of_observations(write, tmp_path):
    inner = {"microwave": box(1), "kettle": box(2)}  # a space's order need not be alphabetical
    space = {
        "type": "Dict",
        "subspaces": {
            "observation": box(3),
            "achieved_goal": {"type": "Dict", "subspaces": inner},
        },
    }
    main = write({0: goal_episode(0), 1: goal_episode(1)}, obs_space=space)
    source = minari.open_source(main)
    leaves = ["observation", "achieved_goal.microwave", "achieved_goal.kettle"]
    assert minari.default_fields(source)["obs"] == [f"observation.{leaf}" for leaf in leaves]
    assert "next_obs" not in minari.default_fields(source)
    source.close()
    want = goal_episode(1)["observations"]
    goals = want["achieved_goal"]
    flat = np.concatenate([want["observation"], goals["microwave"], goals["kettle"]], 1)
    store = convert(main, tmp_path / "all.zarr")
    np.testing.assert_array_equal(store.episode(1)["obs"], flat[:-1].astype(np.float32))
    obs = ["observation.achieved_goal.kettle", "observation.observation"]
    chosen = {"obs": obs, "next_obs": minari.next_fields(obs)}
    store = convert(main, tmp_path / "chosen.zarr", fields=chosen)
    flat = np.concatenate([goals["kettle"], want["observation"]], 1).astype(np.float32)
    np.testing.assert_array_equal(store.episode(1)["obs"], flat[:-1])
    np.testing.assert_array_equal(store.episode(1)["next_obs"], flat[1:])
    assert minari.next_fields(["observation.observation", "info.qpos"]) == []


def test_tuples_indices_and_images(write, tmp_path):
    steps = 4
    parts = (np.zeros((steps + 1, 2)), np.arange(steps + 1))
    arrays = episode(1) | {"observations": parts, "actions": np.arange(steps)}
    space = {"type": "Tuple", "subspaces": [box(2), {"type": "Discrete", "n": 9}]}
    main = write({0: arrays}, obs_space=space, action_space={"type": "Discrete", "n": 4})
    with pytest.raises(ValueError, match=r"does not say what 'obs' is.*'observation.0'"):
        convert(main, tmp_path / "o.zarr")  # an index is not a vector: the user decides
    chosen = {"obs": ["observation.1", "observation.0"], "action": "action"}
    store = convert(main, tmp_path / "o.zarr", fields=chosen)
    np.testing.assert_array_equal(store.read("obs")[:, 0], np.arange(steps))
    assert store.fields["action"].shape == (1,)

    jpeg = np.zeros((steps + 1, 700), np.uint8)  # images that happen to be of one size
    text = np.array([b"go to the door"] * (steps + 1))
    arrays = episode(1) | {"observations": {"rgb": jpeg, "state": parts[0], "mission": text}}
    spaces = {"rgb": box(64, 64, 3, dtype="uint8"), "state": box(2), "mission": {"type": "Text"}}
    main = write({0: arrays}, "images-v0", {"type": "Dict", "subspaces": spaces})
    store = convert(main, tmp_path / "i.zarr", fields={"obs": ["observation.state"]})
    assert list(store.attrs["unread"]) == [
        "observation.rgb",
        "observation.mission",
    ]
    with pytest.raises(ValueError, match="does not say what 'obs' is"):
        convert(main, tmp_path / "j.zarr")


def test_version_0_4_keeps_its_metadata_in_the_file(write, tmp_path):
    main = write({0: episode(0), 1: episode(1)})
    known = json.loads((main.parent / "metadata.json").read_text())
    (main.parent / "metadata.json").unlink()
    with h5py.File(main, "a") as file:
        del known["dataset_id"]
        file.attrs.update({**known, "minari_version": "0.4.3"})
        file["episode_1"].attrs["seed"] = "None"
    store = convert(main, tmp_path / "o.zarr")
    assert store.attrs["minari_version"] == "0.4.3"
    assert store.attrs["env_spec"] == ENV
    assert store.attrs["dataset"] == ID  # from its place below the datasets folder
    assert store.episode_attrs == [{"id": 0, "seed": 100}, {"id": 1}]


def test_ids_are_looked_up(write, root):
    main = write({0: episode(0)})
    assert minari.locate(ID) == main
    assert minari.open_source(Path(ID)).num_episodes == 1
    with pytest.raises(FileNotFoundError) as caught:
        minari.locate("mujoco/hoper/medium-v0")
    message = str(caught.value)
    looked = root / "mujoco/hoper/medium-v0/data/main_data.hdf5"
    for part in (str(looked), "MINARI_DATASETS_PATH", f"There are ['{ID}']", "minari download"):
        assert part in message
    with pytest.raises(FileNotFoundError, match=r"holds the datasets \['hopper/medium-v0'\]"):
        minari.locate(root / "mujoco")
    with pytest.raises(FileNotFoundError, match=r"no Minari dataset at .*nowhere"):
        minari.locate(root / "nowhere")


def test_the_datasets_folder_is_minaris_own(monkeypatch, tmp_path):
    monkeypatch.delenv("MINARI_DATASETS_PATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert minari.datasets_root() == tmp_path / ".minari" / "datasets"


def test_arrow_is_refused_by_name(root):
    data = root / "arrow-v0" / "data"
    data.mkdir(parents=True)
    (data / "metadata.json").write_text(json.dumps({"data_format": "arrow"}))
    assert minari.matches(data.parent)
    with pytest.raises(ValueError, match=r"stored as 'arrow'; this reads 'hdf5' alone"):
        minari.open_source(data.parent)


def test_damaged_files(write, tmp_path, monkeypatch):
    main = write({0: episode(0), 1: episode(1)})
    target = tmp_path / "o.zarr"

    def damaged(name, change):
        place = tmp_path / name / "main_data.hdf5"
        shutil.copytree(main.parent, place.parent)
        with h5py.File(place, "a") as file:
            change(file)
        return place

    def no_last(file):
        values = file["episode_1/observations"][:-1]
        del file["episode_1/observations"]
        file["episode_1"]["observations"] = values

    with pytest.raises(
        ValueError, match=r"episode_1/observations has 4 rows for 4 steps; expec.* 5"
    ):
        convert(damaged("a", no_last), target)
    gone = damaged("b", lambda f: f.__delitem__("episode_1/actions"))
    with pytest.raises(ValueError, match=r"episode_1/actions is missing; the episode has"):
        convert(gone, target)
    gone = damaged("c", lambda f: f.__delitem__("episode_0/rewards"))
    with pytest.raises(ValueError, match=r"not a Minari dataset: /episode_0 has no 'rewards'"):
        convert(gone, target)
    gone = damaged("d", lambda f: f.__delitem__("episode_1"))
    with pytest.raises(ValueError, match=r"has 1 episodes, but its metadata say 2: an interrupted"):
        convert(gone, target)
    short = damaged("e", lambda f: f["episode_1"].attrs.modify("total_steps", 9))
    with pytest.raises(ValueError, match=r"episode_1 has 4 rewards; expected 9"):
        convert(short, target)
    other = damaged("f", lambda f: [f.move(n, n.replace("episode", "demo")) for n in list(f)])
    with pytest.raises(ValueError, match=r"no episode_<i> groups, only \['demo_0', 'demo_1'\]"):
        convert(other, target)
    (other.parent / "metadata.json").write_text("{")
    with pytest.raises(ValueError, match=r"metadata.json is damaged"):
        convert(other, target)
    (tmp_path / "a" / "main_data.hdf5").write_bytes(main.read_bytes()[:700])
    with pytest.raises(ValueError, match="not a whole HDF5 file"):
        convert(tmp_path / "a", target)
    with pytest.raises(ValueError, match=r"has no field \['speed'\]; it has \['action'"):
        minari.open_source(main).episode(0, ["speed"])
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r'pip install "diffpolicy\[hdf5\]"'):
        convert(main, target)
    assert not target.exists()
