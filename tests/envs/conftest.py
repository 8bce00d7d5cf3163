"""Environments under Gymnasium's own checks, and the recorded Push-T demonstrations."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

PUSHT_DATA = Path(__file__).parents[3] / "shared/data/pusht/pusht_lowdim.zarr.zip"


@pytest.fixture
def gymnasium_checks() -> Callable[..., None]:
    """Run Gymnasium's checks: seeds, spaces, types, determinism, no reused buffers."""

    def run(env_id: str, **kwargs: Any) -> None:
        env = gym.make(f"diffpolicy_envs:{env_id}", **kwargs)
        with warnings.catch_warnings():
            # Advice on infinite observation bounds and on pixels as actions; both are meant.
            warnings.simplefilter("ignore")
            check_env(env.unwrapped, skip_render_check=True)
        observation, info = env.reset(seed=0)
        assert observation.dtype == np.float32
        assert observation.shape == env.observation_space.shape
        assert info["is_success"] is False
        env.action_space.seed(0)
        *_, info = env.step(env.action_space.sample())
        assert isinstance(info["is_success"], bool)
        env.close()

    return run


@pytest.fixture
def expert_successes() -> Callable[..., list[bool]]:
    """Roll out an environment's expert with disturbed actions; success at the end per seed."""

    def run(env_id: str, seeds: range, noise: float = 0.15) -> list[bool]:
        env = gym.make(f"diffpolicy_envs:{env_id}")
        expert = env.get_wrapper_attr("expert_action")
        mask = 1.0
        if env.has_wrapper_attr("expert_noise_mask"):
            mask = env.get_wrapper_attr("expert_noise_mask").astype(np.float64)
        successes = []
        for seed in seeds:
            env.reset(seed=seed)
            rng = np.random.default_rng(seed)
            over = False
            while not over:
                action = expert(rng)
                assert action.dtype == np.float32
                assert env.action_space.contains(action)
                disturbed = action + noise * mask * rng.standard_normal(action.shape)
                action = np.clip(disturbed, -1, 1).astype(np.float32)
                *_, terminated, truncated, info = env.step(action)
                over = terminated or truncated
            successes.append(info["is_success"])
        env.close()
        return successes

    return run


@pytest.fixture(scope="session")
def pusht_arrays() -> dict[str, Any]:
    """State, action, keypoint and episode ends of the human Push-T demonstrations."""
    zarr = pytest.importorskip("zarr")
    if not PUSHT_DATA.exists():
        pytest.skip("the recorded Push-T demonstrations (shared/data/pusht) are not here")
    store = zarr.storage.ZipStore(PUSHT_DATA, mode="r")
    group = zarr.open_group(store, mode="r")
    arrays = {name: np.asarray(group[f"data/{name}"]) for name in ("state", "action", "keypoint")}
    arrays["episode_ends"] = np.asarray(group["meta/episode_ends"])
    store.close()
    return arrays
