"""Bounds of actions: whatever gives some, they are numbers, in order, and of the actions' shape."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


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


def _fitting(value: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.float64]:
    try:
        return np.broadcast_to(value, shape)
    except ValueError:
        raise ValueError(
            f"action bounds of shape {list(value.shape)} do not fit actions of shape {list(shape)}"
        ) from None
