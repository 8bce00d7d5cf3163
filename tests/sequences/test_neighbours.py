"""Distances of sequences, and halves that share nothing alike."""

import numpy as np
import pytest

from diffpolicy.sequences.neighbours import Compared, clusters, nearest, split_groups


def levenshtein(a, b) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        left, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            left, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, left + (x != y))
    return row[-1]


def padded(rng, count: int, longest: int, letters: int = 4):
    tokens = rng.integers(0, letters, (count, longest))
    for row, length in zip(tokens, rng.integers(0, longest + 1, count), strict=True):
        row[length:] = letters
    return tokens


@pytest.mark.parametrize("longest", [9, 64, 150])  # within a word, a whole one, three of them
def test_edit_distances_are_levenshteins(longest):
    rng = np.random.default_rng(longest)
    a = padded(rng, 7, longest)
    b = np.concatenate([padded(rng, 5, longest), np.roll(a[:3], 2, axis=1)])
    b.sort(axis=1) if longest == 9 else None  # runs of one letter
    b = np.where(np.cumsum(b == 4, 1) > 0, 4, b)
    found = Compared(a, 5, 4).distances(Compared(b, 5, 4))
    bare = [[[t for t in row if t < 4] for row in x] for x in (a, b)]
    assert found.tolist() == [[levenshtein(x, y) for y in bare[1]] for x in bare[0]]
    near = Compared(a, 5, 4).distances(Compared(b, 5, 4), most=5)
    assert ((near == found) | ((near > 5) & (found > 5))).all()


@pytest.mark.parametrize("pad", [None, 4])
@pytest.mark.parametrize("identity", [0.75, 0.9, 1.0])
def test_no_sequence_of_one_half_is_within_the_threshold_of_the_other(pad, identity):
    rng = np.random.default_rng(0)
    parents = rng.integers(0, 4, (40, 20)) if pad is None else padded(rng, 40, 20)
    change = (rng.random((400, 20)) < 0.1) & (np.repeat(parents, 10, 0) < 4)
    tokens = np.where(change, rng.integers(0, 4, (400, 20)), np.repeat(parents, 10, 0))
    all_of_them = Compared(tokens, 5, pad)
    first, second = split_groups(clusters(all_of_them, identity), 0)
    assert sorted([*first, *second]) == list(range(400))
    a, b = all_of_them.rows(first), all_of_them.rows(second)
    longer = np.maximum(a.lengths[:, None], b.lengths[None])
    assert (a.distances(b) > (1 - identity) * longer + 1e-9).all()
    assert (nearest(b, a) == a.distances(b).min(0)).all()


def test_groups_that_cannot_be_halved_are_refused():
    with pytest.raises(ValueError, match="the largest of 3 groups holds 98 of 100 rows"):
        split_groups(np.array([0] * 98 + [1, 2]), 0)
