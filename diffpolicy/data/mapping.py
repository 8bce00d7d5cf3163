"""Which fields of a source make each field of a store."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from diffpolicy.data.fields import FieldSpec, check_has
from diffpolicy.data.formats import EpisodeSource
from diffpolicy.data.formats.images import is_grid, is_picture
from diffpolicy.data.observation import is_obs
from diffpolicy.data.tasks import FIELD as TASK

Fields = Mapping[str, str | Sequence[str]]
"""Fields of a store, each made of one field of a source or of several."""

# What a state-only policy and its critics are given: float32 vectors.
VECTORS = ("obs", "next_obs", "action")
# Some of a field's entries: ``state[:2]``.
_PART = re.compile(r"(?P<field>.+)\[(?P<first>\d*):(?P<stop>\d*)\]")


def mapping_of(
    source: EpisodeSource, fields: Fields, *, flat: bool = False, task: bool = False
) -> dict[str, list[str]]:
    """Return the source fields that make each field of the store.

    Args:
        source: The source.
        fields: What the user says of it; the format says the rest.
        flat: Whether an observation that the user does not choose is to be a vector.
        task: Whether ``obs.task`` will stand beside it.

    Raises:
        ValueError: No observation or action, no such field, or an image within a vector.
    """
    default = {name: _listed(made_of) for name, made_of in source.default_fields().items()}
    if any(map(is_obs, fields)):
        default = {name: made_of for name, made_of in default.items() if not is_obs(name)}
    elif flat and len(default.get("obs", [])) > 1:
        default["obs"] = [n for n in default["obs"] if not is_picture(source.fields[n])]
    lists = default | {name: _listed(made_of) for name, made_of in fields.items()}
    if "obs" in lists:
        lists |= _by_name(source, lists.pop("obs"), task=task)
    if task:
        lists.pop(TASK, None)
    follow = getattr(source, "next_fields", None)
    if follow is not None and "next_obs" not in fields:  # it is made of what makes obs
        lists.pop("next_obs", None)
        lists |= {f"next_{k}": n for k, v in lists.items() if is_obs(k) and (n := _next(follow, v))}
    for name, there in {"obs": any(map(is_obs, lists)), "action": "action" in lists}.items():
        if not there or not lists.get(name, [name]):
            raise ValueError(
                f"{source.name} does not say what {name!r} is; choose of its fields "
                f"{sorted(source.fields)}, for example {name}=[NAME, NAME] at the command line, "
                f'fields={{"{name}": [...]}} from Python'
            )
    check_has(source.name, {field_of(n) for names in lists.values() for n in names}, source.fields)
    for name, parts in lists.items():
        for part in parts:
            _check_vector(name, part, parts, source.fields[field_of(part)])
    return lists


def is_observed(name: str) -> bool:
    """Return whether a store's field is (a part of) the observation before or after a step."""
    return is_obs(name.removeprefix("next_"))


def field_of(text: str) -> str:
    """Return the field of which a text such as ``state[:2]`` names some entries."""
    found = _PART.fullmatch(text)
    return found["field"] if found else text


def part_of(text: str, raw: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """Return the rows ``[T, ...]`` of a field, or of some of its entries.

    Raises:
        ValueError: The field has no such entries.

    Example:
        >>> part_of("state[:2]", {"state": np.ones((7, 5))}).shape
        (7, 2)
    """
    found = _PART.fullmatch(text)
    rows = raw[field_of(text)]
    if found is None:
        return rows
    rows = rows.reshape(len(rows), -1)
    first, stop = int(found["first"] or 0), int(found["stop"] or rows.shape[1])
    if not first < stop <= rows.shape[1]:
        raise ValueError(f"{text}: {found['field']!r} has the entries 0:{rows.shape[1]}")
    return rows[:, first:stop]


def _listed(made_of: str | Sequence[str]) -> list[str]:
    return [made_of] if isinstance(made_of, str) else list(made_of)


def _next(follow: Callable[[list[str]], list[str]], parts: list[str]) -> list[str]:
    """The parts after a step; none where the source does not know them."""
    names = follow([field_of(part) for part in parts])
    return [f"{n}{p.removeprefix(field_of(p))}" for n, p in zip(names, parts, strict=False)]


def _by_name(source: EpisodeSource, parts: list[str], *, task: bool) -> dict[str, list[str]]:
    """The observation: one array, or several by name where images or a task are among them."""
    images = [n for n in parts if n in source.fields and is_picture(source.fields[n])]
    vectors = [n for n in parts if n not in images]
    if not task and (not images or parts == images[:1]):
        return {"obs": parts}
    names = [n.rpartition(".")[2] for n in images]
    if len({*names, "state", "task"}) < len(names) + 2:  # of two cameras' parts, both ``rgb``
        names = images
    named = {f"obs.{re.sub('[./]', '_', n)}": [i] for n, i in zip(names, images, strict=True)}
    return named | ({"obs.state": vectors} if vectors else {})


def _check_vector(name: str, part: str, parts: list[str], spec: FieldSpec) -> None:
    """Refuse images where a vector is wanted: flattened they would be thousands of numbers."""
    image = is_observed(name) and is_picture(spec)
    if parts == [field_of(part)] and (image or name not in VECTORS):
        return
    if is_grid(spec):
        raise ValueError(
            f"{name!r} is a vector, but {part!r} is an image or a grid, {list(spec.shape)}; make "
            f"{name!r} of vectors, and keep it as fields={{{part}:{part}}}; or name the "
            f"observations, such as fields={{obs.{part}:{part}, obs.state:...}}"
        )
