"""A D4RL file as an episode store, made in one go or in several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from zarr.storage import MemoryStore

from diffpolicy.data import store_layout as layout
from diffpolicy.data.check import check_store, format_issue
from diffpolicy.data.d4rl.rows import block_ends, blocks
from diffpolicy.data.fields import jsonable
from diffpolicy.data.selection import issue_lines, left_out
from diffpolicy.data.store import EpisodeStore

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from diffpolicy.data.check import Issue
    from diffpolicy.data.d4rl.file import D4RLFile
    from diffpolicy.data.fields import FieldSpec
    from diffpolicy.data.selection import Selection


def write_store(
    source: D4RLFile,
    path: Path | None,
    selection: Selection,
    *,
    extras: Sequence[str],
    attrs: Mapping[str, Any],
    doubts: Sequence[str],
    overwrite: bool,
) -> EpisodeStore:
    """See `D4RLFile.to_store`."""
    if not source.num_episodes:
        raise ValueError(f"{source.name} holds no whole episode; keep the partial one")
    names = [*source._main_fields, *_extra(source, extras)]
    specs = {stored_name(name): source.fields[name] for name in names}
    if selection.failed_check:
        selection = selection.without(source.failed_episodes())
    if path is not None:
        layout.clear_target(path, overwrite=overwrite, remove=False)
    while True:
        kept = {**source.attrs, **left_out(source, names, selection), **attrs}
        kept = jsonable(kept, "attrs")
        if path is None:
            store = EpisodeStore._create(MemoryStore(), None, specs, kept, None)
        else:
            store = _resume(_partial(path), specs, kept, len(selection.episodes))
        issues = _copy(source, store, names, selection, doubts, path)
        failed = {
            selection.episodes[issue.episode]: issue.message
            for issue in issues
            if issue.episode is not None and selection.failed_check
        }
        if not failed:
            break
        selection = selection.without(failed)
    if path is None:
        return store
    store.close()
    layout.clear_target(path, overwrite=overwrite)
    _partial(path).rename(path)
    return EpisodeStore.open(path)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def stored_name(name: str) -> str:
    """The name of a field in a store, where `/` is not allowed."""
    return name.replace("/", ".")


def _extra(source: D4RLFile, extras: Sequence[str]) -> list[str]:
    if isinstance(extras, str):
        raise ValueError(f"extras is a list of fields, such as [{extras!r}]")
    there = [name for name in source.fields if name.startswith("infos/")]
    unknown = [name for name in extras if name not in there]
    if unknown:
        raise ValueError(f"{source.name} has no field {unknown}; further fields are {there}")
    return list(extras)


def _resume(
    partial: Path, specs: Mapping[str, FieldSpec], attrs: Mapping[str, Any], total: int
) -> EpisodeStore:
    """The store that an interrupted call with the same arguments began, or a new one."""
    if partial.exists():
        try:
            store = EpisodeStore.open(partial, "a")
        except (OSError, ValueError):  # damaged: `create` below replaces what is ours
            pass
        else:
            same = all(store.attrs.get(name) == value for name, value in attrs.items())
            if same and dict(store.fields) == dict(specs) and store.num_episodes <= total:
                return store
            store.close()
    return EpisodeStore.create(partial, dict(specs), attrs=attrs, overwrite=True)


def _runs(source: D4RLFile, episodes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of the chosen episodes that follow each other in the file, of moderate size."""
    chosen = np.asarray(episodes)
    for run in np.split(chosen, np.flatnonzero(np.diff(chosen) != 1) + 1):
        yield from blocks(source, int(run[0]), int(run[-1]) + 1)


def _copy(
    source: D4RLFile,
    store: EpisodeStore,
    names: Sequence[str],
    selection: Selection,
    doubts: Sequence[str],
    target: Path | None,
) -> list[Issue]:
    """Append what is missing; look at everything; what the checker says of the result."""
    inspection = source._inspection()
    described = source.episode_attrs
    passed, already = 0, store.num_episodes
    for first, last in _runs(source, selection.episodes):
        columns = source._rows(first, last, names)
        ends = block_ends(source, first, last)
        checked = {n: c for n, c in columns.items() if not n.startswith("infos/")}
        inspection.add(checked, ends, first, int(source.episodes.starts[first]))
        errors = [i for i in inspection.issues() if i.severity == "error"]
        if errors:
            raise ValueError(
                f"{format_issue(errors[0])[:-1]}: exclude=[{errors[0].episode}], or "
                "exclude=failed_check."
            )
        skip = min(max(already - passed, 0), last - first)
        passed += last - first
        if skip == last - first:
            continue
        row = int(ends[skip - 1]) if skip else 0
        arrays = {stored_name(name): column[row:] for name, column in columns.items()}
        store.extend(arrays, ends[skip:] - row, described[first + skip : last])
    store.finalize()
    found = check_store(store)
    lines = [format_issue(issue) for issue in inspection.issues(copies=False)]
    lines += issue_lines(found, store.name, str(target or store.name))
    columns_still = inspection.constant_columns()
    store.update_attrs({"warnings": [*doubts, *lines], "constant_obs_columns": columns_still})
    return found
