import numpy as np
import pytest

from diffpolicy.sequences import metrics

ROWS = np.array([[0, 1, 0, 1], [0, 1, 1, 1], [2, 1, 0, 0]], dtype=np.int8)


def test_kmer_counts_by_hand():
    pairs = metrics.kmer_counts(ROWS, 2, 3).reshape(3, 3)
    # 0101: 01 10 01; 0111: 01 11 11; 2100: 21 10 00
    assert pairs.tolist() == [[1, 3, 0], [2, 2, 0], [0, 1, 0]]
    assert metrics.kmer_counts(ROWS, 1, 3).tolist() == [5, 6, 1]
    assert metrics.kmer_counts(ROWS, 4, 3).sum() == 3


def test_kmer_correlation_of_a_set_with_itself_is_one():
    assert metrics.kmer_correlation(ROWS, ROWS[::-1], 2, 3) == pytest.approx(1.0)


def test_pearson_as_numpy():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal(50), rng.standard_normal(50)
    assert metrics.pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert np.isnan(metrics.pearson(a, np.ones(50)))


def test_spearman_takes_ranks_and_shares_them_between_ties():
    assert metrics.spearman([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1.0)
    # Ranks of the second: 1.5, 1.5, 3, 4.
    expected = np.corrcoef([1, 2, 3, 4], [1.5, 1.5, 3, 4])[0, 1]
    assert metrics.spearman([1, 2, 3, 4], [7, 7, 8, 9]) == pytest.approx(expected)


def test_profile_and_entropy_by_hand():
    profile = metrics.profile(ROWS, 3)
    assert profile[0].tolist() == pytest.approx([2 / 3, 0, 1 / 3])
    assert profile[1].tolist() == [0, 1, 0]
    entropy = metrics.position_entropy(ROWS, 3)
    assert entropy[1] == 0
    assert entropy[0] == pytest.approx(-(2 / 3) * np.log(2 / 3) - (1 / 3) * np.log(1 / 3))
    assert metrics.profile_correlation(ROWS, ROWS, 3) == pytest.approx(1.0)


def test_hamming_and_diversity_as_by_pairs():
    assert metrics.hamming(ROWS, [0, 1, 0, 1]).tolist() == [0, 1, 2]
    rows = np.random.default_rng(0).integers(0, 4, (20, 7))
    pairs = [(a != b).sum() for i, a in enumerate(rows) for b in rows[:i]]
    assert metrics.mean_pairwise_hamming(rows, 4) == pytest.approx(np.mean(pairs))
    assert metrics.mean_pairwise_hamming(rows[:1], 4) == 0
    assert metrics.unique_fraction(np.repeat(rows, 2, axis=0)) == 0.5


def test_top_sequences():
    assert metrics.top_sequences(ROWS, [0.1, 0.9, 0.5], 2 / 3).tolist() == ROWS[[1, 2]].tolist()
    assert len(metrics.top_sequences(ROWS, [1, 2, 3], 0.01)) == 1


def test_quartiles():
    assert metrics.quartiles([1, 2, 3, 4, 5]) == {"median": 3, "q25": 2, "q75": 4, "mean": 3}


def test_no_warning_while_both_rise():
    assert metrics.hacking_warning([0, 1, 2, 3, 4], [0, 0.5, 0.9, 1.2, 1.3]) is None


def test_warning_when_they_part():
    message = metrics.hacking_warning([0, 1, 2, 3, 4, 5], [0, 1, 1.5, 1.2, 0.7, 0.3])
    assert message is not None
    assert "hacked" in message
    assert "evaluation 2" in message


def test_warning_when_the_held_out_reward_falls_from_the_start():
    assert metrics.hacking_warning([0, 1, 2, 3], [0, -0.5, -1, -2]) is not None


def test_one_odd_row_is_no_hacking():
    held_out = [0, 0.5, 1.0, 3.0, 1.5, 1.7, 1.9, 2.0]
    assert metrics.hacking_warning(range(8), held_out) is None


def test_noise_of_a_flat_held_out_reward_is_no_hacking():
    rng = np.random.default_rng(0)
    reward = np.linspace(0, 5, 20)
    for _ in range(50):
        assert metrics.hacking_warning(reward, 0.1 * rng.standard_normal(20)) is None


def test_both_falling_is_no_hacking():
    assert metrics.hacking_warning([5, 4, 3, 2], [5, 4, 3, 2]) is None
    assert metrics.hacking_warning([0, 1], [1, 0]) is None  # too few rows to tell


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.kmer_counts(ROWS, 5, 3), r"k must be in \[1, 4\]"),
        (lambda: metrics.pearson([1, 2], [1, 2, 3]), r"must be \[2\]"),
        (lambda: metrics.top_sequences(ROWS, [1, 2, 3], 0), "fraction must be"),
        (lambda: metrics.top_sequences(ROWS, [1, 2], 0.5), r"labels must be \[3\]"),
        (lambda: metrics.quartiles([]), "number_of_values must be at least 1"),
        (lambda: metrics.hacking_warning([1], [1, 2]), r"held_out must be \[1\]"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
