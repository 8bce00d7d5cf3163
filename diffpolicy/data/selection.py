"""Which episodes of a source are stored, and which are left out: one option for all formats.

- a number, or a list of numbers: episodes by their place in the source, from 0;
- `"mask:<name>"`: the episodes of a list that the source has under this name (robomimic's filter
  keys, LeRobot's splits), or those with a true value of that name (`success`);
- `"failed_check"` (to leave out only): every episode that cannot be stored, and every one that
  `diffpolicy data check` would name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffpolicy.data.formats import EpisodeSource

Choice = int | str | Sequence[int | str]
"""Episodes as they are named by `exclude` and `keep`."""

FAILED_CHECK = "failed_check"
_MASK = "mask:"


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
        """The same but for these episodes.

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
    source: EpisodeSource,
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
    if max_episodes is not None and max_episodes < 1:
        raise ValueError(f"max_episodes must be at least 1; got {max_episodes}")
    items = _items(exclude)
    drop = {i: text for item in items for i, text in _episodes(source, item, "exclude").items()}
    wanted = range(source.num_episodes)
    if keep is not None:
        kept = {i for item in _items(keep) for i in _episodes(source, item, "keep")}
        drop |= {i: f"not in keep={keep}" for i in wanted if i not in kept and i not in drop}
    chosen = tuple(i for i in wanted if i not in drop)
    if source.num_episodes and not chosen:
        raise ValueError(
            f"exclude={exclude} and keep={keep} leave none of the {source.num_episodes} episodes "
            f"of {source.name}"
        )
    return Selection(chosen[:max_episodes], drop, FAILED_CHECK in items)


def _items(choice: Choice | None) -> list[int | str]:
    if choice is None:
        return []
    return [choice] if isinstance(choice, int | str) else list(choice)


def _episodes(source: EpisodeSource, item: int | str, option: str) -> dict[int, str]:
    """The episodes that one item of a choice names, each with the item as its reason."""
    if item == FAILED_CHECK and option == "exclude":
        return {}
    if isinstance(item, str) and item.startswith(_MASK):
        return dict.fromkeys(_masked(source, item.removeprefix(_MASK)), f"{option}={item}")
    if isinstance(item, bool) or not isinstance(item, int):
        checks = f", {FAILED_CHECK!r}" if option == "exclude" else ""
        raise ValueError(
            f"{option} names episodes by number, by '{_MASK}NAME'{checks}, or by a list of these; "
            f"got {item!r}"
        )
    if not 0 <= item < source.num_episodes:
        raise ValueError(
            f"{option}: {source.name} has the episodes 0..{source.num_episodes - 1}; got {item}"
        )
    return {item: f"{option}={item}"}


def _masked(source: EpisodeSource, name: str) -> Sequence[int]:
    own = source.masks
    if name in own:
        return own[name]
    attrs = source.episode_attrs
    if any(isinstance(known.get(name), bool) for known in attrs):
        return [i for i, known in enumerate(attrs) if known.get(name) is True]
    flags = {key for known in attrs for key, value in known.items() if isinstance(value, bool)}
    there = sorted({*own, *flags})
    raise ValueError(f"{source.name} has no mask {name!r}; it has {there or 'none'}")
