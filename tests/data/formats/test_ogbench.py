"""Npz files of OGBench and OCBench."""

import numpy as np
import pytest

from diffpolicy.data import check_store, convert
from diffpolicy.data.formats import get_format
from diffpolicy.data.formats.ogbench import OGBenchFile

STEPS = [3, 4]
LAST = np.array([0, 0, 1, 0, 0, 0, 1], bool)


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "observations": rng.normal(size=(7, 3)).astype(np.float32),
        "actions": rng.normal(size=(7, 2)).astype(np.float32),
        "terminals": LAST,
        "qpos": rng.normal(size=(7, 5)).astype(np.float32),
        "button_states": rng.integers(0, 2, (7, 2)),
    }


def saved(tmp_path, arrays):
    np.savez_compressed(tmp_path / "scene-play-v0.npz", **arrays)
    return tmp_path / "scene-play-v0.npz"


def test_a_file_of_ogbench(tmp_path, arrays):
    path = saved(tmp_path, arrays)
    assert get_format("auto", path)[0] == "ogbench"
    store = convert(path, tmp_path / "out.zarr")
    assert store.episode_lengths.tolist() == STEPS
    names = {"obs": "observations", "action": "actions", "truncated": "terminals"}
    names |= {"info.qpos": "qpos", "info.button_states": "button_states"}
    assert set(store.fields) == set(names)
    for name, source in names.items():
        np.testing.assert_array_equal(store.read(name), arrays[source])
    assert store.fields["info.button_states"].dtype == "int64"
    assert check_store(tmp_path / "out.zarr") == []


def test_a_file_of_ocbench(tmp_path):
    observations = np.arange(9.0)[:, None] * np.ones((1, 3))  # 4 + 5: one more in each episode
    arrays = {
        "observations": observations.astype(np.float32),
        "observation_interval": np.int32(1),
        "actions": np.random.default_rng(0).normal(size=(7, 2)).astype(np.float32),
        "rewards": -np.arange(7.0),
        "masks": np.array([1, 1, 0, 1, 1, 1, 1.0]),
        "terminals": LAST,
    }
    path = saved(tmp_path, arrays)
    store = convert(path, None)
    np.testing.assert_array_equal(store.read("obs")[:, 0], [0, 1, 2, 4, 5, 6, 7])
    np.testing.assert_array_equal(store.read("next_obs")[:, 0], [1, 2, 3, 5, 6, 7, 8])
    np.testing.assert_array_equal(store.read("terminated"), np.arange(7) == 2)
    np.testing.assert_array_equal(store.read("truncated"), np.arange(7) == 6)
    np.testing.assert_array_equal(store.read("reward"), arrays["rewards"])
    path = saved(tmp_path, arrays | {"observation_interval": np.int32(2)})
    with pytest.raises(ValueError, match=r"one every 2 steps, .* every step needs its own"):
        OGBenchFile(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"terminals": np.zeros(7, bool)}, "the last of its 7 steps is no end of an episode"),
        ({"actions": None}, r"has no \['actions'\]; it has \['button_states'"),
        ({"observations": np.zeros((6, 3))}, "has 6 observations, one every 1 steps, of 7 steps"),
    ],
)
def test_what_is_missing_is_said(tmp_path, arrays, changes, message):
    kept = {name: array for name, array in {**arrays, **changes}.items() if array is not None}
    with pytest.raises(ValueError, match=message):
        OGBenchFile(saved(tmp_path, kept))


def test_other_npz_files_are_not_taken(tmp_path, arrays):
    path = saved(tmp_path, arrays | {"episode_ends": np.array(STEPS).cumsum()})
    assert get_format("auto", path)[0] == "arrays"
    path.write_bytes(b"PK nothing")
    assert not OGBenchFile.matches(path)
