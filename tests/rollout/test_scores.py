from __future__ import annotations

import math

import numpy as np
import pytest

from diffpolicy.rollout.intervals import (
    mean_interval,
    paired_difference,
    student_quantile,
    wilson_interval,
)


def _pairs(both, only_a, only_b, none):
    a = [1] * (both + only_a) + [0] * (only_b + none)
    b = [1] * both + [0] * only_a + [1] * only_b + [0] * none
    return a, b


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998 (Stat. Med. 17:857), table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (50, 50, 0.9287, 1.0),  # feasibility facts: 50/50 is 93-100 %
    ],
)
def test_wilson_agrees_with_published_values(k, n, low, high):
    got = wilson_interval(k, n)
    assert got.value == pytest.approx(k / n)
    assert (got.low, got.high) == pytest.approx((low, high), abs=6e-5)


def test_wilson_bounds_are_exact_at_the_ends():
    assert wilson_interval(7, 7).high == 1.0
    assert wilson_interval(0, 7).low == 0.0
    assert math.isnan(wilson_interval(0, 0).value)


@pytest.mark.parametrize(
    ("confidence", "df", "t"),
    [
        (0.95, 1, 12.7062),
        (0.95, 2, 4.30265),
        (0.95, 9, 2.26216),
        (0.95, 10, 2.22814),
        (0.99, 49, 2.67995),
        (0.9, 120, 1.65765),
        (0.95, 1000, 1.96234),
    ],
)
def test_student_quantile_agrees_with_tables(confidence, df, t):
    assert student_quantile(confidence, df) == pytest.approx(t, rel=5e-6)


def test_mean_interval_by_hand():
    # mean 3, sd sqrt(2.5), t(4) = 2.77645: half width 2.77645 * sqrt(2.5 / 5)
    got = mean_interval([1, 2, 3, 4, 5])
    assert got.value == 3
    assert got.high - 3 == pytest.approx(2.77645 * math.sqrt(0.5), rel=1e-5)
    assert 3 - got.low == pytest.approx(got.high - 3)


def test_small_samples_have_no_interval_and_json_says_none():
    one = mean_interval([4.0])
    assert one.value == 4
    assert one.to_dict() == {"value": 4.0, "low": None, "high": None, "n": 1}
    assert mean_interval([]).to_dict()["value"] is None


def test_paired_rates_by_hand():
    # 48 and 38 of 50, with 36 pairs both, 12 and 2 one-sided, none neither.
    (l1, u1), (l2, u2) = wilson_interval(48, 50)[1:3], wilson_interval(38, 50)[1:3]
    phi = (36 * 0 - 12 * 2) / math.sqrt(48 * 2 * 38 * 12)  # below 0, so not corrected
    low = 0.2 - math.sqrt((0.96 - l1) ** 2 - 2 * phi * (0.96 - l1) * (u2 - 0.76) + (u2 - 0.76) ** 2)
    high = 0.2 + math.sqrt(
        (u1 - 0.96) ** 2 - 2 * phi * (u1 - 0.96) * (0.76 - l2) + (0.76 - l2) ** 2
    )
    got = paired_difference(*_pairs(36, 12, 2, 0))
    assert got == pytest.approx((0.2, low, high, 50))
    # 45 and 40 of 60 that go together: 38 both, 7 and 2, 13 neither; n/2 comes off the product.
    (l1, u1), (l2, u2) = wilson_interval(45, 60)[1:3], wilson_interval(40, 60)[1:3]
    phi = (38 * 13 - 7 * 2 - 30) / math.sqrt(45 * 15 * 40 * 20)
    p1, p2 = 45 / 60, 40 / 60
    low = p1 - p2 - math.sqrt((p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2)
    assert paired_difference(*_pairs(38, 7, 2, 13)).low == pytest.approx(low)


def test_paired_rates_without_a_differing_pair_still_have_a_width():
    got = paired_difference(*_pairs(50, 0, 0, 0))
    assert got.value == 0
    assert got.low == pytest.approx(-0.0714, abs=1e-3)
    a, b = _pairs(50, 0, 0, 0)
    assert mean_interval(np.subtract(a, b)).low == 0  # what it guards against


def test_paired_rates_cover_the_truth():
    rng = np.random.default_rng(3)
    hits, trials = 0, 600
    for _ in range(trials):
        luck = rng.random(60)  # the same episodes, so the outcomes go together
        a, b = (luck < 0.85).astype(int), (luck + 0.1 * rng.standard_normal(60) < 0.7).astype(int)
        got = paired_difference(a, b)
        hits += got.low <= 0.15 <= got.high
    assert hits / trials > 0.9


def test_paired_difference_of_numbers_is_a_t_interval_of_the_differences():
    a, b = np.array([3.0, 4.0, 7.5]), np.array([1.0, 3.5, 4.0])
    assert paired_difference(a, b) == mean_interval(a - b)
    assert math.isnan(paired_difference([], []).value)


def test_bad_input():
    with pytest.raises(ValueError, match="equally long, got 2 and 3"):
        paired_difference([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match=r"successes must be in \[0, 3\], got 4"):
        wilson_interval(4, 3)
    with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\), got 95"):
        wilson_interval(1, 3, confidence=95)
    with pytest.raises(ValueError, match="one value per episode"):
        mean_interval(np.zeros((2, 2)))
