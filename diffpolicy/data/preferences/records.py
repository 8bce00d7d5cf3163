"""What a preference file says: segments of stored episodes, and how somebody judged them.

A segment is a tuple of spans, each a run of steps of one episode. Most segments are one span; a
segment that goes on from one episode into the next, as in some published label files, is several.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from diffpolicy.data.fields import jsonable

if TYPE_CHECKING:
    from numpy.typing import NDArray


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
    """Of two segments one was preferred, or neither.

    Attributes:
        chosen: The better one.
        rejected: The other one.
        tie: Neither is better; `chosen` and `rejected` are then in no order.
        source: Who or what judged, such as `"human"` or `"return"`.
        info: JSON values to keep with it (finite numbers).

    Raises:
        ValueError: A segment, `source` or `info` that is none, or the same segment twice without
            a tie.
    """

    chosen: Segment
    rejected: Segment
    tie: bool = False
    source: str = ""
    info: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _set(self, chosen=checked_segment(self.chosen, "chosen"))
        _set(self, rejected=checked_segment(self.rejected, "rejected"))
        _set(self, tie=_checked_flag(self.tie, "tie"))
        _check_remarks(self)
        if self.chosen == self.rejected and not self.tie:
            raise ValueError(
                f"chosen and rejected are the same segment, {describe(self.chosen)}; two different "
                "ones are compared, unless tie=True"
            )


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
        _set(self, items=items)
        _check_remarks(self)


@dataclass(frozen=True)
class Label:
    """One segment was judged good or bad.

    Attributes:
        item: The segment.
        good: Whether it is good.
        source: Who or what judged.
        info: JSON values to keep with it.

    Raises:
        ValueError: A segment that is none, or `good` that is not True or False.
    """

    item: Segment
    good: bool
    source: str = ""
    info: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _set(self, item=checked_segment(self.item, "item"))
        _set(self, good=_checked_flag(self.good, "good"))
        _check_remarks(self)


Record = Pair | Ranking | Label
_KINDS: dict[str, type[Pair] | type[Ranking] | type[Label]] = {
    "pair": Pair,
    "ranking": Ranking,
    "label": Label,
}
_REQUIRED = {"pair": ("chosen", "rejected"), "ranking": ("items",), "label": ("item", "good")}
_OPTIONAL = {"pair": ("tie", "source", "info")}


def segments_of(record: Record) -> tuple[Segment, ...]:
    """The segments that a record judges."""
    if isinstance(record, Pair):
        return record.chosen, record.rejected
    return record.items if isinstance(record, Ranking) else (record.item,)


def episodes_of(record: Record) -> set[int]:
    """The episodes that a record judges anything of."""
    return {span.episode for segment in segments_of(record) for span in segment}


def segment_of_rows(rows: NDArray[np.integer], episode_ends: NDArray[np.int64]) -> Segment:
    """The segment that consists of given rows of a store, in their order.

    Args:
        rows: `[n]` rows, counted over all episodes; where the next row is not the following one,
            or belongs to another episode, a new span begins.
        episode_ends: `[E]` cumulative ends.

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
    """The rows of a segment, counted over all episodes, int64 `[n]`."""
    starts = np.concatenate([[0], episode_ends])
    return np.concatenate(
        [np.arange(s.length, dtype=np.int64) + starts[s.episode] + s.start for s in segment]
    )


def check_range(segment: Segment, lengths: NDArray[np.int64]) -> None:
    """Compare a segment with the store's episodes.

    Args:
        segment: The segment.
        lengths: `[E]` steps of each episode.

    Raises:
        ValueError: An episode or a step that the store does not have.
    """
    for span in segment:
        if span.episode >= len(lengths):
            raise ValueError(
                f"{describe((span,))}: the store has the episodes 0..{len(lengths) - 1}"
            )
        if span.start + span.length > lengths[span.episode]:
            raise ValueError(
                f"{describe((span,))}: episode {span.episode} has the steps "
                f"0..{lengths[span.episode] - 1}"
            )


def describe(segment: Segment) -> str:
    """A segment for messages: `episode 3 steps 10..59`."""
    return " and ".join(f"episode {e} steps {s}..{s + n - 1}" for e, s, n in segment)


def record_to_json(record: Record) -> dict[str, Any]:
    """A record as the JSON object that stands in a file; what is default is left out."""
    kind = next(name for name, made in _KINDS.items() if isinstance(record, made))
    values = {name: getattr(record, name) for name in _REQUIRED[kind]}
    for name in _OPTIONAL.get(kind, ("source", "info")):
        value = getattr(record, name)
        values |= {name: dict(value) if name == "info" else value} if value else {}
    return {"kind": kind, **values}


def record_from_json(value: Any) -> Record:
    """The record that a JSON object of a file stands for.

    Raises:
        ValueError: It is no record; the message says what was expected and what came.
    """
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object with a 'kind'; got {value!r:.80}")
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"'kind' must be one of {sorted(_KINDS)}; got {kind!r:.80}")
    required, optional = _REQUIRED[kind], _OPTIONAL.get(kind, ("source", "info"))
    given = set(value) - {"kind"}
    missing, unknown = sorted(set(required) - given), sorted(given - {*required, *optional})
    if missing or unknown:
        raise ValueError(
            f"a {kind} has {list(required)} and may have {list(optional)}; "
            + (f"{missing} is missing" if missing else f"got also {unknown}")
        )
    return _KINDS[kind](**{name: value[name] for name in given})


def checked_segment(value: Any, name: str) -> Segment:
    """A segment with plain integers.

    Raises:
        ValueError: It is not one span or more of (episode, start, length); `name` is in the
            message.
    """
    wanted = f"{name} must be a segment, one or more spans (episode, start, length)"
    if not isinstance(value, tuple | list) or not value:
        raise ValueError(f"{wanted}; got {value!r:.80}")
    if isinstance(value, Span):
        raise ValueError(f"{wanted}; got a single span: write ({value!r},)")
    spans = []
    for part in value:
        if not isinstance(part, tuple | list) or len(part) != 3 or not all(map(_whole, part)):
            raise ValueError(f"{wanted}, all whole numbers; got {part!r:.80} in it")
        span = Span(*(int(n) for n in part))
        if span.episode < 0 or span.start < 0 or span.length < 1:
            raise ValueError(
                f"{wanted} with episode >= 0, start >= 0 and length >= 1; got {list(span)} in it"
            )
        spans.append(span)
    return tuple(spans)


def check_finite(value: Any, where: str) -> None:
    """Make sure that JSON values hold no infinity and no NaN.

    Raises:
        ValueError: They do; `where` names the place.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must hold finite numbers; got {value}")
    if isinstance(value, Mapping):
        for key, part in value.items():
            check_finite(part, f"{where}.{key}")
    elif isinstance(value, Iterable) and not isinstance(value, str):
        for part in value:
            check_finite(part, where)


def _check_remarks(record: Record) -> None:
    if not isinstance(record.source, str):
        raise ValueError(f"source must be text; got {record.source!r:.80}")
    if not isinstance(record.info, Mapping):
        raise ValueError(f"info must be a mapping of JSON values; got {record.info!r:.80}")
    info = jsonable(dict(record.info), "info")
    check_finite(info, "info")
    _set(record, info=info)


def _checked_flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be true or false; got {value!r:.80}")
    return bool(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _set(record: Record, **values: Any) -> None:
    """Settle an attribute while the frozen record is being made."""
    for name, value in values.items():
        object.__setattr__(record, name, value)
