"""Stores made of D4RL files: kept for the next run, and not mistaken for something else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffpolicy.commands.stores import d4rl_store
from diffpolicy.config import ConfigError

h5py = pytest.importorskip("h5py", reason="needs the hdf5 extra")


def write(path: Path, rows: int) -> str:
    with h5py.File(path, "w") as file:
        file["observations"] = np.zeros((rows, 2), np.float32)
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
    write(tmp_path / "own.hdf5", 4000)
    with pytest.raises(ConfigError, match="another version"):
        d4rl_store(source, target, ())


def test_a_missing_file_says_how_ours_are_made(tmp_path):
    with pytest.raises(ConfigError, match="diffpolicy generate"):
        d4rl_store(str(tmp_path / "none.hdf5"), tmp_path / "none.zarr", ())
