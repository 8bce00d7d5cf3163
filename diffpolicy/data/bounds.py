"""Bounds of actions: whatever gives some, they are numbers, in order, and of the actions' shape."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def checked_bounds(
    low: Any, high: Any, shape: tuple[int, ...] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Lower and upper bounds of the shape of one row.

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
    sides = []
    for name, side, default in (("action_low", low, -np.inf), ("action_high", high, np.inf)):
        try:
            value = np.asarray(default if side is None else side, dtype=np.float64)
        except (TypeError, ValueError):
            raise ValueError(f"{name} must be numbers, one for each action; got {side!r}") from None
        if np.isnan(value).any():
            raise ValueError(f"{name} must be numbers; got {value.tolist()}, with NaN in it")
        if shape is not None:
            value = _fitting(value, shape)
        sides.append(value)
    if sides[0].shape != sides[1].shape:
        sides = list(np.broadcast_arrays(*sides))
    lower, upper = sides
    if (lower > upper).any():
        raise ValueError(
            f"action_low must not be above action_high; got {lower.tolist()} and {upper.tolist()}: "
            "swap the two where they are"
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


def _fitting(value: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.float64]:
    try:
        return np.broadcast_to(value, shape)
    except ValueError:
        raise ValueError(
            f"action bounds of shape {list(value.shape)} do not fit actions of shape {list(shape)}"
        ) from None
