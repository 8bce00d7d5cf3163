"""Observations as one array or by name: the same functions for both."""

import gymnasium as gym
import numpy as np
import pytest

from diffpolicy.data import observation
from diffpolicy.data.observation import ObsField

BOX = gym.spaces.Box(-1, 1, (3,), np.float32)
IMAGE = gym.spaces.Box(0, 255, (4, 4, 3), np.uint8)


def named(rows: int, start: float = 0.0) -> dict[str, np.ndarray]:
    return {
        "joints": start + np.arange(rows * 3, dtype=np.float32).reshape(rows, 3),
        "camera": np.full((rows, 4, 4, 3), int(start), np.uint8),
    }


def test_fields_of_spaces_say_shape_type_and_role():
    assert observation.of_space(BOX) == ObsField((3,), "float32", "state")
    space = gym.spaces.Dict({"camera": IMAGE, "desired_goal": BOX, "joints": BOX})
    found = observation.of_space(space, {"joints": "task"})
    assert {name: field.role for name, field in found.items()} == {
        "camera": "image",
        "desired_goal": "goal",
        "joints": "task",
    }
    assert found["camera"].dtype == "uint8"
    assert list(observation.by_store_field(found)) == [
        "obs.camera",
        "obs.desired_goal",
        "obs.joints",
    ]
    with pytest.raises(ValueError, match="entry 'mode' of the observation must be a Box"):
        observation.of_space(gym.spaces.Dict({"mode": gym.spaces.Discrete(3)}))


@pytest.mark.parametrize("make", [named, lambda n, s=0.0: named(n, s)["joints"]])
def test_take_put_stack_and_concat_are_inverse_to_each_other(make):
    obs, other = make(4), make(2, 100.0)
    rows = np.array([3, 1])
    mixed = observation.put(obs, rows, other)
    same = observation.take(mixed, rows)
    flat = observation.each(np.ravel, same)
    for a, b in zip(_arrays(flat), _arrays(observation.each(np.ravel, other)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    again = observation.stack([observation.take(obs, i) for i in range(4)])
    parts = observation.concat([observation.take(obs, [0, 1]), observation.take(obs, [2, 3])])
    for a, b, c in zip(_arrays(obs), _arrays(again), _arrays(parts), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
    assert observation.count(parts) == 4


def _arrays(obs):
    return list(obs.values()) if isinstance(obs, dict) else [obs]


def test_what_does_not_fit_is_named():
    fields = observation.of_space(gym.spaces.Dict({"joints": BOX, "camera": IMAGE}))
    observation.check(named(2), fields)
    with pytest.raises(ValueError, match=r"no 'joints'; there are .*; did you mean 'joint'"):
        observation.check({"joint": np.zeros((2, 3)), "camera": named(2)["camera"]}, fields)
    with pytest.raises(ValueError, match=r"'joints' must be \[N, 3\], got \[2, 2\]"):
        observation.check({**named(2), "joints": np.zeros((2, 2))}, fields)
    with pytest.raises(ValueError, match="by name"):
        observation.check(np.zeros((2, 3)), fields)
    with pytest.raises(ValueError, match="one array"):
        observation.check(named(2), ObsField((3,)))
