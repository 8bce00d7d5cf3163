"""The checker's front: findings as values and as text, and a store in figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffpolicy.data import opening
from diffpolicy.data.checker import StoreChecker
from diffpolicy.data.issue import RECOPY, Issue, format_issue
from diffpolicy.data.store import EpisodeStore

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

__all__ = ["Issue", "check_store", "format_issue", "info"]


def check_store(
    path_or_store: str | os.PathLike[str] | EpisodeStore,
    *,
    action_low: Any = None,
    action_high: Any = None,
) -> list[Issue]:
    """Look at everything in a store, also in one that cannot be opened any more.

    Args:
        path_or_store: A store or a Diffusion Policy replay buffer.
        action_low: Lower bound of `action`, a number or `[A]`; default the store's attribute of
            this name, if it has one.
        action_high: Upper bound likewise.

    Returns:
        What was found, in the order of the files; empty if all is well.

    Raises:
        ValueError: Bounds that do not fit the actions.
    """
    if isinstance(path_or_store, EpisodeStore):
        checker = StoreChecker(path_or_store._group, path_or_store.path, path_or_store.name)
        checker.run(action_low, action_high)
        return checker.issues
    path = Path(path_or_store)
    try:
        group = opening.open_group(path)
    except (FileNotFoundError, ValueError) as error:
        fix = RECOPY if path.exists() else "give the path of a store"
        return [Issue("error", str(path), None, None, None, str(error), fix)]
    checker = StoreChecker(group, path, str(path))
    try:
        checker.run(action_low, action_high)
    finally:
        group.store.close()
    return checker.issues + _unopenable(path, checker.issues)


def _unopenable(path: Path, found: list[Issue]) -> list[Issue]:
    """What opening a store says, where no finding tells already that something is wrong."""
    if any(issue.severity == "error" for issue in found):
        return []
    try:
        EpisodeStore.open(path).close()
    except (OSError, ValueError) as error:
        return [Issue("error", str(path), None, None, None, str(error), RECOPY)]
    return []


def info(store: EpisodeStore) -> dict[str, Any]:
    """A store in figures, as JSON values.

    Args:
        store: An open store.

    Returns:
        `path`, `format` (`diffpolicy` or `replay_zarr`), `episodes`, `steps`, `length` (`min`,
        `mean`, `max`), `fields` (name -> `shape`, `dtype`), `bytes_on_disk`, `attrs`,
        `episode_attrs` (the number of episodes that have each, and the mean of flags and numbers),
        `has_statistics`.
    """
    lengths = store.episode_lengths
    files: Iterable[Path] = ()
    if store.path is not None:
        files = [store.path] if store.path.is_file() else store.path.rglob("*")
    try:
        has_statistics = bool(store.statistics)
    except ValueError:
        has_statistics = False
    return {
        "path": store.name,
        "format": "diffpolicy" if store.is_native else "replay_zarr",
        "episodes": store.num_episodes,
        "steps": store.num_steps,
        "length": {
            "min": int(lengths.min(initial=2**62)) if len(lengths) else 0,
            "mean": float(lengths.mean()) if len(lengths) else 0.0,
            "max": int(lengths.max(initial=0)),
        },
        "fields": {k: {"shape": list(s.shape), "dtype": s.dtype} for k, s in store.fields.items()},
        "bytes_on_disk": sum(f.stat().st_size for f in files if f.is_file()),
        "attrs": store.attrs,
        "episode_attrs": _summary(store.episode_attrs),
        "has_statistics": has_statistics,
    }


def _summary(attrs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    result: dict[str, dict[str, Any]] = {}
    for key in dict.fromkeys(k for a in attrs for k in a):
        values = [a[key] for a in attrs if key in a]
        result[key] = {"count": len(values)}
        if all(isinstance(v, bool | int | float) for v in values):
            result[key]["mean"] = float(np.mean(values))
    return result
