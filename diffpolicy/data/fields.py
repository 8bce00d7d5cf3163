"""What may be put into a store: fields, rows, attributes and bounds, checked on the way in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Attribute names that the store uses itself.
RESERVED_ATTRS = ("format", "version", "fields", "statistics", "statistics_crc32")
NUMBERS = "fiub"  # numpy's kinds of plain numbers


@dataclass(frozen=True)
class FieldSpec:
    """One field of a store.

    Args:
        shape: Shape of one row, ``()`` for a number.
        dtype: A numpy name of a number type, such as ``"float32"``, ``"uint8"``, ``"bool"``.

    Raises:
        ValueError: A shape with a size below 1, or a dtype that is not a plain number.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "dtype", np.dtype(self.dtype).name)
        if any(n < 1 for n in self.shape):
            raise ValueError(f"every size in a field's shape must be at least 1; got {self.shape}")
        if np.dtype(self.dtype).kind not in NUMBERS:
            raise ValueError(
                f"a field holds plain numbers (float, int, uint, bool); got dtype {self.dtype!r}"
            )

    @staticmethod
    def of(array: Any) -> FieldSpec:
        """Return the field whose rows an array holds."""
        return FieldSpec(tuple(array.shape[1:]), str(array.dtype))

    @property
    def size(self) -> int:
        """Numbers in one row."""
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.size * np.dtype(self.dtype).itemsize

    @property
    def is_image(self) -> bool:
        """Whether rows are grids of bytes."""
        return len(self.shape) >= 2 and self.dtype == "uint8"


def field_specs(fields: Mapping[str, tuple[int, ...] | FieldSpec]) -> dict[str, FieldSpec]:
    """Return fields as specs.

    Raises:
        ValueError: No field, a name that is no plain word, or actions that are no vectors.
    """
    if not fields:
        raise ValueError('a store needs fields, such as {"obs": (17,), "action": (6,)}')
    for name in fields:
        if not name.replace("_", "").replace(".", "").isalnum() or name.startswith("."):
            raise ValueError(f"field names are letters, digits, '_' and '.'; got {name!r}")
    specs = {k: v if isinstance(v, FieldSpec) else FieldSpec(tuple(v)) for k, v in fields.items()}
    check_rows_train(specs, "this store")
    return specs


def check_rows_train(fields: Mapping[str, FieldSpec], where: str) -> None:
    """Raise ``ValueError`` unless actions are vectors, and observations vectors or images."""
    if "obs" in fields and not fields["obs"].shape:
        check_vector("obs", (), where)
    if "action" in fields:
        check_vector("action", fields["action"].shape, where)


def check_vector(name: str, shape: tuple[int, ...], where: str) -> None:
    """Make sure that a field holds one vector a step, for what cannot use images.

    Args:
        name: ``"obs"`` or ``"action"``.
        shape: Of its rows.
        where: What holds it, for the message.

    Raises:
        ValueError: Its rows have another shape.
    """
    if len(shape) != 1:
        fix = "array.reshape(len(array), -1)" if shape else "array[:, None]"
        raise ValueError(
            f"{name!r} must be [T, D], one vector a step; in {where} its rows have the shape "
            f"{list(shape)}. Store it as {fix}"
        )


def check_has(where: str, names: Iterable[str], fields: Iterable[str], why: str = "") -> None:
    """Raise ``ValueError`` unless all names are among the fields; ``where`` is whose they are."""
    if missing := sorted(set(names) - set(fields)):
        raise ValueError(f"{where} has no field {missing}; it has {sorted(fields)}{why}")


def whole_numbers(name: str, values: ArrayLike) -> NDArray[np.int64]:
    """Return a vector of whole numbers; raise ``ValueError`` for anything else."""
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        got = f"shape {list(array.shape)}, dtype {array.dtype}"
        raise ValueError(f"{name} must be a vector of whole numbers; got {got}")
    return array.astype(np.int64)


def checked_ends(name: str, values: ArrayLike) -> NDArray[np.int64]:
    """Return cumulative ends of episodes; raise ``ValueError`` unless they can be."""
    ends = whole_numbers(name, values)
    if not len(ends) or (np.diff(ends, prepend=0) <= 0).any():
        raise ValueError(
            f"{name} must increase strictly from above 0, one end for every episode; got "
            f"{ends.tolist()!s:.200}"
        )
    return ends


def checked_rows(
    fields: Mapping[str, FieldSpec], columns: Mapping[str, NDArray[Any]], ends: NDArray[Any]
) -> dict[str, NDArray[Any]]:
    """Return the columns in the store's types.

    Args:
        fields: The store's fields.
        columns: ``[T, *shape]`` each.
        ends: ``[E]`` cumulative ends of the episodes in these columns.

    Raises:
        ValueError: Anything that does not fit, with the field, the row and the fix.
    """
    if set(columns) != set(fields):
        raise ValueError(
            f"give each of the store's fields {sorted(fields)}, and no other; got {sorted(columns)}"
        )
    lengths = {name: len(c) if c.ndim else None for name, c in columns.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"every field must have one row a step; got the lengths {lengths}")
    if checked_ends("episode_ends", ends)[-1] not in lengths.values():
        raise ValueError(f"episode_ends says {ends[-1]} steps, but the fields have {lengths}")
    return {name: _checked_column(name, fields[name], column) for name, column in columns.items()}


def _checked_column(name: str, spec: FieldSpec, column: NDArray[Any]) -> NDArray[Any]:
    if column.shape[1:] != spec.shape:
        raise ValueError(
            f"field {name!r} has rows of shape {list(spec.shape)}; got {list(column.shape[1:])}"
        )
    if not np.can_cast(column.dtype, spec.dtype, "same_kind"):
        raise ValueError(
            f"field {name!r} is stored as {spec.dtype}; got {column.dtype}: convert it with .astype"
        )
    with np.errstate(over="ignore"):  # too large for float32 is reported below, as infinite
        values = column.astype(spec.dtype, copy=False)
    finite = np.isfinite(values).reshape(len(values), -1) if values.dtype.kind == "f" else None
    if finite is not None and not finite.all():
        row, dim = (int(i) for i in np.argwhere(~finite)[0])
        raise ValueError(
            f"field {name!r} is not finite at row {row}, value {dim}: "
            f"{column[row].flat[dim]}. Drop or repair the episode before storing it"
        )
    return values


def user_attrs(attrs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return attributes as JSON values.

    Raises:
        ValueError: One is not JSON, or has a name the store uses itself.
    """
    values = {str(k): jsonable(v, f"attrs.{k}") for k, v in (attrs or {}).items()}
    checked_bounds(values.get("action_low"), values.get("action_high"))
    clash = sorted(set(values) & set(RESERVED_ATTRS))
    if clash:
        raise ValueError(f"the attributes {clash} are the store's own; choose other names")
    return values


def jsonable(value: Any, where: str) -> Any:
    """Return ``value`` with numpy's numbers and arrays as plain ones.

    Raises:
        ValueError: Something in it is not JSON; ``where`` names it in the message.
    """
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, dict):
        return {str(k): jsonable(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v, where) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{where} must be JSON (numbers, text, lists); got {type(value).__name__}")


def checked_bounds(
    low: Any, high: Any, shape: tuple[int, ...] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Return the lower and upper bounds of actions, of the shape of one row.

    Args:
        low: A number or one for each entry; None: there is no lower bound. May be infinite.
        high: Likewise.
        shape: Of one row; None: whatever shape the two have together.

    Returns:
        Both, or None if neither was given.

    Raises:
        ValueError: They are no numbers, do not fit the shape, or a lower one is above the upper.
    """
    if low is None and high is None:
        return None
    given = {"action_low": -np.inf if low is None else low}
    given["action_high"] = np.inf if high is None else high
    sides = []
    for name, side in given.items():
        try:
            value = np.asarray(side, dtype=np.float64)
        except (TypeError, ValueError):
            raise ValueError(f"{name} must be numbers, one for each action; got {side!r}") from None
        if np.isnan(value).any():
            raise ValueError(f"{name} must be numbers; got {value.tolist()}, with NaN in it")
        sides.append(value)
    try:
        target = np.broadcast_shapes(*(v.shape for v in sides)) if shape is None else shape
        lower, upper = (np.broadcast_to(value, target) for value in sides)
    except ValueError:
        shapes = " and ".join(str(list(v.shape)) for v in sides if v.shape)
        fit = "each other" if shape is None else f"actions of shape {list(shape)}"
        raise ValueError(f"action bounds of shape {shapes} do not fit {fit}") from None
    if (lower > upper).any():
        raise ValueError(
            f"action_low must not be above action_high; got {lower.tolist()} and {upper.tolist()}"
        )
    return lower, upper


def inward_bounds(
    low: ArrayLike, high: ArrayLike
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Bounds ``[A]`` as float32, rounded inwards, so that no number between them is outside.

    To the nearest, -0.1 becomes a float32 below it, and an environment whose bounds are float64
    refuses every action that was clipped to it.

    Raises:
        ValueError: bounds that are NaN or swapped, or infinite on the wrong side.
    """
    lower, upper = np.asarray(low, np.float64), np.asarray(high, np.float64)
    sound = (lower <= upper) & (lower < np.inf) & (upper > -np.inf)  # false for NaN too
    if not sound.all():
        i = int(np.flatnonzero(~sound)[0])
        raise ValueError(
            f"actions are bounded by [{lower[i]}, {upper[i]}] in dimension {i}; the lower bound "
            "must be at most the upper one, and neither may be NaN"
        )
    with np.errstate(over="ignore"):
        inner, outer = lower.astype(np.float32), upper.astype(np.float32)
    inner = np.where(inner < lower, np.nextafter(inner, np.float32(np.inf)), inner)
    outer = np.where(outer > upper, np.nextafter(outer, np.float32(-np.inf)), outer)
    crossed = inner > outer  # closer together than float32 can tell: the nearest number
    nearest = np.where(crossed, lower, 0).astype(np.float32)
    return np.where(crossed, nearest, inner), np.where(crossed, nearest, outer)
