"""What passes between a policy and an environment: actions in, observations and rewards out.

Every way to an environment goes through here, so that all read the same numbers alike. What can be
read without guessing is read (an array of one entry is a number); the rest raises, and says what
came.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from diffpolicy.data.fields import NUMBERS
from diffpolicy.data.observation import Obs, ObsField, ObsFields
from diffpolicy.rollout.env_spec import action_ends

_SUCCESS_KEYS = ("is_success", "success")


def to_native(action: np.ndarray, space: spaces.Space[Any]) -> Any:
    """An action ``[A]`` as the environment's space wants it; of ``Discrete`` ones a number.

    Whole numbers are rounded and clipped to the bounds. A number that float32 holds to be a bound
    becomes exactly that bound, also where the space is float64. Others are passed on as they are:
    what an environment does with an action outside its space is its own affair.
    """
    dtype, (low, high) = space.dtype, action_ends(space)
    assert dtype is not None
    if dtype.kind in "iu":
        whole = np.rint(np.asarray(action, np.float64))
        inside = np.clip(whole, low.astype(np.float64), high.astype(np.float64))
        whole = inside.astype(dtype)
        return whole[0] if isinstance(space, spaces.Discrete) else whole
    native = np.asarray(action, dtype)
    if native.itemsize <= 4:
        return native
    single = native.astype(np.float32)
    native = np.where((native < low) & (single == low.astype(np.float32)), low, native)
    return np.where((native > high) & (single == high.astype(np.float32)), high, native)


def as_reward(value: Any) -> float:
    """A reward as a number.

    Raises:
        ValueError: it is not one finite number.
    """
    number = _number(value)
    if number is None or not math.isfinite(number):
        raise ValueError(
            f"the environment returned the reward {value!r}; one finite number is needed"
        )
    return number


def as_flag(value: Any, name: str) -> bool:
    """The end of an episode as a truth value.

    Raises:
        ValueError: it is not one truth value.
    """
    number = _number(value)
    if number is None or math.isnan(number):
        raise ValueError(f"the environment returned {name}={value!r}; a bool is needed")
    return bool(number)


def as_observation(
    value: Any, fields: ObsFields, room: Mapping[str, np.ndarray] | None = None
) -> Obs:
    """An observation in memory of its own, each array in the type that its field says.

    Axes of length one do not matter.

    Args:
        value: what the environment returned.
        fields: what it is made of.
        room: where arrays are to be put, by the names that they have in stores; new memory for
            the others.

    Raises:
        ValueError: an entry is missing or has another shape, or numbers are not finite.
    """
    room = room or {}
    if isinstance(fields, ObsField):
        return _as_array(value, fields, "an observation", room.get("obs"))
    if not isinstance(value, Mapping) or not fields.keys() <= value.keys():
        got = sorted(value) if isinstance(value, Mapping) else type(value).__name__
        raise ValueError(f"the environment returned {got}, not observations {sorted(fields)}")
    return {
        name: _as_array(value[name], field, f"an observation {name!r}", room.get(f"obs.{name}"))
        for name, field in fields.items()
    }


def _as_array(value: Any, field: ObsField, what: str, place: np.ndarray | None) -> np.ndarray:
    make = np.array if place is None else np.asarray  # environments may reuse their own buffer
    try:
        array = make(value, field.dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the environment returned {what} that is no array of numbers: {error}"
        ) from None
    if array.shape != field.shape:
        if array.squeeze().shape != tuple(n for n in field.shape if n != 1):
            raise ValueError(
                f"the environment returned {what} of shape {array.shape}, not {field.shape}"
            )
        array = array.reshape(field.shape)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = np.flatnonzero(~np.isfinite(array)).tolist()
        raise ValueError(f"the environment returned {what} that is not finite at {bad}")
    if place is None:
        return array
    place[...] = array
    return place


def as_success(info: dict[str, Any]) -> bool | None:
    """What ``info`` says of success; None if it says nothing (no key, None, or NaN).

    Raises:
        ValueError: it says something that is no truth value, text for example.
    """
    said = [_said(key, info[key]) for key in _SUCCESS_KEYS if key in info]
    known = [one for one in said if one is not None]
    return any(known) if known else None


def as_task(info: Mapping[str, Any]) -> str | None:
    """The name of the task that ``info["task"]`` tells; None if it tells none.

    Only text names a task: environments that know of no tasks use that key for other things.
    """
    value = info.get("task")
    return str(value) if isinstance(value, str) and value else None


def as_record(info: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
    """The arrays of numbers in ``info["record"]``, in memory of their own; None if there are none.

    Whatever else is there is left out: the entry is of our own making, and others may mean
    something else by it.
    """
    record = info.get("record")
    if not isinstance(record, Mapping):
        return None
    arrays = {str(name): np.array(value) for name, value in record.items()}
    return {name: array for name, array in arrays.items() if array.dtype.kind in NUMBERS} or None


def _said(key: str, value: Any) -> bool | None:
    if value is None:
        return None
    number = _number(value)
    if number is None or not (math.isnan(number) or number in (0, 1)):
        raise ValueError(
            f"the environment returned info[{key!r}]={value!r} ({type(value).__name__}); one bool "
            "is needed (or 0 or 1; NaN is none)"
        )
    return None if math.isnan(number) else bool(number)


def _number(value: Any) -> float | None:
    """A single number, also in an array of one entry; None for anything else."""
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "biuf":
        return None
    return float(array.reshape(()))
