"""Transitions against a plain loop, step by step."""

import numpy as np
import pytest
import torch
from data_array_store import ArrayStore
from hypothesis import given, settings
from hypothesis import strategies as st

from diffpolicy.data import EpisodeStore, Normalizer, Transitions, Windows


def numbered_store(
    lengths, *, flags=None, next_obs=True, truncated=True, column=False, kind=ArrayStore
):
    """Every value says which row it is of; ``flags`` per row: 0, 1 terminated, 2 truncated, 3."""
    count = sum(lengths)
    rng = np.random.default_rng(0)
    flags = np.zeros(count, int) if flags is None else np.asarray(flags)
    row = np.arange(count, dtype=np.float32)
    arrays = {
        "obs": np.stack([row, -row], 1),
        "action": row[:, None],
        "reward": rng.normal(size=(count, 1) if column else count).astype(np.float32),
        "terminated": flags % 2 == 1,
    }
    if truncated:
        arrays["truncated"] = flags >= 2
    if next_obs:  # another number than the next row's, so that it shows which was taken
        arrays["next_obs"] = np.stack([row + 1000, row], 1)
    return kind(arrays, np.cumsum(lengths))


def pieces(arrays, episode, stop):
    """Rows of an episode, cut after every flag that ends it."""
    piece = []
    for row in range(episode, stop):
        piece.append(row)
        flagged = arrays["terminated"][row] or arrays.get("truncated", arrays["terminated"])[row]
        if flagged or row == stop - 1:
            yield piece
            piece = []


def looped_transitions(store, horizon, n_obs_steps, discount, scale, shift, episodes):
    """The same by hand: one transition after the other, one step after the other."""
    arrays = {name: store.read(name) for name in store.fields}
    ends = store.episode_ends
    for e in episodes:
        for piece in pieces(arrays, ends[e - 1] if e else 0, ends[e]):
            terminal = bool(arrays["terminated"][piece[-1]])
            observations = [arrays["obs"][row] for row in piece]
            if "next_obs" in arrays:
                observations.append(arrays["next_obs"][piece[-1]])
            elif terminal:
                observations.append(arrays["obs"][piece[-1]])
            for now in range(len(piece)):
                reward, n = 0.0, 0
                while n < horizon - n_obs_steps + 1 and now + n + 1 < len(observations):
                    value = float(arrays["reward"][piece[now + n]].item()) * scale + shift
                    reward += discount**n * value
                    n += 1
                if n == 0:
                    continue
                over = terminal and now + n == len(piece)
                history = range(1 - n_obs_steps, 1)
                plan = [now + 1 - n_obs_steps + i for i in range(horizon)]
                yield {
                    "obs": [observations[max(now + k, 0)] for k in history],
                    "action": [
                        arrays["action"][piece[min(max(p, 0), len(piece) - 1)]] for p in plan
                    ],
                    "reward": reward,
                    "next_obs": [observations[max(now + n + k, 0)] for k in history],
                    "discount": 0.0 if over else discount**n,
                    "valid": [0 <= p < len(piece) for p in plan],
                }


@st.composite
def cases(draw):
    horizon = draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    flag = st.sampled_from([0, 0, 0, 0, 1, 2, 3])
    return {
        "lengths": lengths,
        "flags": draw(st.lists(flag, min_size=sum(lengths), max_size=sum(lengths))),
        "next_obs": draw(st.booleans()),
        "truncated": draw(st.booleans()),
        "column": draw(st.booleans()),
        "horizon": horizon,
        "n_obs_steps": draw(st.integers(1, horizon)),
        "discount": draw(st.sampled_from([0.5, 0.99, 1.0])),
        "episodes": draw(
            st.none() | st.sets(st.integers(0, len(lengths) - 1), min_size=1).map(sorted)
        ),
    }


@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_transitions_are_those_of_a_plain_loop(case):
    names = ("lengths", "flags", "next_obs", "truncated", "column")
    store = numbered_store(**{name: case.pop(name) for name in names})
    episodes = case.pop("episodes")
    arguments = {**case, "reward_scale": 2.0, "reward_shift": -1.0}
    chosen = range(store.num_episodes) if episodes is None else episodes
    expected = list(looped_transitions(store, *arguments.values(), chosen))
    if not expected:
        with pytest.raises(ValueError, match="no transition"):
            Transitions(store, **arguments, episodes=episodes)
        return
    data = Transitions(store, **arguments, episodes=episodes)
    assert len(data) == len(expected)
    batch = data.gather(torch.arange(len(data)))
    for name in ("obs", "action", "next_obs"):
        assert batch[name].dtype == torch.float32
        np.testing.assert_array_equal(batch[name], [e[name] for e in expected])
    np.testing.assert_array_equal(batch["valid"], [e["valid"] for e in expected])
    np.testing.assert_allclose(
        batch["reward"], [e["reward"] for e in expected], rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(batch["discount"], [e["discount"] for e in expected], rtol=1e-6)
    backwards = data.gather(torch.arange(len(data)).flip(0))
    assert all(torch.equal(backwards[k], v.flip(0)) for k, v in batch.items())


def test_three_ends_by_hand():
    """Discount 1/2, two-step plans: a terminal end, a time-out, and the data's own end."""
    flags = [0, 0, 1, 0, 0, 2, 0, 0, 0]
    store = numbered_store([3, 3, 3], flags=flags)
    reward = torch.from_numpy(store.read("reward").astype(np.float32))
    batch = Transitions(store, horizon=2, discount=0.5).gather(torch.arange(9))
    two = [reward[i] + 0.5 * reward[i + 1] for i in (0, 1, 3, 4, 6, 7)]
    expected = torch.stack([*two[:2], reward[2], *two[2:4], reward[5], *two[4:], reward[8]])
    torch.testing.assert_close(batch["reward"], expected)
    assert batch["discount"].tolist() == [0.25, 0, 0, 0.25, 0.25, 0.5, 0.25, 0.25, 0.5]
    assert batch["next_obs"][:, 0, 0].tolist() == [2, 1002, 1002, 5, 1005, 1005, 8, 1008, 1008]
    assert batch["action"][:, :, 0].tolist()[1:3] == [[1, 2], [2, 2]]
    assert batch["valid"].tolist()[1:3] == [[True, True], [True, False]]


def test_a_time_out_without_next_obs_is_left_out():
    """As D4RL's qlearning_dataset does; a terminal step needs no next observation."""
    store = numbered_store([3, 3], flags=[0, 0, 2, 0, 0, 1], next_obs=False)
    data = Transitions(store, horizon=1)
    assert [data.locate(i) for i in range(len(data))] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    batch = data.gather(torch.arange(5))
    assert batch["obs"][:, 0, 0].tolist() == [0, 1, 3, 4, 5]
    assert batch["next_obs"][:4, 0, 0].tolist() == [1, 2, 4, 5]
    np.testing.assert_allclose(batch["discount"], [0.99, 0.99, 0.99, 0.99, 0], rtol=1e-6)


def test_observations_and_plans_are_those_of_windows():
    flags = [0] * 6 + [1] + [0] * 3 + [1]
    store = numbered_store([7, 4], flags=flags, kind=EpisodeStore.from_arrays)
    shape = {"horizon": 5, "n_obs_steps": 3}
    windows = Windows(store, **shape, n_action_steps=1)
    data = Transitions(store, **shape)
    assert len(data) == len(windows)
    rows = torch.arange(len(data))
    mine, theirs = data.gather(rows), windows.gather(rows)
    for name in ("obs", "action", "valid"):
        assert torch.equal(mine[name], theirs[name])
    assert [data.locate(i) for i in rows.tolist()] == [windows.locate(i) for i in rows.tolist()]


def test_next_observations_are_normalised_as_observations():
    store = numbered_store([4], flags=[0, 0, 0, 2])
    scale, offset = torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])
    normalizer = Normalizer({"obs": "gaussian"}, {"obs": scale}, {"obs": offset})
    plain = Transitions(store, horizon=2).gather(torch.arange(4))
    scaled = Transitions(store, horizon=2, normalizer=normalizer).gather(torch.arange(4))
    for name in ("obs", "next_obs"):
        torch.testing.assert_close(scaled[name], plain[name] * scale + offset)
    assert torch.equal(scaled["action"], plain["action"])


def test_next_obs_is_read_across_blocks(monkeypatch):
    monkeypatch.setattr("diffpolicy.data.blocks.BLOCK_BYTES", 1)
    store = numbered_store([3, 5, 1, 6])
    batch = Transitions(store, horizon=1).gather(torch.arange(15))
    ends = [2, 7, 8, 14]
    expected = [1000 + r if r in ends else r + 1 for r in range(15)]
    assert batch["next_obs"][:, 0, 0].tolist() == expected


def test_a_copy_on_a_device_gives_the_same_batches():
    store = numbered_store([5, 3])
    data, rows = Transitions(store, horizon=2), torch.tensor([7, 0, 3])
    moved = data.to("cpu")
    assert all(torch.equal(v, moved.gather(rows)[k]) for k, v in data.gather(rows).items())


def with_changes(**changes):
    store = numbered_store([3, 2])
    arrays = {name: store.read(name) for name in store.fields}
    for name, change in changes.items():
        if change is None:
            del arrays[name]
        else:
            arrays[name] = change
    return ArrayStore(arrays, store.episode_ends)


NAN = np.array([0, 0, np.nan, 0, 0], np.float32)


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"reward": None}, {}, r"no field \['reward'\].*Actor-critics learn from"),
        ({"terminated": None}, {}, r"no field \['terminated'\]"),
        ({"reward": NAN}, {}, "'reward' is not finite at row 2"),
        ({"next_obs": np.stack([NAN, NAN], 1)}, {}, "'next_obs' is not finite at row 2"),
        ({"obs": np.stack([NAN, NAN], 1)}, {}, "'obs' is not finite at row 2"),
        ({"reward": np.zeros((5, 2), np.float32)}, {}, "'reward' must be one number per step"),
        ({"next_obs": np.zeros((5, 3), np.float32)}, {}, "rows of next_obs in .* must be"),
        ({}, {"horizon": 0}, "horizon must be at least 1"),
        ({}, {"n_obs_steps": 3}, r"n_obs_steps must be in \[1, 2\]"),
        ({}, {"discount": 0.0}, r"discount must be in \(0, 1\], got 0.0"),
        ({}, {"reward_scale": -1.0}, "reward_scale must be positive"),
        ({}, {"episodes": [2]}, "each in 0..1"),
    ],
)
def test_bad_input_is_named(changes, arguments, message):
    store = with_changes(**changes)
    with pytest.raises(ValueError, match=message):
        Transitions(store, **{"horizon": 2, **arguments})


def test_there_is_no_transition_beyond_the_last():
    data = Transitions(numbered_store([3]), horizon=1)
    with pytest.raises(IndexError):
        data.gather(torch.tensor([3]))
    with pytest.raises(IndexError, match="transition 3 of 3"):
        data.locate(3)
