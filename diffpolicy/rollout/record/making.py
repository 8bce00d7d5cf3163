"""Data sets from nothing: a recipe becomes a store, the same one wherever it is made."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from diffpolicy.data.fields import FieldSpec, check_has
from diffpolicy.data.reader import EpisodeReader
from diffpolicy.data.store import EpisodeStore
from diffpolicy.data.store_digest import store_digest
from diffpolicy.rollout.declared import declared
from diffpolicy.rollout.env_spec import EnvSpec, installed_versions
from diffpolicy.rollout.pool.supervisor import Workers
from diffpolicy.rollout.record.datasheet import datasheet, write_datasheet
from diffpolicy.rollout.record.experts import Wanted, record_experts
from diffpolicy.settings import near_miss

FOLDER = "data"
_DEMONSTRATIONS = 100_000  # seeds below are for demonstrations, those above for choices and scores
_ROWS = 8

Relabel = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


class UnknownSetError(ValueError):
    """No installed package has a recipe of this name."""


def find_recipe(name: str) -> Any:
    """The recipe of a data set.

    Args:
        name: such as ``"fetch/push"``.

    Raises:
        UnknownSetError: there is none; with the nearest names.
    """
    known = declared()
    if name in known.recipes:
        return known.recipes[name]
    broken = "".join(f". Not readable: {why}" for why in known.broken.values())
    raise UnknownSetError(
        f"no data set {name!r} can be made (`diffpolicy data make --list` shows all "
        f"{len(known.recipes)}){near_miss(name, known.recipes)}{broken}"
    )


def default_path(name: str) -> Path:
    """Where a set is made unless another place is asked for: ``data/NAME.zarr``."""
    return Path(FOLDER, f"{name}.zarr")


def make_set(
    name: str,
    path: str | Path | None = None,
    *,
    episodes: int | None = None,
    workers: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
    base: str | Path | None = None,
    progress: bool = True,
) -> EpisodeStore:
    """Make a data set by its recipe, and write a datasheet beside it.

    The store depends on the recipe, ``episodes``, ``kwargs`` and the versions of the packages
    alone: neither on the number of workers nor on being killed on the way. Called again it goes on
    where it stopped; a set that is whole is left as it is.

    Args:
        name: of the recipe.
        path: of the store; None: ``data/NAME.zarr``.
        episodes: how many are kept; None: as many as the recipe says. Fewer are the first ones.
        workers: processes; None: one for each core; 0: none but this one.
        kwargs: arguments of the environment that differ from the recipe's, such as ``cameras``.
        base: of a derived set, the store that it is made from; None: ``data/BASE.zarr``, which is
            made if it is not there.
        progress: whether to show a bar.

    Returns:
        The store, open for reading.

    Raises:
        UnknownSetError: no recipe has this name.
        AllFailedError: too few episodes could be kept.
        EnvSpecError: the environment cannot be made; says how to install its package.
        ValueError: ``base`` for a set that is not derived, episodes that
            are no number, something else at ``path``, or what :func:`record_experts` refuses.

    Example:
        >>> make_set("fetch/push", episodes=50)
    """
    recipe = find_recipe(name)
    if base is not None and recipe.derived is None:
        raise ValueError(f"{name} is recorded, not made from another set: leave out base={base}")
    if episodes is not None and type(episodes) is not int:
        raise ValueError(f"episodes must be a whole number, got {episodes!r}")
    recipe = replace(
        recipe,
        episodes=recipe.episodes if episodes is None else episodes,
        kwargs={**recipe.kwargs, **(kwargs or {})},
    )
    target = default_path(name) if path is None else Path(path)
    if not _whole(target, recipe):
        target.parent.mkdir(parents=True, exist_ok=True)
        if recipe.derived is None:
            _record(recipe, target, workers, progress)
        else:
            _derive(recipe, target, base, workers=workers, progress=progress)
        with EpisodeStore.open(target, "a") as made:
            made.update_attrs({"recipe": _settings(recipe), "maker": _maker(name)})
    store = EpisodeStore.open(target)
    write_datasheet(target, datasheet(store, name, recipe, store_digest(store), kwargs))
    return store


def _maker(name: str) -> str:
    """The package that declares a recipe, with its version."""
    distribution = declared().sources[name]
    return f"{distribution} {installed_versions([distribution]).get(distribution, '')}".strip()


def _whole(path: Path, recipe: Any) -> bool:
    """Whether the set is there already, made by this recipe."""
    if not path.exists():
        return False
    with EpisodeStore.open(path) as store:
        made = store.attrs.get("recipe")
        return made == _settings(recipe) and store.num_episodes == recipe.episodes


def _settings(recipe: Any) -> dict[str, Any]:
    """What of a recipe decides the values, as JSON values."""
    names = ("env", "kwargs", "seeds_from", "noise", "keep", "fields", "derived", "relabel")
    values = {name: getattr(recipe, name) for name in names}
    kwargs = EnvSpec(recipe.env, recipe.kwargs).kwargs
    return {**values, "kwargs": kwargs, "fields": [*recipe.fields]}


def _record(recipe: Any, target: Path, workers: int | None, progress: bool) -> None:
    first, most = recipe.seeds_from, recipe.seeds_from + 20 * recipe.episodes + 100
    if first < _DEMONSTRATIONS:
        most = min(most, _DEMONSTRATIONS)
    wanted = Wanted(recipe.noise, recipe.keep, tuple(recipe.fields), recipe.episodes)
    record_experts(
        EnvSpec(recipe.env, recipe.kwargs),
        range(first, most),
        target,
        wanted,
        workers=Workers(num_envs=max(_ROWS, workers or 0), num_workers=workers),
        progress=progress,
    ).close()


def _derive(
    recipe: Any, target: Path, base: str | Path | None, *, workers: int | None, progress: bool
) -> None:
    """Make the set of new rewards from the episodes of another."""
    place = default_path(recipe.derived) if base is None else Path(base)
    if base is None and _count(place) < recipe.episodes:
        count = recipe.episodes
        make_set(recipe.derived, place, episodes=count, workers=workers, progress=progress)
    kwargs = EnvSpec(recipe.env, recipe.kwargs).kwargs
    relabel = functools.partial(_function(recipe.relabel), **kwargs)
    with EpisodeStore.open(place) as source:
        if source.num_episodes < recipe.episodes:
            raise ValueError(
                f"{place} holds {source.num_episodes} episodes, and {recipe.episodes} are needed; "
                f"give episodes={source.num_episodes}, or another base"
            )
        left = {n for n in source.fields if n.startswith("info.")}
        left -= {f"info.{name}" for name in recipe.fields}
        fields = {"reward": FieldSpec(()), "terminated": FieldSpec((), "bool")}  # converted: none
        fields |= {n: spec for n, spec in source.fields.items() if n not in left}
        attrs = {n: source.attrs[n] for n in ("versions",) if n in source.attrs}
        attrs |= {"env_id": recipe.env, "env_kwargs": dict(kwargs), "recipe": _settings(recipe)}
        attrs["made_of"] = {"name": recipe.derived, "sha256": store_digest(source)}
        again = _unfinished(target, recipe)
        with EpisodeStore.create(target, fields, attrs=attrs, overwrite=again) as store:
            for index in range(recipe.episodes):
                _append(store, source, index, relabel)


def _append(store: EpisodeStore, source: EpisodeReader, index: int, relabel: Relabel) -> None:
    episode = source.episode(index)
    given = {name: np.asarray(value) for name, value in relabel(episode).items()}
    check_has("what the function of rewards returns", ("reward", "terminated"), given)
    columns = {**episode, **given}
    columns = {name: columns[name].astype(spec.dtype) for name, spec in store.fields.items()}
    said = dict(source.episode_attrs[index])
    said["return"] = float(np.sum(columns["reward"], dtype=np.float64))
    ends = given.get("success")
    said["success"] = None if ends is None else bool(np.any(ends))
    said["final_success"] = None if ends is None else bool(ends[-1])
    store.append(columns, **said)


def _unfinished(target: Path, recipe: Any) -> bool:
    """Whether the same derived set lies half made at ``target``, where it may begin anew."""
    if not target.exists():
        return False
    with EpisodeStore.open(target) as store:
        same = store.attrs.get("recipe") == _settings(recipe)
        return same and store.num_episodes < recipe.episodes


def _count(path: Path) -> int:
    """Episodes of the store at ``path``; 0 if there is none."""
    return EpisodeStore.open(path).num_episodes if path.exists() else 0


def _function(place: str) -> Callable[..., Any]:
    module, _, name = place.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function
