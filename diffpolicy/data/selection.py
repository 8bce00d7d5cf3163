"""Which episodes of a source are stored, and what of it is left out: the same for all formats.

Episodes are named by one of these, or a list of them, of which each adds to the others:

- a number: an episode by its place in the source, from 0; ``"3..7"``: those from 3 to 7;
- a word: those with an attribute of this value, such as robomimic's ``"demo_3"``;
- a condition on an attribute, or on ``length``: ``"success=true"``, ``"length<50"``,
  ``"return>=0.9"``; an episode without the attribute does not meet it;
- ``"mask:<name>"``: the episodes of a list that the source has under this name (robomimic's filter
  keys, LeRobot's splits), or those with a true value of that name (``success``);
- ``"failed_check"`` (to leave out only): every episode that cannot be stored, and every one that
  ``diffpolicy data check`` would name.

What a conversion leaves out or doubts is kept in the store's attributes, and said every time.
"""

from __future__ import annotations

import json
import logging
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from diffpolicy.settings import check_choice, check_range, near_miss

if TYPE_CHECKING:
    from diffpolicy.data.fields import FieldSpec
    from diffpolicy.data.formats import EpisodeSource, Gap

Choice = int | str | Sequence[int | str]
"""Episodes as they are named by ``exclude`` and ``keep``."""

FAILED_CHECK = "failed_check"
OF_MAKING = ("left_out", "unread", "left_out_episodes", "max_episodes", "warnings", "made_of")
"""Attributes that say how a store was made: they are not true of what is made of it."""
MASKS = "masks"
"""The attribute of an episode that lists the masks it is in."""
_MASK = "mask:"
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_CONDITION = re.compile(r"([^<>=!]+?)\s*(<=|>=|!=|==?|<|>)\s*(.+)")
_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    **{"=": operator.eq, "==": operator.eq, "!=": operator.ne},
    **{"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge},
}
_MOST = 8  # of a kind are listed in a message; the store's attributes hold all
_log = logging.getLogger("diffpolicy.data")


class Episodes(Protocol):
    """A source or a store; ``masks`` and ``episode_lengths`` are looked at where it has them."""

    @property
    def name(self) -> str: ...

    @property
    def num_episodes(self) -> int: ...

    @property
    def episode_attrs(self) -> Sequence[Mapping[str, Any]]: ...


@dataclass(frozen=True)
class Selection:
    """The episodes to store.

    Attributes:
        episodes: Their numbers in the source, ascending.
        left_out: Number and reason of each of the others.
        failed_check: Whether to leave out those that fail a check, too.
    """

    episodes: tuple[int, ...]
    left_out: Mapping[int, str] = field(default_factory=dict)
    failed_check: bool = False

    def without(self, failed: Mapping[int, str]) -> Selection:
        """Return the same but for these episodes.

        Raises:
            ValueError: None is left.
        """
        failed = {i: text for i, text in failed.items() if i in set(self.episodes)}
        kept = tuple(i for i in self.episodes if i not in failed)
        if not kept:
            text = next(iter(failed.values()), "there are none")
            raise ValueError(f"no episode is left to store; the first: {text}")
        return Selection(kept, {**self.left_out, **failed}, self.failed_check)


def select(
    source: Episodes,
    exclude: Choice | None = None,
    keep: Choice | None = None,
    max_episodes: int | None = None,
) -> Selection:
    """Choose episodes of a source.

    Args:
        source: The source.
        exclude: Those to leave out, see the module.
        keep: Those to store; default all.
        max_episodes: Stop after so many of them.

    Returns:
        The choice.

    Raises:
        ValueError: No such episode or mask, or nothing is left.
    """
    check_range("[1, inf)", max_episodes=max_episodes)
    items = _items(exclude)
    drop = {i: text for item in items for i, text in _episodes(source, item, "exclude").items()}
    wanted = range(source.num_episodes)
    if keep is not None:
        kept = {i for item in _items(keep) for i in _episodes(source, item, "keep")}
        drop |= {i: f"not in keep={keep}" for i in wanted if i not in kept and i not in drop}
    chosen = tuple(i for i in wanted if i not in drop)
    if not chosen:
        which = f"none of the {source.num_episodes} episodes of {source.name}"
        raise ValueError(f"exclude={exclude} and keep={keep} leave {which}")
    late = () if max_episodes is None else chosen[max_episodes:]
    drop |= dict.fromkeys(late, f"max_episodes={max_episodes}")
    return Selection(chosen[: len(chosen) - len(late)], drop, FAILED_CHECK in items)


def _items(choice: Choice | None) -> list[int | str]:
    return [choice] if isinstance(choice, int | str) else list(choice or ())


def _episodes(source: Episodes, item: int | str, option: str) -> dict[int, str]:
    """The episodes that one item of a choice names, each with the item as its reason."""
    if item == FAILED_CHECK and option == "exclude":
        return {}
    found: Iterable[int]
    text = item if isinstance(item, str) else ""
    if isinstance(item, int) and not isinstance(item, bool):
        found = _numbered(source, item, item, option)
    elif text.startswith(_MASK):
        found = _masked(source, text.removeprefix(_MASK))
    elif span := _RANGE.fullmatch(text):
        found = _numbered(source, int(span[1]), int(span[2]), option)
    elif asked := _CONDITION.fullmatch(text):
        found = _meeting(source, asked[1].strip(), asked[2], asked[3].strip(), option)
    else:
        found = _named(source, item, option)
    return dict.fromkeys(found, f"{option}={item}")


def _numbered(source: Episodes, first: int, last: int, option: str) -> range:
    if not 0 <= first <= last < source.num_episodes:
        got = first if first == last else f"{first}..{last}"
        there = f"{source.name} has the episodes 0..{source.num_episodes - 1}"
        raise ValueError(f"{option}: {there}; got {got}")
    return range(first, last + 1)


def _named(source: Episodes, word: Any, option: str) -> list[int]:
    attrs = source.episode_attrs
    found = [i for i, known in enumerate(attrs) if isinstance(word, str) and word in known.values()]
    if not found:
        checks = f", {FAILED_CHECK!r}" if option == "exclude" else ""
        values = {v for known in attrs for v in known.values() if isinstance(v, str)}
        values |= {f"{_MASK}{name}" for name in _masks(source)}
        raise ValueError(
            f"{option} names episodes by number, range '3..7', '{_MASK}NAME', a condition such as "
            f"'success=true' or 'length<50', the text of an attribute{checks}, or by a list of "
            f"these; got {word!r}{near_miss(word, sorted(values))}"
        )
    return found


def _meeting(source: Episodes, name: str, sign: str, text: str, option: str) -> list[int]:
    """The episodes whose attribute ``name`` compares so with the value that ``text`` says."""
    attrs = [dict(known) for known in source.episode_attrs]
    for known, length in zip(attrs, getattr(source, "episode_lengths", ()), strict=False):
        known.setdefault("length", int(length))
    try:
        check_choice(f"attribute of {source.name}'s episodes", name, sorted(set().union(*attrs)))
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    compare, found = _OPERATORS[sign], []
    for index, known in enumerate(attrs):
        try:
            if name in known and compare(known[name], value):
                found.append(index)
        except TypeError:
            raise ValueError(
                f"{option}={name}{sign}{text}: {name} of episode {index} of {source.name} is "
                f"{known[name]!r}, which cannot be compared with {value!r}"
            ) from None
    return found


def _masked(source: Episodes, name: str) -> Sequence[int]:
    there = _masks(source)
    if name not in there:
        raise ValueError(f"{source.name} has no mask {name!r}; it has {sorted(there) or 'none'}")
    return there[name]


def _masks(source: Episodes) -> dict[str, Sequence[int]]:
    """Episodes by mask: those that the source lists, and what its episodes say of themselves."""
    found: dict[str, list[int]] = {}
    for index, known in enumerate(source.episode_attrs):
        flags = {name: value for name, value in known.items() if isinstance(value, bool)}
        for name in {*flags, *known.get(MASKS, ())}:
            found.setdefault(name, []).extend([index] * flags.get(name, True))
    return {**found, **getattr(source, MASKS, {})}


def attrs_with_masks(source: EpisodeSource) -> list[dict[str, Any]]:
    """Return the attributes of each episode, with the names of the ``masks`` that it is in."""
    found = [dict(known) for known in source.episode_attrs]
    for name, episodes in source.masks.items():
        for index in episodes:
            found[index].setdefault(MASKS, []).append(name)
    return found


def left_out(
    fields: Mapping[str, FieldSpec],
    used: Iterable[str],
    selection: Selection,
    unread: Mapping[str, str] | None = None,
) -> dict[str, dict[str, str]]:
    """Return attributes for what a store lacks of the ``fields`` and episodes of its source.

    Each name or number has a reason.

    Returns:
        ``left_out``: fields that could be stored, ``unread``: what is none, ``left_out_episodes``;
        those of them that are not empty.
    """
    others = {name: spec for name, spec in fields.items() if name not in set(used)}
    found = {
        "left_out": {name: f"{spec.dtype} {list(spec.shape)}" for name, spec in others.items()},
        "unread": dict(unread or {}),
        "left_out_episodes": {str(i): text for i, text in sorted(selection.left_out.items())},
    }
    return {name: values for name, values in found.items() if values}


def checked_gaps(
    source: EpisodeSource, used: Sequence[str], selection: Selection, *, allow_missing: bool
) -> tuple[Selection, list[str]]:
    """See to the rows of a source that were never written, or got lost, and read as zeros.

    Returns:
        The episodes that remain, and warnings of what was let through.

    Raises:
        ValueError: There are such rows, and nothing says what to do with them.
    """
    chosen = set(selection.episodes)
    gaps = [g for g in source.gaps(used) if chosen & set(range(g.first, g.last + 1))]
    if gaps and allow_missing and hasattr(source, "fill_gaps"):
        source.fill_gaps()  # zarr's files, which are otherwise read strictly
    if not gaps or allow_missing:
        return selection, [f"{_told(source, g)} (let through)" for g in gaps]
    if selection.failed_check:
        failed = {i: g.reason for g in reversed(gaps) for i in range(g.first, g.last + 1)}
        return selection.without(failed), []
    more = f" (and {len(gaps) - 1} more)" if len(gaps) > 1 else ""
    raise ValueError(
        f"{_told(source, gaps[0])}{more}. Copy the source again; or leave these episodes out with "
        "exclude=failed_check; or, if its writer leaves out chunks of zeros, as zarr and HDF5 may, "
        "give allow_missing=true"
    )


def _told(source: EpisodeSource, gap: Gap) -> str:
    return f"{source.name}, episodes {gap.first}..{gap.last}: {gap.reason}"


def announce(target: str, attrs: Mapping[str, Any]) -> None:
    """Say what a store lacks of its source, and what is doubtful, in a log message each."""
    if fields := attrs.get("left_out"):
        _log.warning("%s leaves out %s. To keep one, name it in fields", target, _listed(fields))
    if unread := attrs.get("unread"):
        _log.warning("%s cannot hold %s", target, _listed(unread))
    if episodes := attrs.get("left_out_episodes"):
        _log.warning("%s leaves out %d episodes: %s", target, len(episodes), _listed(episodes))
    lines = attrs.get("warnings", [])
    for line in lines[:_MOST]:
        _log.warning("%s", line)
    if len(lines) > _MOST:
        _log.warning("%d warnings in all, see `diffpolicy data info %s`", len(lines), target)


def _listed(reasons: Mapping[str, str]) -> str:
    texts = [f"{name} ({reason})" for name, reason in reasons.items()]
    more = f", and {len(texts) - _MOST} more" if len(texts) > _MOST else ""
    return ", ".join(texts[:_MOST]) + more
