"""Looks for everything that is wrong with a store, also with one that no longer opens."""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from diffpolicy.data import layout
from diffpolicy.data.fields import FieldSpec
from diffpolicy.data.issue import RECOPY, Issue, Severity
from diffpolicy.data.scan import FieldScan, scan_field

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from diffpolicy.data.layout import ZarrArray

# Of one kind of finding in one field, so many are listed and the rest counted.
MAX_LISTED = 20
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
        self._native = self._attrs.get("format") == layout.FORMAT
        self._zip_names: set[str] | None = None
        if path is not None and path.is_file():
            with zipfile.ZipFile(path) as archive:
                self._zip_names = set(archive.namelist())
        self._arrays: dict[str, ZarrArray] = {}
        self._ends = np.zeros(0, np.int64)
        self._episodes = np.zeros(0, np.int64)  # their numbers: broken ones are left out of _ends
        self._unpublished = False
        self._lost: dict[str, list[tuple[int, int]]] = {}
        self._scans: dict[str, FieldScan] = {}
        self._counts: Counter[tuple[str, str | None]] = Counter()

    def run(self, action_low: Any, action_high: Any) -> None:
        """Look at everything; bounds as for `check_store`."""
        self._open_fields()
        self._check_ends()
        for name, array in self._arrays.items():
            self._check_type(name, array)
            self._check_length(name, array)
            self._check_chunk_files(name, array)
            if array.dtype.kind in "fiub":
                bounds = self._bounds(array, action_low, action_high) if name == "action" else None
                self._scans[name] = scan_field(array, self._ends, bounds)
                self._report_damage(name, array)
                self._report_values(name, bounds)
        self._check_duplicates()
        self._check_frozen()
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

    def _field_names(self) -> list[str]:
        if self._zip_names is not None:
            parts = [n.split("/") for n in self._zip_names]
            return sorted({p[1] for p in parts if p[0] == "data" and len(p) > 2})
        if self._path is not None:
            folder = self._path / "data"
            return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
        return list(layout.field_arrays(self._group, self._name))

    def _open_fields(self) -> None:
        broken = set()
        for name in self._field_names():
            try:
                member = self._group[f"data/{name}"]
            except Exception as error:  # zarr, json and the system each raise their own
                broken.add(name)
                message = f"the field cannot be opened: {str(error) or type(error).__name__}"
                self._field_error(name, message, RECOPY)
                continue
            if isinstance(member, zarr.Array):
                self._arrays[name] = member
        expected: dict[str, Any] = dict(self._attrs.get("fields", {})) if self._native else {}
        for name in [n for n in expected if n not in self._arrays and n not in broken]:
            self._field_error(name, "the field is missing", RECOPY)
        for name in ("obs", "action") if self._native else ("action",):
            if name not in {*self._arrays, *broken, *expected}:
                fix = "run `diffpolicy data convert` and say which fields it is made of"
                self._field_error(name, f"there is no field {name!r}, which training needs", fix)
        for name, array in self._arrays.items():
            if name in expected:
                self._check_spec(name, array, expected[name])

    def _check_spec(self, name: str, array: ZarrArray, expected: Mapping[str, Any]) -> None:
        spec = FieldSpec(tuple(expected["shape"]), expected["dtype"])
        if tuple(array.shape[1:]) != spec.shape or str(array.dtype) != spec.dtype:
            message = (
                f"rows are {list(array.shape[1:])} {array.dtype}, but the store was made for "
                f"{list(spec.shape)} {spec.dtype}"
            )
            self._field_error(name, message, RECOPY)

    def _field_error(self, name: str, message: str, fix: str) -> None:
        issue = Issue("error", self._file(f"data/{name}"), None, None, name, message, fix)
        self._add("damaged fields", issue)

    def _check_type(self, name: str, array: ZarrArray) -> None:
        kind = array.dtype.kind
        severity: Severity = "warning"
        if kind not in "fiub":
            severity = "error"
            message, fix = "is not a number type", "store numbers; other things do not train"
        elif array.dtype == np.float64:
            message, fix = "takes twice the memory of float32", "store it as float32"
        elif name == "action" and kind != "f":
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
            array = layout.child_array(self._group, "meta/episode_ends", self._name)
            raw = np.asarray(array[:])
        except Exception as error:  # zarr, codecs, json and the system each raise their own
            message = f"episode_ends cannot be read: {str(error) or type(error).__name__}"
            self._add("ends", Issue("error", file, None, None, None, message, RECOPY))
            return
        if raw.ndim != 1 or raw.dtype.kind not in "iu":
            message = f"episode_ends must be a vector of integers; it is {raw.ndim}-d {raw.dtype}"
            fix = "write it as int64 [E]"
            self._add("ends", Issue("error", file, None, None, None, message, fix))
            return
        ends = raw.astype(np.int64)
        if self._native:
            ends = ends[: layout.trailing_unpublished(ends)]
            self._unpublished = len(ends) < len(raw)
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

    def _check_chunk_files(self, name: str, array: ZarrArray) -> None:
        if self._path is None:
            return
        lost: list[tuple[int, int]] = []
        total = int(self._ends[-1]) if len(self._ends) else 0
        for start, stop, places in self._chunk_places(name, array, min(total, array.shape[0])):
            for place in places:
                if self._exists(place):
                    continue
                lost.append((start, stop))
                # zarr may leave out a chunk of zeros; our own stores never do.
                severity: Severity = "error" if self._native else "warning"
                message = f"the chunk is missing, so rows {start}..{stop - 1} are made up"
                issue = Issue(
                    severity,
                    self._file(place),
                    self._episode_at(start),
                    start,
                    name,
                    message,
                    RECOPY,
                )
                self._add("missing chunks", issue)
        self._lost[name] = lost

    def _chunk_places(
        self, name: str, array: ZarrArray, rows: int
    ) -> Iterable[tuple[int, int, list[str]]]:
        chunks = array.shards or array.chunks
        inner = [range(-(-n // c)) for n, c in zip(array.shape[1:], chunks[1:], strict=True)]
        for index in range(-(-rows // chunks[0])):
            start = index * chunks[0]
            places = [
                f"data/{name}/{array.metadata.encode_chunk_key((index, *rest))}"
                for rest in product(*inner)
            ]
            yield start, min(start + chunks[0], rows), places

    def _exists(self, place: str) -> bool:
        if self._zip_names is not None:
            return place in self._zip_names
        return self._path is not None and (self._path / place).exists()

    def _report_damage(self, name: str, array: ZarrArray) -> None:
        for damage in self._scans[name].damage:
            chunk = (array.shards or array.chunks)[0]
            key = array.metadata.encode_chunk_key(
                (damage.start // chunk,) + (0,) * (array.ndim - 1)
            )
            first, last = self._episode_at(damage.start), self._episode_at(damage.stop - 1)
            message = (
                f"the chunk is damaged or cut short: rows {damage.start}..{damage.stop - 1} "
                f"(episodes {first}..{last}) cannot be read: {damage.reason}"
            )
            file = self._file(f"data/{name}/{key}")
            issue = Issue("error", file, first, damage.start, name, message, RECOPY)
            self._add("damaged chunks", issue)

    # -- values -------------------------------------------------------------------------------

    def _bounds(
        self, array: ZarrArray, low: Any, high: Any
    ) -> tuple[NDArray[Any], NDArray[Any]] | None:
        low = self._attrs.get("action_low") if low is None else low
        high = self._attrs.get("action_high") if high is None else high
        if low is None and high is None:
            return None
        sides = []
        for side, default in ((low, -np.inf), (high, np.inf)):
            value = np.asarray(default if side is None else side, dtype=np.float64)
            try:
                sides.append(np.broadcast_to(value, array.shape[1:]))
            except ValueError as error:
                raise ValueError(
                    f"action bounds of shape {list(value.shape)} do not fit actions of shape "
                    f"{list(array.shape[1:])}"
                ) from error
        return sides[0], sides[1]

    def _report_values(self, name: str, bounds: tuple[NDArray[Any], NDArray[Any]] | None) -> None:
        scan = self._scans[name]
        rows = scan.not_finite
        for start, stop in self._lost.get(name, ()):  # reported already; there are no values
            rows = rows[(rows < start) | (rows >= stop)]
        self._report_rows(name, rows, "values that are not finite")
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

    # -- what stands beside the data ----------------------------------------------------------

    def _update_command(self) -> str:
        return f"run `diffpolicy data info --update-statistics {self._name}`"

    def _check_attrs(self) -> None:
        file, count = self._file("meta/episode_attrs"), len(self._episodes)
        try:
            array = layout.child_array(self._group, "meta/episode_attrs", self._name)
            lines = np.asarray(array[:]).tobytes().rstrip(b"\0").split(b"\n")[:count]
            for line in lines:
                json.loads(line)
            message = f"there are attributes of {len(lines)} episodes of {count}"
        except Exception as error:  # zarr, codecs, json and the system each raise their own
            message = f"the episodes' attributes cannot be read: {str(error) or error!r}"
            lines = []
        if len(lines) < count:
            fix = "copy the store again; training works without them"
            self._add("attrs", Issue("warning", file, None, None, None, message, fix))

    def _check_statistics(self) -> None:
        stored: Mapping[str, Any] = self._attrs.get("statistics") or {}
        file, total = self._file("zarr.json"), int(self._ends[-1]) if len(self._ends) else 0
        if not stored and total:
            message = "there are no statistics, which normalisers need"
            issue = Issue("warning", file, None, None, None, message, self._update_command())
            self._add("statistics", issue)
        for name, values in stored.items():
            scan = self._scans.get(name)
            if values.get("count") != total:
                message = f"the statistics cover {values.get('count')} steps of {total}"
            elif scan is not None and not self._lost.get(name) and _contradicts(scan, values):
                message = "the statistics are not those of the data, which were changed since"
            else:
                continue
            issue = Issue("warning", file, None, None, name, message, self._update_command())
            self._add("statistics", issue)


def _contradicts(scan: FieldScan, values: Mapping[str, Any]) -> bool:
    if scan.damage or len(scan.not_finite) or scan.low is None or scan.high is None:
        return False  # reported already, and nothing to compare with
    return not (
        np.allclose(scan.low, values["min"], rtol=1e-5, atol=1e-6)
        and np.allclose(scan.high, values["max"], rtol=1e-5, atol=1e-6)
    )
