"""Npz files of named arrays."""

import numpy as np
import pytest

from diffpolicy.commands.data import run
from diffpolicy.data import EpisodeStore, check_store, convert
from diffpolicy.data.formats import get_format
from diffpolicy.data.formats.arrays import ArraysFile


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "observations": rng.normal(size=(7, 3)),
        "actions": rng.normal(size=(7, 2)).astype(np.float32),
        "rewards": np.arange(7.0),
        "phase": np.arange(7) % 3,
        "episode_ends": np.array([3, 7]),
        "start": rng.normal(size=(2, 4)),
        "solved": np.array([True, False]),
        "who": np.array(["ann", "bo"]),
        "rate": np.array(0.25),
        "task": np.array("door"),
        "image": np.zeros((2, 40, 40)),
        "nothing": np.array([[np.nan], [0.0]]),
        "table": np.zeros((5, 5)),
    }


@pytest.fixture
def path(arrays, tmp_path):
    np.savez_compressed(tmp_path / "demo.npz", **arrays)
    return tmp_path / "demo.npz"


def test_conversion(path, arrays, tmp_path):
    store = convert(path, tmp_path / "demo.zarr", fields={"phase": "phase"})
    assert get_format("auto", path)[0] == "arrays"
    assert store.episode_ends.tolist() == [3, 7]
    assert sorted(store.fields) == ["action", "obs", "phase", "reward"]
    np.testing.assert_array_equal(store.read("obs"), arrays["observations"].astype(np.float32))
    np.testing.assert_array_equal(store.read("action"), arrays["actions"])
    np.testing.assert_array_equal(store.read("reward"), np.arange(7))
    assert store.read("phase").dtype == np.int64
    first, second = store.episode_attrs
    assert first == {"start": arrays["start"][0].tolist(), "solved": True, "who": "ann"}
    assert second["who"] == "bo"
    source = {"name": "demo.npz", "format": "arrays"}
    unread = store.attrs["unread"]  # said, since nothing else would tell
    assert sorted(unread) == ["image", "nothing", "table"]
    assert store.attrs == {"rate": 0.25, "task": "door", "source": source, "unread": unread}
    assert check_store(tmp_path / "demo.zarr") == []


def test_command(path, tmp_path, capsys):
    target = tmp_path / "out.zarr"
    assert (
        run(["convert", str(path), str(target), "obs=[observations,phase]", "action=actions"]) == 0
    )
    assert "2 episodes, 7 steps" in capsys.readouterr().out
    assert EpisodeStore.open(target).fields["obs"].shape == (4,)


def test_an_episode_of_one_file(path, arrays):
    source = ArraysFile(path)
    assert sorted(source.fields) == ["actions", "observations", "phase", "rewards"]
    assert source.fields["observations"].dtype == "float64"
    np.testing.assert_array_equal(source.episode(1, ["rewards"])["rewards"], [3, 4, 5, 6])
    assert set(source.episode(0)) == set(source.fields)
    source.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"episode_ends": ...}, r"has no array 'episode_ends' .*; it has \['actions'"),
        ({"episode_ends": np.array([3.0, 7.0])}, "must be a vector of whole numbers; got shape"),
        ({"episode_ends": np.array([3, 3])}, "must increase strictly"),
        ({"episode_ends": np.array([3, 9])}, "says 9 steps, but no array has as many rows"),
        ({"info": np.array([{}, 1])}, r"\['info'\] are pickled Python objects"),
        ({"observations": ...}, "does not say what 'obs' is; choose of its fields"),
    ],
)
def test_files_that_are_refused(arrays, tmp_path, changes, message):
    values = {k: v for k, v in {**arrays, **changes}.items() if v is not ...}
    np.savez(tmp_path / "bad.npz", **values)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "bad.npz", tmp_path / "out.zarr")


def test_files_that_are_none(path, tmp_path):
    with pytest.raises(FileNotFoundError, match="no file at"):
        ArraysFile(tmp_path / "none.npz")
    (tmp_path / "cut.npz").write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="is not a whole npz file of plain arrays"):
        convert(tmp_path / "cut.npz", tmp_path / "out.zarr")
