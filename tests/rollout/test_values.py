from __future__ import annotations

import numpy as np
import pytest
from gymnasium import spaces

from diffpolicy.data.fields import inward_bounds
from diffpolicy.data.observation import ObsField
from diffpolicy.rollout.env_spec import EnvSpec, EnvSpecError, describe
from diffpolicy.rollout.pool.slots import EnvSlot
from diffpolicy.rollout.pool.values import as_flag, as_observation, as_reward, as_success, to_native


def test_no_number_between_rounded_bounds_is_outside_and_none_nearer_was_left_out():
    rng = np.random.default_rng(0)
    low = np.concatenate([rng.normal(size=200), [-0.1, -1, -np.inf, 0.1, -1e300, 1e-50]])
    high = low + np.abs(rng.normal(size=len(low)))
    high[-4:] = [np.inf, 0.1, 1e300, 2e-50]
    inner, outer = inward_bounds(low, high)
    assert inner.dtype == outer.dtype == np.float32
    with np.errstate(over="ignore"):
        wider = np.nextafter(inner, np.float32(-np.inf)), np.nextafter(outer, np.float32(np.inf))
    fits = inner < outer
    assert fits.sum() == len(low) - 2  # [0.1, 0.1] and [1e-50, 2e-50] hold no float32
    assert (inner[fits] >= low[fits]).all()
    assert (outer[fits] <= high[fits]).all()
    assert ((wider[0] < low) | np.isinf(inner))[fits].all()
    assert ((wider[1] > high) | np.isinf(outer))[fits].all()
    assert inner[-3] == outer[-3] == np.float32(0.1)
    for bad in ([np.nan], 1), (0, [np.nan]), ([1], [-1]), ([np.inf], np.inf):
        with pytest.raises(ValueError, match="dimension 0"):
            inward_bounds(np.broadcast_to(bad[0], 1), np.broadcast_to(bad[1], 1))


def test_whole_numbers_are_rounded_and_single_precision_bounds_are_exact():
    whole = spaces.Box(0, 2, (5,), np.int64)
    got = to_native(np.float32([0.97, 1.5, 1.49, -0.4, 3.0]), whole)
    assert got.dtype == np.int64
    assert got.tolist() == [1, 2, 1, 0, 2]
    byte = to_native(np.float32([-3, 300]), spaces.Box(0, 255, (2,), np.uint8))
    assert byte.tolist() == [0, 255]
    double = spaces.Box(-0.1, 0.1, (3,), np.float64)
    got = to_native(np.float32([-0.1, 0.1, 0.05]), double)
    assert double.contains(got)
    assert got[2] == np.float64(np.float32(0.05))
    outside = to_native(np.float32([-0.2, 0.3, 0]), double)
    assert outside[0] == np.float64(np.float32(-0.2))  # not clipped: that is the environment's part


def test_what_can_be_read_is_read_and_the_rest_says_what_came():
    for one in (2, 2.0, np.float32(2), np.array([2.0]), np.array([[2]]), [2]):
        assert as_reward(one) == 2.0
    for bad in (np.nan, np.array([1.0, 2.0]), "1", None, np.array([])):
        with pytest.raises(ValueError, match="one finite number"):
            as_reward(bad)
    assert as_flag(np.array([True]), "terminated") is True
    with pytest.raises(ValueError, match="terminated='no'"):
        as_flag("no", "terminated")
    assert as_observation(np.ones((1, 3)), ObsField((3,))).shape == (3,)
    assert as_observation(7.0, ObsField((1,))).tolist() == [7]
    with pytest.raises(ValueError, match=r"shape \(2,\), not \(3,\)"):
        as_observation(np.ones(2), ObsField((3,)))


@pytest.mark.parametrize(
    ("info", "said"),
    [
        ({}, None),
        ({"success": None}, None),
        ({"success": np.nan}, None),
        ({"is_success": np.nan, "success": 1.0}, True),
        ({"is_success": np.array([0.0])}, False),
        ({"success": np.array([1.0])}, True),
        ({"success": np.bool_(False)}, False),
    ],
)
def test_success_is_what_was_said(info, said):
    assert as_success(info) is said


@pytest.mark.parametrize("said", ["false", 0.5, np.array([1, 0])])
def test_what_is_no_truth_value_is_no_success(said):
    with pytest.raises(ValueError, match=r"info\['success'\]=.*one bool is needed"):
        as_success({"success": said})


def test_an_environment_of_whole_numbers_and_double_bounds():
    slot = EnvSlot(EnvSpec("rollout_fake_envs:rollout_fakes/Odd-v0"))
    slot.reset(0)
    outcome = slot.step(np.float32([0.97, 1.6]))
    assert (outcome.reward, outcome.success, outcome.terminated) == (3.0, True, True)
    with pytest.raises(EnvSpecError, match="bounded by"):
        describe(EnvSpec("rollout_fake_envs:rollout_fakes/Odd-v0", {"low": 9}))
