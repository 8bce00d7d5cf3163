"""Pairs and rankings of segments that have scores: returns, success, or anybody's numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffpolicy.data.preferences.records import (
    Pair,
    Ranking,
    Record,
    Segment,
    Span,
    describe,
    episode_values,
)
from diffpolicy.data.store import EpisodeStore
from diffpolicy.settings import check_choice, check_range

Choose = Literal["best_worst", "all", "ranking"]
EpisodeScore = Literal["return", "max_reward", "success"]
Scorer = Callable[["NDArray[np.float64]", dict[str, Any]], float]


def from_scores(
    segments: Sequence[Segment],
    scores: ArrayLike,
    *,
    groups: Sequence[Hashable] | None = None,
    choose: Choose = "best_worst",
    min_gap: float = 0.0,
    source: str = "score",
) -> list[Record]:
    """Prefer the segments with higher scores.

    Only segments of the same group are compared: what started elsewhere may have been easier.

    Args:
        segments: N segments.
        scores: ``[N]``, higher is better.
        groups: N values; equal ones are a group. Default: all are one.
        choose: Of each group the best against the worst ("best_worst", one pair); each two
            ("all"); or one ranking of those that differ ("ranking").
        min_gap: The least difference of two scores, >= 0; equal scores are never compared. A
            ranking passes over segments that are closer than this to the one before.
        source: Kept with every record.

    Returns:
        Pairs or rankings, group by group as they first come; ``info`` holds ``scores``, in the
        order of the record's segments.

    Raises:
        ValueError: Lengths that differ, scores that are not finite, or a setting that is none.
    """
    values = np.asarray(scores, np.float64)
    keys: Sequence[Hashable] = [0] * len(segments) if groups is None else groups
    if values.shape != (len(segments),) or len(keys) != len(segments):
        got = f"scores {list(values.shape)} and {len(keys)} groups"
        raise ValueError(f"{len(segments)} segments need as many scores and groups; got {got}")
    for place in np.flatnonzero(~np.isfinite(values)).tolist():
        where = describe(segments[place])
        raise ValueError(f"scores must be finite; got {values[place]} for {where}")
    check_range("[0, inf)", min_gap=min_gap)
    check_choice("choose", choose, get_args(Choose))
    members: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        members.setdefault(key, []).append(place)
    made: list[Record] = []
    for places in members.values():
        for row in _orders(places, values, choose, min_gap):
            items, info = tuple(segments[i] for i in row), {"scores": values[row].tolist()}
            if choose == "ranking":
                made.append(Ranking(items, source, info))
            else:
                made.append(Pair(items[0], items[1], source=source, info=info))
    return made


def by_return(
    store: EpisodeStore,
    *,
    score: EpisodeScore | Scorer = "return",
    group: str | None = "seed",
    discount: float = 1.0,
    choose: Choose = "best_worst",
    min_gap: float = 0.0,
) -> list[Record]:
    """Compare whole episodes that started from the same state.

    Args:
        store: Episodes, with a field ``reward`` of one number a step unless ``score`` is "success".
        score: "return", the sum of ``discount^t r_t``; "max_reward"; "success", the episode's
            attribute of that name (1 or 0); or a function of the rewards ``[T]`` float64 and the
            episode's attributes.
        group: The episode attribute that says which episodes started alike, such as the
            environment's seed; None compares any two.
        discount: In (0, 1]; of "return" alone.
        choose: See ``from_scores``.
        min_gap: See ``from_scores``.

    Returns:
        See ``from_scores``; the source is the score's name.

    Raises:
        ValueError: No field or attribute of that name, or a setting that is none.
    """
    check_range("(0, 1]", discount=discount)
    if not callable(score):
        check_choice("score", score, get_args(EpisodeScore))
    name = getattr(score, "__name__", "scorer") if callable(score) else score
    groups = None
    if group is not None:
        groups = [json.dumps(v, sort_keys=True) for v in episode_values(store, group)]
    values = _episode_scores(store, score, discount)
    whole: list[Segment] = [(Span(i, 0, n),) for i, n in enumerate(store.episode_lengths.tolist())]
    return from_scores(whole, values, groups=groups, choose=choose, min_gap=min_gap, source=name)


def _orders(
    places: list[int], values: NDArray[np.float64], choose: Choose, min_gap: float
) -> Iterator[list[int]]:
    """Places of a group in the order of preference, as many lists as there are records."""
    order = sorted(places, key=lambda i: -values[i])

    def apart(a: int, b: int) -> bool:
        return bool(values[a] > values[b] and values[a] - values[b] >= min_gap)

    if choose == "all":
        yield from ([a, b] for i, a in enumerate(order) for b in order[i + 1 :] if apart(a, b))
        return
    row = order[:1]
    for place in order[1:] if choose == "ranking" else order[-1:]:
        row += [place] if apart(row[-1], place) else []
    if len(row) > 1:
        yield row


def _episode_scores(
    store: EpisodeStore, score: EpisodeScore | Scorer, discount: float
) -> list[float]:
    if score == "success":
        return [float(bool(value)) for value in episode_values(store, "success")]
    rewards = _rewards(store)
    if score == "return":
        return [float(r @ discount ** np.arange(len(r))) for r in rewards]
    if score == "max_reward":
        return [float(r.max()) for r in rewards]
    return [float(score(r, attrs)) for r, attrs in zip(rewards, store.episode_attrs, strict=True)]


def _rewards(store: EpisodeStore) -> list[NDArray[np.float64]]:
    """The rewards of each episode."""
    spec = store.fields.get("reward")
    if spec is None or spec.size != 1:
        raise ValueError(
            f"scoring episodes needs a field 'reward' of one number a step; {store.name} has "
            f"{store.fields}. Use score='success', or collect them with their rewards"
        )
    rewards = store.read("reward", 0, store.num_steps).astype(np.float64).reshape(-1)
    return np.split(rewards, store.episode_ends[:-1])
