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
LARGER = {"diffpolicy/PointMazeMedium-v0": 600, "diffpolicy/PointMazeLarge-v0": 800}
SMOOTH = {"kp": 5.0, "kd": 1.0, "speed": 4.0}
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

    @pytest.mark.parametrize("env_id", LARGER)
    def test_the_larger_mazes_are_solved_in_time(
        self, expert_successes: Callable[..., list[bool]], env_id: str
    ) -> None:
        assert gym.spec(env_id).max_episode_steps == LARGER[env_id]
        assert all(expert_successes(env_id, range(4)))

    def test_new_goals_come_one_step_after_the_old_one_was_reached(self) -> None:
        env: Any = gym.make(ENV_ID, stop_at_goal=False, new_goals=True, controller=SMOOTH)
        observation, _ = env.reset(seed=0)
        first, after = env.get_wrapper_attr("GOAL_ENTRIES")
        rng, reached = np.random.default_rng(0), False
        for _ in range(200):
            action = env.get_wrapper_attr("expert_action")(rng)
            following, reward, terminated, _, _ = env.step(action)
            changed = bool((following[first:after] != observation[first:after]).any())
            assert changed == reached
            assert not terminated
            reached = reward > 0
            assert reached == (np.linalg.norm(following[:2] - following[first:after]) <= 0.45)
            observation = following

    def test_the_controller_keeps_to_its_speed_and_hardly_touches_a_wall(self) -> None:
        env: Any = gym.make(
            ENV_ID, stop_at_goal=False, new_goals=True, controller=SMOOTH, max_episode_steps=1000
        )
        env.reset(seed=0)
        simulator = env.unwrapped.simulator.unwrapped.point_env
        walls = {i for i in range(simulator.model.ngeom) if "block" in simulator.model.geom(i).name}
        assert walls
        rng, touches = np.random.default_rng(0), 0
        for _ in range(1000):
            observation, *_ = env.step(env.get_wrapper_attr("expert_action")(rng))
            assert np.linalg.norm(observation[2:4]) < 4.1
            touched = {g for c in simulator.data.contact for g in (c.geom1, c.geom2)}
            touches += bool(touched & walls)
        assert touches <= 5
        state = env.get_wrapper_attr("simulator_state")()
        np.testing.assert_array_equal(
            np.concatenate([state["qpos"], state["qvel"]]).astype(np.float32), observation[:4]
        )

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"new_goals": True}, "new_goals=True needs stop_at_goal=False"),
            (
                {"controller": {"ki": 1.0}},
                r"controller takes \['kd', 'kp', 'speed'\], got \['ki'\]",
            ),
            ({"controller": {"kp": None}}, "controller kp must be a positive number, got None"),
            ({"controller": {"speed": -1}}, "controller speed must be a positive number, got -1"),
        ],
    )
    def test_bad_arguments_are_explained(self, kwargs: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            gym.make(ENV_ID, **kwargs)

    def test_leaves_no_maze_file_behind(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        gym.make(f"diffpolicy_envs:{ENV_ID}").close()
        assert list(tmp_path.iterdir()) == []
