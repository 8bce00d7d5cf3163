"""Returns to go against a plain sum, and stores with computed fields."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffpolicy.data.returns import returns_to_go, with_fields
from diffpolicy.data.store import EpisodeStore
from diffpolicy.data.windows import Windows


@pytest.fixture
def rewarded():
    rng = np.random.default_rng(0)
    arrays = {
        "obs": rng.standard_normal((12, 2)).astype(np.float32),
        "action": rng.standard_normal((12, 1)).astype(np.float32),
        "reward": rng.standard_normal(12).astype(np.float32),
    }
    return EpisodeStore.from_arrays(arrays, [5, 6, 12])


@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_returns_are_the_discounted_sums_within_an_episode(rewarded, discount):
    reward = rewarded.read("reward", 0, 12)
    expected = []
    for begin, end in ((0, 5), (5, 6), (6, 12)):
        expected += [
            sum(discount ** (k - t) * reward[k] for k in range(t, end)) for t in range(begin, end)
        ]
    np.testing.assert_allclose(returns_to_go(rewarded, discount), expected, atol=1e-5)


def test_computed_fields_are_windowed_like_stored_ones(rewarded):
    more = with_fields(rewarded, {"twice": 2 * rewarded.read("reward", 0, 12)})
    windows = Windows(
        more,
        horizon=3,
        n_obs_steps=1,
        n_action_steps=1,
        fields=("obs", "action", "reward", "twice"),
        whole=True,
    )
    batch = windows.gather(np_indices(len(windows)))
    assert batch["obs"].shape == (12, 3, 2)
    np.testing.assert_allclose(batch["twice"], 2 * batch["reward"])
    np.testing.assert_array_equal(batch["obs"][0], rewarded.read("obs", 0, 3))


def np_indices(count):
    return torch.arange(count)


def test_bad_requests_say_what_is_wrong(rewarded):
    with pytest.raises(ValueError, match="discount must be in"):
        returns_to_go(rewarded, 0.0)
    with pytest.raises(ValueError, match="needs 12 rows and a new name"):
        with_fields(rewarded, {"reward": np.zeros(12)})
    with pytest.raises(ValueError, match="needs 12 rows"):
        with_fields(rewarded, {"other": np.zeros(3)})
    bare = EpisodeStore.from_arrays({"obs": np.zeros((3, 1)), "action": np.zeros((3, 1))}, [3])
    with pytest.raises(ValueError, match=r"no field .*'reward'"):
        returns_to_go(bare, 0.9)
