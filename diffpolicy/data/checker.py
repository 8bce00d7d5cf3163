"""Looks for everything that is wrong with a store, also with one that no longer opens."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from diffpolicy.data import opening
from diffpolicy.data.bounds import checked_bounds
from diffpolicy.data.issue import RECOPY, Issue, Severity
from diffpolicy.data.scan import FieldScan, scan_field
from diffpolicy.data.statistics import PARTS, damaged_statistics
from diffpolicy.data.suspects import suspects

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import zarr
    from numpy.typing import NDArray

    from diffpolicy.data.fields import FieldSpec
    from diffpolicy.data.opening import ZarrArray

# Of one kind of finding in one field, so many are listed and the rest counted.
MAX_LISTED = 20
_MAX_WIDTH = 1024
# Not observations: an episode in which nothing but these changes is frozen.
_NOT_OBSERVED = ("action", "reward", "terminated", "truncated")
_DROP = "leave the episode out (data convert with exclude=failed_check), or record it again"


class StoreChecker:
    """Collects the issues of one group.

    Args:
        group: The zarr group.
        path: Where it is; None in memory.
        name: What to call it.
    """

    def __init__(self, group: zarr.Group, path: Path | None, name: str) -> None:
        self.issues: list[Issue] = []
        self._group = group
        self._path = path
        self._name = name
        self._attrs: Mapping[str, Any] = dict(group.attrs)
        self._native = False
        self._arrays: dict[str, ZarrArray] = {}
        self._declared: dict[str, FieldSpec] = {}
        self._ends = np.zeros(0, np.int64)
        self._episodes = np.zeros(0, np.int64)  # their numbers: broken ones are left out of _ends
        self._unpublished = False
        self._scans: dict[str, FieldScan] = {}
        self._frozen: set[int | None] = set()  # places among the ends
        self._counts: Counter[tuple[str, str | None]] = Counter()

    def run(self, action_low: Any, action_high: Any) -> None:
        """Look at everything; bounds as for `check_store`."""
        self._check_format()
        self._open_fields()
        self._check_ends()
        for name, array in self._arrays.items():
            self._check_type(name, array)
            if opening.unusable(array):
                continue
            self._check_length(name, array)
            bounds = self._bounds(array, action_low, action_high) if name == "action" else None
            self._scans[name] = scan_field(array, self._ends, bounds)
            self._report_damage(name, array)
            self._report_values(name, bounds)
        self._check_duplicates()
        self._check_frozen()
        self._check_suspects()
        if self._native:
            self._check_writer()
            self._check_attrs()
            self._check_statistics()
        for (kind, field), count in self._counts.items():
            if count > MAX_LISTED:
                message = f"{kind}: {count - MAX_LISTED} more are not listed"
                fix = "repair those that are listed, then check again"
                self.issues.append(Issue("warning", self._name, None, None, field, message, fix))

    def _add(self, kind: str, issue: Issue) -> None:
        self._counts[kind, issue.field] += 1
        if self._counts[kind, issue.field] <= MAX_LISTED:
            self.issues.append(issue)

    def _file(self, place: str) -> str:
        return f"{self._name}/{place}"

    # -- fields -------------------------------------------------------------------------------

    def _check_format(self) -> None:
        try:
            self._native = opening.is_native(self._group, self._name)
        except ValueError as error:
            self._native = True  # or no other question of it would be answered
            self._error("format", "zarr.json", str(error))

    def _open_fields(self) -> None:
        names: list[str] = []
        try:
            names = opening.field_names(self._group, self._path, self._name)
            if self._native:
                self._declared = opening.declared_fields(self._attrs, self._name)
        except ValueError as error:
            self._error("format", "zarr.json", str(error))
        expected = self._declared
        for name in sorted({*names, *expected}):
            try:
                self._arrays[name] = opening.child_array(self._group, f"data/{name}", self._name)
            except ValueError as error:
                missing = "the field is missing"
                text = f"the field cannot be opened: {error}" if name in names else missing
                self._field_error(name, text, RECOPY)
                continue
            if name in expected and (odd := opening.misfit(self._arrays[name], expected[name])):
                self._field_error(name, odd, RECOPY)
        for name in ("obs", "action") if self._native else ("action",):
            if name not in {*names, *expected}:
                fix = "run `diffpolicy data convert` and say which fields it is made of"
                self._field_error(name, f"there is no field {name!r}, which training needs", fix)

    def _error(self, kind: str, place: str, message: str) -> None:
        self._add(kind, Issue("error", self._file(place), None, None, None, message, RECOPY))

    def _field_error(self, name: str, message: str, fix: str) -> None:
        issue = Issue("error", self._file(f"data/{name}"), None, None, name, message, fix)
        self._add("damaged fields", issue)

    def _check_type(self, name: str, array: ZarrArray) -> None:
        severity: Severity = "warning"
        if text := opening.unusable(array):
            fix = "store rows of plain numbers; other things do not train"
            self._field_error(name, text, fix)
            return
        if name in ("obs", "action") and array.ndim != 2 and (self._native or name == "action"):
            message = f"rows have the shape {list(array.shape[1:])}; they must be vectors to train"
            self._field_error(name, message, "store it as [T, D]: array.reshape(len(array), -1)")
        if array.dtype == np.float64:
            message, fix = "takes twice the memory of float32", "store it as float32"
        elif name == "action" and array.dtype.kind != "f":
            message = "is not continuous, but actions are normalised and denoised as real numbers"
            fix = "store them as float32, if they are quantities; one-hot, if they are choices"
        else:
            return
        message = f"dtype {array.dtype} {message}"
        file = self._file(f"data/{name}")
        self._add("dtypes", Issue(severity, file, None, None, name, message, fix))

    # -- lengths ------------------------------------------------------------------------------

    def _check_ends(self) -> None:
        file = self._file("meta/episode_ends")
        try:
            ends = opening.raw_ends(self._group, self._name, native=self._native)
            rows = opening.child_array(self._group, "meta/episode_ends", self._name).shape[0]
        except ValueError as error:
            self._error("ends", "meta/episode_ends", f"episode_ends cannot be read: {error}")
            return
        self._unpublished = self._native and len(ends) < rows
        if len(ends) == 0:
            message, fix = "the store holds no episodes", "record or convert some"
            self._add("ends", Issue("error", file, None, None, None, message, fix))
        self._check_order(ends, file)

    def _check_order(self, ends: NDArray[np.int64], file: str) -> None:
        before = np.concatenate([[0], np.maximum.accumulate(ends)[:-1]]) if len(ends) else ends
        for index in np.flatnonzero(ends <= before).tolist():
            previous = int(ends[index - 1]) if index else 0
            end = int(ends[index])
            if end == previous:
                message, fix = (
                    f"the episode is empty (it ends at row {end}, where it begins)",
                    "drop",
                )
            else:
                message = f"it ends at row {end}, after one that ends at row {int(before[index])}"
                fix = "correct"
            fix += " this entry of meta/episode_ends; ends are cumulative and increase strictly"
            self._add("order", Issue("error", file, index, end, None, message, fix))
        self._episodes = np.flatnonzero(ends > before)
        self._ends = ends[self._episodes]

    def _check_length(self, name: str, array: ZarrArray) -> None:
        rows, total = int(array.shape[0]), int(self._ends[-1]) if len(self._ends) else 0
        file = self._file(f"data/{name}")
        if rows < total:
            episode = self._episode_at(rows)
            message = f"the field has {rows} rows, but episode_ends counts {total}"
            fix = f"drop the episodes from {episode} on, or copy the store again"
            self._add("lengths", Issue("error", file, episode, rows, name, message, fix))
        elif rows > total and total:
            if self._native:
                self._unpublished = True
                return
            message = f"the field has {rows} rows, but the last episode ends at {total}"
            fix = "add the missing end to meta/episode_ends, or drop the rows"
            self._add("lengths", Issue("warning", file, None, total, name, message, fix))

    def _check_writer(self) -> None:
        if self._unpublished:
            message = "rows follow the last episode: its writer still runs, or was killed"
            fix = f"if no writer runs: {self._update_command()}"
            self._add("writer", Issue("warning", self._name, None, None, None, message, fix))

    def _episode_at(self, row: int) -> int | None:
        index = int(np.searchsorted(self._ends, row, side="right"))
        return int(self._episodes[index]) if index < len(self._episodes) else None

    # -- chunks -------------------------------------------------------------------------------

    def _report_damage(self, name: str, array: ZarrArray) -> None:
        for damage in self._scans[name].damage:
            chunk = (array.shards or array.chunks)[0]
            key = array.metadata.encode_chunk_key(
                (damage.start // chunk,) + (0,) * (array.ndim - 1)
            )
            first, last = self._episode_at(damage.start), self._episode_at(damage.stop - 1)
            what = "missing" if damage.missing else "damaged or cut short"
            message = (
                f"the chunk is {what}: rows {damage.start}..{damage.stop - 1} "
                f"(episodes {first}..{last}) cannot be read: {damage.reason}"
            )
            file = self._file(damage.missing or f"data/{name}/{key}")
            issue = Issue("error", file, first, damage.start, name, message, RECOPY)
            self._add("damaged chunks", issue)

    # -- values -------------------------------------------------------------------------------

    def _bounds(
        self, array: ZarrArray, low: Any, high: Any
    ) -> tuple[NDArray[Any], NDArray[Any]] | None:
        shape = tuple(array.shape[1:])
        checked_bounds(low, high, shape)  # the caller's; the store's own are a finding
        low = self._attrs.get("action_low") if low is None else low
        high = self._attrs.get("action_high") if high is None else high
        try:
            return checked_bounds(low, high, shape)
        except ValueError as error:
            self._error("bounds", "zarr.json", str(error))
            return None

    def _report_values(self, name: str, bounds: tuple[NDArray[Any], NDArray[Any]] | None) -> None:
        scan = self._scans[name]
        self._report_rows(name, scan.not_finite, "values that are not finite")
        if bounds is not None:
            text = f"actions outside [{bounds[0].tolist()}, {bounds[1].tolist()}]"
            self._report_rows(name, scan.outside, text)

    def _report_rows(self, name: str, rows: NDArray[np.int64], what: str) -> None:
        place = np.searchsorted(self._ends, rows, side="right")
        for index in np.unique(place).tolist():
            inside = rows[place == index]
            row, begin = int(inside[0]), int(self._ends[index - 1]) if index else 0
            message = f"{what} in {len(inside)} steps, first in step {row - begin} of the episode"
            file = self._file(f"data/{name}")
            episode = int(self._episodes[index])
            self._add(what, Issue("error", file, episode, row, name, message, _DROP))

    def _check_duplicates(self) -> None:
        first: dict[bytes, int] = {}
        begins = np.concatenate([[0], self._ends[:-1]]) if len(self._ends) else self._ends
        for index, number in enumerate(self._episodes.tolist()):
            if not self._scans or not all(s.whole[index] for s in self._scans.values()):
                continue
            key = b"".join(s.digests[index] for s in self._scans.values())
            earlier = first.setdefault(key, number)
            if earlier != number:
                message = f"the episode is a copy of episode {earlier}"
                fix = "leave one of them out: copies leak from training into validation"
                file, row = self._file("data"), int(begins[index])
                self._add("duplicates", Issue("warning", file, number, row, None, message, fix))

    def _check_frozen(self) -> None:
        observed = {k: s for k, s in self._scans.items() if k not in _NOT_OBSERVED}
        begins = np.concatenate([[0], self._ends[:-1]]) if len(self._ends) else self._ends
        for index, number in enumerate(self._episodes.tolist()):
            row, length = int(begins[index]), int(self._ends[index] - begins[index])
            still = all(s.whole[index] and not s.changed[index] for s in observed.values())
            if observed and still and length > 1:
                message = f"no observation changes in its {length} steps: the episode is frozen"
                fix = "leave the episode out, and look whether the recorder lost its sensors"
                file, name = self._file("data"), ", ".join(observed)
                self._add("frozen", Issue("warning", file, number, row, name, message, fix))
                self._frozen.add(index)

    def _check_suspects(self) -> None:
        arrays = {
            name: self._arrays[name]
            for name, scan in self._scans.items()
            if scan.sound and _is_vectors(name, self._arrays[name]) and scan.whole.all()
        }
        for name, found in suspects(arrays, self._ends):
            number = None if found.episode is None else int(self._episodes[found.episode])
            if found.kind != "frozen" or found.episode not in self._frozen:
                file = self._file(f"data/{name}")
                issue = Issue("warning", file, number, found.row, name, found.message, found.fix)
                self._add(found.kind, issue)

    # -- what stands beside the data ----------------------------------------------------------

    def _update_command(self) -> str:
        return f"run `diffpolicy data info --update-statistics {self._name}`"

    def _check_attrs(self) -> None:
        file, count = self._file("meta/episode_attrs"), len(self._episodes)
        try:
            lines = opening.episode_lines(self._group, count, self._name)
            message = f"there are attributes of {len(lines)} episodes of {count}"
        except ValueError as error:
            message = f"the episodes' attributes cannot be read: {error}"
            lines = []
        if len(lines) < count:
            fix = "copy the store again; training works without them"
            self._add("attrs", Issue("warning", file, None, None, None, message, fix))

    def _check_statistics(self) -> None:
        stored: Any = self._attrs.get("statistics")
        total = int(self._ends[-1]) if len(self._ends) else 0
        if not stored:
            if total:
                self._statistics_issue(None, "there are no statistics, which normalisers need")
            return
        if problem := damaged_statistics(
            stored, self._declared, self._attrs.get("statistics_crc32")
        ):
            self._statistics_issue(None, problem)
            return
        for name, values in stored.items():
            scan = self._scans.get(name)
            if values["count"] != total:
                self._statistics_issue(
                    name, f"the statistics cover {values['count']} steps of {total}"
                )
            elif scan is not None and (parts := _contradicted(scan, values)):
                message = f"{', '.join(parts)} are not those of the data, which were changed since"
                self._statistics_issue(name, f"the statistics {message}")

    def _statistics_issue(self, field: str | None, message: str) -> None:
        fix, file = self._update_command(), self._file("zarr.json")
        self._add("statistics", Issue("warning", file, None, None, field, message, fix))


def _is_vectors(name: str, array: ZarrArray) -> bool:
    """Whether the values of a field can be judged by each other: no flags, images or copies."""
    numbers = array.dtype.kind == "f" and array.ndim == 2 and array.shape[1] <= _MAX_WIDTH
    return numbers and name not in ("reward", "next_obs")


def _contradicted(scan: FieldScan, values: Mapping[str, Any]) -> list[str]:
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
