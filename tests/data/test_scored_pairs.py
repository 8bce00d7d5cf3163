"""Pairs of what has scores: the better one first, and only where it makes sense to compare."""

import numpy as np
import pytest

from diffpolicy.data import EpisodeStore
from diffpolicy.data.preferences.records import Pair, Ranking, Span
from diffpolicy.data.preferences.scored import by_return, from_scores
from diffpolicy.data.preferences.set import PreferenceSet

SEGMENTS = [(Span(0, i, 1),) for i in range(6)]


@pytest.fixture
def store(tmp_path):
    """Two starts of three episodes; the rewards of an episode are all its number."""
    fields = {"obs": (1,), "action": (1,), "reward": ()}
    with EpisodeStore.create(tmp_path / "s.zarr", fields) as made:
        for index, length in enumerate((2, 2, 2, 3, 1, 2)):
            zeros, rewards = np.zeros((length, 1)), np.full(length, float(index))
            arrays = {"obs": zeros, "action": zeros, "reward": rewards}
            made.append(arrays, seed=index // 3, success=index == 1)
    return EpisodeStore.open(tmp_path / "s.zarr")


def order(records):
    return [(r.chosen[0].start, r.rejected[0].start) for r in records]


def test_who_is_compared():
    scores, groups = [1.0, 3.0, 2.0, 5.0, 5.0, 4.5], "aaabbb"
    best = from_scores(SEGMENTS, scores, groups=groups)
    assert order(best) == [(1, 0), (3, 5)]
    assert best[0] == Pair(SEGMENTS[1], SEGMENTS[0], source="score", info={"scores": [3.0, 1.0]})
    every = from_scores(SEGMENTS, scores, groups=groups, choose="all")
    assert order(every) == [(1, 2), (1, 0), (2, 0), (3, 5), (4, 5)]  # 3 and 4 are equal
    ranked = from_scores(SEGMENTS, scores, groups=groups, choose="ranking")
    assert [[s[0].start for s in r.items] for r in ranked] == [[1, 2, 0], [3, 5]]
    assert isinstance(ranked[0], Ranking)
    assert ranked[1].info == {"scores": [5.0, 4.5]}
    assert order(from_scores(SEGMENTS, scores)) == [(3, 0)]


def test_least_gap():
    scores = [0.0, 0.4, 1.0, 1.5]
    some = SEGMENTS[:4]
    assert order(from_scores(some, scores, choose="all", min_gap=1.0)) == [(3, 1), (3, 0), (2, 0)]
    (ranking,) = from_scores(some, scores, choose="ranking", min_gap=0.6)
    assert ranking.info == {"scores": [1.5, 0.4]}
    assert from_scores(some, scores, min_gap=2.0) == []
    assert from_scores(some[:1], scores[:1]) == []
    assert from_scores([], []) == []


def test_episodes_that_start_alike(store):
    pairs = by_return(store, choose="all")
    assert [(p.chosen[0].episode, p.rejected[0].episode) for p in pairs] == [
        (2, 1),
        (2, 0),
        (1, 0),
        (5, 3),
        (5, 4),
        (3, 4),
    ]
    assert pairs[0].chosen == (Span(2, 0, 2),)
    assert {p.source for p in pairs} == {"return"}
    assert PreferenceSet(store, pairs).agreement(store.read("reward")) == 1.0
    (only,) = by_return(store, group=None)
    assert (only.chosen[0].episode, only.rejected[0].episode) == (5, 0)


def test_scores_of_episodes(store):
    info = [p.info["scores"] for p in by_return(store, discount=0.5)]
    assert info == [[3.0, 0.0], [7.5, 4.0]]  # 5 (1 + 1/2), 4
    assert [p.info["scores"] for p in by_return(store, score="max_reward")] == [[2, 0], [5, 3]]
    (success,) = by_return(store, score="success")
    assert (success.chosen[0].episode, success.info["scores"]) == (1, [1.0, 0.0])
    all_of_it = by_return(store, score="success", choose="all")
    assert [p.rejected[0].episode for p in all_of_it] == [0, 2]

    def shortness(rewards, attrs):
        return -len(rewards) - attrs["seed"]

    found = by_return(store, score=shortness)
    assert [(p.source, p.info["scores"]) for p in found] == [("shortness", [-2.0, -4.0])]


def test_bad_input(store):
    with pytest.raises(ValueError, match=r"6 segments need as many scores .* \[2\] and 6 groups"):
        from_scores(SEGMENTS, [1.0, 2.0])
    with pytest.raises(
        ValueError, match=r"scores must be finite; got nan for episode 0 steps 2..2"
    ):
        from_scores(SEGMENTS[:3], [1.0, 2.0, np.nan])
    with pytest.raises(ValueError, match="min_gap must be at least 0, got -1"):
        from_scores([], [], min_gap=-1)
    with pytest.raises(ValueError, match=r"unknown choose 'best'; expected one of best_worst"):
        from_scores([], [], choose="best")
    with pytest.raises(ValueError, match=r"episode 0 has no attribute 'start'; it has \['seed', "):
        by_return(store, group="start")
    with pytest.raises(ValueError, match=r"discount must be in \(0, 1\], got 0"):
        by_return(store, discount=0)
    with pytest.raises(ValueError, match=r"unknown score 'length'; expected one of return"):
        by_return(store, score="length")
    bare = EpisodeStore.from_arrays({"obs": np.zeros((2, 1))}, [1, 2])
    with pytest.raises(ValueError, match=r"needs a field 'reward' .*it has|needs a field 'reward'"):
        by_return(bare, group=None)
    with pytest.raises(ValueError, match="episode 0 has no attribute 'success'"):
        by_return(bare, group=None, score="success")
