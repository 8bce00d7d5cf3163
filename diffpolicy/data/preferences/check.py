"""What is wrong with preferences, or probably not meant; and how many there are."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpolicy.data.check import Issue
from diffpolicy.data.preferences import file as files
from diffpolicy.data.preferences.records import (
    Label,
    Pair,
    Record,
    describe,
    episodes_of,
    segments_of,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from diffpolicy.data.preferences.set import PreferenceSet
    from diffpolicy.data.store import EpisodeStore


def check_preferences(
    path: str | os.PathLike[str], store: EpisodeStore | str | os.PathLike[str] | None = None
) -> list[Issue]:
    """List everything that is wrong with a preference file.

    Args:
        path: The file.
        store: Its episodes, or where they are; default where the file says.

    Returns:
        An issue for each bad line, the line's number in its message; and a warning of a torn last
        line. Empty: all is well.

    Raises:
        FileNotFoundError: No file, or no store.
    """
    target = Path(path)

    try:
        contents = files.read_contents(target)
        found = files.open_store(contents, store)
    except files.PreferenceFileError as error:
        text = str(error).removeprefix(f"{target}, ")
        return [Issue("error", str(target), text, "see the message")]
    issues = [
        Issue("error", str(target), f"line {number}: {value}", "correct the line, or remove it")
        for number, value in files.parsed(contents, found)
        if isinstance(value, ValueError)
    ]
    if contents.header.content is None:
        fix = "none needed if the store was never made anew"
        issues.append(Issue("warning", str(target), f"line 1: {files.NO_CONTENT}", fix))
    if torn := contents.size - contents.kept:
        fix = "none needed: the next append removes it"
        text = f"the last {torn} bytes are a torn line"
        issues.append(Issue("warning", str(target), text, fix))
    return issues


def summarize(preferences: PreferenceSet) -> dict[str, Any]:
    """Count everything; see ``PreferenceSet.summary``."""
    pairs = [r for r in preferences.records if isinstance(r, Pair)]
    labels = preferences.labels()
    segments = {s for r in preferences.records for s in segments_of(r)}
    lengths = [sum(span.length for span in s) for s in segments]
    counts: dict[str, Any] = {
        "records": len(preferences.records),
        "pairs": sum(not p.tie for p in pairs),
        "ties": sum(p.tie for p in pairs),
        "rankings": len(preferences.records) - len(pairs) - len(labels),
        "good": sum(x.good for x in labels),
        "bad": sum(not x.good for x in labels),
        "sources": dict(Counter(r.source for r in preferences.records)),
        "episodes": len({e for r in preferences.records for e in episodes_of(r)}),
        "segments": len(segments),
        "crossing": sum(len(s) > 1 for s in segments),
        "length": [min(lengths), max(lengths)] if lengths else None,
    }
    reward = preferences.store.fields.get("reward")
    if reward is not None and reward.size == 1 and preferences.pairs():
        counts["reward_agreement"] = preferences.agreement(preferences.store.read("reward"))
    return counts


def doubts(name: str, records: Sequence[Record]) -> Iterator[Issue]:
    """Warn of records that come twice or contradict each other."""
    seen: dict[Any, int] = {}
    for number, record in enumerate(records):
        key: Any = (type(record), segments_of(record), getattr(record, "good", None))
        if key in seen:
            text = f"record {number} is record {seen[key]} again"
            yield Issue("warning", name, text, "remove one, unless two people judged it")
        seen.setdefault(key, number)
        other = _opposite(record)
        if other in seen:
            what = " / ".join(describe(s) for s in segments_of(record))
            text = f"records {seen[other]} and {number} contradict each other ({what})"
            yield Issue("warning", name, text, "none needed if people disagree")


def _opposite(record: Record) -> Any:
    if isinstance(record, Pair) and not record.tie:
        return Pair, (record.rejected, record.chosen), None
    return (Label, (record.item,), not record.good) if isinstance(record, Label) else None
