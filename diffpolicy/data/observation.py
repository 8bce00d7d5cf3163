"""Observations: one array, or arrays by name, through one set of functions.

A robot says several things at once: joint positions, a goal, a camera's image. :data:`Obs` is what
a batch of rows observes, and everything that carries observations (environments, stores, policies,
servers) goes through the functions here, so that it need not know which of both it carries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffpolicy.data.fields import FieldSpec
from diffpolicy.settings import check_choice, check_shape, near_miss

Array = np.ndarray[Any, Any]
Obs = Array | Mapping[str, Array]
"""Arrays ``[N, ...]``, one row per environment or example: a single one, or by name.

Arrays keep their own types: an image of bytes stays an image of bytes. Torch tensors do as well.
"""

ROLES = ("state", "image", "task", "goal")
_USUAL = {"desired_goal": "goal", "task": "task"}


@dataclass(frozen=True)
class ObsField(FieldSpec):
    """One array of an observation, without its batch.

    Args:
        shape: of one row.
        dtype: NumPy's name of its type.
        role: what it is for: ``"state"``, ``"image"``, ``"task"`` or ``"goal"``.

    Raises:
        ValueError: an unknown role, or what :class:`~diffpolicy.data.fields.FieldSpec` refuses.
    """

    role: str = "state"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("role", self.role, ROLES)

    @property
    def is_id(self) -> bool:
        """Whether it says which of several tasks is meant, as one integer."""
        return self.role == "task" and self.shape == (1,) and "int" in self.dtype


ObsFields = ObsField | Mapping[str, ObsField]
"""What an :data:`Obs` is made of: one field, or fields by name."""


def of_space(space: Any, roles: Mapping[str, str] | None = None) -> ObsFields:
    """Return the fields of a Gymnasium observation space: a ``Box``, or a ``Dict`` of them.

    Args:
        space: the space.
        roles: by name, where a field is not ``"state"``. Images (grids of bytes) are
            ``"image"``, a ``Dict``'s ``desired_goal`` is a ``"goal"`` and its ``task`` a
            ``"task"``, unless said otherwise.

    Raises:
        ValueError: a space of another kind, with the name of the entry.
    """
    inner = getattr(space, "spaces", None)
    named = inner if isinstance(inner, Mapping) else {"": space}
    for name, one in named.items():
        if not hasattr(one, "low") or getattr(one, "shape", None) is None:
            where = f"entry {name!r} of the observation" if name else "the observation"
            raise ValueError(
                f"{where} must be a Box (or a Dict of Boxes), got {one}; wrap the environment, for "
                "example in gymnasium.wrappers.FlattenObservation"
            )
    return _fields(named, roles)


def of_store(store: Any, roles: Mapping[str, str] | None = None) -> ObsFields:
    """Return the fields of a store's observations, ``obs`` or all ``obs.NAME``.

    Args:
        store: An episode store, or whatever has ``fields`` with shapes and types by name.
        roles: As for :func:`of_space`.
    """
    names = obs_fields(store)
    return _fields({name[4:]: store.fields[name] for name in names}, roles)


def _fields(named: Mapping[str, Any], roles: Mapping[str, str] | None) -> ObsFields:
    """Fields of what has ``shape`` and ``dtype``; the name ``""`` stands for a single array."""
    found = {}
    for name, one in named.items():
        spec = FieldSpec(one.shape, str(one.dtype))
        usual = "image" if spec.is_image else _USUAL.get(name, "state")
        found[name] = ObsField(spec.shape, spec.dtype, (roles or {}).get(name, usual))
    return found[""] if list(found) == [""] else found


def store_field(name: str) -> str:
    """Return the name of a field in episode stores and normalisers: ``obs``, or ``obs.NAME``."""
    return f"obs.{name}" if name else "obs"


def is_obs(field: str) -> bool:
    """Return whether a store's field is (a part of) the observation."""
    return field == "obs" or field.startswith("obs.")


def obs_fields(store: Any) -> list[str]:
    """Return the names of a store's observations: ``["obs"]``, or its ``obs.NAME`` in their order.

    A store that has ``obs`` is read by that alone. Without either the list is empty.
    """
    return ["obs"] if "obs" in store.fields else [name for name in store.fields if is_obs(name)]


def from_fields(batch: Mapping[str, Any], key: str = "obs") -> Any:
    """Return the observation in a batch or episode of a store's fields.

    Args:
        batch: Arrays or tensors by the names that they have in stores.
        key: ``"obs"``, ``"next_obs"``, or either behind a prefix, such as ``"chosen_obs"``.

    Returns:
        The array ``key``, or those of ``key.NAME`` by name.

    Raises:
        KeyError: There is neither.
    """
    parts = {k.removeprefix(f"{key}."): v for k, v in batch.items() if k.startswith(f"{key}.")}
    return parts if parts and key not in batch else batch[key]


def holds(batch: Mapping[str, Any], key: str = "obs") -> bool:
    """Return whether a batch has an observation ``key``, as one array or by name."""
    return key in batch or any(name.startswith(f"{key}.") for name in batch)


def to_fields(obs: Any, key: str = "obs") -> dict[str, Any]:
    """Return the arrays of an observation by their names in stores, as :func:`from_fields` reads.

    Example:
        >>> to_fields({"joints": 1, "camera": 2})
        {'obs.joints': 1, 'obs.camera': 2}
    """
    if isinstance(obs, Mapping):
        return {f"{key}.{name}": array for name, array in obs.items()}
    return {key: obs}


def by_store_field(fields: ObsFields) -> dict[str, ObsField]:
    """Return the fields under the names that they have in stores, in their order."""
    return to_fields(fields)


def each(function: Callable[..., Any], obs: Any, *others: Any) -> Any:
    """Return an observation of what ``function`` makes of every array, and those of ``others``."""
    if isinstance(obs, Mapping):
        return {k: function(array, *(o[k] for o in others)) for k, array in obs.items()}
    return function(obs, *others)


def count(obs: Any) -> int:
    """Return the number N of rows."""
    return len(next(iter(obs.values())) if isinstance(obs, Mapping) else obs)


def take(obs: Any, rows: Any) -> Any:
    """Return the given rows as a new observation."""
    return each(lambda array: array[rows], obs)


def put(obs: Any, rows: Any, other: Any) -> Any:
    """Return a copy whose given rows are those of ``other``."""

    def replaced(array: Array, values: Array) -> Array:
        out = array.copy()
        out[rows] = values
        return out

    return each(replaced, obs, other)


def stack(rows: Sequence[Any]) -> Any:
    """Return one batch of single observations (without a batch dimension), in their order."""
    return _joined(np.stack, rows)


def concat(parts: Sequence[Any]) -> Any:
    """Return one batch of several."""
    return _joined(np.concatenate, parts)


def _joined(join: Callable[[list[Any]], Any], parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], Mapping):
        return {name: join([part[name] for part in parts]) for name in parts[0]}
    return join(list(parts))


def zeros(fields: ObsFields, lead: tuple[int, ...]) -> Obs:
    """Return zeros ``[*lead, ...]`` in the types that policies see: float32, bytes of images."""

    def empty(field: ObsField) -> Array:
        return np.zeros((*lead, *field.shape), field.dtype if field.is_image else np.float32)

    out: Obs = each(empty, fields)
    return out


def as_seen(obs: Any, fields: ObsFields, *, lead: tuple[int | str, ...] = ("N",)) -> Obs:
    """Return an observation as policies see it: the arrays of ``fields`` alone, float32 or bytes.

    Raises:
        ValueError: what :func:`check` refuses, and images that are not bytes.
    """
    obs = each(np.asarray, obs)
    check(obs, fields, lead=lead)
    arrays = to_fields(obs)
    for name, field in by_store_field(fields).items():
        if field.is_image and arrays[name].dtype != field.dtype:
            got = arrays[name].dtype
            raise ValueError(f"the image {name!r} must be uint8, from 0 to 255; got {got}")

    def seen(field: ObsField, array: Array) -> Array:
        return array if field.is_image else array.astype(np.float32, copy=False)

    out: Obs = each(seen, fields, obs)
    return out


def sizes(fields: ObsFields) -> list[int]:
    """Return the sizes of vectors that stand side by side in one.

    Raises:
        ValueError: a field that is no vector.
    """
    for name, field in by_store_field(fields).items():
        if len(field.shape) != 1:
            raise ValueError(f"{name!r} has the shape {list(field.shape)}; vectors are needed here")
    return [field.size for field in by_store_field(fields).values()]


def side_by_side(obs: Any) -> Any:
    """Return the tensors ``[..., D]`` of an observation as one, in their order."""
    import torch  # only policies come here; workers of environments start without it

    return torch.cat(list(obs.values()), -1) if isinstance(obs, Mapping) else obs


def apart(obs: Any, fields: ObsFields) -> Any:
    """Return an observation by name that may stand :func:`side_by_side`; any other as it is."""
    if isinstance(obs, Mapping) or not isinstance(fields, Mapping):
        return obs
    return dict(zip(fields, obs.split(sizes(fields), -1), strict=True))


def check(obs: Any, fields: ObsFields, *, lead: tuple[int | str, ...] = ("N",)) -> None:
    """Raise ``ValueError`` unless an observation has the fields, in shape.

    Args:
        obs: the observation.
        fields: what it is made of.
        lead: the dimensions before a row's own; letters stand for any size.
    """
    if isinstance(obs, Mapping) == isinstance(fields, ObsField):
        expected = "one array" if isinstance(fields, ObsField) else f"{sorted(fields)} by name"
        got = sorted(obs) if isinstance(obs, Mapping) else type(obs).__name__
        raise ValueError(f"the observation must be {expected}, got {got}")
    if isinstance(fields, ObsField):
        _check_array("the observation", obs, fields, lead)
        return
    for name, field in fields.items():
        if name not in obs:
            hint = near_miss(name, obs, listing="there are")
            raise ValueError(f"the observation has no {name!r}{hint}")
        _check_array(f"observation {name!r}", obs[name], field, lead)


def _check_array(what: str, array: Any, field: ObsField, lead: tuple[int | str, ...]) -> None:
    try:
        check_shape(what, array.shape, (*lead, *field.shape))
    except ValueError as error:
        if not field.is_image or array.shape[-3:] != (field.shape[-1], *field.shape[:-1]):
            raise
        raise ValueError(
            f"{error}: its channels come first. Give images as environments do, [height, width, "
            "channels]; Stable-Baselines3's VecTransposeImage moves the channels, so leave it out"
        ) from None
