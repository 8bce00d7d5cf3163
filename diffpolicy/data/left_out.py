"""What a conversion leaves out or doubts: kept with the store, and said every time."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from diffpolicy.data.issue import format_issue

if TYPE_CHECKING:
    from diffpolicy.data.formats import EpisodeSource, Gap
    from diffpolicy.data.issue import Issue
    from diffpolicy.data.selection import Selection

_log = logging.getLogger("diffpolicy.data")
_MOST = 8  # of a kind are listed in a message; the store's attributes hold all


def left_out(
    source: EpisodeSource, used: Iterable[str], selection: Selection
) -> dict[str, dict[str, str]]:
    """Attributes for what a store lacks of its source, each name or number with a reason.

    Returns:
        `left_out`: fields that could be stored, `unread`: what is none, `left_out_episodes`; those
        of them that are not empty.
    """
    taken = set(used)
    fields = {
        name: f"{spec.dtype} {list(spec.shape)}"
        for name, spec in source.fields.items()
        if name not in taken
    }
    episodes = {str(i): text for i, text in sorted(selection.left_out.items())}
    found = {"left_out": fields, "unread": dict(source.unread), "left_out_episodes": episodes}
    return {name: values for name, values in found.items() if values}


def checked_gaps(
    source: EpisodeSource, used: Iterable[str], selection: Selection, *, allow_missing: bool
) -> tuple[Selection, list[str]]:
    """See to the rows of a source that were never written, or got lost, and read as zeros.

    Returns:
        The episodes that remain, and warnings of what was let through.

    Raises:
        ValueError: There are such rows, and nothing says what to do with them.
    """
    chosen = set(selection.episodes)
    gaps = [g for g in source.gaps(sorted(set(used))) if chosen & set(range(g.first, g.last + 1))]
    if gaps and allow_missing and hasattr(source, "fill_gaps"):
        source.fill_gaps()  # zarr's files, which are otherwise read strictly
    if not gaps or allow_missing:
        return selection, [f"{_told(source, g)} (let through)" for g in gaps]
    if selection.failed_check:
        failed = {i: g.reason for g in reversed(gaps) for i in range(g.first, g.last + 1)}
        return selection.without(failed), []
    more = f" (and {len(gaps) - 1} more)" if len(gaps) > 1 else ""
    raise ValueError(
        f"{_told(source, gaps[0])}{more}. Copy the source again from where it is whole; or leave "
        "these episodes out with exclude=failed_check; or, if whoever wrote it leaves out chunks "
        "of zeros, as zarr and HDF5 may, give allow_missing=true (from Python True)"
    )


def _told(source: EpisodeSource, gap: Gap) -> str:
    return f"{source.name}, episodes {gap.first}..{gap.last}: {gap.reason}"


def issue_lines(issues: Iterable[Issue], partial: str, target: str) -> list[str]:
    """Findings about a store that does not have its name yet, under the name that it will have."""
    return [format_issue(issue).replace(partial, target) for issue in issues]


def announce(target: str, attrs: Mapping[str, Any]) -> None:
    """Say what a store lacks of its source, and what is doubtful, in a log message each."""
    if fields := attrs.get("left_out"):
        _log.warning("%s leaves out %s. To keep one: fields={NAME:NAME}", target, _listed(fields))
    if unread := attrs.get("unread"):
        _log.warning("%s cannot hold %s", target, _listed(unread))
    if episodes := attrs.get("left_out_episodes"):
        _log.warning("%s leaves out %d episodes: %s", target, len(episodes), _listed(episodes))
    for line in attrs.get("warnings", [])[:_MOST]:
        _log.warning("%s", line)
    if len(attrs.get("warnings", [])) > _MOST:
        _log.warning(
            "%d warnings in all, see `diffpolicy data info %s`", len(attrs["warnings"]), target
        )


def _listed(reasons: Mapping[str, str]) -> str:
    texts = [f"{name} ({reason})" for name, reason in reasons.items()]
    more = f", and {len(texts) - _MOST} more" if len(texts) > _MOST else ""
    return ", ".join(texts[:_MOST]) + more
