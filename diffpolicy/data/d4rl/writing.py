"""A D4RL file as an episode store, made in one go or in several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zarr.storage import MemoryStore

from diffpolicy.data import layout
from diffpolicy.data.fields import jsonable
from diffpolicy.data.issue import format_issue
from diffpolicy.data.store import EpisodeStore

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from diffpolicy.data.d4rl.file import D4RLFile
    from diffpolicy.data.fields import FieldSpec


def write_store(
    source: D4RLFile,
    path: Path | None,
    *,
    max_episodes: int | None,
    extras: Sequence[str],
    attrs: Mapping[str, Any],
    overwrite: bool,
) -> EpisodeStore:
    """See `D4RLFile.to_store`."""
    if max_episodes is not None and max_episodes < 1:
        raise ValueError(f"max_episodes must be at least 1; got {max_episodes}")
    if not source.num_episodes:
        raise ValueError(f"{source.name} holds no whole episode; keep the partial one")
    names = [*source._main_fields, *_extra(source, extras)]
    specs = {stored_name(name): source.fields[name] for name in names}
    part = {} if max_episodes is None else {"max_episodes": max_episodes}
    kept = jsonable({**source.attrs, **part, **attrs}, "attrs")
    total = min(source.num_episodes, max_episodes or source.num_episodes)
    if path is None:
        store = EpisodeStore._create(MemoryStore(), None, specs, kept, None)
        _copy(source, store, names, total)
        store.finalize()
        return store
    layout.clear_target(path, overwrite=overwrite, remove=False)
    partial = path.with_name(f".{path.name}.partial")
    store = _resume(partial, specs, kept, total)
    _copy(source, store, names, total)
    store.close()
    layout.clear_target(path, overwrite=overwrite)
    partial.rename(path)
    return EpisodeStore.open(path)


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


def _copy(source: D4RLFile, store: EpisodeStore, names: Sequence[str], total: int) -> None:
    """Append what is missing; look at everything."""
    inspection = source._inspection()
    described = source.episode_attrs
    for first, last in source._blocks(0, total):
        columns = source._rows(first, last, names)
        ends = source._block_ends(first, last)
        inspection.add({n: c for n, c in columns.items() if not n.startswith("infos/")}, ends)
        errors = [i for i in inspection.issues() if i.severity == "error"]
        if errors:
            raise ValueError(format_issue(errors[0]))
        done = store.num_episodes
        if last <= done:
            continue
        skip = max(done - first, 0)
        row = int(ends[skip - 1]) if skip else 0
        arrays = {stored_name(name): column[row:] for name, column in columns.items()}
        store.extend(arrays, ends[skip:] - row, described[first + skip : last])
    store.update_attrs(
        {
            "warnings": [format_issue(issue) for issue in inspection.issues()],
            "constant_obs_columns": inspection.constant_columns(),
        }
    )
