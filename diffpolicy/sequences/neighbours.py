"""How alike sequences are: identities, clusters, halves that share nothing, nearest neighbours.

Identity is the share of equal positions of sequences of one length, and ``1 - edits / longer`` of
others, with the edit distance of Levenshtein.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from diffpolicy.settings import check_range

ROWS = 256  # sequences compared with all others at a time: bounds the memory
PAIRS = 20_000  # edit distances computed at a time

Tokens = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]


class Compared:
    """Sequences made ready to be compared with each other.

    Args:
        tokens: ``[N, L]``.
        pad: what ends sequences shorter than L; None: all have L letters.
        vocab_size: tokens that there are, the pad among them.

    Attributes:
        lengths: of the sequences ``[N]``.
    """

    def __init__(self, tokens: Tokens, vocab_size: int, pad: int | None = None) -> None:
        self.tokens, self.pad = tokens.astype(np.int64), pad
        eye = np.eye(vocab_size, dtype=np.float32)
        if pad is None:
            self.lengths = np.full(len(tokens), tokens.shape[1])
            self.features = eye[self.tokens].reshape(len(tokens), -1)
            return
        self.lengths = (tokens != pad).sum(1)
        self.k = 4 if vocab_size <= 8 else 2
        self.features = _kmers(self.tokens, self.k, vocab_size, pad)
        # Which positions hold a letter, a bit each, the first the lowest of the first word.
        words = -(-max(1, tokens.shape[1]) // 64)
        held = (self.tokens[:, None] == np.arange(vocab_size)[None, :, None]).astype(np.uint8)
        bits = np.packbits(held, axis=-1, bitorder="little")
        bits = np.pad(bits, ((0, 0), (0, 0), (0, 8 * words - bits.shape[-1])))
        self.places = np.ascontiguousarray(bits).view("<u8")  # [N, V, W]
        self.places[:, pad] = 0

    def rows(self, which: slice | Ints) -> Compared:
        """Some of the sequences."""
        part = copy.copy(self)
        for name in ("tokens", "lengths", "features", "places"):
            if hasattr(self, name):
                setattr(part, name, getattr(self, name)[which])
        return part

    def distances(self, other: Compared, most: float = math.inf) -> Ints:
        """Edits from each of ours to each of another's, ``[N, M]``.

        Substitutions alone where all have the same length; else insertions and deletions as well.

        Args:
            other: sequences of the same L, letters and pad.
            most: pairs further apart than that need not be exact: any number above stands for them.
        """
        shared = np.rint(self.features @ other.features.T).astype(np.int64)
        if self.pad is None:
            substituted: Ints = self.tokens.shape[1] - shared
            return substituted
        # An edit takes away at most k of the k-mers that occur: a bound that spares many pairs.
        counts = [x.features.sum(1).astype(np.int64) for x in (self, other)]
        gone = np.maximum(counts[0][:, None], counts[1][None]) - shared
        found: Ints = -(-gone // self.k)
        found = np.maximum(found, np.abs(self.lengths[:, None] - other.lengths[None]))
        rows, columns = np.nonzero(found <= most)
        for first in range(0, len(rows), PAIRS):
            i, j = rows[first : first + PAIRS], columns[first : first + PAIRS]
            found[i, j] = _edits(self, other, i, j)
        return found


def _kmers(tokens: Ints, k: int, vocab_size: int, pad: int) -> npt.NDArray[np.float32]:
    """Which k-mers occur in each sequence, ``[N, V^k]``."""
    found = np.zeros((len(tokens), vocab_size**k), dtype=np.float32)
    if tokens.shape[1] >= k:
        windows = np.lib.stride_tricks.sliding_window_view(tokens, k, axis=1)
        index = windows @ vocab_size ** np.arange(k - 1, -1, -1)
        row, column = np.nonzero((windows != pad).all(-1))
        found[row, index[row, column]] = 1
    return found


def _edits(a: Compared, b: Compared, i: Ints, j: Ints) -> Ints:
    """Levenshtein's distance of pairs ``a[i], b[j]``, by Myers (1999) with Hyyro's words (2003).

    The table of edits has a row for each letter of ``a`` and a column for each of ``b``; a bit says
    that an entry is one more (``up``) or one less (``down``) than the one above it. A column of 64
    rows is a word, and a pair costs some twenty operations per word and column.
    """
    places, last, texts = a.places[i], a.lengths[i] - 1, b.tokens[j]
    words, one = places.shape[-1], np.uint64(1)
    up = np.full((words, len(i)), ~np.uint64(0))
    down = np.zeros_like(up)
    end = [np.where(last // 64 == w, one << (last % 64).astype(np.uint64), 0) for w in range(words)]
    end = [np.where(last >= 0, e, 0).astype(np.uint64) for e in end]
    found, pairs, top = a.lengths[i].astype(np.int64), np.arange(len(i)), np.uint64(63)
    for column in range(int(b.lengths[j].max(initial=0))):
        letter = places[pairs, texts[:, column]]
        more, less = np.full(len(i), one), np.zeros(len(i), np.uint64)  # carried into the word
        moved = np.zeros(len(i), np.int64)
        for w in range(words):
            equal = letter[:, w]
            either = equal | down[w]
            equal = equal | less
            across = (((equal & up[w]) + up[w]) ^ up[w]) | equal
            rise, fall = down[w] | ~(across | up[w]), up[w] & across
            moved += ((rise & end[w]) != 0).astype(np.int64) - ((fall & end[w]) != 0)
            rise, next_more = (rise << one) | more, rise >> top
            fall, next_less = (fall << one) | less, fall >> top
            up[w], down[w] = fall | ~(either | rise), rise & either
            more, less = next_more, next_less
        found += np.where(column < b.lengths[j], moved, 0)
    return np.where(last < 0, b.lengths[j], found)


def clusters(sequences: Compared, identity: float) -> Ints:
    """Numbers of clusters ``[N]``: those at least so alike share one, and so do chains of them.

    Single linkage, so that two sequences of different clusters are never within the threshold.

    Args:
        sequences: N of them.
        identity: in (0, 1]; 1 joins equal sequences alone.
    """
    check_range("(0, 1]", identity=identity)
    _, first_of, back = np.unique(sequences.tokens, axis=0, return_index=True, return_inverse=True)
    distinct = sequences.rows(first_of)
    label = np.arange(len(first_of))
    for first in range(0, len(label), ROWS):
        block, rest = slice(first, first + ROWS), slice(first, None)
        near = _within(distinct.rows(block), distinct.rows(rest), identity)
        near &= label[block][:, None] != label[rest][None]  # else they are joined already
        for i, j in zip(*np.nonzero(near), strict=True):
            one, other = label[first + i], label[first + j]
            if one != other:
                label[label == max(one, other)] = min(one, other)
    return np.unique(label[back.reshape(-1)], return_inverse=True)[1].reshape(-1)


def _within(a: Compared, b: Compared, identity: float) -> npt.NDArray[np.bool_]:
    """Which of ``a`` and ``b`` are at least so alike, ``[N, M]``."""
    longer = np.maximum(a.lengths[:, None], b.lengths[None])
    limit = (1 - identity) * longer + 1e-9
    near: npt.NDArray[np.bool_] = a.distances(b, most=float(limit.max(initial=0))) <= limit
    return near


def split_groups(group: Ints, seed: int) -> tuple[Ints, Ints]:
    """Row numbers of two halves, as even as whole groups allow; which is which is drawn.

    Raises:
        ValueError: the smaller one would have less than a fifth of all rows.
    """
    sizes = np.bincount(group)
    rng = np.random.default_rng(seed)
    first, count = np.zeros(len(sizes), dtype=bool), [0, 0]
    order = rng.permutation(len(sizes))
    for one in order[np.argsort(-sizes[order], kind="stable")]:  # the largest first
        side = int(count[1] < count[0]) if count[0] != count[1] else int(rng.integers(2))
        first[one] = side == 0
        count[side] += int(sizes[one])
    if min(count) < 0.2 * len(group):
        raise ValueError(
            f"the largest of {len(sizes)} groups holds {sizes.max()} of {len(group)} rows, so two "
            "halves that share nothing are too uneven"
        )
    return np.flatnonzero(first[group]), np.flatnonzero(~first[group])


def nearest(sequences: Compared, among: Compared) -> Ints:
    """Edits from each of N sequences to the nearest of others, ``[N]``.

    Of sequences of different lengths these are edit distances; else differing positions.
    """
    best = np.full(len(sequences.tokens), np.iinfo(np.int64).max)
    for first in range(0, len(among.tokens), ROWS):
        # What is further than the best so far needs no exact distance.
        part = sequences.distances(among.rows(slice(first, first + ROWS)), float(best.max()))
        best = np.minimum(best, part.min(1))
    return best
