"""Stores made of D4RL files: kept for the next run, and not mistaken for something else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffpolicy.commands.stores import d4rl_store
from diffpolicy.data import EpisodeStore, load_d4rl
from diffpolicy.settings import ConfigError

h5py = pytest.importorskip("h5py", reason="needs the hdf5 extra")


def write(path: Path, rows: int, seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    with h5py.File(path, "w") as file:
        file["observations"] = rng.normal(size=(rows, 2)).astype(np.float32)
        file["actions"] = np.zeros((rows, 1), np.float32)
        file["rewards"] = np.ones(rows, np.float32)
        file["terminals"] = np.arange(rows) % 10 == 9
        file["timeouts"] = np.zeros(rows, bool)
    return str(path)


def test_the_store_is_made_once_and_outlives_its_file(tmp_path):
    source, target = write(tmp_path / "own.hdf5", 40), tmp_path / "own.zarr"
    assert d4rl_store(source, target, ()).num_episodes == 4
    Path(source).unlink()
    assert d4rl_store(source, target, ()).num_episodes == 4


def test_another_file_or_other_transforms_are_noticed(tmp_path):
    source, target = write(tmp_path / "own.hdf5", 40), tmp_path / "own.zarr"
    d4rl_store(source, target, ())
    with pytest.raises(ConfigError, match="with the transforms"):
        d4rl_store(source, target, ("reward_shift:1",))


@pytest.mark.parametrize(("rows", "seed"), [(4000, 0), (40, 1)])
def test_a_file_that_was_made_anew_is_read_anew(tmp_path, caplog, rows, seed):
    source, target = write(tmp_path / "own.hdf5", 40), tmp_path / "own.zarr"
    old = d4rl_store(source, target, ()).read("obs")
    write(tmp_path / "own.hdf5", rows, seed)  # with seed 1: of the same size
    new = d4rl_store(source, target, ()).read("obs")
    assert len(new) == rows
    assert not np.array_equal(new, old)
    assert "has changed since" in caplog.text
    kept = EpisodeStore.open(tmp_path / "own.old1.zarr")  # it may be all that is left of the old
    np.testing.assert_array_equal(kept.read("obs"), old)


def test_a_store_of_a_part_is_not_taken_for_the_whole(tmp_path):
    source, target = write(tmp_path / "own.hdf5", 40), tmp_path / "own.zarr"
    with load_d4rl(source) as file:
        file.to_store(target, exclude=[1])
    with pytest.raises(ConfigError, match=r"a part of 'own\.hdf5'"):
        d4rl_store(source, target, ())


def test_a_missing_file_says_how_ours_are_made(tmp_path):
    with pytest.raises(ConfigError, match=r"python scripts/generate\.py"):
        d4rl_store(str(tmp_path / "none.hdf5"), tmp_path / "none.zarr", ())
