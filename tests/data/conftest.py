from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from diffpolicy.data import EpisodeStore

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def pusht_zip() -> Path:
    path = SHARED / "pusht" / "pusht_lowdim.zarr.zip"
    if not path.exists():
        pytest.skip("the Push-T demonstrations (../shared/data/pusht) are not here")
    return path


@pytest.fixture
def make_episode() -> Callable[..., dict[str, np.ndarray]]:
    """Episode `index`: a function of its number, so that any part of it can be recognised."""

    def make(index: int, length: int | None = None, obs: int = 3, action: int = 2) -> dict:
        rng = np.random.default_rng(index)
        length = length or int(rng.integers(1, 30))
        return {
            "obs": rng.normal(size=(length, obs)).astype(np.float32),
            "action": rng.uniform(-1, 1, size=(length, action)).astype(np.float32),
        }

    return make


@pytest.fixture
def make_store(tmp_path: Path, make_episode: Callable) -> Callable[..., Path]:
    """A finished store of some episodes, in small chunks."""

    def make(count: int = 6, length: int = 10, name: str = "demo.zarr", **changes) -> Path:
        path = tmp_path / name
        fields = {"obs": (3,), "action": (2,)}
        with EpisodeStore.create(path, fields, chunk_rows=16) as store:
            for index in range(count):
                arrays = make_episode(index, length)
                if index in changes.get("replace", {}):
                    arrays |= changes["replace"][index]
                store.append(arrays, seed=index, success=index % 2 == 0)
        return path

    return make


@pytest.fixture
def write_replay() -> Callable[..., None]:
    """Write a replay buffer as Diffusion Policy does: zarr format 2, a directory or a zip."""
    import numcodecs
    import zarr
    from zarr.storage import LocalStore, ZipStore

    def write(path: Path, arrays: dict[str, np.ndarray], ends: list[int]) -> None:
        backend = ZipStore(path, mode="w") if path.suffix == ".zip" else LocalStore(path)
        root = zarr.create_group(backend, zarr_format=2)
        blosc = numcodecs.Blosc("zstd", clevel=5, shuffle=2)
        for name, values in arrays.items():
            chunks = (16, *values.shape[1:])
            root.create_array(f"data/{name}", data=values, chunks=chunks, compressors=blosc)
        root.create_array("meta/episode_ends", data=np.array(ends, np.int64), compressors=blosc)
        backend.close()

    return write
