"""Observations as one array or by name: the same functions for both."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from diffpolicy.data import (
    EpisodeStore,
    Normalizer,
    Pair,
    PairExamples,
    PreferenceSet,
    Span,
    Transitions,
    Windows,
    check_store,
    convert,
    observation,
)
from diffpolicy.data.blocks import content_digest
from diffpolicy.data.observation import ObsField
from diffpolicy.data.returns import with_fields
from diffpolicy.data.transitions import check_fields

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


def camera_store(lengths, path=None, next_obs=False):
    """Two observations a step, of which each value says the row that it is of."""
    row = np.arange(sum(lengths))
    arrays = {
        "obs.state": np.stack([row, -row, 0 * row], 1).astype(np.float32),
        "obs.camera": np.broadcast_to(row[:, None, None, None], (len(row), 8, 8, 3)),
        "action": row[:, None].astype(np.float32),
        "reward": np.ones(len(row), np.float32),
        "terminated": np.isin(row, np.cumsum(lengths) - 1),
    }
    arrays["obs.camera"] = arrays["obs.camera"].astype(np.uint8)
    if next_obs:
        arrays |= {f"next_{k}": arrays[k] + 100 for k in ("obs.state", "obs.camera")}
    return EpisodeStore.from_arrays(arrays, np.cumsum(lengths), path=path)


def test_a_store_of_several_observations_keeps_their_types(tmp_path):
    path = tmp_path / "s.zarr"
    camera_store([9, 6], path).close()
    store = EpisodeStore.open(path)
    assert observation.obs_fields(store) == ["obs.camera", "obs.state"]
    found = observation.of_store(store)
    assert found["camera"] == ObsField((8, 8, 3), "uint8", "image")
    assert found["state"] == ObsField((3,), "float32", "state")
    assert store.read("obs.camera").dtype == np.uint8
    assert sorted(store.statistics) == ["action", "obs.state", "reward", "terminated"]
    assert [i for i in check_store(path) if i.severity == "error"] == []
    digest = content_digest(store)
    changed = camera_store([9, 6])
    assert content_digest(changed) == digest
    obs = observation.from_fields(store.episode(1))
    assert sorted(obs) == ["camera", "state"]
    assert sorted(observation.to_fields(obs)) == observation.obs_fields(store)
    plain = EpisodeStore.from_arrays({"obs": np.ones((4, 2)), "action": np.ones((4, 1))}, [4])
    assert observation.obs_fields(plain) == ["obs"]
    assert observation.of_store(plain) == ObsField((2,))
    assert observation.from_fields(plain.episode(0)).shape == (4, 2)


@pytest.mark.parametrize("in_memory", [True, False])
def test_windows_gather_images_by_index_in_their_type(in_memory):
    store = camera_store([5, 1, 9])
    modes = {"obs.state": "gaussian", "action": "minmax"}
    normalizer = Normalizer.fit(store.statistics, modes)
    sizes = {"horizon": 4, "n_obs_steps": 2, "n_action_steps": 2, "episodes": [0, 2]}
    windows = Windows(store, **sizes, normalizer=normalizer, in_memory=in_memory)
    assert windows.fields == ("obs.camera", "obs.state", "action")
    batch = windows.gather(torch.tensor([0, 7, 13, 7]))
    assert batch["obs.camera"].shape == (4, 2, 8, 8, 3)
    assert batch["obs.camera"].dtype == torch.uint8
    seen = [[0, 0], [7, 8], [13, 14], [7, 8]]  # rows, edges repeated
    assert batch["obs.camera"][:, :, 3, 3, 0].tolist() == seen
    state = normalizer.unnormalize("obs.state", batch["obs.state"])
    torch.testing.assert_close(state[..., 0], torch.tensor(seen).float())
    frames = windows._frames["obs.camera"]  # held once a row: never in padded runs
    assert frames.shape == (14, 8, 8, 3)
    assert frames.dtype == torch.uint8
    whole = Windows(store, **sizes, whole=True).gather(torch.tensor([0]))
    assert whole["obs.camera"].shape == (1, 4, 8, 8, 3)
    assert "obs.camera" in windows.identity()


@pytest.mark.parametrize("next_obs", [True, False])
def test_transitions_of_several_observations(next_obs):
    store = camera_store([4, 3], next_obs=next_obs)
    data = Transitions(store, horizon=2, n_obs_steps=2, discount=0.5)
    batch = data.to("cpu").gather(torch.tensor([0, 3]))
    assert batch["next_obs.camera"].dtype == torch.uint8
    assert batch["obs.camera"][:, :, 0, 0, 0].tolist() == [[0, 0], [2, 3]]
    last = 103 if next_obs else 3
    assert batch["next_obs.camera"][:, :, 0, 0, 0].tolist() == [[0, 1], [3, last]]
    assert batch["next_obs.state"][:, :, 0].tolist() == [[0, 1], [3, last]]


def test_one_image_is_an_observation_too():
    image = np.arange(6 * 4 * 4 * 3, dtype=np.uint8).reshape(6, 4, 4, 3)
    store = EpisodeStore.from_arrays({"obs": image, "action": np.ones((6, 1))}, [6])
    windows = Windows(store, horizon=2, n_obs_steps=1, n_action_steps=1)
    batch = windows.gather(torch.arange(6))
    np.testing.assert_array_equal(batch["obs"][:, 0], image)
    with pytest.raises(ValueError, match="not what follows each of"):
        check_fields(_with_one_next(camera_store([3])))


def _with_one_next(store):
    return with_fields(store, {"next_obs.state": store.read("obs.state")})


def test_preferences_give_all_observations_of_a_side():
    pair = Pair((Span(0, 0, 4),), (Span(1, 0, 4),))
    preferences = PreferenceSet(camera_store([6, 6]), [pair])
    examples = PairExamples(preferences, horizon=4, n_obs_steps=2, n_action_steps=2)
    batch = examples.gather(torch.tensor([0]))
    assert batch["chosen_obs.camera"].shape == (1, 2, 2, 8, 8, 3)
    chosen = observation.from_fields(batch, "rejected_obs")
    assert sorted(chosen) == ["camera", "state"]


def test_named_observations_are_converted(tmp_path, write_replay):
    rng = np.random.default_rng(0)
    arrays = {
        "state": rng.normal(size=(20, 3)).astype(np.float32),
        "img": rng.integers(0, 255, (20, 8, 8, 3), dtype=np.uint8),
        "action": rng.normal(size=(20, 2)).astype(np.float32),
    }
    write_replay(tmp_path / "r.zarr", arrays, [8, 20])
    fields = {"obs.joints": "state", "obs.camera": "img"}
    store = convert(tmp_path / "r.zarr", tmp_path / "s.zarr", fields=fields)
    assert sorted(store.fields) == ["action", "obs.camera", "obs.joints"]
    np.testing.assert_array_equal(store.read("obs.camera"), arrays["img"])


def test_vectors_stand_side_by_side_and_apart():
    fields = {"goal": ObsField((2,)), "joints": ObsField((3,), "float64")}
    obs = {"goal": torch.randn(4, 2, 2), "joints": torch.randn(4, 2, 3)}
    whole = observation.side_by_side(obs)
    assert whole.shape == (4, 2, 5)
    parts = observation.apart(whole, fields)
    assert all(torch.equal(parts[name], obs[name]) for name in fields)
    assert observation.side_by_side(whole) is observation.apart(whole, ObsField((5,))) is whole
    with pytest.raises(ValueError, match=r"'obs\.camera' has the shape"):
        observation.apart(whole, {"camera": ObsField((8, 8, 3), "uint8")})


def test_policies_see_float32_and_bytes_of_the_fields_they_know():
    fields = {"joints": ObsField((2,), "float64"), "camera": ObsField((4, 4, 3), "uint8")}
    given = {name: np.ones((3, *field.shape), field.dtype) for name, field in fields.items()}
    seen = observation.as_seen({"other": np.zeros(3), **given}, fields)
    blank = observation.zeros(fields, (3,))
    for one in (seen, blank):
        assert list(one) == ["joints", "camera"]
        assert {name: array.dtype.name for name, array in one.items()} == {
            "joints": "float32",
            "camera": "uint8",
        }
    with pytest.raises(ValueError, match="'joints'"):
        observation.as_seen({"joint": given["joints"], "camera": given["camera"]}, fields)


def test_normalisers_take_observations_of_both_kinds():
    scale, offset = {"obs.joints": torch.tensor([2.0])}, {"obs.joints": torch.tensor([1.0])}
    normalizer = Normalizer({"obs.joints": "minmax"}, scale, offset)
    obs = {"joints": torch.ones(2, 1), "camera": torch.ones(2, 4, 4, 3, dtype=torch.uint8)}
    normal = normalizer.normalize_obs(obs)
    assert normal["joints"].flatten().tolist() == [3, 3]
    assert normal["camera"] is obs["camera"]
    assert torch.equal(normalizer.unnormalize_obs(normal)["joints"], obs["joints"])


def test_a_field_named_task_is_one_and_an_integer_is_its_number():
    boxes = {
        "task": gym.spaces.Box(0, 9, (1,), np.int64),
        "words": gym.spaces.Box(-1, 1, (4,), np.float32),
    }
    found = observation.of_space(gym.spaces.Dict(boxes), roles={"words": "task"})
    assert {name: (field.role, field.is_id) for name, field in found.items()} == {
        "task": ("task", True),
        "words": ("task", False),
    }
    assert not observation.of_space(gym.spaces.Box(0, 9, (1,), np.int64)).is_id
