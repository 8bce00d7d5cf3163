"""What a person is asked (which of two segments is better), and the file of the answers."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from diffpolicy.data.preferences.set import Pair, PreferenceSet, Segment, Span
from diffpolicy.data.store import EpisodeStore

Choice = Literal["left", "right", "tie", "skip"]
CHOICES: tuple[Choice, ...] = ("left", "right", "tie", "skip")


class Question(NamedTuple):
    """Two segments to compare.

    Attributes:
        key: names the pair, whichever side its segments are on.
        left: shown on the left.
        right: shown on the right.
    """

    key: str
    left: Segment
    right: Segment


def make_question(one: Segment, other: Segment) -> Question:
    """The question of a pair.

    Which segment is on the left is decided by a digest of the two: the same at every start, and
    telling nothing about which of them was called better before.
    """
    low, high = sorted((one, other))
    digest = hashlib.sha256(json.dumps([low, high]).encode()).digest()
    sides = (low, high) if digest[-1] % 2 == 0 else (high, low)
    return Question(digest[:8].hex(), *sides)


def questions_of(preferences: PreferenceSet) -> list[Question]:
    """The pairs of a file as questions, ties included, each once."""
    found = [make_question(p.chosen, p.rejected) for p in preferences.pairs(ties=True)]
    return list({question.key: question for question in found}.values())


def propose(store: EpisodeStore, *, count: int, length: int, seed: int = 0) -> list[Question]:
    """Unlabelled pairs of a store.

    Where several episodes have the same attribute ``seed`` only such are compared (they start
    alike, so what differs is what was done), else any two episodes. Both segments of a pair begin
    at the same step of their episodes in the first case, and anywhere in the second.

    Args:
        store: the episodes.
        count: at most so many pairs.
        length: steps of a segment; shorter where an episode is.
        seed: of the draws.

    Returns:
        The questions, each once.

    Raises:
        ValueError: fewer than two episodes, or a number below 1.
    """
    if min(count, length) < 1:
        raise ValueError(f"count and length must be at least 1, got {count} and {length}")
    if store.num_episodes < 2:
        raise ValueError(f"{store.name} has {store.num_episodes} episodes; two can be compared")
    rng = np.random.default_rng(seed)
    lengths = store.episode_lengths
    families: dict[Any, list[int]] = {}
    for episode, attrs in enumerate(store.episode_attrs):
        families.setdefault(attrs.get("seed"), []).append(episode)
    alike = [members for key, members in families.items() if key is not None and len(members) > 1]
    found: dict[str, Question] = {}
    for _ in range(20 * count):  # draws that come twice are not counted
        if len(found) == count:
            break
        if alike:
            members = alike[int(rng.integers(len(alike)))]
            pair = [members[i] for i in rng.choice(len(members), 2, replace=False)]
            latest = max(int(min(lengths[pair])) - length, 0)
            starts = [int(rng.integers(latest + 1))] * 2
        else:
            pair = rng.choice(store.num_episodes, 2, replace=False).tolist()
            starts = [int(rng.integers(max(int(lengths[e]) - length, 0) + 1)) for e in pair]
        one, other = (
            (Span(e, start, min(length, int(lengths[e]) - start)),)
            for e, start in zip(pair, starts, strict=True)
        )
        question = make_question(one, other)
        found.setdefault(question.key, question)
    return list(found.values())


class Answers:
    """The answers of a person, each on the disk before the next question is shown.

    They are pairs (ties included) of ``source="human"``; ``info`` holds ``question`` (its key),
    ``shown`` (where the chosen one was), ``seconds`` and ``when`` (UTC). A skipped question is not
    in the file: it comes again at the next start.

    Args:
        path: the preference file; made if it does not exist, else continued.
        store: the episodes.
        questions: all of them; those that the file answers are done.

    Raises:
        ValueError: no questions; or the file belongs to other episodes.
    """

    def __init__(
        self, path: str | Path, store: EpisodeStore, questions: Sequence[Question]
    ) -> None:
        if not questions:
            raise ValueError("there is nothing to ask: no pairs")
        self.path, self.store = Path(path), store
        self.questions = {question.key: question for question in questions}
        if self.path.exists():
            self._file = PreferenceSet.open(self.path, store)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = PreferenceSet.create(self.path, store, attrs={"made_by": "labelling"})
        self._skipped: list[str] = []
        self._order: list[str] = []  # of this session, for undo

    @property
    def answered(self) -> list[str]:
        """Keys of the questions that the file answers, the oldest first."""
        keys = [record.info.get("question") for record in self._file.records]
        return [key for key in keys if key in self.questions]

    @property
    def skipped(self) -> int:
        """Questions skipped since the start."""
        return len(self._skipped)

    @property
    def undoable(self) -> bool:
        """Whether there is an answer of this session to take back."""
        return bool(self._order)

    def waiting(self) -> list[Question]:
        """The questions that are still open, in their order."""
        done = {*self.answered, *self._skipped}
        return [question for key, question in self.questions.items() if key not in done]

    def answer(self, key: str, choice: Choice, seconds: float) -> None:
        """Keeps an answer; when this returns it is on the disk.

        Raises:
            KeyError: no such question.
            ValueError: it was answered already, or the choice is none.
        """
        question = self.questions[key]
        if choice not in CHOICES:
            raise ValueError(f"choice must be one of {list(CHOICES)}, got {choice!r}")
        if key in self.answered or key in self._skipped:
            raise ValueError("this question is answered already; undo takes an answer back")
        if choice == "skip":
            self._skipped.append(key)
        else:
            self._file.append(_pair(question, choice, seconds))
        self._order.append(key)

    def undo(self) -> str:
        """Takes the last answer of this session back, also from the file; the question's key.

        Raises:
            ValueError: there is none.
        """
        if not self._order:
            raise ValueError("there is no answer of this session to take back")
        key = self._order[-1]
        if key in self._skipped:
            self._skipped.remove(key)
        else:
            self._drop_last()
        self._order.pop()
        return key

    def _drop_last(self) -> None:
        # The rest is written beside the file and put in its place at once, so that whatever
        # happens one of the two whole files is there.
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        partial.unlink(missing_ok=True)
        try:
            rest = PreferenceSet.create(partial, self.store, attrs=self._file.attrs)
            rest.extend(self._file.records[:-1])
            os.replace(partial, self.path)
        finally:
            partial.unlink(missing_ok=True)
        self._file = PreferenceSet.open(self.path, self.store)


def _pair(question: Question, choice: Choice, seconds: float) -> Pair:
    chosen, rejected = question.left, question.right
    if choice == "right":
        chosen, rejected = rejected, chosen
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    info = {"question": question.key, "seconds": round(seconds, 2), "when": now}
    shown = {} if choice == "tie" else {"shown": choice}
    return Pair(chosen, rejected, choice == "tie", source="human", info={**info, **shown})
