"""Pairs and labels as batches of plans, for the objectives that learn from preferences.

A segment becomes windows: in each of its spans one window at every ``n_action_steps``-th step,
where the policy would have planned. Of a window the actions that are executed and lie in the span
are scored. So every step of a segment is scored exactly once, by the window that executed it, and
no step outside of it is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from diffpolicy.data.preferences.records import Label, Pair, Segment, episodes_of
from diffpolicy.data.preferences.set import PreferenceSet
from diffpolicy.data.windows import Windows
from diffpolicy.settings import check_range


class _Table(NamedTuple):
    """The windows of every example.

    Attributes:
        window: int64 ``[N, W]``; places that are not used repeat the first one.
        scored: int64 ``[N, W]`` executed steps that are scored, 0..Ta; 0 where not used.
    """

    window: Tensor
    scored: Tensor


class _Examples:
    """Windows of segments, by name: what pairs and labels have in common.

    Args:
        preferences: Whose store the segments are of.
        records: What is made examples of.
        sides: Which attribute of a record, a segment, stands under which name.
        most: At most so many windows of a segment in an example; None: all.
        plans: See ``PairExamples``.
    """

    def __init__(
        self,
        preferences: PreferenceSet,
        records: Sequence[Pair | Label],
        sides: dict[str, str],
        most: int | None,
        **plans: Any,
    ) -> None:
        check_range("[1, inf)", windows=most)
        # All windows of the episodes that were judged: each step of them is now exactly once.
        used = sorted({e for record in records for e in episodes_of(record)})
        self._windows = Windows(preferences.store, episodes=used, **plans)
        steps = preferences.store.episode_lengths[self._windows.episodes]
        begins = (steps.cumsum() - steps).tolist()
        first = dict(zip(self._windows.episodes.tolist(), begins, strict=True))
        every = self._windows.n_action_steps
        laid = {
            name: [_laid_out(getattr(record, side), first, every) for record in records]
            for name, side in sides.items()
        }
        longest = max(len(windows) for segments in laid.values() for windows in segments)
        self._parts = 1 if most is None else -(-longest // most)
        width = -(-longest // self._parts)
        self._tables = {
            name: _filled([w for s in segments for w in _parts(s, self._parts)], width)
            for name, segments in laid.items()
        }
        self._flags: dict[str, Tensor] = {}

    @property
    def parts(self) -> int:
        """P, examples of each record: rows ``i P .. i P + P - 1`` are record i."""
        return self._parts

    def __len__(self) -> int:
        return len(next(iter(self._tables.values())).window)

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        """Gather a batch.

        Args:
            indices: ``[B]`` int64, each in 0..len-1.

        Returns:
            ``obs [B, W, To, O]`` and ``action [B, W, H, A]`` float32, normalised, and
            ``steps [B, W, H]`` bool, True where a position is scored; of pairs each of them under
            ``chosen_...`` and ``rejected_...``. W is the largest number of windows in any example;
            rows that fill up to it repeat the first window and have no scored step. Beside them
            ``good [B]`` bool of labels, and ``tie [B]`` bool of pairs if ties were asked for.

        Raises:
            IndexError: An index is out of range (on the CPU).
        """
        windows = self._windows
        batch: dict[str, Tensor] = {}
        for prefix, table in self._tables.items():
            rows = indices.to(table.window.device)
            window, scored = (t.index_select(0, rows) for t in table)
            found = windows.gather(window.flatten())
            for name in windows.fields:
                batch[prefix + name] = found[name].view(*window.shape, *found[name].shape[1:])
            position = torch.arange(windows.horizon, device=window.device)
            place = position - (windows.n_obs_steps - 1)  # 0 is now's action
            batch[f"{prefix}steps"] = (place >= 0) & (place < scored.unsqueeze(-1))
        for name, flag in self._flags.items():
            record = torch.div(indices.to(flag.device), self._parts, rounding_mode="floor")
            batch[name] = flag.index_select(0, record)
        return batch

    def to(self, device: torch.device | str) -> Self:
        """Return the same examples, whose batches (and data in memory) are on ``device``."""
        moved = copy.copy(self)
        moved._windows = self._windows.to(device)
        moved._tables = {k: _Table(*(t.to(device) for t in v)) for k, v in self._tables.items()}
        moved._flags = {k: v.to(device) for k, v in self._flags.items()}
        return moved

    def __repr__(self) -> str:
        width = next(iter(self._tables.values())).window.shape[1]
        size = f"up to {width} windows of {self._windows.horizon} steps in a segment"
        return f"{type(self).__name__}({len(self)} examples, {size})"


class PairExamples(_Examples):
    """Pairs of segments, normalised: a source of the trainer.

    All windows of a segment are given together, because what is compared is the sum over a segment.
    For long segments that is much to compute; ``windows`` bounds it. A pair is then P examples,
    each with every P-th window of both segments, P the least number that keeps the longest segment
    within ``windows``. That is the same in every epoch, in which every window comes (of a segment
    of fewer than P windows one comes again). A score is then a sum over about ``1 / P`` of a
    segment.

    Args:
        preferences: The pairs, and the rankings as the pairs they stand for.
        windows: At most so many windows of a segment in an example; None: all.
        ties: Also the pairs in which neither was better; a batch then has ``tie``.
        rankings: See ``PreferenceSet.pairs``.
        plans: ``horizon``, ``n_obs_steps``, ``n_action_steps`` and ``normalizer`` of ``Windows``.

    Attributes:
        pairs: The pairs, in the order of the examples.

    Raises:
        ValueError: No pair, or what ``Windows`` refuses.
    """

    def __init__(
        self,
        preferences: PreferenceSet,
        *,
        windows: int | None = None,
        ties: bool = False,
        rankings: Literal["all", "adjacent"] = "all",
        **plans: Any,
    ) -> None:
        self.pairs: tuple[Pair, ...] = tuple(preferences.pairs(ties=ties, rankings=rankings))
        if not self.pairs:
            reason = "has no pairs to learn from (ties are left out unless ties=True)"
            raise ValueError(f"{preferences!r} {reason}; LabelExamples reads good and bad labels")
        sides = {"chosen_": "chosen", "rejected_": "rejected"}
        super().__init__(preferences, self.pairs, sides, windows, **plans)
        if ties:
            self._flags = {"tie": torch.tensor([pair.tie for pair in self.pairs])}


class LabelExamples(_Examples):
    """Good and bad segments, normalised: a source of the trainer.

    Args:
        preferences: The labels.
        windows: See ``PairExamples``.
        pairs: Also the chosen segments of pairs and rankings as good ones, and the rejected ones
            as bad.
        plans: See ``PairExamples``.

    Attributes:
        labels: The labels, in the order of the examples.

    Raises:
        ValueError: No label, or what ``Windows`` refuses.
    """

    def __init__(
        self,
        preferences: PreferenceSet,
        *,
        windows: int | None = None,
        pairs: bool = True,
        **plans: Any,
    ) -> None:
        self.labels: tuple[Label, ...] = tuple(preferences.labels(pairs=pairs))
        if not self.labels:
            hint = "" if pairs else "; pairs=True takes the segments of pairs as labels"
            raise ValueError(f"{preferences!r} has no good or bad labels to learn from{hint}")
        super().__init__(preferences, self.labels, {"": "item"}, windows, **plans)
        self._flags = {"good": torch.tensor([label.good for label in self.labels])}


def _laid_out(segment: Segment, first: dict[int, int], every: int) -> list[tuple[int, int]]:
    """The windows of a segment and how many steps of each are scored."""
    return [
        (first[span.episode] + span.start + offset, min(every, span.length - offset))
        for span in segment
        for offset in range(0, span.length, every)
    ]


def _parts(windows: list[tuple[int, int]], parts: int) -> list[list[tuple[int, int]]]:
    """Every ``parts``-th window, from each of the first ones; never none."""
    return [windows[part % min(parts, len(windows)) :: parts] for part in range(parts)]


def _filled(rows: list[list[tuple[int, int]]], width: int) -> _Table:
    full = torch.tensor([row + [(row[0][0], 0)] * (width - len(row)) for row in rows])
    return _Table(full[..., 0].contiguous(), full[..., 1].contiguous())
