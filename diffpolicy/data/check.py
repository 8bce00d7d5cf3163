"""Looks for everything that is wrong with a store, also with one that no longer opens."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray

from diffpolicy.data import opening
from diffpolicy.data.blocks import by_episode
from diffpolicy.data.fields import FieldSpec, checked_bounds
from diffpolicy.data.frames import layout_problem
from diffpolicy.data.observation import is_obs
from diffpolicy.data.scan import Bounds, FieldScan, scan_field
from diffpolicy.data.statistics import PARTS, statistics_problem
from diffpolicy.data.store import EpisodeStore
from diffpolicy.data.suspects import moving, suspects

Severity = Literal["error", "warning"]
RECOPY = "copy the store again from where it is whole; otherwise the episodes there are lost"
MAX_LISTED = 20  # so many of one kind in one field; the rest are counted
_MAX_WIDTH = 1024
# Not observations: an episode in which nothing but these changes is frozen.
_NOT_OBSERVED = ("action", "reward", "terminated", "truncated")


@dataclass(frozen=True)
class Issue:
    """One finding.

    Attributes:
        severity: ``error``: training on it fails or goes wrong; ``warning``: probably not meant.
        file: The file or directory at fault.
        message: What is wrong.
        fix: What to do.
        episode: The (first) episode concerned, if any.
        row: The (first) row concerned, counted over the whole store, if any.
        field: The field concerned, if any.
    """

    severity: Severity
    file: str
    message: str
    fix: str
    episode: int | None = None
    row: int | None = None
    field: str | None = None


def format_issue(issue: Issue) -> str:
    """Return one line: severity, file, field, episode, row, message and fix."""
    parts = (("field", issue.field), ("episode", issue.episode), ("row", issue.row))
    where = [issue.file, *(f"{name} {value}" for name, value in parts if value is not None)]
    return f"{issue.severity}: {', '.join(where)}: {issue.message}. Fix: {issue.fix}."


def check_store(
    path_or_store: str | os.PathLike[str] | EpisodeStore,
    *,
    action_low: Any = None,
    action_high: Any = None,
) -> list[Issue]:
    """Look at everything in a store, also in one that cannot be opened any more.

    Args:
        path_or_store: A store or a Diffusion Policy replay buffer.
        action_low: Lower bound of ``action``, a number or ``[A]``; default the store's attribute of
            this name, if it has one.
        action_high: Upper bound likewise.

    Returns:
        What was found, in the order of the files; empty if all is well.

    Raises:
        ValueError: Bounds that do not fit the actions.
    """
    if isinstance(path_or_store, EpisodeStore):
        parts = path_or_store._group, path_or_store.path, path_or_store.name
        return _Checker(*parts).run(action_low, action_high)
    try:
        group = opening.open_group(path := Path(path_or_store))
    except (FileNotFoundError, ValueError) as error:
        fix = RECOPY if path.exists() else "give the path of a store"
        return [Issue("error", str(path), str(error), fix)]
    try:
        found = _Checker(group, path, str(path)).run(action_low, action_high)
    finally:
        group.store.close()
    if not any(issue.severity == "error" for issue in found):
        try:
            EpisodeStore.open(path).close()
        except (OSError, ValueError) as error:
            found.append(Issue("error", str(path), str(error), RECOPY))
    return found


class _Checker:
    """Collects the issues of one group; ``path`` is None in memory, ``name`` is for messages."""

    def __init__(self, group: zarr.Group, path: Path | None, name: str) -> None:
        self._group, self._path, self._name = group, path, name
        self._attrs: dict[str, Any] = dict(group.attrs)
        self._native = False
        self._arrays: dict[str, opening.ZarrArray] = {}
        self._declared: dict[str, FieldSpec] = {}
        # Of the episodes whose ends can be: their ends and begins, and their numbers in the store.
        self._ends = self._begins = self._episodes = np.zeros(0, np.int64)
        self._unpublished = False
        self._scans: dict[str, FieldScan] = {}
        self._issues: list[Issue] = []
        self._counts: Counter[tuple[str, str | None]] = Counter()

    def run(self, action_low: Any, action_high: Any) -> list[Issue]:
        """Look at everything; bounds as for :func:`check_store`."""
        self._check_format()
        self._check_ends()
        for name, array in self._arrays.items():
            if problem := opening.unusable(array):
                fix = "store rows of plain numbers; others do not train"
                self._add("damaged fields", problem, fix, field=name)
                continue
            self._check_type(name, array)
            self._check_length(name, array)
            bounds = self._bounds(array, action_low, action_high) if name == "action" else None
            self._scans[name] = scan_field(array, self._ends, bounds)
            self._report_damage(name, array)
            self._report_rows(name, self._scans[name].not_finite, "values that are not finite")
            if bounds is not None:
                text = f"actions outside [{bounds[0].tolist()}, {bounds[1].tolist()}]"
                self._report_rows(name, self._scans[name].outside, text)
        self._check_duplicates()
        self._check_suspects(self._check_frozen())
        if self._native:
            self._check_beside()
        for (kind, field), count in self._counts.items():
            if count > MAX_LISTED:
                message = f"{kind}: {count - MAX_LISTED} more are not listed"
                fix = "repair those that are listed, then check again"
                self._issues.append(Issue("warning", self._name, message, fix, field=field))
        return self._issues

    def _add(
        self,
        kind: str,
        message: str,
        fix: str = RECOPY,
        severity: Severity = "error",
        *,
        place: str | None = None,
        field: str | None = None,
        index: int | None = None,
        row: int | None = None,
    ) -> None:
        """Add an issue of the file ``place``; ``index``: of its episode, among those with ends."""
        self._counts[kind, field] += 1
        if self._counts[kind, field] <= MAX_LISTED:
            file = f"{self._name}/{f'data/{field}' if place is None else place}".rstrip("/")
            episode = None if index is None else int(self._episodes[index])
            row = int(self._begins[index]) if row is None and index is not None else row
            self._issues.append(Issue(severity, file, message, fix, episode, row, field))

    # -- fields -------------------------------------------------------------------------------

    def _check_format(self) -> None:
        names: list[str] = []
        try:
            self._native = True  # if it cannot be told: or no other question would be answered
            self._native = opening.is_native(self._group, self._name)
        except ValueError as error:
            self._add("format", str(error), place="zarr.json")
        try:
            names = opening.field_names(self._group, self._path, self._name)
            if self._native:
                self._declared = opening.declared_fields(self._attrs, self._name)
        except ValueError as error:
            self._add("format", str(error), place="zarr.json")
        known = sorted({*names, *self._declared})
        for name in known:
            try:
                array = opening.child_array(self._group, f"data/{name}", self._name)
            except ValueError as error:
                text = f"the field cannot be opened: {error}"
                text = text if name in names else "the field is missing"
                self._add("damaged fields", text, field=name)
                continue
            self._arrays[name] = array
            if name in self._declared and (odd := opening.misfit(array, self._declared[name])):
                self._add("damaged fields", odd, field=name)
        for name, there in {"obs": map(is_obs, known), "action": ["action" in known]}.items():
            if not any(there) and (self._native or name == "action"):
                message = f"there is no field {name!r}, which training needs"
                fix = "run `diffpolicy data convert` and say which fields it is made of"
                self._add("damaged fields", message, fix, field=name)

    def _check_type(self, name: str, array: opening.ZarrArray) -> None:
        flat = array.ndim == 1 and name == "obs" and self._native
        if flat or (name == "action" and array.ndim != 2):
            message = f"rows have the shape {list(array.shape[1:])}; they must be vectors to train"
            fix = "store it as [T, D]: array.reshape(len(array), -1)"
            self._add("damaged fields", message, fix, field=name)
        if is_obs(name) and (problem := layout_problem(name, FieldSpec.of(array))):
            self._add("images", *problem, "warning", field=name)
        if array.dtype == np.float64:
            message, fix = "takes twice the memory of float32", "store it as float32"
        elif name == "action" and array.dtype.kind != "f":
            message = "is not continuous, but actions are normalised and denoised as real numbers"
            fix = "store them as float32, if they are quantities; one-hot, if they are choices"
        else:
            return
        self._add("dtypes", f"dtype {array.dtype} {message}", fix, "warning", field=name)

    # -- lengths ------------------------------------------------------------------------------

    def _check_ends(self) -> None:
        place = "meta/episode_ends"
        try:
            ends = opening.raw_ends(self._group, self._name, native=self._native)
            rows = opening.child_array(self._group, place, self._name).shape[0]
        except ValueError as error:
            self._add("ends", f"episode_ends cannot be read: {error}", place=place)
            return
        self._unpublished = self._native and len(ends) < rows
        if len(ends) == 0:
            message = "the store holds no episodes"
            self._add("ends", message, "record or convert some", place=place)
        before = np.maximum.accumulate(np.concatenate([[0], ends]))[:-1]
        self._episodes, self._ends, self._begins = np.arange(len(ends)), ends, before
        for index in np.flatnonzero(ends <= before).tolist():
            end = int(ends[index])
            what = f"the episode ends at row {end}, but begins at row {int(before[index])}"
            fix = "correct or drop this entry of meta/episode_ends; ends increase strictly"
            self._add("order", what, fix, place=place, index=index, row=end)
        kept = np.flatnonzero(ends > before)
        self._episodes, self._ends, self._begins = kept, ends[kept], before[kept]

    def _check_length(self, name: str, array: opening.ZarrArray) -> None:
        rows, total = int(array.shape[0]), int(self._ends.max(initial=0))
        if rows < total:
            index = self._index_at(rows)
            message = f"the field has {rows} rows, but episode_ends counts {total}"
            fix = f"drop the episodes from {self._episodes[index]} on, or copy the store again"
            self._add("lengths", message, fix, index=index, row=rows, field=name)
        elif rows > total and total and self._native:
            self._unpublished = True
        elif rows > total and total:
            message = f"the field has {rows} rows, but the last episode ends at {total}"
            fix = "add the missing end to meta/episode_ends, or drop the rows"
            self._add("lengths", message, fix, "warning", row=total, field=name)

    def _index_at(self, row: int) -> int:
        return int(np.searchsorted(self._ends, row, side="right"))

    # -- chunks and values --------------------------------------------------------------------

    def _report_damage(self, name: str, array: opening.ZarrArray) -> None:
        chunk = (array.shards or array.chunks)[0]
        for start, stop, why, missing in self._scans[name].damage:
            key = array.metadata.encode_chunk_key((start // chunk,) + (0,) * (array.ndim - 1))
            first, last = self._index_at(start), self._index_at(stop - 1)
            message = (
                f"the chunk is {'missing' if missing else 'damaged or cut short'}: rows "
                f"{start}..{stop - 1} (episodes {self._episodes[first]}..{self._episodes[last]}) "
                f"cannot be read: {why}"
            )
            place = missing or f"data/{name}/{key}"
            self._add("damaged chunks", message, place=place, index=first, row=start, field=name)

    def _bounds(self, array: opening.ZarrArray, low: Any, high: Any) -> Bounds | None:
        shape = tuple(array.shape[1:])
        checked_bounds(low, high, shape)  # the caller's; the store's own are a finding
        low = self._attrs.get("action_low") if low is None else low
        high = self._attrs.get("action_high") if high is None else high
        try:
            return checked_bounds(low, high, shape)
        except ValueError as error:
            self._add("bounds", str(error), place="zarr.json")
            return None

    def _report_rows(self, name: str, rows: NDArray[np.int64], what: str) -> None:
        fix = "leave the episode out (data convert with exclude=failed_check), or record it"
        for index, inside in by_episode(rows, self._ends):
            row = int(inside[0])
            step = row - self._begins[index]
            message = f"{what} in {len(inside)} steps, first in step {step} of the episode"
            self._add(what, message, fix, index=index, row=row, field=name)

    # -- episodes -----------------------------------------------------------------------------

    def _check_duplicates(self) -> None:
        first: dict[bytes, int] = {}
        scans = self._scans.values()
        for index, number in enumerate(self._episodes.tolist()):
            if not scans or not all(s.whole[index] for s in scans):
                continue
            earlier = first.setdefault(b"".join(s.digests[index] for s in scans), number)
            if earlier != number:
                message = f"the episode is a copy of episode {earlier}"
                fix = "leave one of them out: copies leak from training into validation"
                self._add("duplicates", message, fix, "warning", place="data", index=index)

    def _check_frozen(self) -> list[int]:
        """Report episodes in which nothing moves; return their indices."""
        seen = {k: s for k, s in self._scans.items() if k not in _NOT_OBSERVED}
        if not seen:
            return []
        still = np.all([s.whole & ~s.changed for s in seen.values()], axis=0)
        lengths = self._ends - self._begins
        found: list[int] = np.flatnonzero(still & (lengths > 1)).tolist()
        fix = "leave the episode out, and look whether the recorder lost its sensors"
        for index in found:
            message = f"no observation changes in its {lengths[index]} steps: the episode is frozen"
            where: Any = {"place": "data", "field": ", ".join(seen), "index": index}
            self._add("frozen", message, fix, "warning", **where)
        return found

    def _check_suspects(self, frozen: list[int]) -> None:
        arrays = {
            name: self._arrays[name]
            for name, scan in self._scans.items()
            if scan.sound and _is_vectors(name, self._arrays[name]) and scan.whole.all()
        }
        seen = {name: array for name, array in arrays.items() if is_obs(name)}
        cameras = {n: s.frames for n, s in self._scans.items() if s.frames and s.whole.all()}
        odd = [suspects(arrays, self._ends)]
        if cameras and len(self._ends):
            changes = moving(seen, self._ends)
            odd += [frames.suspects(name, changes) for name, frames in cameras.items()]
        idle = self._without_actions()
        for name, kind, index, row, message, fix in chain.from_iterable(odd):
            if name == "action" and index in idle:
                continue
            if kind != "frozen" or index not in frozen:
                self._add(kind, message, fix, "warning", field=name, index=index, row=row)

    def _without_actions(self) -> set[int]:
        """Indices of the episodes that say that they have no actions: these stand as zeros."""
        try:
            lines = opening.episode_lines(self._group, len(self._episodes), self._name)
        except ValueError:  # which is reported as damage of its own
            return set()
        numbers = {i for i, known in enumerate(lines) if known.get("actions") is False}
        return set(np.flatnonzero(np.isin(self._episodes, sorted(numbers))).tolist())

    # -- what stands beside the data ----------------------------------------------------------

    def _check_beside(self) -> None:
        """Look at traces of a writer, the episodes' attributes and the statistics."""
        update = f"run `diffpolicy data info --update-statistics {self._name}`"
        if self._unpublished:
            message = "rows follow the last episode: its writer still runs, or was killed"
            self._add("writer", message, f"if no writer runs: {update}", "warning", place="")
        count, total = len(self._episodes), int(self._ends.max(initial=0))
        try:
            lines = opening.episode_lines(self._group, count, self._name)
            problem = f"there are attributes of {len(lines)} episodes of {count}"
        except ValueError as error:
            lines, problem = [], f"the episodes' attributes cannot be read: {error}"
        if len(lines) < count:
            fix = "copy the store again; training works without them"
            self._add("attrs", problem, fix, "warning", place="meta/episode_attrs")
        if odd := statistics_problem(self._attrs, self._declared, total):
            if total or self._attrs.get("statistics"):
                self._add("statistics", odd, update, "warning", place="zarr.json")
            return
        for name, values in self._attrs["statistics"].items():
            scan = self._scans.get(name)
            if scan is not None and (parts := _contradicted(scan, values)):
                said = f"the statistics {', '.join(parts)} are not those of the data"
                text, place = f"{said}, which were changed since", "zarr.json"
                self._add("statistics", text, update, "warning", place=place, field=name)


def _is_vectors(name: str, array: opening.ZarrArray) -> bool:
    """Whether the values of a field can be judged by each other: no flags, images or copies."""
    numbers = array.dtype.kind == "f" and array.ndim == 2 and array.shape[1] <= _MAX_WIDTH
    return numbers and name != "reward" and not name.startswith("next_obs")


def _contradicted(scan: FieldScan, values: dict[str, Any]) -> list[str]:
    """Which of the stored statistics the data do not have."""
    found = scan.statistics
    if not scan.sound or not found:
        return []  # reported already, or nothing to compare with
    # Sums over other blocks are rounded otherwise, by a share of the range.
    slack = 1e-6 + 1e-5 * (np.asarray(found["max"]) - np.asarray(found["min"]))
    return [
        part
        for part in PARTS
        if (np.abs(np.asarray(found[part]) - np.asarray(values[part])) > slack).any()
    ]
