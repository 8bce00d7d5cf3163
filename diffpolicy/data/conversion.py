"""Make a store of another format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffpolicy.data import layout
from diffpolicy.data.fields import FieldSpec
from diffpolicy.data.formats import EpisodeSource, Format, get_format
from diffpolicy.data.store import EpisodeStore
from diffpolicy.files import WriterLock

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

# Episodes are handed to the store in blocks of about so many bytes.
_BLOCK_BYTES = 2**25
# What a policy and its critics are given: float32 vectors.
_OBSERVATIONS = ("obs", "next_obs")
_VECTORS = (*_OBSERVATIONS, "action")

Columns = dict[str, "NDArray[Any]"]


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format: str = "auto",
    fields: Mapping[str, str | Sequence[str]] | None = None,
    transform: Callable[[NDArray[Any]], NDArray[Any]] | None = None,
    max_episodes: int | None = None,
    attrs: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> EpisodeStore:
    """Convert a file or directory into an episode store with statistics.

    The store appears at `target` when it is complete, not before.

    Args:
        source: What to read: a path, or with `format` "minari" or "lerobot" a dataset's id.
        target: The store to make, by custom `something.zarr`.
        format: A format's name, or `"auto"` to look.
        fields: The target's fields, each made of one source field or of several, which are
            flattened and concatenated: `{"obs": ["state"], "action": "action"}`. What is not said
            of `obs` and `action` comes from the format. Both become float32 vectors; other fields
            keep their shape and type (float64 becomes float32).
        transform: Applied to `obs` `[T, O]` of each episode; returns `[T, O']`. Also to `next_obs`,
            where the format knows the observation after each step.
        max_episodes: Stop after so many.
        attrs: JSON values to keep with the store, such as `{"env_id": ...}`.
        overwrite: Replace the store that is at `target`.

    Returns:
        The new store, open for reading.

    Raises:
        FileNotFoundError: No source.
        FileExistsError: Something is at `target`.
        ValueError: An unknown format or field, or an episode that cannot be stored; the message
            names it.
    """
    origin, goal = Path(source), Path(target)
    if format == "auto" and not origin.exists():
        raise FileNotFoundError(
            f"nothing to convert at {origin}; to look up a dataset by its id, name the format, "
            "such as format=minari"
        )
    if max_episodes is not None and max_episodes < 1:
        raise ValueError(f"max_episodes must be at least 1; got {max_episodes}")
    layout.clear_target(goal, overwrite=overwrite, remove=False)
    name, module = get_format(format, origin)
    reader = module.open_source(origin)
    try:
        mapping = _mapping(reader, module, fields)
        kept = dict(reader.attrs) | {"source": {"name": origin.name, "format": name}}
        episodes = _episodes(reader, mapping, transform, max_episodes)
        with WriterLock(goal, "converting to it"), layout.replaced(goal) as partial:
            _write(partial, episodes, kept | dict(attrs or {}))
    finally:
        reader.close()
    return EpisodeStore.open(goal)


def _mapping(
    reader: EpisodeSource, module: Format, fields: Mapping[str, str | Sequence[str]] | None
) -> dict[str, list[str]]:
    chosen: dict[str, str | Sequence[str]] = {**module.default_fields(reader), **(fields or {})}
    lists = {k: [v] if isinstance(v, str) else list(v) for k, v in chosen.items()}
    follow = getattr(module, "next_fields", None)
    if follow is not None and "next_obs" not in (fields or {}):  # it is made of what makes obs
        lists.pop("next_obs", None)
        lists |= {"next_obs": names} if (names := follow(lists.get("obs", []))) else {}
    for name in ("obs", "action"):
        if not lists.get(name):
            raise ValueError(
                f"{reader.name} does not say what {name!r} is; choose of its fields "
                f'{sorted(reader.fields)}, for example fields={{"{name}": [...]}}'
            )
    unknown = sorted({n for names in lists.values() for n in names} - set(reader.fields))
    if unknown:
        raise ValueError(f"{reader.name} has no field {unknown}; it has {sorted(reader.fields)}")
    return lists


def _episodes(
    reader: EpisodeSource,
    mapping: Mapping[str, list[str]],
    transform: Callable[[NDArray[Any]], NDArray[Any]] | None,
    max_episodes: int | None,
) -> Iterator[tuple[Columns, dict[str, Any]]]:
    names = sorted({n for group in mapping.values() for n in group})
    known = reader.episode_attrs
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(min(reader.num_episodes, max_episodes or reader.num_episodes)):
        raw = reader.episode(index, names)
        try:
            columns = {k: _column(k, [raw[n] for n in group]) for k, group in mapping.items()}
            if transform is not None:
                for name in (n for n in _OBSERVATIONS if n in columns):
                    columns[name] = _transformed(transform, columns[name])
            shapes = shapes or {k: c.shape[1:] for k, c in columns.items()}
            _check_columns(columns, shapes)
        except ValueError as error:
            raise ValueError(f"{reader.name}, episode {index}: {error}") from error
        yield columns, dict(known[index])


def _column(name: str, parts: list[NDArray[Any]]) -> NDArray[Any]:
    lengths = [len(p) for p in parts]
    if len(set(lengths)) > 1:
        raise ValueError(f"the parts of {name!r} have different lengths: {lengths}")
    flat = name in _VECTORS or len(parts) > 1
    column = np.concatenate([p.reshape(len(p), -1) for p in parts], 1) if flat else parts[0]
    if name in _VECTORS or column.dtype == np.float64:
        with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is reported
            column = column.astype(np.float32)
    return column


def _transformed(
    transform: Callable[[NDArray[Any]], NDArray[Any]], obs: NDArray[Any]
) -> NDArray[np.float32]:
    result = np.asarray(transform(obs))
    if result.ndim != 2 or len(result) != len(obs):
        raise ValueError(
            f"transform must turn [T, O] = {list(obs.shape)} into [T, O']; got {list(result.shape)}"
        )
    return result.astype(np.float32)


def _check_columns(columns: Columns, shapes: Mapping[str, tuple[int, ...]]) -> None:
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"every field must have one row a step; got the lengths {lengths}")
    for name, column in columns.items():
        if column.shape[1:] != shapes[name]:
            raise ValueError(
                f"field {name!r} has rows of shape {list(column.shape[1:])}, in the first episode "
                f"{list(shapes[name])}; leave the episode out"
            )
        if column.dtype.kind == "f" and not np.isfinite(column).all():
            row = int(np.argwhere(~np.isfinite(column))[0][0])
            raise ValueError(f"field {name!r} is not finite at step {row}; leave the episode out")


def _write(
    path: Path, episodes: Iterator[tuple[Columns, dict[str, Any]]], attrs: Mapping[str, Any]
) -> None:
    store: EpisodeStore | None = None
    block: list[tuple[Columns, dict[str, Any]]] = []
    size = 0
    for columns, known in episodes:
        if store is None:
            specs = {k: FieldSpec(c.shape[1:], str(c.dtype)) for k, c in columns.items()}
            store = EpisodeStore.create(path, specs, attrs=attrs, overwrite=True)
        block.append((columns, known))
        size += sum(c.nbytes for c in columns.values())
        if size > _BLOCK_BYTES:
            _write_block(store, block)
            block, size = [], 0
    if store is None:
        raise ValueError("there are no episodes to convert")
    if block:
        _write_block(store, block)
    store.close()


def _write_block(store: EpisodeStore, block: list[tuple[Columns, dict[str, Any]]]) -> None:
    arrays = {k: np.concatenate([c[k] for c, _ in block]) for k in store.fields}
    ends = np.cumsum([len(c["obs"]) for c, _ in block])
    store.extend(arrays, ends, [known for _, known in block])
