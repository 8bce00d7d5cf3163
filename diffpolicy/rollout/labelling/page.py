"""A page that asks a person which of two clips is better, and the file of answers that it gives.

The page is a folder: an HTML file that any browser opens, and a film for every question. Nothing is
served and nothing is sent; the browser keeps the answers until the person downloads them.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffpolicy.data.preferences.records import Pair, Segment, Span
from diffpolicy.data.preferences.set import PreferenceSet
from diffpolicy.data.store import EpisodeStore
from diffpolicy.files import replaced_directory
from diffpolicy.rollout.labelling.clips import ClipRenderer, pair_video, write_pair
from diffpolicy.settings import check_choice, check_range, from_values

CHOICES = ("left", "right", "tie")
QUESTIONS = "questions.jsonl"
"""The questions of a page, as ties of a preference file, which knows its store."""


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
    check_range("[1, inf)", count=count, length=length)
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


# ------------------------------------------------------------------------------------- the page


def write_page(
    folder: str | Path, questions: Sequence[Question], renderer: ClipRenderer, *, fps: int = 10
) -> dict[str, str]:
    """Write ``index.html``, the films, and the questions for :func:`read_answers`.

    Args:
        folder: there must be nothing yet.
        questions: in the order they are asked.
        renderer: draws the clips.
        fps: steps shown per second.

    Returns:
        Why questions were left out, by their keys: their clips could not be drawn.

    Raises:
        FileExistsError: the folder exists.
        ImportError: imageio or its ffmpeg is missing (with the pip command).
        ValueError: there are no questions, or none can be shown.
    """
    target = Path(folder)
    if target.exists():
        raise FileExistsError(f"{target} exists, and is not replaced; choose another folder")
    if not questions:
        raise ValueError("there is nothing to ask: no pairs")
    left_out: dict[str, str] = {}
    with replaced_directory(target) as partial:
        for question in questions:
            try:
                film = pair_video(renderer, question.left, question.right, None)
            except Exception as error:  # whatever a simulator may raise: the others are asked
                left_out[question.key] = str(error) or type(error).__name__
            else:
                write_pair(partial / "clips" / f"{question.key}.mp4", film, fps=fps)
        shown = [question for question in questions if question.key not in left_out]
        if not shown:
            raise ValueError(f"no pair can be shown: {next(iter(left_out.values()))}")
        kept = PreferenceSet.create(partial / QUESTIONS, renderer.store, attrs={"made_by": "page"})
        kept.extend(Pair(q.left, q.right, tie=True, source="question") for q in shown)
        (partial / "index.html").write_text(_html([question.key for question in shown]), "utf-8")
    return left_out


def _page_id(keys: Sequence[str]) -> str:
    return hashlib.sha256(" ".join(keys).encode()).hexdigest()[:16]


def _html(keys: Sequence[str]) -> str:
    package = resources.files("diffpolicy.rollout.labelling")
    text = package.joinpath("labelling.html").read_text("utf-8")
    return text.replace("__PAGE__", json.dumps({"page": _page_id(keys), "questions": list(keys)}))


# ---------------------------------------------------------------------------------- the answers


@dataclass(frozen=True)
class Answer:
    """A person's answer to a question.

    Attributes:
        question: key of the question.
        choice: ``"left"``, ``"right"`` or ``"tie"``.
        seconds: that the question was looked at.
        when: time of the answer (ISO 8601).
    """

    question: str
    choice: str
    seconds: float
    when: str

    def __post_init__(self) -> None:
        check_choice("choice", self.choice, CHOICES)
        check_range("[0, inf)", seconds=self.seconds)
        datetime.datetime.fromisoformat(self.when)


@dataclass(frozen=True)
class _AnswerFile:
    """What the page gives to download."""

    format: str
    page: str
    answers: tuple[Answer, ...]


def read_answers(folder: str | Path, file: str | Path) -> tuple[EpisodeStore, list[Pair]]:
    """The answers that a page gave, checked, as pairs of ``source="human"``.

    Their ``info`` holds ``question`` (its key), ``shown`` (where the chosen one was), ``seconds``
    and ``when``.

    Args:
        folder: that :func:`write_page` made.
        file: that the page gave to download.

    Raises:
        FileNotFoundError: there is no such page, file or store.
        ValueError: no file of answers, or one of another page; or an answer that is damaged, to an
            unknown question, or given twice.
    """
    asked = PreferenceSet.open(Path(folder) / QUESTIONS)
    questions = {question.key: question for question in questions_of(asked)}
    path = Path(file)
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from None
    if not isinstance(values, Mapping) or values.get("format") != "diffpolicy-answers":
        raise ValueError(f"{path} does not hold the answers that a page gives to download")
    try:
        found = from_values(_AnswerFile, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if found.page != _page_id(list(questions)):
        raise ValueError(f"{path} answers the questions of another page than the one in {folder}")
    pairs: dict[str, Pair] = {}
    for i, answer in enumerate(found.answers):
        where = f"{path}: answers[{i}]"
        if answer.question not in questions:
            raise ValueError(f"{where}: the page has no question {answer.question!r}")
        if answer.question in pairs:
            raise ValueError(f"{where}: question {answer.question!r} is answered twice")
        pairs[answer.question] = _pair(questions[answer.question], answer)
    return asked.store, list(pairs.values())


def _pair(question: Question, answer: Answer) -> Pair:
    chosen, rejected = question.left, question.right
    if answer.choice == "right":
        chosen, rejected = rejected, chosen
    info = {"question": question.key, "seconds": answer.seconds, "when": answer.when}
    tie = answer.choice == "tie"
    shown = {} if tie else {"shown": answer.choice}
    return Pair(chosen, rejected, tie, source="human", info={**info, **shown})
