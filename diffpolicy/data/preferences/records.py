"""What a preference file says: segments of stored episodes, and how somebody judged them.

A segment is a tuple of spans, each a run of steps of one episode. Most segments are one span; a
segment that goes on from one episode into the next, as in some published label files, is several.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffpolicy.data.fields import jsonable
from diffpolicy.data.store import EpisodeStore
from diffpolicy.settings import check_choice, settings_of


class Span(NamedTuple):
    """Consecutive steps of one episode.

    Attributes:
        episode: The episode's index in the store, from 0.
        start: Its first step, counted from 0 in the episode.
        length: How many steps, at least 1.
    """

    episode: int
    start: int
    length: int


Segment = tuple[Span, ...]


@dataclass(frozen=True)
class Pair:
    """Two segments of which one was preferred, or neither.

    Attributes:
        chosen: The better one.
        rejected: The other one.
        tie: Neither is better; ``chosen`` and ``rejected`` are then in no order.
        source: Who or what judged, such as ``"human"`` or ``"return"``.
        info: JSON values to keep with it (finite numbers).

    Raises:
        ValueError: A segment, ``source`` or ``info`` that is none, or the same segment twice
            without a tie.
    """

    chosen: Segment
    rejected: Segment
    tie: bool = False
    source: str = ""
    info: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _settle(self, chosen=self.chosen, rejected=self.rejected)
        object.__setattr__(self, "tie", _checked_flag(self.tie, "tie"))
        if self.chosen == self.rejected and not self.tie:
            where = describe(self.chosen)
            raise ValueError(f"chosen and rejected are the same segment without a tie, {where}")


@dataclass(frozen=True)
class Ranking:
    """Several segments in order.

    Attributes:
        items: At least two different segments, the best first.
        source: Who or what judged.
        info: JSON values to keep with it.

    Raises:
        ValueError: Fewer than two segments, one that comes twice, or one that is none.
    """

    items: tuple[Segment, ...]
    source: str = ""
    info: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.items, tuple | list) or len(self.items) < 2:
            raise ValueError(f"items must be two segments or more, best first; got {self.items!r}")
        items = tuple(checked_segment(s, f"items[{i}]") for i, s in enumerate(self.items))
        if len(set(items)) != len(items):
            raise ValueError("items must be different segments; one comes twice in the ranking")
        object.__setattr__(self, "items", items)
        _settle(self)


@dataclass(frozen=True)
class Label:
    """One segment that was judged good or bad.

    Attributes:
        item: The segment.
        good: Whether it is good.
        source: Who or what judged.
        info: JSON values to keep with it.

    Raises:
        ValueError: A segment that is none, or ``good`` that is not True or False.
    """

    item: Segment
    good: bool
    source: str = ""
    info: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _settle(self, item=self.item)
        object.__setattr__(self, "good", _checked_flag(self.good, "good"))


Record = Pair | Ranking | Label
_KINDS: dict[str, type[Any]] = {kind.__name__.lower(): kind for kind in (Pair, Ranking, Label)}


def segments_of(record: Record) -> tuple[Segment, ...]:
    """Return the segments that a record judges."""
    if isinstance(record, Pair):
        return record.chosen, record.rejected
    return record.items if isinstance(record, Ranking) else (record.item,)


def episodes_of(record: Record) -> set[int]:
    """Return the episodes that a record judges anything of."""
    return {span.episode for segment in segments_of(record) for span in segment}


def episode_values(
    store: EpisodeStore, name: str, episodes: Iterable[int] | None = None
) -> list[Any]:
    """Return an attribute of each of these episodes, by default of all.

    Raises:
        ValueError: One of them has no such attribute.
    """
    attrs, found = store.episode_attrs, []
    for episode in range(len(attrs)) if episodes is None else episodes:
        if name not in attrs[episode]:
            where, known = f"{store.name}: episode {episode}", sorted(attrs[episode])
            raise ValueError(f"{where} has no attribute {name!r}; it has {known}")
        found.append(attrs[episode][name])
    return found


def segment_of_rows(rows: NDArray[np.integer], episode_ends: NDArray[np.int64]) -> Segment:
    """Return the segment that consists of given rows of a store, in their order.

    Args:
        rows: ``[n]`` rows, counted over all episodes; where the next row is not the following one,
            or belongs to another episode, a new span begins.
        episode_ends: ``[E]`` cumulative ends.

    Raises:
        ValueError: No row, or a row that the store does not have.
    """
    steps = int(episode_ends[-1]) if len(episode_ends) else 0
    if len(rows) == 0 or rows.min() < 0 or rows.max() >= steps:
        found = f"{rows.min()}..{rows.max()}" if len(rows) else "none"
        raise ValueError(f"a segment's rows must be in 0..{steps - 1}; got {found}")
    episode = np.searchsorted(episode_ends, rows, side="right")
    first = np.concatenate([[0], episode_ends])[episode]
    cuts = np.flatnonzero((np.diff(rows) != 1) | (np.diff(episode) != 0)) + 1
    bounds = [0, *cuts.tolist(), len(rows)]
    return tuple(
        Span(int(episode[a]), int(rows[a] - first[a]), b - a) for a, b in itertools.pairwise(bounds)
    )


def rows_of_segment(segment: Segment, episode_ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rows of a segment, counted over all episodes, int64 ``[n]``."""
    starts = np.concatenate([[0], episode_ends])
    return np.concatenate(
        [np.arange(s.length, dtype=np.int64) + starts[s.episode] + s.start for s in segment]
    )


def check_fits(record: Record, lengths: NDArray[np.int64]) -> None:
    """Compare a record with the lengths ``[E]`` of the store's episodes.

    Raises:
        ValueError: It judges an episode or a step that the store does not have.
    """
    for span in itertools.chain(*segments_of(record)):
        where = describe((span,))
        if span.episode >= len(lengths):
            raise ValueError(f"{where}: the store has the episodes 0..{len(lengths) - 1}")
        steps = int(lengths[span.episode])
        if span.start + span.length > steps:
            raise ValueError(f"{where}: episode {span.episode} has the steps 0..{steps - 1}")


def describe(segment: Segment) -> str:
    """Describe a segment for messages: ``episode 3 steps 10..59``."""
    return " and ".join(f"episode {e} steps {s}..{s + n - 1}" for e, s, n in segment)


def record_to_json(record: Record) -> dict[str, Any]:
    """Return a record as the JSON object that stands in a file, without what is default."""
    values = {entry.name: getattr(record, entry.name) for entry in fields(record)}
    given = {k: v for k, v in values.items() if v or k not in ("tie", "source", "info")}
    return {"kind": type(record).__name__.lower(), **given}


def record_from_json(value: Any) -> Record:
    """Return the record that a JSON object of a file stands for.

    Raises:
        ValueError: It is no record; the message says what was expected and what came.
    """
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object with a 'kind'; got {value!r:.80}")
    kind = value.get("kind")
    check_choice("kind", kind, _KINDS)
    values = {name: part for name, part in value.items() if name != "kind"}
    made: Record = settings_of(_KINDS[str(kind)], values, f"a {kind}")
    return made


def checked_segment(value: Any, name: str) -> Segment:
    """Return a segment with plain integers.

    Raises:
        ValueError: It is not one span or more of (episode, start, length); ``name`` is in the
            message.
    """
    wanted = (
        f"{name} must be a segment, one or more spans (episode, start, length) of whole numbers "
        "with episode >= 0, start >= 0 and length >= 1"
    )
    if isinstance(value, Span):
        raise ValueError(f"{wanted}; got a single span: write ({value!r},)")
    if not isinstance(value, tuple | list) or not value:
        raise ValueError(f"{wanted}; got {value!r:.80}")
    for part in value:
        numbers = isinstance(part, tuple | list) and len(part) == 3 and all(map(_whole, part))
        if not numbers or min(part[:2]) < 0 or part[2] < 1:
            raise ValueError(f"{wanted}; got {part!r:.80} in it")
    return tuple(Span(*map(int, part)) for part in value)


def checked_json(value: Any, name: str) -> dict[str, Any]:
    """Return a mapping as plain JSON values.

    Raises:
        ValueError: Something in it is not JSON, or is not finite.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a mapping of JSON values; got {value!r:.80}")
    plain: dict[str, Any] = jsonable(dict(value), name)
    try:
        json.dumps(plain, allow_nan=False)
    except ValueError:
        raise ValueError(f"{name} must hold finite numbers; got {plain!r:.80}") from None
    return plain


def _settle(record: Record, **segments: Any) -> None:
    """Check what all records have, and these segments, while a frozen one is being made."""
    if not isinstance(record.source, str):
        raise ValueError(f"source must be text; got {record.source!r:.80}")
    object.__setattr__(record, "info", checked_json(record.info, "info"))
    for name, value in segments.items():
        object.__setattr__(record, name, checked_segment(value, name))


def _checked_flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be true or false; got {value!r:.80}")
    return bool(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
