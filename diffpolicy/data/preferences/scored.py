"""Pairs and rankings of segments that have scores: returns, success, or anybody's numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from diffpolicy.data.preferences.records import Pair, Ranking, Record, Segment, Span, describe

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

    from numpy.typing import ArrayLike, NDArray

    from diffpolicy.data.store import EpisodeStore

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
    """Preferences for the segments with higher scores.

    Only segments of the same group are compared: what started elsewhere may have been easier.

    Args:
        segments: N segments.
        scores: `[N]`, higher is better.
        groups: N values; equal ones are a group. Default: all are one.
        choose: Of each group the best against the worst ("best_worst", one pair); each two
            ("all"); or one ranking of those that differ ("ranking").
        min_gap: The least difference of two scores, >= 0; equal scores are never compared. A
            ranking passes over segments that are closer than this to the one before.
        source: Kept with every record.

    Returns:
        Pairs or rankings, group by group as they first come; `info` holds `scores`, in the order
        of the record's segments.

    Raises:
        ValueError: Lengths that differ, scores that are not finite, or a setting that is none.
    """
    values = np.asarray(scores, np.float64)
    keys: Sequence[Hashable] = [0] * len(segments) if groups is None else groups
    if values.shape != (len(segments),) or len(keys) != len(segments):
        raise ValueError(
            f"{len(segments)} segments need as many scores and groups; got scores "
            f"{list(values.shape)} and {len(keys)} groups"
        )
    if not np.isfinite(values).all():
        place = int(np.argmin(np.isfinite(values)))
        raise ValueError(
            f"scores must be finite; got {values[place]} for {describe(segments[place])}"
        )
    if not (np.isfinite(min_gap) and min_gap >= 0):
        raise ValueError(f"min_gap must be a finite number >= 0; got {min_gap}")
    if choose not in ("best_worst", "all", "ranking"):
        raise ValueError(f"choose must be 'best_worst', 'all' or 'ranking'; got {choose!r}")
    members: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        members.setdefault(key, []).append(place)
    return [
        _record([segments[i] for i in row], values[row].tolist(), source, choose)
        for places in members.values()
        for row in _orders(places, values, choose, min_gap)
    ]


def by_return(
    store: EpisodeStore,
    *,
    score: EpisodeScore | Scorer = "return",
    group: str | None = "seed",
    discount: float = 1.0,
    choose: Choose = "best_worst",
    min_gap: float = 0.0,
) -> list[Record]:
    """Preferences between whole episodes that started from the same state.

    Args:
        store: Episodes, with a field `reward` of one number a step unless `score` is "success".
        score: "return", the sum of `discount^t r_t`; "max_reward"; "success", the episode's
            attribute of that name (1 or 0); or a function of the rewards `[T]` float64 and the
            episode's attributes.
        group: The episode attribute that says which episodes started alike, such as the
            environment's seed; None compares any two.
        discount: In (0, 1]; of "return".
        choose: See `from_scores`.
        min_gap: See `from_scores`.

    Returns:
        See `from_scores`; the source is the score's name.

    Raises:
        ValueError: No field or attribute of that name, or a setting that is none.
    """
    name, scorer = _scorer(score, discount)
    attrs = store.episode_attrs
    groups = None
    if group is not None:
        found = [_attribute(store, index, known, group) for index, known in enumerate(attrs)]
        groups = [json.dumps(value, sort_keys=True) for value in found]
    rewards = _rewards(store, needed=score != "success")
    if score == "success":
        for index, known in enumerate(attrs):
            _attribute(store, index, known, "success")
    values = [float(scorer(r, a)) for r, a in zip(rewards, attrs, strict=True)]
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


def _record(segments: list[Segment], scores: list[float], source: str, choose: Choose) -> Record:
    info = {"scores": scores}
    if choose == "ranking":
        return Ranking(tuple(segments), source, info)
    return Pair(segments[0], segments[1], source=source, info=info)


def _scorer(score: EpisodeScore | Scorer, discount: float) -> tuple[str, Scorer]:
    if not 0 < discount <= 1:
        raise ValueError(f"discount must be in (0, 1]; got {discount}")
    if discount != 1 and score != "return":
        raise ValueError(f"discount belongs to score='return'; got {discount} with {score!r}")
    if callable(score):
        return getattr(score, "__name__", "scorer"), score
    known: dict[str, Scorer] = {
        "return": lambda rewards, _: float(rewards @ discount ** np.arange(len(rewards))),
        "max_reward": lambda rewards, _: float(rewards.max()),
        "success": lambda _, attrs: float(bool(attrs["success"])),
    }
    if score not in known:
        raise ValueError(f"score must be one of {sorted(known)} or a function; got {score!r}")
    return score, known[score]


def _rewards(store: EpisodeStore, *, needed: bool) -> list[NDArray[np.float64]]:
    """The rewards of each episode; nothing of each if they are not needed."""
    if not needed:
        return [np.zeros(0)] * store.num_episodes
    spec = store.fields.get("reward")
    if spec is None or int(np.prod(spec.shape)) != 1:
        raise ValueError(
            f"scoring episodes needs a field 'reward' of one number a step; {store.name} has "
            f"{ ({name: list(field.shape) for name, field in store.fields.items()}) }. Convert or "
            "collect them with their rewards, or use score='success'"
        )
    rewards = store.read("reward", 0, store.num_steps).astype(np.float64).reshape(-1)
    return np.split(rewards, store.episode_ends[:-1])


def _attribute(store: EpisodeStore, episode: int, attrs: dict[str, Any], name: str) -> Any:
    if name not in attrs:
        raise ValueError(
            f"{store.name}: episode {episode} has no attribute {name!r}; it has {sorted(attrs)}"
        )
    return attrs[name]
