"""Make a store of another format."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffpolicy.data import store_layout as layout
from diffpolicy.data.check import check_store, format_issue
from diffpolicy.data.fields import FieldSpec, checked_rows
from diffpolicy.data.formats import EpisodeSource, get_format
from diffpolicy.data.formats.images import as_bytes, is_picture
from diffpolicy.data.mapping import VECTORS, Fields, field_of, is_observed, mapping_of, part_of
from diffpolicy.data.observation import is_obs
from diffpolicy.data.selection import (
    OF_MAKING,
    Choice,
    Selection,
    announce,
    attrs_with_masks,
    checked_gaps,
    left_out,
    select,
)
from diffpolicy.data.store import EpisodeStore
from diffpolicy.data.tasks import FIELD as TASK
from diffpolicy.data.tasks import Encoder, Tasks
from diffpolicy.locks import WriterLock

# Episodes are handed to the store in blocks of about so many bytes.
_BLOCK_BYTES = 2**25

Columns = dict[str, NDArray[Any]]


def convert(
    source: str | os.PathLike[str] | EpisodeSource,
    target: str | os.PathLike[str] | None,
    *,
    format: str = "auto",
    fields: Fields | None = None,
    transform: Callable[[NDArray[Any]], NDArray[Any]] | None = None,
    task: str | None = "auto",
    task_encoder: str | Encoder | None = None,
    max_episodes: int | None = None,
    exclude: Choice | None = None,
    keep: Choice | None = None,
    allow_missing: bool = False,
    attrs: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> EpisodeStore:
    """Convert a file or directory into an episode store with statistics.

    The store appears at ``target`` when it is complete and was checked, not before. What it lacks
    of the source, and what is doubtful, is logged, and kept in its attributes: ``left_out``
    (fields), ``unread`` (what is no field), ``left_out_episodes`` and ``warnings``.

    Args:
        source: What to read: a path, with ``format`` "minari" or "lerobot" a dataset's id, or an
            open source, which stays open.
        target: The store to make, by custom ``something.zarr``; None keeps it in memory.
        format: A format's name, or ``"auto"`` to look.
        fields: The target's fields, each made of one source field or of several, which are
            flattened and concatenated: ``{"obs": ["state"], "action": "action"}``; ``state[:2]`` is
            the first two entries. What is not said of ``obs`` and ``action`` comes from the format:
            all cameras and the state. Both become float32 vectors; other fields keep their shape
            and type (float64 becomes float32). Several observations are named ``obs.NAME``:
            ``{"obs.joints": "state", "obs.camera": "img"}``. An observed image stays one, in bytes
            H x W x C: of images and vectors in ``obs`` each image becomes ``obs.NAME``, and the
            vectors together ``obs.state``.
        transform: Applied to ``obs`` ``[T, O]`` of each episode; returns ``[T, O']``. Also to
            ``next_obs``, where the format knows the observation after each step. As it makes the
            one vector ``obs``, cameras have to be asked for.
        task: What fills ``obs.task``, int64 ``[T, 1]``: a field of ids, or what the source says in
            words of each step, episode or the whole. The instructions become the attribute
            ``tasks``, in the order of their ids. ``"auto"``: the source's own task column, where it
            tells several apart and no observation is chosen; None: nothing.
        task_encoder: What makes float32 vectors ``[n, d]`` of n instructions, once each, which
            ``obs.task`` then holds: a function, ``"package:function"`` or
            ``"sentence-transformers/NAME"``.
        max_episodes: Stop after so many.
        exclude: Episodes to leave out: numbers, ``"mask:NAME"`` or ``"failed_check"``, or a list of
            these; see :mod:`diffpolicy.data.selection`.
        keep: Episodes to store; default all. Numbers, ``"mask:train"``, or a list.
        allow_missing: Read chunks that are not there as zeros, which zarr and HDF5 may leave out.
        attrs: JSON values to keep with the store, such as ``{"env_id": ...}``.
        overwrite: Replace the store that is at ``target``.

    Returns:
        The new store, open for reading (in memory: for appending).

    Raises:
        FileNotFoundError: No source.
        FileExistsError: Something is at ``target``.
        ValueError: An unknown format, field or episode, a source that is damaged, or an episode
            that cannot be stored; the message names it.
    """
    goal = None if target is None else Path(target)
    with contextlib.ExitStack() as stack:
        known: dict[str, Any] = {}
        if not isinstance(source, EpisodeSource):
            name, kind = get_format(format, Path(source))
            known = {"source": {"name": Path(source).name, "format": name}}
            source = stack.enter_context(kind(Path(source)))
        if goal is not None:
            layout.clear_target(goal, overwrite=overwrite, remove=False)
        tasks = _tasks(source, fields or {}, task, task_encoder)
        mapping = mapping_of(source, fields or {}, flat=transform is not None, task=bool(tasks))
        by_id = {tasks.name} if tasks and tasks.by_id else set()
        used = sorted({field_of(n) for group in mapping.values() for n in group} | by_id)
        selection = select(source, exclude, keep, max_episodes)
        selection, doubts = checked_gaps(source, used, selection, allow_missing=allow_missing)
        partial = None
        if goal is not None:
            stack.enter_context(WriterLock(goal, "converting to it"))
            partial = stack.enter_context(layout.replaced(goal))
        before = {k: v for k, v in source.attrs.items() if k in OF_MAKING}  # of a store of ours
        known |= {"made_of": [{"store": Path(source.name).name, "attrs": before}]} if before else {}
        own = {k: v for k, v in source.attrs.items() if k not in before}
        attrs = {**own, **known, **(attrs or {})}
        job = _Job(source, mapping, used, transform, tasks, partial, str(goal), attrs)
        store, selection, found = job.write_checked(selection)
        said = source.remarks(store)
        if warnings := [*doubts, *said.get("warnings", []), *found]:
            said["warnings"] = warnings
        if tasks:
            said["tasks"] = tasks.texts
        parts = _parts(mapping)
        lacks = left_out(source.fields, set(used) - set(parts), selection, source.unread)
        for name, texts in parts.items():
            lacks["left_out"][name] += f", but for {', '.join(texts)}"
        store.update_attrs({**lacks, **said})
        if goal is not None:
            store.close()
    made = store if goal is None else EpisodeStore.open(goal)
    announce(made.name, made.attrs)
    return made


@dataclass(frozen=True)
class _Job:
    """What is converted: fields of a reader into a store at ``place``, or (None) in memory."""

    reader: EpisodeSource
    mapping: Mapping[str, list[str]]
    used: list[str]  # the fields that are read
    transform: Callable[[NDArray[Any]], NDArray[Any]] | None
    tasks: Tasks | None
    place: Path | None
    shown: str  # the name that the store will have
    attrs: Mapping[str, Any]

    def write_checked(self, selection: Selection) -> tuple[EpisodeStore, Selection, list[str]]:
        """Write the episodes and look at every value of what was written.

        Returns:
            The store, the episodes that were written, and what is doubtful about them.

        Raises:
            ValueError: Something is wrong with one, and it is not to be left out for that.
        """
        while True:
            store, selection = self._write(selection)
            issues = check_store(store)
            failed = {
                selection.episodes[issue.episode]: issue.message
                for issue in reversed(issues)
                if issue.episode is not None and issue.episode < len(selection.episodes)
            }
            if not (selection.failed_check and failed):
                break
            store.close()
            selection = selection.without(failed)  # of many alike not all are named: look again
        lines = [format_issue(issue).replace(str(self.place), self.shown) for issue in issues]
        for issue, line in zip(issues, lines, strict=True):
            if issue.severity == "error":
                raise ValueError(line)
        return store, selection, lines

    def _write(self, selection: Selection) -> tuple[EpisodeStore, Selection]:
        """Write the episodes to a new store; return it, and those that were written."""
        store: EpisodeStore | None = None
        block: list[tuple[Columns, Mapping[str, Any]]] = []
        failed: dict[int, str] = {}
        size = 0
        for columns, known in self._episodes(selection, failed):
            if store is None:  # "store or" would make it anew for every episode: empty is false
                specs = _specs(columns)
                store = EpisodeStore.create(self.place, specs, attrs=self.attrs, overwrite=True)
            block.append((columns, known))
            size += sum(c.nbytes for c in columns.values())
            if size > _BLOCK_BYTES:
                _write_block(store, block)
                block, size = [], 0
        selection = selection.without(failed)
        assert store is not None
        _write_block(store, block)
        store.finalize()
        return store, selection

    def _episodes(
        self, selection: Selection, failed: dict[int, str]
    ) -> Iterator[tuple[Columns, Mapping[str, Any]]]:
        """Columns and attributes of each episode; ``failed`` receives those that are left out."""
        known = attrs_with_masks(self.reader)
        specs: dict[str, FieldSpec] = {}  # of the first episode: the others' are to be the same
        for index in selection.episodes:
            try:
                raw = self.reader.episode(index, self.used)
                columns = {k: self._column(k, raw) for k in self.mapping}
                steps = len(columns["action"])
                told: dict[str, Any] = {}
                if self.tasks:
                    columns[TASK], told["tasks"] = self.tasks.column(index, raw, steps)
                found = _specs(columns)
                columns = checked_rows(specs or found, columns, np.array([steps]))
            except ValueError as error:
                if not selection.failed_check:
                    raise ValueError(
                        f"{self.reader.name}, episode {index}: {error}; leave it out with "
                        f"exclude=[{index}], or all such with exclude=failed_check"
                    ) from error
                failed[index] = str(error)
                continue
            specs = specs or found
            yield columns, {**known[index], **told}

    def _column(self, name: str, raw: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """The column ``name`` of an episode, of one part or several."""
        parts = [part_of(text, raw) for text in self.mapping[name]]
        lengths = [len(p) for p in parts]
        if len(set(lengths)) > 1:
            raise ValueError(f"the parts of {name!r} have different lengths: {lengths}")
        image = len(parts) == 1 and is_observed(name) and is_picture(FieldSpec.of(parts[0]))
        if self.transform is not None and is_observed(name) and (image or name not in VECTORS):
            what = "of bytes" if name in VECTORS else "by name"
            raise ValueError(f"transform is of the one array obs; there is {name} {what}")
        if image:
            return as_bytes(self.mapping[name][0], parts[0])
        # A number a step that is observed is a vector of one.
        flat = name in VECTORS or len(parts) > 1 or (is_observed(name) and parts[0].ndim == 1)
        column = np.concatenate([p.reshape(len(p), -1) for p in parts], 1) if flat else parts[0]
        if name in VECTORS or column.dtype == np.float64:
            with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is reported
                column = column.astype(np.float32)
        if self.transform is None or not is_observed(name):
            return column
        changed = np.asarray(self.transform(column))
        if changed.ndim != 2 or len(changed) != len(column):
            shapes = f"{list(column.shape)} into [T, O']; got {list(changed.shape)}"
            raise ValueError(f"transform must turn [T, O] = {shapes}")
        return changed.astype(np.float32)


def _tasks(
    reader: EpisodeSource, fields: Fields, task: str | None, encoder: str | Encoder | None
) -> Tasks | None:
    """Where ``obs.task`` comes from, if from anywhere."""
    if task == "auto":
        task = None if any(map(is_obs, fields)) and not encoder else reader.task_field
    if task is None and encoder is not None:
        raise ValueError(f"task_encoder is given, but {reader.name} names no tasks; say task=FIELD")
    return None if task is None else Tasks(reader, task, encoder)


def _parts(mapping: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """The fields of which only some entries are stored, with these."""
    texts = {text for group in mapping.values() for text in group}
    partial = {field_of(text) for text in texts} - texts
    return {name: sorted(t for t in texts if field_of(t) == name) for name in sorted(partial)}


def _specs(columns: Columns) -> dict[str, FieldSpec]:
    return {k: FieldSpec.of(c) for k, c in columns.items()}


def _write_block(store: EpisodeStore, block: list[tuple[Columns, Mapping[str, Any]]]) -> None:
    if block:
        arrays = {k: np.concatenate([c[k] for c, _ in block]) for k in store.fields}
        ends = np.cumsum([len(c["action"]) for c, _ in block])
        store.extend(arrays, ends, [known for _, known in block])
