"""Weighted sources: how often each is drawn, in a batch and over time, and from where on."""

import math

import numpy as np
import pytest
import torch

from diffpolicy.training.sources import Drawn, Turns, Weighted, in_any_order


class Numbers:
    """Examples that are their own number, behind one that says which source they are of."""

    def __init__(self, size, name=0):
        self.values = torch.arange(size) + 1000 * name

    def __len__(self):
        return len(self.values)

    def gather(self, indices):
        return {"x": self.values[indices]}


def weighted(sizes, weights):
    parts = {str(i): Numbers(size, i) for i, size in enumerate(sizes)}
    return Weighted(parts, weights)


CASES = [
    ((40, 7, 300), (1, 1, 2), 64),
    ((40, 7), (3, 1), 5),
    ((9, 9, 9), (0.7, 0.2, 0.1), 3),
    ((5,), (2,), 8),
    ((100, 100), (1000, 1), 4),
]


@pytest.mark.parametrize(("sizes", "weights", "batch"), CASES)
def test_counts_are_within_one_of_the_expectation_and_exact_in_the_mean(sizes, weights, batch):
    source = weighted(sizes, weights)
    wanted = batch * np.array(weights) / sum(weights)
    steps = np.arange(2000)
    counts = source.counts(steps, batch, seed=3)
    assert (counts.sum(1) == batch).all()
    assert (np.abs(counts - wanted) < 1).all()
    # Over time: a golden-section sequence keeps its shares to a few rows, not to sqrt(steps).
    drift = np.abs(np.cumsum(counts, 0) - wanted * (steps[:, None] + 1))
    assert drift.max() < 4
    # Over the offset u of a batch, which is uniform over seeds, the mean is exact.
    first = np.array([source.counts(steps[:1], batch, seed)[0] for seed in range(2000)])
    assert (np.abs(first.mean(0) - wanted) < 4 * 0.5 / math.sqrt(2000)).all()


def test_draws_depend_on_seed_and_step_alone():
    sizes, weights = (40, 7, 300), (1, 1, 2)
    source = weighted(sizes, weights)
    drawn = [source.draw(step, 16, 5) for step in range(60)]
    late = weighted(sizes, weights)  # as after a resume: it has drawn nothing before
    assert torch.equal(late.draw(41, 16, 5), drawn[41])
    assert torch.equal(late.draw(42, 16, 5), drawn[42])
    assert torch.equal(source.draw(3, 16, 5), drawn[3])  # and back
    assert not torch.equal(source.draw(3, 16, 6), drawn[3])


def test_every_row_of_a_source_comes_once_before_any_comes_again():
    source = weighted((40, 7, 300), (1, 1, 2))
    rows = torch.cat([source.draw(step, 16, 0) for step in range(120)])
    values = source.gather(rows)["x"]
    for number, size in enumerate((40, 7, 300)):
        own = values[values // 1000 == number] % 1000
        for start in range(0, len(own) - size + 1, size):
            assert torch.equal(own[start : start + size].sort().values, torch.arange(size))
    passes = [values[values // 1000 == 1][i : i + 7].tolist() for i in (0, 7)]
    assert passes[0] != passes[1]


def test_gather_finds_each_row_in_any_order():
    source = weighted((3, 2, 4), (1, 1, 1))
    order = torch.tensor([8, 0, 4, 3, 5, 2, 2])
    assert source.gather(order)["x"].tolist() == [2003, 0, 1001, 1000, 2000, 2, 2]
    assert len(source) == 9
    named = {name: Numbers(3) for name in "zyxwvutsrqponm"}
    for part in named.values():
        part.gather = lambda rows: dict.fromkeys(named, rows)
    assert list(Weighted(named, [1] * 14).gather(order)) == list(named)  # not that of a set
    turns = Turns([Numbers(3), Numbers(3, 1)])
    assert turns.gather(torch.arange(6))["x"].tolist() == [0, 1000, 1, 1001, 2, 1002]


def test_beside_other_examples_shares_hold_in_any_order():
    source = weighted((4000, 7), (1, 3))
    drawn = in_any_order(source, seed=0)
    assert isinstance(drawn, Drawn)
    values = drawn.gather(torch.arange(len(drawn)))["x"]
    assert int((values >= 1000).sum()) >= 0
    share = ((source._ends[0] <= drawn.order).sum() / len(drawn)).item()
    assert share == pytest.approx(0.75, abs=1 / len(drawn))
    plain = Numbers(3)
    assert in_any_order(plain, seed=0) is plain
