"""Minari datasets through the store; the files here are written by minari itself."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from gymnasium import spaces

from diffpolicy.data import check_store, convert
from diffpolicy.data.formats import get_format
from diffpolicy.data.formats.minari import MinariDataset, datasets_root, locate

pytest.importorskip("minari", reason='minari is not installed (extra "minari")')
h5py = pytest.importorskip("h5py")
from minari.data_collector import EpisodeBuffer  # noqa: E402
from minari.dataset.minari_storage import MinariStorage  # noqa: E402

ID = "mujoco/hopper/medium-v0"
ENV = {"id": "Hopper-v5", "entry_point": "gymnasium.envs.mujoco.hopper_v5:HopperEnv", "kwargs": {}}
STEPS = ("rewards", "terminations", "truncations")


def box(*shape: int, dtype: str = "float64") -> spaces.Box:
    return spaces.Box(-np.inf, np.inf, shape, np.dtype(dtype).type)


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
    """Write a dataset; returns the directory of its `metadata.json`."""

    def make(episodes, dataset_id=ID, obs=None, action=None, format="hdf5", **known) -> Path:
        data = root / dataset_id / "data"
        data.mkdir(parents=True)
        storage = MinariStorage.new(
            data, obs or box(4), action or box(2, dtype="float32"), data_format=format
        )
        storage.update_episodes(
            EpisodeBuffer(id=i, seed=100 + i, **arrays) for i, arrays in enumerate(episodes)
        )
        known = {"dataset_id": dataset_id, "minari_version": "0.5.4", **known}
        change(data, env_spec=json.dumps(ENV), **known)
        return data

    return make


def change(data: Path, **values) -> None:
    """Alter the metadata; `...` removes a key."""
    known = json.loads((data / "metadata.json").read_text()) | values
    known = {key: value for key, value in known.items() if value is not ...}
    (data / "metadata.json").write_text(json.dumps(known))


@pytest.mark.parametrize("format", ["hdf5", "parquet"])
def test_round_trip(write, tmp_path, format):
    want = [episode(i, ended="truncations" if i % 2 else "terminations") for i in range(11)]
    scores = {"ref_min_score": -20.0, "ref_max_score": 3000.0, "num_episodes_average_score": 100}
    if format == "parquet":  # which holds infos of one length alone
        want = [arrays | {"infos": None} for arrays in want]
    data = write(want, format=format, **scores)
    for place in (data.parent, *data.glob("*.hdf5")):
        assert get_format("auto", place)[0] == "minari"
    store = convert(data.parent, tmp_path / "out.zarr")
    assert store.num_episodes == 11
    assert sorted(store.fields) == [
        "action", "next_obs", "obs", "reward", "terminated", "truncated",
    ]  # fmt: skip
    assert store.fields["terminated"].dtype == "bool"
    for i, arrays in enumerate(want):  # numerically: episode 2 comes before episode 10
        got = store.episode(i)
        obs = arrays["observations"].astype(np.float32)
        assert len(got["obs"]) == 3 + i
        np.testing.assert_array_equal(got["obs"], obs[:-1])
        np.testing.assert_array_equal(got["next_obs"], obs[1:])
        np.testing.assert_array_equal(got["action"], arrays["actions"])
        np.testing.assert_array_equal(got["reward"], arrays["rewards"].astype(np.float32))
        np.testing.assert_array_equal(got["terminated"], arrays["terminations"])
        np.testing.assert_array_equal(got["truncated"], arrays["truncations"])
        assert store.episode_attrs[i]["id"] == i
        assert store.episode_attrs[i]["seed"] == 100 + i
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
    data = write([episode(0), episode(1)])
    store = convert(data, tmp_path / "o.zarr", fields={"qpos": "info.qpos", "c": "info.deep.cost"})
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
        "actions": rng.normal(size=(steps, 2)).astype(np.float32),
        **{name: np.zeros(steps) for name in STEPS},
        "infos": {},
    }


def test_dictionaries_of_observations(write, tmp_path):
    goals = spaces.Dict([("microwave", box(1)), ("kettle", box(2))])  # the order is the space's
    space = spaces.Dict([("observation", box(3)), ("achieved_goal", goals)])
    data = write([goal_episode(0), goal_episode(1)], obs=space)
    chosen = MinariDataset(data).default_fields()
    leaves = ["observation", "achieved_goal.microwave", "achieved_goal.kettle"]
    assert chosen["obs"] == [f"observation.{leaf}" for leaf in leaves]
    assert "next_obs" not in chosen
    want = goal_episode(1)["observations"]
    goals = want["achieved_goal"]
    flat = np.concatenate([want["observation"], goals["microwave"], goals["kettle"]], 1)
    store = convert(data, tmp_path / "all.zarr")
    np.testing.assert_array_equal(store.episode(1)["obs"], flat[:-1].astype(np.float32))
    obs = ["observation.achieved_goal.kettle", "observation.observation"]
    store = convert(data, tmp_path / "chosen.zarr", fields={"obs": obs})
    flat = np.concatenate([goals["kettle"], want["observation"]], 1).astype(np.float32)
    np.testing.assert_array_equal(store.episode(1)["obs"], flat[:-1])
    np.testing.assert_array_equal(store.episode(1)["next_obs"], flat[1:])
    assert MinariDataset.next_fields(["observation.observation", "info.qpos"]) == []


def test_tuples_indices_images_and_texts(write, tmp_path):
    steps = 4
    parts = (np.zeros((steps + 1, 2)), np.arange(steps + 1))
    arrays = episode(1) | {"observations": parts, "actions": np.arange(steps)}
    space = spaces.Tuple([box(2), spaces.Discrete(9)])
    data = write([arrays], obs=space, action=spaces.Discrete(4))
    with pytest.raises(ValueError, match=r"does not say what 'obs' is.*'observation.0'"):
        convert(data, tmp_path / "o.zarr")  # an index is not a vector: the user decides
    chosen = {"obs": ["observation.1", "observation.0"], "action": "action"}
    store = convert(data, tmp_path / "o.zarr", fields=chosen)
    np.testing.assert_array_equal(store.read("obs")[:, 0], np.arange(steps))
    assert store.fields["action"].shape == (1,)

    images = np.full((steps + 1, 40, 48, 3), 128, np.uint8)  # stored as JPEG
    texts = ["go to the door"] * (steps + 1)
    arrays = episode(1) | {"observations": {"rgb": images, "state": parts[0], "mission": texts}}
    inner = {"rgb": spaces.Box(0, 255, (40, 48, 3), np.uint8), "state": box(2)}
    data = write([arrays], "images-v0", spaces.Dict(inner | {"mission": spaces.Text(20)}))
    chosen = {"obs": ["observation.state"], "camera": "observation.rgb"}
    store = convert(data, tmp_path / "i.zarr", fields=chosen)
    np.testing.assert_allclose(store.read("camera"), images[:-1], atol=2)
    assert list(store.attrs["unread"]) == ["observation.mission"]
    named = {"obs.state": "observation.state", "obs.camera": "observation.rgb"}
    store = convert(data, tmp_path / "n.zarr", fields=named)
    assert store.fields["obs.camera"].shape == (40, 48, 3)
    assert {"next_obs.state", "next_obs.camera"} <= set(store.fields)
    store = convert(data, tmp_path / "j.zarr", task="observation.mission")
    np.testing.assert_array_equal(store.read("obs.state"), parts[0][:-1])
    np.testing.assert_array_equal(store.read("obs.rgb"), store.read("next_obs.rgb"))
    assert (store.attrs["tasks"], store.read("obs.task").sum()) == (texts[:1], 0)


def test_ids_are_looked_up(write, root, monkeypatch, tmp_path):
    data = write([episode(0)])
    assert locate(ID) == data
    assert MinariDataset(Path(ID)).num_episodes == 1
    with pytest.raises(FileNotFoundError) as caught:
        locate("mujoco/hoper/medium-v0")
    looked = root / "mujoco/hoper/medium-v0/data/metadata.json"
    for part in (str(looked), "MINARI_DATASETS_PATH", f"There are ['{ID}']", "minari download"):
        assert part in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"holds the datasets \['hopper/medium-v0'\]"):
        locate(root / "mujoco")
    with pytest.raises(FileNotFoundError, match=r"no Minari dataset at .*nowhere"):
        locate(root / "nowhere")
    monkeypatch.delenv("MINARI_DATASETS_PATH")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert datasets_root() == tmp_path / ".minari" / "datasets"


def test_damaged_files(write, tmp_path, monkeypatch):
    data = write([episode(0), episode(1)])
    target = tmp_path / "o.zarr"

    def refused(match, alter, **metadata):
        """Alter a copy of the file; it is refused with this message."""
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        shutil.copytree(data, tmp_path / "d")
        change(tmp_path / "d", **metadata)
        with h5py.File(tmp_path / "d" / "main_data.hdf5", "a") as file:
            alter(file)
        with pytest.raises(ValueError, match=match):
            convert(tmp_path / "d", target)

    def cut(file):
        values = file["episode_1/observations"][:-1]
        del file["episode_1/observations"]
        file["episode_1"]["observations"] = values

    def unwritten(file):
        del file["episode_1/rewards"]
        file["episode_1"].create_dataset("rewards", (4,), np.float32)

    refused("episode 1 has 4 rows of observation for 4 steps; expected 5", cut)
    refused("episode 1 cannot be read.*KeyError", lambda f: f.__delitem__("episode_1/actions"))
    refused("episode 0 cannot be read.*KeyError", lambda f: f.__delitem__("episode_0/rewards"))
    refused(r"episode_1/rewards: rows \[\(0, 4\)\] were never written", unwritten)
    refused("has 1 episodes, but its metadata say 2", lambda f: f.__delitem__("episode_1"))
    modify = lambda f: f["episode_1"].attrs.modify("total_steps", 9)  # noqa: E731
    refused("episode 1 has 4 rewards; expected 9", modify)
    refused("cannot be read.*KeyError", lambda f: None, data_format="zip")
    # minari would make the environment for want of a space, and so run what the dataset names.
    refused(r"lacks \['action_space'\]", lambda f: None, action_space=...)
    (tmp_path / "d" / "metadata.json").write_text("{")
    with pytest.raises(ValueError, match=r"metadata.json cannot be read, so it is damaged"):
        convert(tmp_path / "d", target, format="minari")
    shutil.copy(data / "metadata.json", tmp_path / "d")
    (tmp_path / "d" / "main_data.hdf5").write_bytes((data / "main_data.hdf5").read_bytes()[:700])
    with pytest.raises(ValueError, match="not a whole HDF5 file"):
        convert(tmp_path / "d", target)
    with pytest.raises(ValueError, match=r"has no field \['speed'\]; it has \['action'"):
        MinariDataset(data).episode(0, ["speed"])
    monkeypatch.setitem(sys.modules, "minari.dataset.minari_storage", None)
    with pytest.raises(ImportError, match=r'pip install "diffpolicy\[minari\]"'):
        convert(data, target)
    assert not target.exists()
