"""A D4RL file as an episode store, made in one go or in several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from zarr.storage import MemoryStore

from diffpolicy.data import store_layout as layout
from diffpolicy.data.check import check_store
from diffpolicy.data.fields import jsonable
from diffpolicy.data.selection import issue_lines, left_out
from diffpolicy.data.store import EpisodeStore

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from diffpolicy.data.d4rl.file import D4RLFile
    from diffpolicy.data.fields import FieldSpec
    from diffpolicy.data.selection import Selection

# D4RL's continuous actions lie in [-1, 1], apart from these families.
_UNBOUNDED = ("flow", "minigrid")
_SLACK = 1e-5
_BLOCK_BYTES = 2**25

Block = tuple[dict[str, "NDArray[Any]"], "NDArray[np.int64]", int]
"""The columns of episodes back to back, their ends in them, and the number of the first."""


def write_store(
    source: D4RLFile,
    path: Path | None,
    selection: Selection,
    names: Sequence[str],
    attrs: Mapping[str, Any],
    doubts: Sequence[str],
    *,
    overwrite: bool,
) -> EpisodeStore:
    """Make a store of these fields of the chosen episodes; see ``D4RLFile.to_store``."""
    if not source.num_episodes:
        raise ValueError(f"{source.name} holds no whole episode; keep the partial one")
    specs = {name.replace("/", "."): source.fields[name] for name in names}
    if path is not None:
        layout.clear_target(path, overwrite=overwrite, remove=False)
    if selection.failed_check:
        blocks = _blocks(source, selection.episodes, names)
        selection = selection.without({k: v for b in blocks for k, v in _not_finite(*b).items()})
    while True:
        kept = jsonable({**source.attrs, **left_out(source, names, selection), **attrs}, "attrs")
        if path is None:
            store = EpisodeStore._create(MemoryStore(), None, specs, kept, None)
        else:
            store = _resumed(_partial(path), specs, kept, len(selection.episodes))
        _append(source, store, selection.episodes[store.num_episodes :], names)
        issues = check_store(store)
        failed = {selection.episodes[i.episode]: i.message for i in issues if i.episode is not None}
        if not (failed and selection.failed_check):
            break
        selection = selection.without(failed)  # of many alike not all are named: look again
    lines = issue_lines(issues, store.name, str(path or store.name))
    warnings = [*doubts, *_outside(source, store), *lines]
    store.update_attrs({"warnings": warnings, "constant_obs_columns": _constant_columns(store)})
    if path is None:
        return store
    store.close()
    layout.clear_target(path, overwrite=overwrite)
    _partial(path).rename(path)
    return EpisodeStore.open(path)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _resumed(
    partial: Path, specs: Mapping[str, FieldSpec], attrs: Mapping[str, Any], total: int
) -> EpisodeStore:
    """The store that an interrupted call with the same arguments began, or a new one."""
    if partial.exists():
        try:
            store = EpisodeStore.open(partial, "a")
        except (OSError, ValueError):  # damaged: ``create`` below replaces what is ours
            pass
        else:
            same = all(store.attrs.get(name) == value for name, value in attrs.items())
            if same and dict(store.fields) == dict(specs) and store.num_episodes <= total:
                return store
            store.close()
    return EpisodeStore.create(partial, dict(specs), attrs=attrs, overwrite=True)


def _append(
    source: D4RLFile, store: EpisodeStore, episodes: Sequence[int], names: Sequence[str]
) -> None:
    described = source.episode_attrs
    for columns, ends, first in _blocks(source, episodes, names):
        for episode, reason in _not_finite(columns, ends, first).items():
            raise ValueError(
                f"{source.name}, episode {episode}: {reason}; leave it out with "
                f"exclude=[{episode}], or all such with exclude=failed_check"
            )
        arrays = {name.replace("/", "."): column for name, column in columns.items()}
        store.extend(arrays, ends, described[first : first + len(ends)])
    store.finalize()


def _blocks(source: D4RLFile, episodes: Sequence[int], names: Sequence[str]) -> Iterator[Block]:
    """The chosen episodes, in blocks of moderate size that follow each other in the file."""
    rows = _BLOCK_BYTES // (4 * sum(int(np.prod(s.shape)) for s in source.fields.values()))
    ends, starts = source.episodes.ends, source.episodes.starts
    chosen = np.asarray(episodes, int)
    for run in np.split(chosen, np.flatnonzero(np.diff(chosen) != 1) + 1):
        first, stop = (int(run[0]), int(run[-1]) + 1) if len(run) else (0, 0)
        while first < stop:
            last = int(np.searchsorted(ends, starts[first] + max(rows, 1), "right"))
            last = min(max(last, first + 1), stop)
            yield source.columns(first, last, names), ends[first:last] - starts[first], first
            first = last


def _not_finite(
    columns: Mapping[str, NDArray[Any]], ends: NDArray[np.int64], first: int
) -> dict[int, str]:
    """Number and fault of each episode of a block with values that are not finite."""
    found: dict[int, str] = {}
    for name, values in columns.items():
        finite = np.isfinite(values).reshape(len(values), -1).all(1)
        bad = np.flatnonzero(~finite)
        episodes, places = np.unique(np.searchsorted(ends, bad, "right"), return_index=True)
        for episode, row in zip(episodes.tolist(), bad[places].tolist(), strict=True):
            step = row - (int(ends[episode - 1]) if episode else 0)
            found.setdefault(first + episode, f"field {name!r} is not finite at step {step}")
    return found


def _outside(source: D4RLFile, store: EpisodeStore) -> list[str]:
    """A warning of actions outside of the bounds that D4RL's environments have."""
    family = source.info.id.split("-")[0] if source.info else ""
    known = store.statistics["action"]
    largest = np.abs([known["min"], known["max"]]).max()
    if family in _UNBOUNDED or largest <= 1 + _SLACK:
        return []
    return [
        f"{source.name}: actions lie outside [-1, 1], up to {largest:.6g}: clip them, or learn in "
        "their own units"
    ]


def _constant_columns(store: EpisodeStore) -> list[int]:
    """The entries of a flat observation that never change; empty for other observations."""
    known = store.statistics.get("obs")
    if known is None or len(store.fields["obs"].shape) != 1:
        return []
    return np.flatnonzero(np.equal(known["min"], known["max"])).tolist()
