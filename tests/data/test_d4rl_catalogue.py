"""D4RL's catalogue: counts, exact reference scores, where files are looked for."""

import hashlib
import subprocess
import sys
from importlib.resources import files

import numpy as np
import pytest

from diffpolicy.data.d4rl.catalogue import DATASETS, by_file, lookup, normalized_score
from diffpolicy.data.d4rl.location import find_dataset, scan

_ANT = "Ant_maze"
_SIZES = ("umaze", "medium", "large")
WITHOUT = {
    *(f"maze2d-eval-{size}{kind}-v1" for size in _SIZES for kind in ("", "-dense")),
    "ant-random-expert-v0",
    "carla-town-full-v0",
}


def test_the_table_is_the_one_that_was_compared_with_d4rl():
    content = files("diffpolicy.data.d4rl").joinpath("catalogue.csv").read_bytes()
    digest = hashlib.sha256(content.replace(b"\r\n", b"\n")).hexdigest()
    assert digest == "07b8df2ab7759ecd73a747360bb03692cc6519c863a0b1bcb9224b2ed014e3db"


def test_counts_and_names():
    assert len(DATASETS) == 155
    assert len({info.file for info in DATASETS.values()}) == 155
    scored = [info for info in DATASETS.values() if info.has_score]
    assert len(scored) == 147
    assert all(info.ref_max > info.ref_min for info in scored)
    assert {info.id for info in DATASETS.values() if not info.has_score} == WITHOUT
    start = [name.split("-")[0] for name in DATASETS]
    counts = dict.fromkeys(("halfcheetah", "hopper", "walker2d"), 17)
    counts |= {"ant": 18, "antmaze": 12, "maze2d": 14, "kitchen": 3, "bullet": 24}
    counts |= {"flow": 4, "carla": 3, "minigrid": 2}
    assert {agent: start.count(agent) for agent in counts} == counts
    assert sum(start.count(agent) for agent in ("pen", "door", "hammer", "relocate")) == 24


@pytest.mark.parametrize(
    ("ids", "low", "high"),
    [
        ("halfcheetah-medium-v0 halfcheetah-full-replay-v2", -280.178953, 12135.0),
        ("hopper-medium-v2 hopper-expert-v1", -20.272305, 3234.3),
        ("walker2d-medium-expert-v2", 1.629008, 4592.3),
        ("ant-expert-v2", -325.6, 3879.7),
        ("antmaze-umaze-v0 antmaze-large-play-v2", 0.0, 1.0),
        ("kitchen-complete-v0 kitchen-mixed-v0 kitchen-partial-v0", 0.0, 4.0),
        ("maze2d-open-v0", 0.01, 20.66),
        ("maze2d-umaze-v1", 23.85, 161.86),
        ("maze2d-medium-v1", 13.13, 277.39),
        ("maze2d-large-v1", 6.7, 273.99),
        ("maze2d-umaze-dense-v1", 68.537689, 193.66285642381482),
        ("maze2d-medium-dense-v1", 44.264742, 297.4552547777125),
        ("maze2d-large-dense-v1", 30.569041, 303.4857382709002),
        ("pen-human-v0 pen-expert-v1", 96.262799, 3076.8331017826877),
        ("door-cloned-v1", -56.512833, 2880.5693087298737),
        ("hammer-expert-v1", -274.856578, 12794.134825156867),
        ("relocate-human-v1", -6.425911, 4233.877797728884),
    ],
)
def test_reference_scores_are_exact(ids, low, high):
    for name in ids.split():
        assert (lookup(name).ref_min, lookup(name).ref_max) == (low, high)
        assert normalized_score(name, low) == 0.0
        assert normalized_score(name, high) == 100.0


@pytest.mark.parametrize(
    ("name", "steps", "file"),
    [
        ("hopper-medium-replay-v2", 1000, "hopper_medium_replay-v2.hdf5"),
        ("walker2d-medium-replay-v0", 1000, "walker_mixed.hdf5"),
        ("antmaze-umaze-v2", 700,
         f"{_ANT}_u-maze_noisy_multistart_False_multigoal_False_sparse_fixed.hdf5"),
        ("antmaze-medium-diverse-v2", 1000,
         f"{_ANT}_big-maze_noisy_multistart_True_multigoal_True_sparse_fixed.hdf5"),
        ("kitchen-complete-v0", 280, "mini_kitchen_microwave_kettle_light_slider-v0.hdf5"),
        ("maze2d-umaze-v1", 300, "maze2d-umaze-sparse-v1.hdf5"),
        ("maze2d-open-v0", 150, "maze2d-open-sparse.hdf5"),
        ("maze2d-large-dense-v1", 800, "maze2d-large-dense-v1.hdf5"),
        ("pen-cloned-v1", 100, "pen-cloned-v1.hdf5"),
        ("hammer-human-v0", 200, "hammer-v0_demos_clipped.hdf5"),
    ],
)  # fmt: skip
def test_files_and_step_limits(name, steps, file):
    assert lookup(name).max_episode_steps == steps
    assert lookup(name).file == file
    assert by_file(file) == lookup(name)


def test_scores_of_arrays():
    middle = (-20.272305 + 3234.3) / 2
    scores = normalized_score(
        "hopper-medium-v2", np.array([[-20.272305, middle], [3234.3, middle]])
    )
    np.testing.assert_allclose(scores, [[0, 50], [100, 50]], atol=1e-12)
    assert scores.dtype == np.float64
    assert isinstance(normalized_score("hopper-medium-v2", 3), float)
    assert isinstance(normalized_score("hopper-medium-v2", np.float32(3)), float)
    np.testing.assert_array_equal(normalized_score("kitchen-mixed-v0", [1, 4]), [25.0, 100.0])


def test_unknown_ids_and_missing_references():
    with pytest.raises(ValueError, match=r"no dataset 'hopper-medum-v2'; did you mean hopper-med"):
        lookup("hopper-medum-v2")
    for name in sorted(WITHOUT):
        with pytest.raises(ValueError, match=f"no reference returns for '{name}'"):
            normalized_score(name, 1.0)


def test_the_catalogue_needs_no_numpy():
    code = """
import sys
from diffpolicy.data.d4rl.catalogue import normalized_score
assert normalized_score("kitchen-mixed-v0", 1) == 25.0
assert not {"numpy", "h5py", "zarr"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_files_are_found(tmp_path, monkeypatch):
    (tmp_path / "mujoco").mkdir()
    for name in (
        "hopper_medium-v2.hdf5",
        "mujoco/walker2d_expert-v2.hdf5",
        "ours.h5",
        "readme.txt",
    ):
        (tmp_path / name).write_bytes(b"")
    assert find_dataset("hopper-medium-v2", tmp_path) == tmp_path / "hopper_medium-v2.hdf5"
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    assert find_dataset("walker2d-expert-v2").parent.name == "mujoco"
    assert find_dataset(str(tmp_path / "ours.h5")) == tmp_path / "ours.h5"
    names = ["hopper_medium-v2.hdf5", "ours.h5", "walker2d_expert-v2.hdf5"]
    assert [path.name for path in scan()] == names
    assert scan(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("name", "file", "other"),
    [
        ("hopper-medium-v2", "hopper_medium-v2.hdf5", "'mujoco/hopper/medium-v0'"),
        ("maze2d-large-dense-v1", "maze2d-large-dense-v1.hdf5", "'D4RL/pointmaze/large-dense-v2'"),
        ("antmaze-medium-play-v2", "sparse_fixed.hdf5", "'D4RL/antmaze/medium-play-v1'"),
        ("pen-cloned-v1", "pen-cloned-v1.hdf5", "'D4RL/pen/cloned-v2'"),
        ("kitchen-mixed-v0", "light-v0.hdf5", "'D4RL/kitchen/mixed-v2'"),
        ("flow-ring-random-v0", "flow-ring-v0-random.hdf5", None),
    ],
)
def test_a_missing_file_says_what_to_put_where(name, file, other, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.delenv("D4RL_DATASET_DIR", raising=False)
    with pytest.raises(FileNotFoundError) as caught:
        find_dataset(name)
    text = str(caught.value)
    assert text.startswith(f"{name!r} not found in ~/.d4rl/datasets (expected ")
    assert f"{file})." in text
    assert text.endswith("You do not need the d4rl package.")
    assert ("Minari" in text) == (other is not None)
    assert other is None or other in text
    with pytest.raises(FileNotFoundError, match="no file at"):
        find_dataset(tmp_path / "gone.hdf5")
