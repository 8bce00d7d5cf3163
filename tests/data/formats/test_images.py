"""Pictures of other formats become rows of bytes, and none of them changes."""

import numpy as np
import pytest

from diffpolicy.data import convert
from diffpolicy.data.fields import FieldSpec
from diffpolicy.data.formats.images import as_bytes, is_grid, is_picture
from diffpolicy.data.formats.robomimic import LOW_DIM_KEYS

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (12, 16, 20, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("shape", "dtype", "grid", "picture"),
    [
        ((16, 20, 3), "uint8", True, True),
        ((3, 16, 20), "float32", True, True),
        ((16, 20), "uint8", True, True),
        ((7, 7, 3), "uint8", True, True),
        ((16, 20, 1), "float32", True, False),  # depths
        ((9, 2), "uint8", False, False),
        ((2, 3, 3), "float32", True, False),  # rotations
        ((5,), "float32", False, False),
    ],
)
def test_what_is_a_picture(shape, dtype, grid, picture):
    spec = FieldSpec(shape, dtype)
    assert (is_grid(spec), is_picture(spec)) == (grid, picture)


def test_numbers_become_bytes_exactly():
    for rows in (IMAGES, IMAGES.astype(np.float32), np.moveaxis(IMAGES, -1, 1).astype(np.int64)):
        made = as_bytes("img", rows)
        assert made.dtype == np.uint8
        np.testing.assert_array_equal(made, IMAGES)
    depth = np.full((2, 16, 20, 1), 0.3, np.float32)
    np.testing.assert_array_equal(as_bytes("depth", depth), depth)
    for odd in (IMAGES / 255, IMAGES - 1.0, IMAGES * np.nan, IMAGES.astype(np.int64) + 256):
        with pytest.raises(ValueError, match=r"'img' has colours of .*, such as .* multiply"):
            as_bytes("img", odd)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_replay_buffers(tmp_path, write_replay, dtype):
    state, action = RNG.normal(size=(2, 12, 5)).astype(np.float32)
    arrays = {"img": IMAGES.astype(dtype), "state": state, "action": action}
    write_replay(tmp_path / "r.zarr", arrays, [5, 12])
    chosen = {"obs.image": "img", "obs.agent_pos": "state[:2]"}
    for fields, names in (({}, ("img", "state")), (chosen, ("image", "agent_pos"))):
        store = convert(tmp_path / "r.zarr", None, fields=fields)
        image, vector = (f"obs.{name}" for name in names)
        assert (store.fields[image].dtype, store.fields[image].is_image) == ("uint8", True)
        np.testing.assert_array_equal(store.read(image), IMAGES)
        width = store.fields[vector].size
        np.testing.assert_array_equal(store.read(vector), state[:, :width])
    assert width == 2


def test_robomimic(tmp_path):
    h5py = pytest.importorskip("h5py")
    state = dict(zip(LOW_DIM_KEYS, np.split(RNG.normal(size=(12, 8)), 4, 1), strict=True))
    with h5py.File(tmp_path / "r.hdf5", "w") as file:
        for index, rows in enumerate((slice(0, 5), slice(5, 12))):
            demo = file.create_group(f"data/demo_{index}")
            demo["actions"] = np.ones((12, 2))[rows]
            for name in ("obs/agentview_image", "next_obs/agentview_image"):
                demo[name] = IMAGES[rows]
            for key, values in state.items():
                demo[f"obs/{key}"] = values[rows]
    store = convert(tmp_path / "r.hdf5", None)
    np.testing.assert_array_equal(store.read("obs.agentview_image"), IMAGES)
    own = np.concatenate([state[key] for key in LOW_DIM_KEYS[1:]], 1)  # not the object's pose
    np.testing.assert_array_equal(store.read("obs.state"), own.astype(np.float32))
    assert "object" in store.attrs["left_out"]
