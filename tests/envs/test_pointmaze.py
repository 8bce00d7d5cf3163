"""The point maze: path search, expert, termination."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from diffpolicy_envs.pointmaze import shortest_path

ENV_ID = "diffpolicy/PointMazeUMaze-v0"
U_MAZE = [[1, 1, 1, 1, 1], [1, 0, 0, 0, 1], [1, 1, 1, 0, 1], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]]


def test_shortest_path_goes_round_the_wall() -> None:
    path = shortest_path(U_MAZE, (1, 1), (3, 1))
    assert path == [(1, 1), (1, 2), (1, 3), (2, 3), (3, 3), (3, 2), (3, 1)]
    assert shortest_path(U_MAZE, (1, 1), (1, 1)) == [(1, 1)]


def test_an_unreachable_goal_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no free path from cell \(0, 0\) to cell \(0, 2\)"):
        shortest_path([[0, 1, 0]], (0, 0), (0, 2))


@pytest.mark.mujoco
class TestEnvironment:
    @pytest.fixture(autouse=True)
    def _simulator(self) -> None:
        pytest.importorskip("mujoco", exc_type=ImportError)
        pytest.importorskip("gymnasium_robotics", exc_type=ImportError)

    def test_gymnasium_checks(self, gymnasium_checks: Callable[[str], None]) -> None:
        gymnasium_checks(ENV_ID)

    def test_expert_solves_every_seed(self, expert_successes: Callable[..., list[bool]]) -> None:
        assert all(expert_successes(ENV_ID, range(30)))

    def test_ends_at_the_goal_with_reward_one(self) -> None:
        env: Any = gym.make(f"diffpolicy_envs:{ENV_ID}")
        observation, _ = env.reset(seed=1)
        rng, terminated, reward = np.random.default_rng(0), False, 0.0
        while not terminated:
            assert reward == 0.0
            action = env.get_wrapper_attr("expert_action")(rng)
            observation, reward, terminated, truncated, info = env.step(action)
            assert not truncated
        assert reward == 1.0
        assert info["is_success"]
        assert np.linalg.norm(observation[:2] - observation[4:6]) <= 0.45

    def test_goes_on_until_the_time_limit_when_asked(self) -> None:
        env = gym.make(f"diffpolicy_envs:{ENV_ID}", stop_at_goal=False, max_episode_steps=150)
        env.reset(seed=1)
        rng, truncated, steps = np.random.default_rng(0), False, 0
        while not truncated:
            action = env.get_wrapper_attr("expert_action")(rng)
            _, _, terminated, truncated, info = env.step(action)
            assert not terminated
            steps += 1
        assert steps == 150
        assert info["is_success"]

    def test_leaves_no_maze_file_behind(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        gym.make(f"diffpolicy_envs:{ENV_ID}").close()
        assert list(tmp_path.iterdir()) == []
