"""Push-T: features of recorded states, replay of the human demonstrations, resets, scores."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from diffpolicy import EpisodeStore
from diffpolicy_envs.pusht import PushTEnv, diffusion_policy_state
from diffpolicy_envs.pusht_features import keypoints_from_state, observation_from_state

ENV_ID = "diffpolicy/PushT-v0"
PUSHT_IMAGES = Path(__file__).parents[3] / "shared/data/pusht/pusht_image.zarr.zip"


@pytest.fixture
def env() -> Any:
    pytest.importorskip("gym_pusht", exc_type=ImportError)
    return gym.make(f"diffpolicy_envs:{ENV_ID}").unwrapped


def test_known_features() -> None:
    state = np.array([[110.0, 120.0, 100.0, 100.0, np.pi / 2]])
    observation = observation_from_state(state)
    assert observation.dtype == np.float32
    assert observation.shape == (1, 26)
    np.testing.assert_allclose(observation[0, :6], [110, 120, 100, 100, 0, 1], atol=1e-5)
    # A quarter turn takes the block's x axis to the world's y axis.
    np.testing.assert_allclose(observation[0, 24:], [20, -10], atol=1e-5)
    x, y = observation_from_state(np.zeros((1, 5)))[0, 6:8]
    np.testing.assert_allclose(observation[0, 6:8], [100 - y, 100 + x], atol=1e-4)


def test_features_do_not_jump_where_the_angle_does() -> None:
    around = np.array([[50, 60, 200, 210, 1e-7], [50, 60, 200, 210, 2 * np.pi - 1e-7]])
    first, last = observation_from_state(around)
    np.testing.assert_allclose(first, last, atol=1e-4)


def test_features_refuse_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"expected states \[T, 5\].*got shape \[5\]"):
        observation_from_state(np.zeros(5))


def test_keypoints_are_the_recorded_ones(pusht_arrays: dict[str, Any]) -> None:
    state, recorded = pusht_arrays["state"], pusht_arrays["keypoint"]
    error = np.abs(keypoints_from_state(state.astype(np.float64)) - recorded).max(axis=(1, 2))
    # Some frames were recorded while the block moved: a tail of up to 2 px in 0.1 % of them.
    assert np.median(error) < 1e-3
    assert np.quantile(error, 0.99) < 0.1
    assert error.max() < 3.0


def test_replay_reproduces_the_demonstrations(env: Any, pusht_arrays: dict[str, Any]) -> None:
    state, action = pusht_arrays["state"].astype(np.float64), pusht_arrays["action"]
    ends = pusht_arrays["episode_ends"]
    starts = np.concatenate([[0], ends[:-1]])
    agent, block, angle, worst, best = [], [], [], [], []
    for start, end in list(zip(starts, ends, strict=True))[::10]:
        observation, _ = env.reset(seed=0, options={"state": state[start]})
        np.testing.assert_allclose(
            observation, observation_from_state(state[start][None])[0], atol=1e-3
        )
        replayed, rewards = [], []
        for step in range(start, end):
            _, reward, *_ = env.step(action[step])
            replayed.append(env.state())
            rewards.append(reward)
        difference = np.stack(replayed[:-1]) - state[start + 1 : end]
        agent.append(np.linalg.norm(difference[:, :2], axis=1))
        block.append(np.linalg.norm(difference[:, 2:4], axis=1))
        angle.append(np.abs((difference[:, 4] + np.pi) % (2 * np.pi) - np.pi))
        worst.append(block[-1].max())
        best.append(max(rewards))
    assert np.concatenate(agent).max() < 0.01
    assert np.quantile(np.concatenate(block), 0.9) < 0.01
    assert np.quantile(np.concatenate(angle), 0.9) < 1e-4
    # A touch that goes off by a rounding error ends pixels away (17 in the worst of all episodes).
    assert np.mean(np.array(worst) < 1.0) > 0.9
    assert np.mean(best) > 0.9


def test_gymnasium_checks(env: Any, gymnasium_checks: Callable[[str], None]) -> None:
    gymnasium_checks(ENV_ID)


def test_set_state_is_exact(env: Any) -> None:
    env.reset(seed=0)
    state = np.array([100.0, 350.0, 240.0, 260.0, 2.5])
    observation = env.set_state(state)
    np.testing.assert_allclose(env.state(), state, atol=1e-9)
    np.testing.assert_array_equal(observation, env.observation_from_state(state[None])[0])


@pytest.mark.parametrize("state", [np.zeros(4), np.full(5, np.nan)])
def test_set_state_refuses_what_is_no_state(env: Any, state: Any) -> None:
    env.reset(seed=0)
    with pytest.raises(ValueError, match="five finite numbers"):
        env.set_state(state)


def test_block_on_its_outline_is_a_success(env: Any) -> None:
    _, info = env.reset(seed=0, options={"state": [50.0, 450.0, 256.0, 256.0, np.pi / 4]})
    assert info["coverage"] == pytest.approx(1.0)
    np.testing.assert_allclose(info["block_pose"], [256, 256, np.pi / 4])
    _, reward, terminated, _, info = env.step(np.array([50, 450], np.float32))
    assert reward == 1.0
    assert terminated
    assert info["is_success"]
    assert info["coverage"] > 0.95


def test_reward_is_coverage_over_095(env: Any) -> None:
    env.reset(seed=0, options={"state": [50.0, 450.0, 280.0, 256.0, np.pi / 4]})
    _, reward, terminated, _, info = env.step(np.array([50, 450], np.float32))
    assert 0.0 < info["coverage"] < 0.95
    assert reward == pytest.approx(info["coverage"] / 0.95)
    assert not terminated
    assert not info["is_success"]


def test_resets_of_diffusion_policys_runner() -> None:
    # Drawn once with numpy's legacy generator, in the order of the published runner.
    state = diffusion_policy_state(100000)
    rng = np.random.RandomState(100000)
    expected = [rng.randint(*span) for span in [(50, 450)] * 2 + [(100, 400)] * 2]
    np.testing.assert_array_equal(state[:4], expected)
    assert state[4] == rng.randn() * 2 * np.pi - np.pi


def test_diffusion_policy_resets_are_reproducible_and_different(env: Any) -> None:
    other = PushTEnv(resets="diffusion_policy")
    first = other.reset(seed=100000)[0]
    np.testing.assert_allclose(first[:2], diffusion_policy_state(100000)[:2])
    np.testing.assert_array_equal(first, other.reset(seed=100000)[0])
    assert not np.array_equal(first, other.reset()[0])
    assert not np.array_equal(first, env.reset(seed=100000)[0])


def test_time_limit_is_300() -> None:
    pytest.importorskip("gym_pusht", exc_type=ImportError)
    env = gym.make(f"diffpolicy_envs:{ENV_ID}")
    env.reset(seed=0)
    steps, truncated = 0, False
    while not truncated:
        _, _, terminated, truncated, _ = env.step(np.array([256, 20], np.float32))
        assert not terminated
        steps += 1
    assert steps == 300


def test_pictures_have_the_size_asked_for() -> None:
    pytest.importorskip("gym_pusht", exc_type=ImportError)
    env = gym.make(f"diffpolicy_envs:{ENV_ID}", render_mode="rgb_array", width=96, height=64)
    env.reset(seed=0)
    image: Any = env.render()
    assert image.shape == (64, 96, 3)
    assert image.dtype == np.uint8


@pytest.mark.parametrize(
    ("kwargs", "options", "message"),
    [
        ({"resets": "mine"}, None, "resets must be one of"),
        ({}, {"reset_to_state": [0] * 5}, r"unknown reset options \['reset_to_state'\]"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], options: Any, message: str) -> None:
    pytest.importorskip("gym_pusht", exc_type=ImportError)
    with pytest.raises(ValueError, match=message):
        PushTEnv(**kwargs).reset(seed=0, options=options)


def test_image_is_that_of_the_recorded_demonstrations(env: Any) -> None:
    """What the camera sees is the table without the last action's mark, as people recorded it."""
    seen = gym.make("diffpolicy_envs:diffpolicy/PushTImage-v0")
    observation, _ = seen.reset(seed=1)
    assert seen.observation_space.contains(observation)
    for _ in range(3):
        observation, *_ = seen.step(np.array([100, 400], np.float32))
    assert seen.observation_space.contains(observation)
    env.reset(seed=1)  # the same seed is the same table
    for _ in range(3):
        env.step(np.array([100, 400], np.float32))
    np.testing.assert_allclose(observation["agent_pos"], env.state()[:2], atol=1e-4)
    still = seen.unwrapped.set_state(env.state())["image"]
    assert (np.abs(still.astype(int) - observation["image"]) > 20).mean() < 0.005
    if not PUSHT_IMAGES.exists():
        return
    recorded = EpisodeStore.open(PUSHT_IMAGES).episode(3)
    for step in (0, 40, 80):
        drawn = seen.unwrapped.set_state(recorded["state"][step])["image"]
        apart = np.abs(drawn.astype(int) - recorded["img"][step]).max(-1)
        assert (apart > 20).mean() < 0.005  # edges, by another version of the drawing library
