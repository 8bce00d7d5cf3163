"""What is to be known of a data set, beside it: for programs as JSON, for people as Markdown."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffpolicy.data.reader import EpisodeReader
from diffpolicy.files import write_atomic, write_json


def sheet_path(store: Path, suffix: str) -> Path:
    """Where the datasheet of a store is: ``push.datasheet.json`` beside ``push.zarr``."""
    return store.with_name(f"{store.name.removesuffix('.zarr')}.datasheet{suffix}")


def datasheet(
    store: EpisodeReader,
    name: str,
    recipe: Any,
    digest: str,
    kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Say what a data set is, as JSON values that depend on the set and its recipe alone.

    Args:
        store: the set.
        name: of the recipe.
        recipe: with the number of episodes and the arguments that were asked for.
        digest: see :func:`~diffpolicy.data.store_digest.store_digest`.
        kwargs: arguments of the environment that were asked for beside the recipe's.

    Returns:
        ``returns`` and ``lengths`` are over the kept episodes, ``expert`` over all that were tried.
    """
    attrs, kept = store.attrs, store.episode_attrs
    collection = attrs.get("collection", {})
    tried = collection.get("tried", len(kept))
    told = [one["success"] for one in kept if one.get("success") is not None]
    expert = {"tried": tried, "succeeded": sum(told), "success_rate": sum(told) / tried}
    return {
        "name": name,
        "about": recipe.about,
        "maker": attrs["maker"],
        "command": _command(name, recipe.episodes, kwargs or {}),
        "licence": recipe.licence,
        "settings": attrs["recipe"],
        "made_of": attrs.get("made_of"),
        "versions": attrs["versions"],
        "episodes": {"tried": tried, "kept": len(kept)},
        "seeds": {"first": kept[0]["seed"], "last": kept[-1]["seed"]},
        "tasks": dict(sorted(Counter(a["task"] for a in kept if "task" in a).items())),
        "steps": store.num_steps,
        "lengths": _spread(store.episode_lengths),
        "returns": _spread(np.array([one["return"] for one in kept])),
        "expert": expert if told and recipe.derived is None else None,
        "fields": {n: [*spec.shape, spec.dtype] for n, spec in store.fields.items()},
        "sha256": digest,
    }


def write_datasheet(path: Path, sheet: Mapping[str, Any]) -> None:
    """Write ``NAME.datasheet.json`` and ``NAME.datasheet.md`` beside the store at ``path``."""
    write_json(sheet_path(path, ".json"), sheet)
    write_atomic(sheet_path(path, ".md"), as_markdown(sheet))


def as_markdown(sheet: Mapping[str, Any]) -> str:
    """Write a datasheet for people."""
    settings, expert = sheet["settings"], sheet["expert"]
    rows = {
        "maker": sheet["maker"],
        "licence": sheet["licence"],
        "environment": f"`{settings['env']}` {json.dumps(settings['kwargs'])}",
        "made from": f"{base['name']}, SHA-256 `{base['sha256']}`"
        if (base := sheet["made_of"])
        else "nothing: recorded in the simulator",
        "rewards": f"`{settings['relabel']}`" if settings["relabel"] else "the environment's",
        "noise": _noise(settings),
        "episodes": _episodes(sheet),
        "episodes by task": ", ".join(f"{n} {count}" for n, count in sheet["tasks"].items()),
        "steps": f"{sheet['steps']}, {_words(sheet['lengths'])} an episode",
        "return": _words(sheet["returns"]),
        "expert": ("" if settings["derived"] else "no success is told")
        if expert is None
        else f"{expert['succeeded']} of {expert['tried']} succeeded ({expert['success_rate']:.1%})",
        "fields": ", ".join(
            f"`{n}` {kind} {list(shape)}" for n, (*shape, kind) in sheet["fields"].items()
        ),
        "versions": ", ".join(f"{n} {v}" for n, v in sheet["versions"].items()),
        "SHA-256": f"`{sheet['sha256']}`",
    }
    table = "\n".join(f"| {name} | {text} |" for name, text in rows.items() if text)
    return (
        f"# {sheet['name']}\n\n{sheet['about']}\n\n```\n{sheet['command']}\n```\n\n"
        f"| | |\n|---|---|\n{table}\n"
    )


def _noise(settings: Mapping[str, Any]) -> str:
    if settings["derived"]:
        return ""
    if not settings["noise"]:
        return "none is added to the expert's actions"
    return f"{settings['noise']:g} on what is executed; the clean action is stored"


def _episodes(sheet: Mapping[str, Any]) -> str:
    kept, tried = sheet["episodes"]["kept"], sheet["episodes"]["tried"]
    seeds = f"seeds {sheet['seeds']['first']} to {sheet['seeds']['last']}"
    if sheet["settings"]["derived"]:
        return f"{kept}, the first of {sheet['settings']['derived']}; {seeds}"
    return f"{kept} kept ({sheet['settings']['keep']}) of {tried} tried, {seeds}"


def _command(name: str, episodes: int, kwargs: Mapping[str, Any]) -> str:
    words = ["diffpolicy", "data", "make", name, f"episodes={episodes}"]
    if kwargs:
        words.append(f"kwargs={json.dumps(dict(kwargs))}")
    return shlex.join(words)


def _spread(values: np.ndarray) -> dict[str, float]:
    return {
        "mean": float(values.mean(dtype=np.float64)),
        "min": float(values.min()),
        "max": float(values.max()),
    }


def _words(spread: Mapping[str, float]) -> str:
    return f"{spread['mean']:.4g} ({spread['min']:.4g} to {spread['max']:.4g})"
