"""Batches of preferences against a plain loop over the steps of the segments."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffpolicy.data import EpisodeStore, Normalizer
from diffpolicy.data.preferences.examples import LabelExamples, PairExamples
from diffpolicy.data.preferences.records import Label, Pair, Ranking, Span
from diffpolicy.data.preferences.set import PreferenceSet


def numbered_store(lengths):
    """Every value says which episode and step it is of: obs [episode, step], action [row]."""
    episode = np.repeat(np.arange(len(lengths)), lengths)
    step = np.concatenate([np.arange(n) for n in lengths])
    obs = np.stack([episode, step], 1).astype(np.float32)
    action = np.arange(len(step), dtype=np.float32)[:, None]
    return EpisodeStore.from_arrays({"obs": obs, "action": action}, np.cumsum(lengths))


def windows_of(store, segment, horizon, n_obs_steps, n_action_steps):
    """The windows of a segment by hand: (obs, action, scored positions) of each."""
    found = []
    for episode, start, length in segment:
        arrays = store.episode(episode)
        last = len(arrays["obs"]) - 1
        for now in range(start, start + length, n_action_steps):
            first = now - (n_obs_steps - 1)
            rows = [min(max(first + k, 0), last) for k in range(horizon)]
            executed = range(now, now + n_action_steps)
            steps = [first + k in executed and first + k < start + length for k in range(horizon)]
            found.append((arrays["obs"][rows[:n_obs_steps]], arrays["action"][rows], steps))
    return found


@st.composite
def cases(draw):
    horizon = draw(st.integers(1, 6))
    n_obs_steps = draw(st.integers(1, horizon))
    lengths = draw(st.lists(st.integers(3, 12), min_size=2, max_size=4))

    def segment():
        spans = []
        for _ in range(draw(st.integers(1, 2))):
            episode = draw(st.integers(0, len(lengths) - 1))
            start = draw(st.integers(0, lengths[episode] - 1))
            spans.append(Span(episode, start, draw(st.integers(1, lengths[episode] - start))))
        return tuple(spans)

    return {
        "lengths": lengths,
        "pairs": [(segment(), segment()) for _ in range(draw(st.integers(1, 3)))],
        "sizes": {
            "horizon": horizon,
            "n_obs_steps": n_obs_steps,
            "n_action_steps": draw(st.integers(1, horizon - n_obs_steps + 1)),
        },
        "windows": draw(st.none() | st.integers(1, 4)),
    }


@settings(max_examples=30, deadline=None)
@given(case=cases())
def test_examples_are_those_of_a_plain_loop(case):
    store = numbered_store(case["lengths"])
    pairs = [Pair(a, b, tie=a == b) for a, b in case["pairs"]]
    examples = PairExamples(
        PreferenceSet(store, pairs), **case["sizes"], windows=case["windows"], ties=True
    )
    batch = examples.gather(torch.arange(len(examples)))
    assert len(examples) == len(pairs) * examples.parts
    seen = {side: [[] for _ in pairs] for side in ("chosen", "rejected")}
    for row in range(len(examples)):
        pair, part = divmod(row, examples.parts)
        for side in seen:
            want = windows_of(store, getattr(pairs[pair], side), **case["sizes"])
            kept = want[part % min(examples.parts, len(want)) :: examples.parts]
            obs, action, steps = (batch[f"{side}_{n}"][row] for n in ("obs", "action", "steps"))
            assert len(kept) <= len(obs) <= (case["windows"] or 99)
            padding = [(*kept[0][:2], [False] * case["sizes"]["horizon"])] * (len(obs) - len(kept))
            for place, (o, a, s) in enumerate(kept + padding):
                np.testing.assert_array_equal(obs[place].numpy(), o)
                np.testing.assert_array_equal(action[place].numpy(), a)
                assert steps[place].tolist() == s
            seen[side][pair] += action[..., 0][steps].tolist()
    for side, rows in seen.items():  # every step of a segment is scored, and no other
        for pair, found in zip(pairs, rows, strict=True):
            spans = getattr(pair, side)
            want = PreferenceSet(store).rows(spans).tolist()
            assert set(found) == set(want)
            assert examples.parts > 1 or sorted(found) == sorted(want)


def test_shapes_types_and_normalisation():
    store = numbered_store([10, 10, 10])
    normalizer = Normalizer.fit(store.statistics, {"obs": "minmax", "action": "minmax"})
    long, short = (Span(0, 5, 5), Span(1, 0, 3)), (Span(2, 0, 2),)
    kept = PreferenceSet(store, [Pair(short, long), Pair(long, short, tie=True)])
    sizes = {"horizon": 4, "n_obs_steps": 2, "n_action_steps": 3}
    examples = PairExamples(kept, **sizes, normalizer=normalizer)
    batch = examples.gather(torch.tensor([0, 0]))
    assert {k: (*v.shape, v.dtype) for k, v in batch.items()} == {
        "chosen_obs": (2, 3, 2, 2, torch.float32),
        "chosen_action": (2, 3, 4, 1, torch.float32),
        "chosen_steps": (2, 3, 4, torch.bool),
        "rejected_obs": (2, 3, 2, 2, torch.float32),
        "rejected_action": (2, 3, 4, 1, torch.float32),
        "rejected_steps": (2, 3, 4, torch.bool),
    }
    assert batch["rejected_steps"][0].int().tolist() == [[0, 1, 1, 1], [0, 1, 1, 0], [0, 1, 1, 1]]
    assert batch["chosen_steps"][0].int().tolist() == [[0, 1, 1, 0], [0] * 4, [0] * 4]
    action = normalizer.unnormalize("action", batch["rejected_action"][0])
    assert action[..., 0].round().int().tolist() == [[4, 5, 6, 7], [7, 8, 9, 9], [10, 10, 11, 12]]
    with_ties = PairExamples(kept, **sizes, ties=True)
    assert with_ties.gather(torch.tensor([1, 0]))["tie"].tolist() == [True, False]
    assert repr(examples) == "PairExamples(1 examples, up to 3 windows of 4 steps in a segment)"
    assert torch.equal(
        examples.to("cpu").gather(torch.tensor([0]))["chosen_obs"], batch["chosen_obs"][:1]
    )


def test_unused_episodes_are_not_read():
    store = numbered_store([5, 5, 5])
    far = PairExamples(
        PreferenceSet(store, [Pair((Span(2, 1, 1),), (Span(0, 2, 1),))]),
        horizon=1,
        n_obs_steps=1,
        n_action_steps=1,
    )
    assert len(far._windows) == 10
    batch = far.gather(torch.tensor([0]))
    assert batch["chosen_obs"].flatten().tolist() == [2, 1]
    assert batch["rejected_obs"].flatten().tolist() == [0, 2]


def test_rankings_and_labels():
    store = numbered_store([9])
    items = tuple((Span(0, start, 3),) for start in (6, 0, 3))
    kept = PreferenceSet(store, [Ranking(items), Label(items[1], good=False)])
    sizes = {"horizon": 3, "n_obs_steps": 1, "n_action_steps": 3}
    assert len(PairExamples(kept, **sizes)) == 3
    assert len(PairExamples(kept, **sizes, rankings="adjacent")) == 2
    single = LabelExamples(kept, **sizes, pairs=False)
    batch = single.gather(torch.tensor([0]))
    assert {k: tuple(v.shape) for k, v in batch.items()} == {
        "obs": (1, 1, 1, 2),
        "action": (1, 1, 3, 1),
        "steps": (1, 1, 3),
        "good": (1,),
    }
    assert batch["good"].tolist() == [False]
    both = LabelExamples(kept, **sizes, windows=1)
    assert both.gather(torch.arange(7))["good"].tolist() == [False, *[True, False] * 3]
    assert both.gather(torch.arange(7))["action"][:, 0, 0, 0].tolist() == [0, 6, 0, 6, 3, 0, 3]


def test_long_segments_in_parts():
    store = numbered_store([40])
    kept = PreferenceSet(store, [Label((Span(0, 0, 10),), True), Label((Span(0, 20, 4),), False)])
    sizes = {"horizon": 2, "n_obs_steps": 1, "n_action_steps": 2}
    examples = LabelExamples(kept, **sizes, windows=2)
    assert (examples.parts, len(examples)) == (3, 6)
    batch = examples.gather(torch.arange(6))
    first = batch["action"][..., 0, 0].int().tolist()
    assert first == [[0, 6], [2, 8], [4, 4], [20, 20], [22, 22], [20, 20]]
    assert batch["steps"].any(-1).int().tolist() == [[1, 1], [1, 1], *[[1, 0]] * 4]
    assert batch["good"].tolist() == [True] * 3 + [False] * 3
    assert LabelExamples(kept, **sizes, windows=5).parts == 1


def test_bad_input():
    store = numbered_store([9])
    sizes = {"horizon": 3, "n_obs_steps": 1, "n_action_steps": 3}
    tie = PreferenceSet(store, [Pair((Span(0, 0, 3),), (Span(0, 3, 3),), tie=True)])
    with pytest.raises(ValueError, match=r"has no pairs to learn from \(ties are left out unless"):
        PairExamples(tie, **sizes)
    with pytest.raises(ValueError, match="has no good or bad labels to learn from"):
        LabelExamples(tie, **sizes)
    with pytest.raises(ValueError, match=r"windows must be at least 1, got 0"):
        PairExamples(tie, **sizes, ties=True, windows=0)
    with pytest.raises(ValueError, match=r"n_action_steps must be in \[1, 3\]"):
        PairExamples(tie, horizon=3, n_obs_steps=1, n_action_steps=4, ties=True)
    examples = PairExamples(tie, **sizes, ties=True)
    for index in (-1, 1):
        with pytest.raises(IndexError):
            examples.gather(torch.tensor([index]))
