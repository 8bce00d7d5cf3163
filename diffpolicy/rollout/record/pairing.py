"""Pairs from stored rollouts: what was better, measured by their own rewards or by your function.

The pairs are a function of the store alone, so another score needs no new rollouts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from diffpolicy.data.preferences.file import read_contents
from diffpolicy.data.preferences.records import Record, Segment, Span, segments_of
from diffpolicy.data.preferences.scored import Choose, from_scores
from diffpolicy.data.preferences.set import PreferenceSet
from diffpolicy.data.store import EpisodeStore
from diffpolicy.settings import check_choice, check_range

ScoreFunction = Callable[[np.ndarray, np.ndarray], float]
Score = Literal["return", "max_reward", "success"]
MADE_BY, SOURCE = "rollouts", "rollout"


@dataclass(frozen=True)
class Scoring:
    """Which of several rollouts is the better one, and what of them makes a pair.

    Args:
        score: ``"return"``: ``sum_i discount^i r_i`` (i from 0 at the start of what is compared);
            ``"max_reward"``: the largest ``discount^i r_i``; ``"success"``: ``discount^i`` at the
            first success, 0 without one; or a function ``(rewards [T], successes [T] bool)
            -> float``, higher is better.
        discount: in (0, 1]; of the three named scores.
        after_end: what a rollout is taken to earn between its end and ``lookahead``: ``"zero"``
            nothing; ``"hold"`` its last reward (and success) again at every step. Where a success
            ends the episode and rewards are positive, ``"zero"`` makes a success the worst branch
            of all: use ``"hold"`` there.
        pairs: ``"best_worst"``: one pair per group of rollouts; ``"all"``: every ordered pair;
            ``"ranking"``: one ranking of those that differ.
        min_gap: pairs whose scores differ by less are ties and left out; so are equal scores.
        span: steps of a rollout that make up the segment; None: one chunk (``n_action_steps``) of
            a branch, which is where branches differ, and all of a whole episode.

    Raises:
        ValueError: a value out of its range.
    """

    score: Score | ScoreFunction = "return"
    discount: float = 1.0
    after_end: Literal["zero", "hold"] = "zero"
    pairs: Choose = "best_worst"
    min_gap: float = 0.0
    span: int | None = None

    def __post_init__(self) -> None:
        if not callable(self.score):
            check_choice("score", self.score, get_args(Score))
        check_choice("after_end", self.after_end, ("zero", "hold"))
        check_choice("pairs", self.pairs, get_args(Choose))
        check_range("(0, 1]", discount=self.discount)
        check_range("[0, inf)", min_gap=self.min_gap)
        check_range("[1, inf)", span=self.span)

    @property
    def name(self) -> str:
        """The score, for records."""
        if not callable(self.score):
            return str(self.score)
        return str(getattr(self.score, "__qualname__", type(self.score).__qualname__))

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; a function is named."""
        return {**vars(self), "score": self.name}

    def rate(
        self, rewards: np.ndarray, successes: np.ndarray, lookahead: int | None = None
    ) -> float:
        """The score of one rollout.

        Args:
            rewards: ``[T]``.
            successes: ``[T]`` bool.
            lookahead: steps it could have had, for ``after_end="hold"``; None: T.
        """
        rewards, successes = np.asarray(rewards, np.float64), np.asarray(successes, bool)
        if self.after_end == "hold" and lookahead is not None and lookahead > len(rewards):
            rest = (0, lookahead - len(rewards))
            rewards = np.pad(rewards, rest, mode="edge")
            successes = np.pad(successes, rest, mode="edge")
        if callable(self.score):
            return float(self.score(rewards, successes))
        weights = self.discount ** np.arange(len(rewards))
        if self.score == "return":
            return math.fsum(rewards * weights)
        if self.score == "max_reward":
            return float(np.max(rewards * weights))
        return float(weights[int(np.argmax(successes))]) if successes.any() else 0.0


def rollout_records(store: EpisodeStore, scoring: Scoring) -> list[Record]:
    """Pairs or rankings among the rollouts of a store made by ``rollout.record.branches``.

    Branches of one observation are compared with each other, or episodes of one seed. The
    ``info`` of a record holds ``scores`` (the best first), ``score`` (its name), ``seed`` and, for
    branches, ``step``.

    Args:
        store: with its attribute ``rollouts``.
        scoring: what is better.

    Raises:
        ValueError: another store; a score that is not finite; or successes are asked of an
            environment that never says.
    """
    made, attrs = rollouts_of(store), store.episode_attrs
    if scoring.score == "success" and attrs and not any(own["says_success"] for own in attrs):
        raise ValueError(
            f"{store.name}: the environment never said whether an episode succeeded "
            "(info['is_success']), so score='success' cannot tell anything; use 'return' or "
            "'max_reward'"
        )
    lookahead = made["settings"].get("lookahead", store.attrs["max_episode_steps"])
    rewards, successes = (store.read(name, 0, store.num_steps) for name in ("reward", "success"))
    ends, lengths = store.episode_ends.tolist(), store.episode_lengths.tolist()
    segments: list[Segment] = []
    scores, groups = [], []
    for episode, own in enumerate(attrs):
        if own["kind"] == "base":
            continue
        whole = lengths[episode] - own["start"]
        usual = int(made["n_action_steps"]) if own["kind"] == "branch" else whole
        rows = slice(ends[episode] - whole, ends[episode])
        segments.append((Span(episode, own["start"], min(scoring.span or usual, whole)),))
        scores.append(scoring.rate(rewards[rows], successes[rows], lookahead))
        groups.append((own["seed"], own.get("step")))
    ways: dict[str, Any] = {"choose": scoring.pairs, "min_gap": scoring.min_gap}
    records = from_scores(segments, scores, groups=groups, source=SOURCE, **ways)
    return [replace(record, info=_info(record, attrs, scoring.name)) for record in records]


def _info(record: Record, attrs: Sequence[Mapping[str, Any]], score: str) -> dict[str, Any]:
    own = attrs[segments_of(record)[0][0].episode]
    place = {name: own[name] for name in ("seed", "step") if name in own}
    return {**place, **record.info, "score": score}


def write_pairs(store: EpisodeStore, prefs_path: str | Path, scoring: Scoring) -> PreferenceSet:
    """Write the pairs of :func:`rollout_records` to a preference file, replacing an earlier one.

    Args:
        store: of rollouts, complete.
        prefs_path: the file; one that was not made by this function is left alone.
        scoring: what is better.

    Raises:
        FileExistsError: something else is there (a person's answers, say).
        ValueError: as :func:`rollout_records`; or no pair is left.
    """
    check_target(prefs_path)
    records = rollout_records(store, scoring)
    if not records:
        failed = list(rollouts_of(store)["failed"].values())
        why = f"; {len(failed)} rollouts failed, one with {failed[0]}" if failed else ""
        raise ValueError(
            f"no pairs: among the {store.num_episodes} rollouts of {store.name} no two that may be "
            f"compared differ in {scoring.name!r} by more than min_gap={scoring.min_gap}{why}"
        )
    attrs = {"made_by": MADE_BY, "scoring": scoring.to_dict()}
    preferences = PreferenceSet.create(prefs_path, store, attrs=attrs, overwrite=True)
    preferences.extend(records)
    return preferences


def check_target(prefs_path: str | Path) -> None:
    """Raise ``FileExistsError`` if a preference file holds what no rollout can replace."""
    path = Path(prefs_path)
    if not path.exists():
        return
    contents = read_contents(path)
    ours = contents.header.attrs.get("made_by") == MADE_BY
    records = [json.loads(line) for _, line in contents.lines]
    others = [one for one in records if one.get("source") != SOURCE and one["kind"] != "store"]
    if others or not ours:
        raise FileExistsError(
            f"{path} holds preferences that were not made from rollouts (answers of a person, "
            "say), which would be lost; choose another path"
        )


def rollouts_of(store: EpisodeStore) -> dict[str, Any]:
    """How the rollouts of a store were made: its attribute ``rollouts``.

    Raises:
        ValueError: it has none.
    """
    made: dict[str, Any] | None = store.attrs.get("rollouts")
    if made is None:
        raise ValueError(
            f"{store.name} was not made by `diffpolicy data prefs collect`: its episodes do not "
            "say what they branched from"
        )
    return made
