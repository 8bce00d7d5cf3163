from __future__ import annotations

import math

import pytest
import torch

from pedestrians.diversity import footprint_diversity, mean_pairwise_distance


def test_equal_plans_have_no_diversity():
    plans = torch.randn(3, 1, 8, 2, generator=torch.Generator().manual_seed(0)).repeat(1, 5, 1, 1)
    assert mean_pairwise_distance(plans).tolist() == [0, 0, 0]
    assert footprint_diversity(plans, radius=0.3).tolist() == [0, 0, 0]


def test_pairwise_distance_is_per_coordinate():
    plans = torch.zeros(1, 3, 4, 2)
    plans[0, 1], plans[0, 2] = 1.0, 3.0
    # differences 1, 3 and 2 in every coordinate
    assert mean_pairwise_distance(plans).item() == pytest.approx(2.0)


@pytest.mark.parametrize("count", [2, 5])
def test_disjoint_equal_footprints(count):
    """Parallel lanes that do not touch: every path is 1/M of the union."""
    line = torch.stack([torch.arange(6.0), torch.zeros(6)], dim=-1)
    lanes = torch.stack([line + torch.tensor([0.0, 4.0 * i]) for i in range(count)])
    value = footprint_diversity(lanes[None], radius=0.5, origin=False)
    assert value.item() == pytest.approx(1 - 1 / count, abs=1e-6)


def test_half_overlapping_footprints():
    """Two straight strips of length 4 + caps; the second is the first, moved by 2."""
    radius = 0.5
    first = torch.tensor([[0.0, 0.0], [4.0, 0.0]])
    both = torch.stack([first, first + torch.tensor([2.0, 0.0])])
    caps = math.pi * radius**2
    expected = 1 - (4 * 2 * radius + caps) / (6 * 2 * radius + caps)
    value = footprint_diversity(both[None], radius=radius, cell=0.02, origin=False)
    assert value.item() == pytest.approx(expected, abs=2e-3)


def test_paths_begin_at_the_origin():
    points = torch.tensor([[[4.0, 0.0]], [[-4.0, 0.0]]])[None]
    radius = 0.5
    caps = math.pi * radius**2
    expected = 1 - (4 * 2 * radius + caps) / (8 * 2 * radius + caps)
    value = footprint_diversity(points, radius=radius, cell=0.02)
    assert value.item() == pytest.approx(expected, abs=2e-3)
    standing = footprint_diversity(torch.zeros(1, 3, 1, 2), radius=radius, origin=False)
    assert standing.item() == 0


def test_bad_input():
    with pytest.raises(ValueError, match=r"at least 2 plan\(s\) per state, got \[3, 1, 8, 2\]"):
        mean_pairwise_distance(torch.zeros(3, 1, 8, 2))
    with pytest.raises(ValueError, match=r"planar, \[n, M, H, 2\], got \[1, 2, 3, 4\]"):
        footprint_diversity(torch.zeros(1, 2, 3, 4), radius=1.0)
    with pytest.raises(ValueError, match="radius and cell must be positive"):
        footprint_diversity(torch.zeros(1, 2, 3, 2), radius=0.0)
