"""Stores made of others by whole episodes: some of them, two parts of them, or all of several.

Rows are copied bit for bit, in their types, a few megabytes at a time; statistics are computed
anew. What a store was made of, and what was left out, is said, and kept in its attributes:
``made_of`` (name, sizes and digest of each store, and what its own attributes said of episodes),
and ``left_out_episodes``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from diffpolicy.data import store_layout as layout
from diffpolicy.data.blocks import content_digest
from diffpolicy.data.check import check_store
from diffpolicy.data.fields import check_has
from diffpolicy.data.joined import Joined, Place, open_store
from diffpolicy.data.reader import EpisodeReader
from diffpolicy.data.selection import OF_MAKING, Choice, Selection, announce, left_out, select
from diffpolicy.data.store import EpisodeStore
from diffpolicy.locks import WriterLock
from diffpolicy.settings import check_range


def filtered(
    source: Place | EpisodeReader,
    target: Place,
    *,
    exclude: Choice | None = None,
    keep: Choice | None = None,
    max_episodes: int | None = None,
    fields: Sequence[str] | None = None,
    overwrite: bool = False,
) -> EpisodeStore:
    """Make a store of some episodes of another.

    Args:
        source: The store, or a Diffusion Policy replay buffer.
        target: The store to make.
        exclude: Episodes to leave out; see :mod:`diffpolicy.data.selection`.
        keep: Episodes to keep; default all.
        max_episodes: The first so many of them only.
        fields: Fields to keep; default all.
        overwrite: Replace the store that is at ``target``.

    Returns:
        The new store, open for reading.

    Raises:
        FileExistsError: Something is at ``target``.
        ValueError: No such episode or field, nothing is left, or the target is the source.

    Example:
        >>> filtered("demos.zarr", "good.zarr", exclude=["success=false", "length<20"])
    """
    store = _opened(source)
    _check_apart([store], target)
    selection = select(store, exclude, keep, max_episodes)
    return _made(store, target, selection, fields, overwrite)


def halved(
    source: Place | EpisodeReader,
    first: Place,
    second: Place,
    *,
    keep: Choice | None = None,
    fraction: float | None = None,
    seed: int = 0,
    fields: Sequence[str] | None = None,
    overwrite: bool = False,
) -> tuple[EpisodeStore, EpisodeStore]:
    """Divide the episodes of a store over two.

    Args:
        source: The store, or a Diffusion Policy replay buffer.
        first: The store to make of the chosen episodes.
        second: The store to make of the others.
        keep: The episodes of ``first``; see :mod:`diffpolicy.data.selection`.
        fraction: Instead of ``keep``, the share of all episodes, drawn by ``seed``, in (0, 1).
        seed: Decides which.
        fields: Fields to keep; default all.
        overwrite: Replace the stores that are there.

    Returns:
        Both, open for reading.

    Raises:
        FileExistsError: Something is at one of the targets.
        ValueError: Neither or both of ``keep`` and ``fraction``, or a part without episodes.
    """
    if (keep is None) == (fraction is None):
        raise ValueError("a split takes keep=EPISODES or fraction=SHARE, one of them")
    check_range("(0, 1)", fraction=fraction)
    store = _opened(source)
    _check_apart([store], first, second)
    if fraction is not None:
        order = np.random.default_rng(seed).permutation(store.num_episodes)
        keep = [int(i) for i in np.sort(order[: round(fraction * store.num_episodes)])]
    every = Selection(tuple(range(store.num_episodes)))
    chosen = set() if keep == [] else set(select(store, None, keep).episodes)  # 0 is an episode
    if not 0 < len(chosen) < len(every.episodes):
        asked = f"keep={keep}" if fraction is None else f"fraction={fraction}"
        raise ValueError(
            f"{asked} puts {len(chosen)} of the {len(every.episodes)} episodes of {store.name} "
            "into the first store; each needs one at least"
        )
    for place in (first, second):
        layout.clear_target(Path(place), overwrite=overwrite, remove=False)

    def made(place: Place, gone: Iterable[int], other: Place) -> EpisodeStore:
        part = every.without(dict.fromkeys(sorted(gone), f"in {Path(other).name}"))
        return _made(store, place, part, fields, overwrite)

    return made(first, set(every.episodes) - chosen, second), made(second, chosen, first)


def merged(
    sources: Sequence[Place | EpisodeReader],
    target: Place,
    *,
    fields: Sequence[str] | None = None,
    overwrite: bool = False,
) -> EpisodeStore:
    """Make a store of all episodes of several, one store after the other.

    Attributes that all have alike are kept, and the others in ``made_of``. Instructions (``tasks``)
    become one list, and ``obs.task`` is numbered by it.

    Args:
        sources: The stores.
        target: The store to make.
        fields: Fields to keep; default all, and then all stores must have them.
        overwrite: Replace the store that is at ``target``.

    Returns:
        The new store, open for reading.

    Raises:
        FileExistsError: Something is at ``target``.
        ValueError: Fields that differ in shape or type, or that some store lacks: names them.
    """
    parts = {f"{i} {source}": _opened(source) for i, source in enumerate(sources)}
    _check_apart(parts.values(), target)
    joined = Joined(parts, fields=fields, strict=True)
    return _made(joined, target, Selection(tuple(range(joined.num_episodes))), None, overwrite)


def _opened(source: Place | EpisodeReader) -> EpisodeStore:
    if not isinstance(source, EpisodeReader) and not Path(source).exists():
        raise FileNotFoundError(f"no store at {source}")
    return open_store(source)


def _check_apart(sources: Iterable[EpisodeReader], *targets: Place) -> None:
    """Raise ``ValueError`` for a target that is read, or is two: neither would be whole."""
    places = [store.path.resolve() for store in sources if store.path is not None]
    for target in targets:
        if (place := Path(target).resolve()) in places:
            raise ValueError(f"{target} is read or made already; choose another place for it")
        places.append(place)


def _made(
    source: EpisodeReader,
    target: Place,
    selection: Selection,
    fields: Sequence[str] | None,
    overwrite: bool,
) -> EpisodeStore:
    """Write the chosen episodes to a store that appears at ``target`` when it is complete."""
    check_has(source.name, fields or (), source.fields)
    goal = Path(target)
    specs = {n: s for n, s in source.fields.items() if fields is None or n in fields}
    layout.clear_target(goal, overwrite=overwrite, remove=False)
    attrs = {k: v for k, v in source.attrs.items() if k not in OF_MAKING}
    with WriterLock(goal, "making it"), layout.replaced(goal) as partial:
        while True:
            with EpisodeStore.create(partial, specs, attrs=attrs, overwrite=True) as store:
                store.extend_from(source, selection.episodes)
            issues = check_store(partial) if selection.failed_check else []
            failed = {
                selection.episodes[i.episode]: i.message for i in issues if i.episode is not None
            }
            if not failed:
                break
            selection = selection.without(failed)  # of many alike not all are named: look again
        with EpisodeStore.open(partial, "a") as store:
            store.update_attrs(_provenance(source, selection, set(specs)))
    made = EpisodeStore.open(goal)
    announce(made.name, made.attrs)
    return made


def _provenance(source: EpisodeReader, selection: Selection, fields: set[str]) -> dict[str, Any]:
    """Attributes that say what a store was made of."""
    parts = list(source.parts.values()) if isinstance(source, Joined) else [source]
    said: dict[str, Any] = {"made_of": [_described(part, source.attrs) for part in parts]}
    every = {name: spec for part in parts for name, spec in part.fields.items()}
    return said | left_out(every, fields, selection)


def _described(store: EpisodeReader, kept: Mapping[str, Any]) -> dict[str, Any]:
    """What a store was: name, sizes, digest of its vectors, and attributes that are not kept."""
    before = {k: v for k, v in store.attrs.items() if k in OF_MAKING or kept.get(k) != v}
    return {
        "store": store.name if store.path is None else store.path.name,
        "episodes": store.num_episodes,
        "steps": store.num_steps,
        "sha256": content_digest(cast("EpisodeStore", store)),
        **({"attrs": before} if before else {}),
    }
