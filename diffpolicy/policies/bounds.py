"""Bounds of actions, as the float32 numbers that policies and environments compare with.

Only numpy is imported, because the processes that hold environments import this too.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def inward_bounds(
    low: npt.ArrayLike, high: npt.ArrayLike
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
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
