"""Figures of sets of sequences, in numpy: k-mers, profiles, diversity, correlations, hacking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from diffpolicy.settings import check_range, check_shape

PATIENCE, TOLERANCE = 2, 0.1  # of the warning of reward hacking
Floats = npt.NDArray[np.float64]
Tokens = npt.NDArray[Any]  # integers [N, L]


def quartiles(values: npt.ArrayLike) -> dict[str, float]:
    """Median, lower and upper quartile, and mean of ``values [N]``.

    Raises:
        ValueError: no values.
    """
    found = np.asarray(values, dtype=np.float64)
    check_range("[1, inf)", number_of_values=found.size)
    low, median, high = np.quantile(found, [0.25, 0.5, 0.75])
    mean = float(found.mean())
    return {"median": float(median), "q25": float(low), "q75": float(high), "mean": mean}


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Describe the distribution of one number over seeds.

    Returns:
        What :func:`quartiles` says, ``std`` (of n - 1; ``None`` for one seed) and the ``values``.
    """
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {**quartiles(values), "std": std, "values": list(values)}


def pearson(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Pearson's correlation of two arrays of one size; nan if one of them is constant.

    Raises:
        ValueError: arrays of different size.
    """
    x, y = (np.asarray(v, dtype=np.float64).reshape(-1) for v in (a, b))
    check_shape("what is correlated", y.shape, x.shape)
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else float("nan")


def spearman(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Spearman's rank correlation (ties share their mean rank); nan if one array is constant."""
    return pearson(rankdata(a), rankdata(b))


def kmer_counts(
    tokens: Tokens, k: int, vocab_size: int, *, pad: int | None = None
) -> npt.NDArray[np.int64]:
    """How often each k-mer occurs in all sequences together.

    Args:
        tokens: ``[N, L]`` in 0..V-1.
        k: letters per k-mer, 1..L.
        vocab_size: V.
        pad: a token that fills up shorter sequences: k-mers with it do not count.

    Returns:
        ``[V^k]``, in lexicographic order.

    Raises:
        ValueError: ``k`` out of range.
    """
    length = tokens.shape[1]
    check_range(f"[1, {length}]", k=k)
    place = vocab_size ** np.arange(k - 1, -1, -1)
    windows = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.int64), k, axis=1)
    index = windows @ place
    index = index.reshape(-1) if pad is None else index[(windows != pad).all(-1)]
    return np.bincount(index, minlength=vocab_size**k)


def kmer_correlation(
    tokens: Tokens, top: Tokens, k: int, vocab_size: int, *, pad: int | None = None
) -> float:
    """Pearson's correlation of the pooled k-mer counts of two sets of sequences (DRAKES)."""
    counts = [kmer_counts(x, k, vocab_size, pad=pad) for x in (tokens, top)]
    return pearson(*counts)


def top_sequences(tokens: Tokens, labels: npt.ArrayLike | None, fraction: float) -> Tokens:
    """The sequences of the highest labels, at least one; all of them where there are no labels.

    Args:
        tokens: ``[N, L]``.
        labels: ``[N]``, or None.
        fraction: of N, in (0, 1].

    Raises:
        ValueError: a fraction out of range, or labels of another size.
    """
    check_range("(0, 1]", fraction=fraction)
    if labels is None:
        return tokens
    values = np.asarray(labels)
    check_shape("labels", values.shape, (len(tokens),))
    count = max(1, round(fraction * len(values)))
    found: Tokens = tokens[np.argsort(-values, kind="stable")[:count]]
    return found


def profile(tokens: Tokens, vocab_size: int) -> Floats:
    """Frequency of every token at every position ``[L, V]`` (a position frequency matrix)."""
    counts = (tokens[..., None] == np.arange(vocab_size)).sum(0)
    found: Floats = counts / len(tokens)
    return found


def profile_correlation(tokens: Tokens, top: Tokens, vocab_size: int) -> float:
    """Pearson's correlation of the profiles of two sets of sequences, over all L V entries."""
    return pearson(profile(tokens, vocab_size), profile(top, vocab_size))


def position_entropy(tokens: Tokens, vocab_size: int) -> Floats:
    """Entropy of the empirical law of tokens at every position, in nats, ``[L]``."""
    p = profile(tokens, vocab_size)
    found: Floats = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0).sum(1)
    return found


def hamming(tokens: Tokens, to: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Positions in which each sequence ``[N, L]`` differs from one sequence ``[L]``, ``[N]``."""
    found: npt.NDArray[np.int64] = (tokens != np.asarray(to)).sum(1)
    return found


def mean_pairwise_hamming(tokens: Tokens, vocab_size: int) -> float:
    """Mean Hamming distance of two different rows; 0 for a single row."""
    count = len(tokens)
    if count < 2:
        return 0.0
    held = np.round(profile(tokens, vocab_size) * count)
    same = (held * (held - 1)).sum() / (count * (count - 1))
    return float(tokens.shape[1] - same)


def unique_fraction(tokens: Tokens) -> float:
    """Different sequences over all sequences."""
    return len(np.unique(tokens, axis=0)) / len(tokens)


def hacking_warning(reward: Sequence[float], held_out: Sequence[float]) -> str | None:
    """A message when the training oracle still rises while the held-out one falls, else ``None``.

    Both histories are smoothed by a running median of three rows (two at the ends), so that one odd
    evaluation neither raises nor hides an alarm. Let ``peak`` be the row in which the held-out
    reward was highest. There is a warning if that was at least two rows ago (``PATIENCE``), the
    training oracle has risen since, and the held-out reward has fallen since by more than a tenth
    (``TOLERANCE``) of the whole rise of the training oracle. Both rewards estimate the same
    quantity, so the latter is the scale of what tuning claims to have gained; the noise of a
    held-out reward that is merely flat is small against it.

    Args:
        reward: under the training oracle at every evaluation, oldest first (medians, say).
        held_out: under the held-out oracle.

    Raises:
        ValueError: histories of different length.
    """
    check_shape("held_out", (len(held_out),), (len(reward),))
    trained, judged = _smooth(reward), _smooth(held_out)
    peak = int(judged.argmax())
    since, fall = float(trained[-1] - trained[peak]), float(judged[peak] - judged[-1])
    rise = float(trained[-1] - trained.min())
    late = len(judged) - 1 - peak >= PATIENCE
    if not (late and since > 0 and fall > TOLERANCE * rise):
        return None
    return (
        f"the reward is being hacked: since evaluation {peak} the training oracle rose by "
        f"{since:.3g} while the held-out one fell by {fall:.3g}; stop there, raise kl_weight, or "
        "lower the learning rate"
    )


def _smooth(values: Sequence[float]) -> Floats:
    row = np.asarray(values, dtype=np.float64)
    return np.array([np.median(row[max(0, i - 1) : i + 2]) for i in range(len(row))])
