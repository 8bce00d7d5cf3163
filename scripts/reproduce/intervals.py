"""Intervals over training seeds and episodes, or over training seeds and datasets."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from diffpolicy.rollout.intervals import Interval

Matrix = NDArray[np.float64]
RESAMPLES = 5000
_BLOCK = 250
INTERVALS = (
    "95 % percentile bootstrap that resamples training seeds and episodes, each episode seed being "
    "the same one for every training seed; with one training seed it says nothing about training"
)


def mean_of(values: Matrix) -> Matrix:
    """Mean over the last axis."""
    return np.asarray(values.mean(axis=-1), np.float64)


def iqm_of(values: Matrix) -> Matrix:
    """Interquartile mean over the last axis (Agarwal et al. 2021, section 4.3).

    A quarter of the values, rounded down, is cut at each end.
    """
    ordered = np.sort(values, axis=-1)
    cut = ordered.shape[-1] // 4
    return mean_of(ordered[..., cut : ordered.shape[-1] - cut])


def crossed_bootstrap(
    scores: Matrix,
    statistic: Callable[[Matrix], Matrix] = mean_of,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """95 % interval over training seeds and episodes.

    Rows and columns are resampled independently of each other (Owen 2007, "The pigeonhole
    bootstrap"): all training seeds are evaluated on the same episode seeds, so an easy initial
    state is easy for all of them.

    Args:
        scores: ``[S, E]``, a row per training seed.
        statistic: of the last axis.
        resamples: number of resamples.
        seed: of the resampling.

    Returns:
        The statistic of all values, its bounds, and their number.
    """
    rows, columns = scores.shape
    rng = np.random.default_rng(seed)
    found = []
    for first in range(0, resamples, _BLOCK):
        count = min(_BLOCK, resamples - first)
        row = rng.integers(rows, size=(count, rows, 1))
        column = rng.integers(columns, size=(count, 1, columns))
        found.append(statistic(scores[row, column].reshape(count, -1)))
    low, high = np.quantile(np.concatenate(found), [0.025, 0.975])
    return Interval(float(statistic(scores.reshape(-1))), float(low), float(high), scores.size)


def iqm_over_datasets(scores: Matrix, *, resamples: int = RESAMPLES) -> tuple[Interval, str]:
    """Interquartile mean over training seeds and datasets, with its 95 % interval.

    The interval is a bootstrap of the training seeds within every dataset (Agarwal et al. 2021,
    section 4.2); by the package ``rliable`` where it is installed.

    Args:
        scores: ``[S, D]`` mean scores, a row per training seed, a column per dataset.
        resamples: number of resamples.

    Returns:
        The interval, and which program made it.
    """
    try:
        library = importlib.import_module("rliable.library")
        metrics = importlib.import_module("rliable.metrics")
    except ImportError:
        return _stratified(scores, resamples), "diffpolicy (rliable is not installed)"
    except Exception as error:  # its dependencies break on import with some versions of pandas
        why = f"rliable does not import: {type(error).__name__}"
        return _stratified(scores, resamples), f"diffpolicy ({why})"
    points, bounds = library.get_interval_estimates(
        {"method": scores}, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=resamples
    )
    low, high = np.asarray(bounds["method"], np.float64).reshape(2)
    value = float(np.asarray(points["method"]).reshape(-1)[0])
    return Interval(value, float(low), float(high), scores.size), "rliable"


def _stratified(scores: Matrix, resamples: int) -> Interval:
    rows, columns = scores.shape
    drawn = np.random.default_rng(0).integers(rows, size=(resamples, rows, columns))
    samples = scores[drawn, np.arange(columns)].reshape(resamples, -1)
    low, high = np.quantile(iqm_of(samples), [0.025, 0.975])
    return Interval(float(iqm_of(scores.reshape(-1))), float(low), float(high), scores.size)
