"""Scores with their uncertainty: a number without an interval is not a result.

Everything is deterministic and works on per-episode values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri, stdtrit

from diffpolicy.settings import check_range


class Interval(NamedTuple):
    """An estimate with its confidence interval.

    Attributes:
        value: the estimate.
        low: lower bound; NaN if the sample is too small to say.
        high: upper bound.
        n: size of the sample.
    """

    value: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, float | int | None]:
        """As JSON values, with None for what is not known."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return {**{k: v if math.isfinite(v) else None for k, v in numbers.items()}, "n": self.n}


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a rate (Wilson 1927, eq. for p without continuity correction).

    Unlike mean +- 2 standard errors it is right for rates near 0 and 1, such as 50 of 50.

    Args:
        successes: 0..n.
        n: number of trials; 0 gives NaN.
        confidence: in (0, 1).
    """
    check_range(f"[0, {n}]", successes=successes)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    check_range("(0, 1)", confidence=confidence)
    z = float(ndtri((1 + confidence) / 2))
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # At the ends the bound is exactly 0 or 1; rounding must not say 0.9999999.
    low = 0.0 if successes == 0 else max(centre - half, 0.0)
    high = 1.0 if successes == n else min(centre + half, 1.0)
    return Interval(rate, low, high, n)


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Student's t interval of a mean; bounds are NaN for fewer than two values."""
    sample = _sample(values)
    n = len(sample)
    if n < 2:
        return Interval(float(sample.mean()) if n else math.nan, math.nan, math.nan, n)
    mean = float(sample.mean())
    half = student_quantile(confidence, n - 1) * float(sample.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def paired_difference(a: ArrayLike, b: ArrayLike, confidence: float = 0.95) -> Interval:
    """Mean of ``a - b`` over the same episodes, with its interval.

    The project's rule: "not below" means ``low > -0.03``, "better" means ``low > 0``. Values that
    are 0 or 1 have the interval of Newcombe 1998, method 10, which stays honest when no pair
    differs; others have Student's.

    Args:
        a: ``[n]``, one value per episode.
        b: ``[n]``, of the same episodes in the same order.
        confidence: in (0, 1).

    Raises:
        ValueError: the lengths differ.
    """
    first, second = _sample(a), _sample(b)
    if first.shape != second.shape:
        raise ValueError(f"paired samples must be equally long, got {len(first)} and {len(second)}")
    if len(first) and np.isin([first, second], (0, 1)).all():
        return _newcombe(first, second, confidence)
    return mean_interval(first - second, confidence)


def mean_over(parts: Sequence[Interval]) -> Interval:
    """The mean of independent estimates, each counting the same, with its interval.

    The parts are what there is (tasks of a benchmark), no sample of others, so only the
    uncertainty of each counts. Its bounds are combined as by Newcombe's "square and add" (Zou and
    Donner 2008, Statistics in Medicine 27:1693, eq. 4), which keeps the honesty of Wilson's
    interval at rates of 0 and 1.

    Args:
        parts: at least one, such as the success rate of every task.

    Returns:
        The mean, NaN where a part has no value; its bounds, NaN where a part has none; and the
        sizes of all samples together.

    Example:
        >>> mean_over([wilson_interval(5, 10), wilson_interval(10, 10)]).value
        0.75
    """
    values, lows, highs = (np.array([part[i] for part in parts], np.float64) for i in range(3))
    mean = float(values.mean()) if len(parts) else math.nan
    below = math.sqrt(np.sum((values - lows) ** 2)) / max(len(parts), 1)
    above = math.sqrt(np.sum((highs - values) ** 2)) / max(len(parts), 1)
    return Interval(mean, mean - below, mean + above, sum(part.n for part in parts))


def _newcombe(a: np.ndarray, b: np.ndarray, confidence: float) -> Interval:
    """Newcombe 1998 (Statistics in Medicine 17:2635), method 10: square and add."""
    n = len(a)
    both, only_a, only_b, none = (
        float(np.sum(x * y)) for x, y in ((a, b), (a, 1 - b), (1 - a, b), (1 - a, 1 - b))
    )
    of_a = wilson_interval(int(both + only_a), n, confidence)
    of_b = wilson_interval(int(both + only_b), n, confidence)
    margins = (both + only_a) * (only_b + none) * (both + only_b) * (only_a + none)
    phi = 0.0
    if margins > 0:
        cross = both * none - only_a * only_b
        if cross > n / 2:
            cross -= n / 2
        elif cross >= 0:
            cross = 0.0
        phi = cross / math.sqrt(margins)
    difference = of_a.value - of_b.value

    def square_and_add(d_a: float, d_b: float) -> float:
        return math.sqrt(max(d_a * d_a - 2 * phi * d_a * d_b + d_b * d_b, 0.0))

    low = difference - square_and_add(of_a.value - of_a.low, of_b.high - of_b.value)
    high = difference + square_and_add(of_a.high - of_a.value, of_b.value - of_b.low)
    return Interval(difference, max(low, -1.0), min(high, 1.0), n)


def student_quantile(confidence: float, df: int) -> float:
    """The t with ``P(|T| <= t) = confidence`` for Student's distribution with ``df`` >= 1."""
    check_range("(0, 1)", confidence=confidence)
    return float(stdtrit(df, (1 + confidence) / 2))


def _sample(values: ArrayLike | Sequence[float]) -> np.ndarray:
    sample = np.asarray(values, np.float64)
    if sample.ndim != 1:
        raise ValueError(f"expected one value per episode, got an array of shape {sample.shape}")
    return sample
