"""Preferences over windows of stored episodes: pairs, rankings, and good or bad labels.

A preference file lies beside an episode store and refers to its episodes by number;
``diffpolicy.data.preferences.file`` describes it. ``PreferenceSet`` reads and appends to one.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from diffpolicy.data.check import Issue
from diffpolicy.data.preferences import file as files
from diffpolicy.data.preferences.check import check_preferences, doubts, summarize
from diffpolicy.data.preferences.file import PreferenceFileError
from diffpolicy.data.preferences.records import (
    Label,
    Pair,
    Ranking,
    Record,
    Segment,
    check_fits,
    checked_json,
    episodes_of,
    record_to_json,
    rows_of_segment,
)
from diffpolicy.data.preferences.split import split_records
from diffpolicy.data.store import EpisodeStore
from diffpolicy.settings import check_choice, check_shape

_log = logging.getLogger("diffpolicy.data")


class PreferenceSet:
    """Preferences over the episodes of one store, in memory or in a file.

    Make a file with ``create``, read one with ``open``; the constructor keeps the records in
    memory.

    Args:
        store: The episodes.
        records: What is known of them.
        attrs: JSON values that describe the whole.

    Attributes:
        store: The episodes.
        path: The file; None in memory.

    Raises:
        ValueError: A record of episodes or steps that the store does not have, or attributes that
            are not JSON.
    """

    def __init__(
        self,
        store: EpisodeStore,
        records: Iterable[Record] = (),
        *,
        attrs: Mapping[str, Any] | None = None,
    ) -> None:
        self.store = store
        self._attrs = checked_json(attrs or {}, "attrs")
        self.path: Path | None = None
        self._file: files.Contents | None = None
        self._lock = threading.Lock()
        self._mark = files.mark_of(store, content=False)
        self._records: list[Record] = []
        self.extend(records)

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        store: EpisodeStore,
        *,
        attrs: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> PreferenceSet:
        """Make an empty file to append to.

        Args:
            path: The file, by custom ``something.jsonl`` beside the store: the two can then be
                moved together.
            store: The episodes, on the disk.
            attrs: JSON values that describe the whole.
            overwrite: Replace the preference file at ``path``. Anything else there is left alone.

        Returns:
            The set, for appending.

        Raises:
            FileExistsError: Something is at ``path``.
            ValueError: A store in memory, or attributes that are not JSON.
        """
        target = Path(path)
        if store.path is None:
            raise ValueError(
                "a preference file needs a store on the disk; of one in memory keep the "
                "preferences there too: PreferenceSet(store, records)"
            )
        if target.exists():
            files.check_overwritten(target, overwrite=overwrite)
        made = cls(store, attrs=attrs)
        made._mark = files.mark_of(store)
        files.write_header(target, store.path, made._mark, made._attrs)
        made.path, made._file = target, files.read_contents(target)
        return made

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        store: EpisodeStore | str | os.PathLike[str] | None = None,
    ) -> PreferenceSet:
        """Read a file; it can be appended to as well.

        Args:
            path: The file.
            store: Its episodes, or where they are; default where the file says. A store that has
                grown since is fine.

        Returns:
            The set. A torn last line (of a writer that was killed) is not in it.

        Raises:
            FileNotFoundError: No file, or no store.
            PreferenceFileError: The first line that is wrong, with what was expected and what came
                (``check_preferences`` lists all); or a store of other episodes.
        """
        target = Path(path)
        contents = files.read_contents(target)
        found = files.open_store(contents, store)
        made = cls(found, attrs=contents.header.attrs)
        made._mark = contents.header
        for number, value in files.parsed(contents, found):
            if isinstance(value, ValueError):
                raise PreferenceFileError(f"{target}, line {number}: {value}") from value
            if isinstance(value, files.Mark):
                made._mark = value
            else:
                made._records.append(value)
        made.path, made._file = target, contents
        if contents.header.content is None:
            _log.warning("%s: %s", target, files.NO_CONTENT)
        return made

    @property
    def name(self) -> str:
        """The path, or a stand-in, for messages."""
        return str(self.path) if self.path is not None else "<preferences in memory>"

    @property
    def attrs(self) -> dict[str, Any]:
        """What describes the whole (a copy)."""
        return dict(self._attrs)

    @property
    def records(self) -> tuple[Record, ...]:
        """All records, in the order they were made."""
        return tuple(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        kinds = Counter(type(r).__name__ for r in self._records)
        counts = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())) or "empty"
        return f"PreferenceSet({self.name}: {counts}; of {self.store.name})"

    def append(self, record: Record) -> None:
        """Add one record. When this returns, killing the process does not lose it.

        Raises:
            ValueError: Episodes or steps that the store does not have; nothing was added.
            PreferenceFileError: Another program wrote to the file since it was opened.
        """
        self.extend([record])

    def extend(self, records: Iterable[Record]) -> None:
        """Add several records with one write, which is much faster than one by one.

        Killed while it writes, the first of them are in the file.

        Raises:
            ValueError: As for ``append``; nothing was added.
            PreferenceFileError: As for ``append``.
        """
        added = list(records)
        lengths = self.store.episode_lengths
        for record in added:
            if not isinstance(record, Pair | Ranking | Label):
                raise ValueError(f"records are Pair, Ranking or Label; got {record!r:.80}")
            check_fits(record, lengths)
        if not added:
            return
        with self._lock:
            mark = self._mark
            if max(max(episodes_of(r)) for r in added) >= mark.episodes:  # the store has grown
                mark = files.mark_of(self.store, content=self._file is not None)
            if self._file is not None:
                grown = [{"kind": "store", **asdict(mark)}] if mark != self._mark else []
                self._file.append(grown + [record_to_json(r) for r in added])
            self._mark = mark
            self._records.extend(added)

    def pairs(
        self, *, ties: bool = False, rankings: Literal["all", "adjacent"] = "all"
    ) -> list[Pair]:
        """Return the pairs, and those that the rankings stand for.

        Args:
            ties: Also those in which neither was better.
            rankings: A ranking of n segments is n (n - 1) / 2 pairs, each of its items above each
                later one ("all"), or n - 1, each above the next ("adjacent"). The places of the
                two are in the pair's ``info``: ``{"places": [0, 2], "of": 4}``.

        Returns:
            The pairs in the order of the records.

        Raises:
            ValueError: ``rankings`` is neither.
        """
        check_choice("rankings", rankings, ("all", "adjacent"))
        made: list[Pair] = []
        for record in self._records:
            if isinstance(record, Ranking):
                made.extend(_expanded(record, adjacent=rankings == "adjacent"))
            elif isinstance(record, Pair) and (ties or not record.tie):
                made.append(record)
        return made

    def labels(self, *, pairs: bool = False) -> list[Label]:
        """Return the good and bad labels.

        Args:
            pairs: Also the chosen segments of ``pairs()`` as good ones and the rejected as bad ones
                (a segment that comes in several pairs is labelled several times).
        """
        made = [r for r in self._records if isinstance(r, Label)]
        for pair in self.pairs() if pairs else ():
            made.append(Label(pair.chosen, True, pair.source, pair.info))
            made.append(Label(pair.rejected, False, pair.source, pair.info))
        return made

    def rows(self, segment: Segment) -> NDArray[np.int64]:
        """Return the rows of a segment in the store, counted over all episodes, int64 ``[n]``."""
        return rows_of_segment(segment, self.store.episode_ends)

    def agreement(self, scores: NDArray[np.floating]) -> float:
        """Return the share of the pairs whose chosen segment has the larger sum of a score.

        Args:
            scores: ``[T]``, one number for each step of the store, such as its rewards.

        Returns:
            0..1; equal sums count half; NaN without pairs.

        Raises:
            ValueError: Another length.
        """
        values = np.asarray(scores, np.float64).reshape(-1)
        check_shape("scores", values.shape, [self.store.num_steps])
        gaps = [
            float(values[self.rows(p.chosen)].sum() - values[self.rows(p.rejected)].sum())
            for p in self.pairs()
        ]
        return float(np.mean((np.sign(gaps) + 1) / 2)) if gaps else float("nan")

    def check(self) -> list[Issue]:
        """List what is wrong with the set, or probably not meant.

        Returns:
            Of a file all that ``check_preferences`` finds; and warnings of records that come twice,
            and of pairs that were judged both ways.
        """
        found = check_preferences(self.path, self.store) if self.path is not None else []
        return found + list(doubts(self.name, self._records))

    def summary(self) -> dict[str, Any]:
        """Count everything, for people.

        Returns:
            ``records, pairs, ties, rankings, good, bad``; ``sources`` (name -> records);
            ``episodes`` used; ``segments`` different ones, ``crossing`` those of more than one
            span, their ``length`` (shortest, longest; in steps); and ``reward_agreement`` (see
            ``agreement``) where the store has a field ``reward`` of one number a step.
        """
        return summarize(self)

    def split_by_episode(
        self, folds: int, seed: int, *, group: str | None = None
    ) -> list[tuple[PreferenceSet, PreferenceSet]]:
        """Split into training and held-out records so that no episode is on both sides.

        Every episode is held out in one fold. A record of a fold's training episodes alone is its
        training, one of its held-out episodes alone is held out, and one that straddles is in
        neither. Where episodes were compared only within small groups (those that start from one
        state), a group stays together and nothing is lost. Where any two were compared, about
        ``1 / folds`` of all pairs are held out over all folds together: fewer folds hold out more.

        Args:
            folds: K, at least 2.
            seed: Decides which episode is held out when.
            group: An episode attribute, such as ``"seed"``: episodes with the same value stay on
                the same side although they were never compared.

        Returns:
            K times (training, held out), each in memory; ``attrs["split"]`` of both says
            ``{"fold", "folds", "seed", "dropped"}``, the last how many records straddle.

        Raises:
            ValueError: Fewer than 2 folds, or a fold without a record to train on or to hold out.
        """
        made = []
        for fold, sides in enumerate(split_records(self.store, self._records, folds, seed, group)):
            dropped = len(self._records) - len(sides[0]) - len(sides[1])
            split = {"fold": fold, "folds": folds, "seed": seed, "dropped": dropped}
            attrs = {**self._attrs, "split": split}
            train, held_out = (PreferenceSet(self.store, side, attrs=attrs) for side in sides)
            made.append((train, held_out))
        return made


def _expanded(ranking: Ranking, *, adjacent: bool) -> Iterator[Pair]:
    count = len(ranking.items)
    for a in range(count):
        for b in range(a + 1, min(a + 2, count) if adjacent else count):
            info = {**ranking.info, "places": [a, b], "of": count}
            yield Pair(ranking.items[a], ranking.items[b], source=ranking.source, info=info)
