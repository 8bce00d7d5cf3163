"""Windows against a plain loop, step by step."""

import itertools

import numpy as np
import pytest
import torch
from data_array_store import ArrayStore
from hypothesis import given, settings
from hypothesis import strategies as st

from diffpolicy.data import EpisodeStore, Normalizer, Windows, split_episodes


def numbered_store(lengths):
    """Every value says which episode and step it is of: obs [episode, step], action [row]."""
    episode = np.repeat(np.arange(len(lengths)), lengths)
    step = np.concatenate([np.arange(n) for n in lengths])
    obs = np.stack([episode, step], 1).astype(np.float32)
    action = np.arange(len(step), dtype=np.float32)[:, None]
    return ArrayStore({"obs": obs, "action": action}, np.cumsum(lengths))


def looped_windows(store, horizon, n_obs_steps, pad_after, episodes):
    """The same by hand: one window after the other, one step after the other."""
    result = []
    for e in episodes:
        arrays = store.episode(e)
        length = len(arrays["obs"])
        for now in range(length):
            steps = range(now - (n_obs_steps - 1), now - (n_obs_steps - 1) + horizon)
            if steps[-1] > length - 1 + pad_after:
                continue
            rows = [min(max(s, 0), length - 1) for s in steps]
            obs = arrays["obs"][rows[:n_obs_steps]]
            valid = [0 <= s < length for s in steps]
            result.append((e, now, obs, arrays["action"][rows], np.array(valid)))
    return result


@st.composite
def window_cases(draw):
    horizon = draw(st.integers(1, 8))
    n_obs_steps = draw(st.integers(1, horizon))
    limit = horizon - n_obs_steps
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    episodes = draw(st.none() | st.sets(st.integers(0, len(lengths) - 1), min_size=1).map(sorted))
    return {
        "lengths": lengths,
        "horizon": horizon,
        "n_obs_steps": n_obs_steps,
        "n_action_steps": draw(st.integers(1, limit + 1)),
        "pad_after": draw(st.none() | st.integers(0, limit)),
        "episodes": episodes,
    }


@settings(max_examples=60, deadline=None)
@given(case=window_cases(), in_memory=st.booleans())
def test_windows_are_those_of_a_plain_loop(case, in_memory):
    store = numbered_store(case.pop("lengths"))
    pad = case["horizon"] - case["n_obs_steps"] if case["pad_after"] is None else case["pad_after"]
    chosen = range(store.num_episodes) if case["episodes"] is None else case["episodes"]
    want = looped_windows(store, case["horizon"], case["n_obs_steps"], pad, chosen)
    if not want:
        with pytest.raises(ValueError, match="no window of"):
            Windows(store, **case, in_memory=in_memory)
        return
    windows = Windows(store, **case, in_memory=in_memory)
    assert len(windows) == len(want)
    order = torch.randperm(len(want), generator=torch.Generator().manual_seed(0))
    batch = windows.gather(order)
    for place, index in enumerate(order.tolist()):
        episode, now, obs, action, valid = want[index]
        np.testing.assert_array_equal(batch["obs"][place].numpy(), obs)
        np.testing.assert_array_equal(batch["action"][place].numpy(), action)
        np.testing.assert_array_equal(batch["valid"][place].numpy(), valid)
        assert windows.locate(index) == (episode, now)


@settings(max_examples=40, deadline=None)
@given(case=window_cases())
def test_every_step_is_now_exactly_once_and_no_window_crosses_an_episode(case):
    case["pad_after"] = None
    lengths = case.pop("lengths")
    store = numbered_store(lengths)
    windows = Windows(store, **case)
    batch = windows.gather(torch.arange(len(windows)))
    now = batch["obs"][:, -1].long().tolist()
    chosen = range(len(lengths)) if case["episodes"] is None else case["episodes"]
    assert sorted(map(tuple, now)) == [(e, s) for e in chosen for s in range(lengths[e])]
    # The action at now is the one taken there; all of a window is of one episode.
    rows = batch["action"][..., 0].long()
    ends = torch.from_numpy(store.episode_ends)
    episode = torch.searchsorted(ends, rows, right=True)
    assert (episode == episode[:, :1]).all()
    assert (batch["obs"][..., 0].long() == episode[:, :1]).all()
    starts = ends - torch.from_numpy(store.episode_lengths)
    at_now = rows[:, case["n_obs_steps"] - 1]
    assert torch.equal(at_now - starts[episode[:, 0]], batch["obs"][:, -1, 1].long())


def test_diffusion_policys_set_of_windows():
    # Its sampler takes every start from -(To-1) to T - H + (Ta-1), with H=16, To=2, Ta=8.
    lengths = [30, 8, 7, 16]
    windows = Windows(
        numbered_store(lengths), horizon=16, n_obs_steps=2, n_action_steps=8, pad_after=7
    )
    want = [(e, start + 1) for e, n in enumerate(lengths) for start in range(-1, n - 16 + 7 + 1)]
    assert [windows.locate(i) for i in range(len(windows))] == want
    assert {e for e, _ in want} == {0, 1, 3}  # the episode of 7 steps is too short


def test_real_push_t_windows(pusht_zip):
    with EpisodeStore.open(pusht_zip) as store:
        sizes = {"horizon": 16, "n_obs_steps": 2, "n_action_steps": 8}
        fields = ("state", "action")
        windows = Windows(store, **sizes, fields=fields)
        assert len(windows) == store.num_steps == 25_650
        assert len(Windows(store, **sizes, fields=fields, pad_after=7)) == 25_650 - 206 * 7
        index = 12_345
        episode, now = windows.locate(index)
        want = store.episode(episode)
        batch = windows.gather(torch.tensor([index]))
        np.testing.assert_array_equal(batch["state"][0].numpy(), want["state"][now - 1 : now + 1])


def test_values_come_normalised(make_store):
    store = EpisodeStore.open(make_store())
    normalizer = Normalizer.fit(store.statistics, {"obs": "gaussian", "action": "minmax"})
    sizes = {"horizon": 4, "n_obs_steps": 2, "n_action_steps": 2}
    raw, normal = Windows(store, **sizes), Windows(store, **sizes, normalizer=normalizer)
    index = torch.tensor([0, 17, 59, 17])
    for name in ("obs", "action"):
        want = normalizer.normalize(name, raw.gather(index)[name])
        torch.testing.assert_close(normal.gather(index)[name], want)
        assert normal.gather(index)[name].dtype == torch.float32
    with pytest.raises(
        ValueError, match=r"normaliser rows of 'obs' in .* must be \[3\], got \[2\]"
    ):
        Windows(numbered_store([5]), **sizes, normalizer=normalizer)


def test_streamed_equals_in_memory_and_batches_are_copies(make_store):
    store = EpisodeStore.open(make_store(count=30, length=33))
    normalizer = Normalizer.fit(store.statistics, {"obs": "minmax"})
    cases = {"horizon": 8, "n_obs_steps": 3, "n_action_steps": 4, "normalizer": normalizer}
    chosen = [28, 3, 11]
    memory = Windows(store, **cases, episodes=chosen, in_memory=True)
    disk = Windows(store, **cases, episodes=chosen, in_memory=False)
    assert memory.in_memory
    assert not disk.in_memory
    index = torch.randint(len(memory), (64,), generator=torch.Generator().manual_seed(1))
    before = memory.gather(index)
    for name, values in disk.gather(index).items():
        assert torch.equal(values, before[name])
    memory.gather(index)["obs"].zero_()
    assert torch.equal(memory.gather(index)["obs"], before["obs"])
    assert "streamed" in repr(disk)


def test_small_blocks_read_the_same(make_store, monkeypatch):
    store = EpisodeStore.open(make_store(count=9, length=21))
    sizes = {"horizon": 5, "n_obs_steps": 2, "n_action_steps": 2}
    whole = Windows(store, **sizes)
    monkeypatch.setattr("diffpolicy.data.blocks.BLOCK_BYTES", 100)
    pieces = Windows(store, **sizes)
    index = torch.arange(len(whole))
    assert torch.equal(whole.gather(index)["obs"], pieces.gather(index)["obs"])


def test_memory_decides(make_store, monkeypatch):
    store = EpisodeStore.open(make_store())
    sizes = {"horizon": 4, "n_obs_steps": 2, "n_action_steps": 2}
    assert Windows(store, **sizes).in_memory
    monkeypatch.setattr("diffpolicy.data.windows.free_memory", lambda: 1000)
    assert not Windows(store, **sizes).in_memory


def test_moving_keeps_the_windows():
    windows = Windows(numbered_store([9, 4]), horizon=4, n_obs_steps=2, n_action_steps=2)
    index = torch.arange(len(windows))
    moved = windows.to("cpu")
    assert moved is not windows
    for name, values in moved.gather(index).items():
        assert torch.equal(values, windows.gather(index)[name])
    meta = windows.to("meta")  # a device without storage: shapes must survive the move
    assert meta.gather(index.to("meta"))["action"].shape == (13, 4, 1)


def test_fields_keep_their_shape():
    x = np.arange(60, dtype=np.float32).reshape(10, 3, 2)
    store = EpisodeStore.from_arrays({"grid": x, "action": x[:, 0], "reward": x[:, 0, 0]}, [10])
    windows = Windows(
        store,
        horizon=4,
        n_obs_steps=2,
        n_action_steps=1,
        fields=("grid", "action", "reward"),
    )
    batch = windows.gather(torch.tensor([0, 5]))
    assert {k: tuple(v.shape) for k, v in batch.items()} == {
        "grid": (2, 2, 3, 2),
        "action": (2, 4, 2),
        "reward": (2, 4),
        "valid": (2, 4),
    }
    np.testing.assert_array_equal(batch["grid"][1].numpy(), x[4:6])


def test_split_is_by_episode_and_repeatable():
    train, val = split_episodes(206, 0.02, seed=42)
    assert len(val) == 4
    assert sorted([*train, *val]) == list(range(206))
    for a, b in itertools.pairwise([split_episodes(206, 0.02, seed=42) for _ in range(2)]):
        np.testing.assert_array_equal(a[0], b[0])
    assert not np.array_equal(split_episodes(206, 0.02, seed=43)[1], val)
    assert [len(part) for part in split_episodes(2, 0.001, 0)] == [1, 1]
    assert [len(part) for part in split_episodes(2, 0.99, 0)] == [1, 1]
    assert [len(part) for part in split_episodes(5, 0, 0)] == [5, 0]
    with pytest.raises(ValueError, match=r"val_fraction must be in \[0, 1\)"):
        split_episodes(10, 1.0, 0)
    with pytest.raises(ValueError, match="cannot be split"):
        split_episodes(1, 0.5, 0)


def test_bad_input(make_store):
    store = EpisodeStore.open(make_store())
    sizes = {"horizon": 8, "n_obs_steps": 2, "n_action_steps": 4}
    for change, message in (
        ({"n_action_steps": 8}, r"n_action_steps must be in \[1, 7\], got 8"),
        ({"n_action_steps": 0}, r"n_action_steps must be in \[1, 7\], got 0"),
        ({"n_obs_steps": 9}, r"n_obs_steps must be in \[1, 8\], got 9"),
        ({"pad_after": 7}, r"pad_after must be in \[0, 6\]"),
        ({"episodes": [6]}, r"each in 0\.\.5; got \[6\]"),
        ({"episodes": [1, 1]}, "episodes must be different"),
        ({"fields": ("state", "action")}, r"no field \['state'\].*data convert"),
        ({"horizon": 40, "pad_after": 0}, "no window of 40 steps fits: the longest of 6"),
        ({"episodes": []}, "no window"),
    ):
        with pytest.raises(ValueError, match=message):
            Windows(store, **(sizes | change))
    windows = Windows(store, **sizes)
    with pytest.raises(IndexError):
        windows.gather(torch.tensor([60]))
    with pytest.raises(IndexError, match="window 60 of 60"):
        windows.locate(60)


def test_values_that_are_not_finite_name_their_row(make_store):
    import zarr

    path = make_store()
    zarr.open_group(path, mode="r+")["data/action"][23, 1] = np.inf
    with pytest.raises(ValueError, match=r"'action' is not finite at row 23 \(episode 2\)"):
        Windows(EpisodeStore.open(path), horizon=8, n_obs_steps=2, n_action_steps=4)
