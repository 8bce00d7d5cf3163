"""Normalisers: known maps, round trips, constant dimensions, frozen parts."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from diffpolicy.data import EpisodeStore, Normalizer
from diffpolicy.data.normalize import MODES


def fitted(data, mode):
    store = EpisodeStore.from_arrays({"x": data}, [len(data)])
    return Normalizer.fit(store.statistics, {"x": mode})


def example():
    rng = np.random.default_rng(0)
    x = rng.normal([5, -3, 0, 7], [2, 100, 0.01, 0], size=(4000, 4)).astype(np.float32)
    x[:, 3] = 7 + np.float32(1e-6) * rng.integers(0, 2, 4000)  # constant but for rounding
    return x


def test_known_answers():
    x = example()
    y = fitted(x, "minmax").normalize("x", x)
    np.testing.assert_allclose(y[:, :3].min(0), -1, atol=1e-5)
    np.testing.assert_allclose(y[:, :3].max(0), 1, atol=1e-5)
    y = fitted(x, "gaussian").normalize("x", x)
    np.testing.assert_allclose(y[:, :3].mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(y[:, :3].std(0), 1, atol=1e-4)
    y = fitted(x, "quantile").normalize("x", x)
    np.testing.assert_allclose(np.quantile(y[:, :3], 0.01, axis=0), -1, atol=1e-4)
    np.testing.assert_allclose(np.quantile(y[:, :3], 0.99, axis=0), 1, atol=1e-4)
    np.testing.assert_array_equal(fitted(x, "identity").normalize("x", x), x)


@pytest.mark.parametrize("mode", ["minmax", "gaussian", "quantile"])
def test_constant_dimensions_become_zero_and_are_not_blown_up(mode):
    x = example()
    normalizer = fitted(x, mode)
    assert np.abs(normalizer.normalize("x", x)[:, 3]).max() < 2e-6
    # What differs from the constant later keeps its size.
    assert normalizer.normalize("x", x + 0.5)[0, 3] == pytest.approx(0.5, abs=1e-5)


def test_a_rare_flag_is_not_constant_for_quantiles():
    x = np.zeros((1000, 1), np.float32)
    x[3] = 1
    np.testing.assert_array_equal(np.unique(fitted(x, "quantile").normalize("x", x)), [-1, 1])


@settings(max_examples=60, deadline=None)
@given(
    data=hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 20), st.integers(1, 4)),
        elements=st.floats(-1e4, 1e4, width=32),
    ),
    mode=st.sampled_from(MODES),
    constant=st.booleans(),
)
def test_round_trip(data, mode, constant):
    if constant:
        data[:, 0] = data[0, 0]
    normalizer = fitted(data, mode)
    for x in (data, torch.from_numpy(data)):
        back = normalizer.unnormalize("x", normalizer.normalize("x", x))
        assert type(back) is type(x)
        assert back.dtype == x.dtype
        # float32 keeps a value to 6e-8 of the largest number on the way.
        scale = np.abs(data).max(axis=0) + np.ptp(data, axis=0) + 1
        assert (np.abs(np.asarray(back) - data) <= 1e-6 * scale).all()
    if mode == "minmax":
        slack = 1e-6 * (1 + np.abs(data).max(0) / np.maximum(np.ptp(data, axis=0), 1e-4))
        assert (np.abs(normalizer.normalize("x", data)) <= 1 + slack).all()


def test_batches_of_any_shape_and_images():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 2, 3)).astype(np.float32)
    normalizer = fitted(x, "minmax")
    y = normalizer.normalize("x", torch.from_numpy(x).view(5, 10, 2, 3))
    np.testing.assert_array_equal(y.view(50, 2, 3).numpy(), normalizer.normalize("x", x))


def test_only_minmax_is_unit_range():
    assert [m for m in MODES if fitted(example(), m).is_unit_range("x")] == ["minmax"]


def test_parts_survive_json_and_rebuild_exactly():
    x = example()
    store = EpisodeStore.from_arrays({"obs": x, "action": x[:, :2], "r": x[:, 0]}, [4000])
    modes = {"obs": "gaussian", "action": "minmax", "r": "quantile"}
    first = Normalizer.fit(store.statistics, modes)
    config = json.loads(json.dumps(first.to_config()))
    again = Normalizer.from_parts(config, first.to_tensors())
    assert again.fields == ("obs", "action", "r")
    assert again.modes == modes
    assert again.shape("r") == ()
    for field in first.fields:
        values = store.read(field)
        np.testing.assert_array_equal(
            first.normalize(field, values), again.normalize(field, values)
        )
    assert torch.equal(first.to("cpu").to_tensors()["obs.scale"], first.to_tensors()["obs.scale"])
    assert "obs: gaussian [4]" in repr(first)


def test_bad_input():
    x = example()
    normalizer = fitted(x, "minmax")
    statistics = EpisodeStore.from_arrays({"x": x}, [4000]).statistics
    with pytest.raises(ValueError, match=r"no field 'obs'.*\['x'\]"):
        normalizer.normalize("obs", x)
    with pytest.raises(ValueError, match=r"rows of shape \[4\]; got .*\[4000, 3\]"):
        normalizer.normalize("x", x[:, :3])
    with pytest.raises(ValueError, match="unknown mode of field 'x': 'maxmin'"):
        Normalizer.fit(statistics, {"x": "maxmin"})
    with pytest.raises(ValueError, match=r"no statistics for field 'obs'.*\['x'\]"):
        Normalizer.fit(statistics, {"obs": "minmax"})
    broken = {"x": statistics["x"] | {"max": [np.nan] * 4}}
    with pytest.raises(ValueError, match="not finite"):
        Normalizer.fit(broken, {"x": "minmax"})
    config, tensors = normalizer.to_config(), normalizer.to_tensors()
    with pytest.raises(ValueError, match=r"'x.offset' must have shape \[4\].* got none"):
        Normalizer.from_parts(config, {"x.scale": tensors["x.scale"]})
    with pytest.raises(ValueError, match=r"must have shape \[4\], as its config says; got \[3\]"):
        Normalizer.from_parts(config, tensors | {"x.scale": tensors["x.scale"][:3]})
    with pytest.raises(ValueError, match="finite and the scale not zero"):
        Normalizer.from_parts(config, tensors | {"x.scale": torch.zeros(4)})
