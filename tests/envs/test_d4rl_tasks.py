"""Kitchen and ant mazes: D4RL's flat observations, starts, goals and rewards."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest

pytest.importorskip("gymnasium_robotics", reason="needs the robotics extra")
pytestmark = pytest.mark.mujoco


def made(name: str) -> gym.Env:
    return gym.make(f"diffpolicy_envs:diffpolicy/{name}-v0")


def test_the_kitchen_observes_positions_and_the_goal() -> None:
    env = made("KitchenBurner")
    observation, info = env.reset(seed=3)
    raw = env.unwrapped.simulator
    assert observation.shape == (60,)
    np.testing.assert_allclose(observation[9:30], raw.data.qpos[9:], atol=0.01)  # but for noise
    goal = observation[30:]
    assert goal[[11, 12]].tolist() == pytest.approx([-0.88, -0.01])
    assert goal[22] == pytest.approx(-0.75)
    assert (goal[[19, 20, 21]] == 0).all()  # the cabinets are not asked for
    assert not info["is_success"]
    again, _ = env.reset(seed=3)
    np.testing.assert_array_equal(again, observation)
    env.close()


def test_a_thing_that_arrives_is_rewarded_once() -> None:
    env = made("KitchenSlider")
    env.reset(seed=0)
    raw, idle = env.unwrapped.simulator, np.zeros(9, np.float32)
    rewards = []
    for _ in range(3):
        raw.data.qpos[22] = -0.75  # the microwave's door
        rewards.append(env.step(idle)[1])
    assert rewards == [1.0, 0.0, 0.0]
    env.close()


@pytest.mark.parametrize(
    ("name", "start", "goal"),
    [
        ("AntMazeUMaze", (-4, 4), (-4, -4)),
        ("AntMazeMedium", (-10, 10), (10, -10)),
        ("AntMazeLarge", (-18, 12), (18, -12)),
    ],
)
def test_ants_walk_from_corner_to_corner(
    name: str, start: tuple[int, int], goal: tuple[int, int]
) -> None:
    env = made(name)
    for seed in (0, 1):
        observation, _ = env.reset(seed=seed)
        assert observation.shape == (29,)
        assert np.abs(observation[:2] - start).max() < 2.1  # noise within a cell of 4 m
        raw = env.unwrapped.simulator
        assert np.abs(raw.goal - goal).max() < 2.1
    raw.goal[:] = observation[:2]
    _, reward, terminated, _, info = env.step(np.zeros(8, np.float32))
    assert (reward, terminated, info["is_success"]) == (1.0, True, True)
    env.close()
