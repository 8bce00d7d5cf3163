"""The moving reach task: the target's course, the score, and what stale actions cost."""

from collections import deque
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from diffpolicy_envs import fetch_moving
from diffpolicy_envs.fetch_experts import MovingReachExpert
from diffpolicy_envs.motion import MotionSettings, draw_motion

ENV_ID = "diffpolicy/FetchReachMoving-v0"
BOX = (-np.ones(3), np.ones(3))


def course(seed: int = 0, steps: int = 200, start: Any = None, **settings: float) -> Any:
    kwargs = {"speed": 1.0, "turn_rate": 0.1, "jump_rate": 0.0, **settings}
    rng = np.random.default_rng(seed)
    return draw_motion(rng, BOX, steps, settings=MotionSettings(**kwargs), seconds=0.1, start=start)


@pytest.fixture
def moving_reach() -> Any:
    pytest.importorskip("mujoco", exc_type=ImportError)
    pytest.importorskip("gymnasium_robotics", exc_type=ImportError)
    return gym.make(f"diffpolicy_envs:{ENV_ID}").unwrapped


def run_late(env: Any, seed: int, late: int) -> float:
    """Return of the expert whose actions are applied some steps after the state they are for."""
    env.reset(seed=seed)
    rng, queue = np.random.default_rng(0), deque([np.zeros(4, np.float32)] * late)
    total, over = 0.0, False
    while not over:
        queue.append(env.expert_action(rng))
        _, reward, _, over, _ = env.step(queue.popleft())
        total += reward
    return total


def test_a_course_without_turns_and_jumps_is_a_line_reflected_at_the_walls() -> None:
    position, velocity = course(turn_rate=0.0, start=np.zeros(3))
    assert position.shape == velocity.shape == (201, 3)
    free = velocity[0] * 0.1 * np.arange(201)[:, None]
    # Reflecting a line in [-1, 1] gives the triangle wave of period 4.
    np.testing.assert_allclose(position, 1 - np.abs((free + 1) % 4 - 2), atol=1e-9)
    assert (np.abs(free) > 3).any()
    np.testing.assert_allclose(np.abs(velocity), np.broadcast_to(np.abs(velocity[0]), (201, 3)))


@pytest.mark.parametrize("seed", range(5))
def test_a_course_stays_in_its_box_and_moves_with_its_velocity(seed: int) -> None:
    position, velocity = course(seed, speed=2.0)
    assert np.abs(position).max() <= 1.0
    assert np.linalg.norm(velocity, axis=1).max() <= 2.0 + 1e-9
    step = position[1:] - position[:-1]
    inside = (np.abs(position[:-1] + 0.1 * velocity[:-1]) <= 1.0).all(axis=1)
    assert inside.mean() > 0.5
    np.testing.assert_allclose(step[inside], 0.1 * velocity[:-1][inside], atol=1e-12)


def test_rates_are_the_mean_number_of_events() -> None:
    position, velocity = course(steps=4000, jump_rate=0.05)
    jumps = np.linalg.norm(np.diff(position, axis=0), axis=1) > 0.1 + 1e-9
    assert jumps.mean() == pytest.approx(0.05, abs=0.015)
    still = course(speed=0.0)
    np.testing.assert_array_equal(still.position, np.broadcast_to(still.position[0], (201, 3)))
    assert not still.velocity.any()
    assert np.linalg.norm(velocity, axis=1).mean() == pytest.approx(0.7, abs=0.1)


def test_one_rate_does_not_change_what_the_others_draw() -> None:
    np.testing.assert_array_equal(
        course(jump_rate=0.0).velocity[0], course(jump_rate=1.0).velocity[0]
    )
    jumping, other = course(jump_rate=1.0), course(jump_rate=1.0, turn_rate=0.7)
    np.testing.assert_array_equal(jumping.position, other.position)


@pytest.mark.parametrize(
    ("distance", "expected"), [(0.0, 1.0), (0.03, 1.0), (0.08, 0.5), (0.13, 0.0), (1.0, 0.0)]
)
def test_quality_of_a_distance(distance: float, expected: float) -> None:
    assert fetch_moving.quality(distance) == pytest.approx(expected)


def test_the_expert_aims_at_where_the_target_will_be() -> None:
    raw = {
        "observation": np.zeros(10),
        "desired_goal": np.array([0.01, 0.0, 0.0]),
        "target_velocity": np.array([0.0, 0.5, 0.0]),
    }
    action = MovingReachExpert(lead=0.02).action(raw)
    np.testing.assert_allclose(action, [0.01 / 0.031, 0.01 / 0.031, 0, -1])
    far = MovingReachExpert(lead=0.0).action({**raw, "desired_goal": np.array([2.0, 1.0, 0.0])})
    np.testing.assert_allclose(far, [1.0, 0.5, 0.0, -1.0])


@pytest.mark.mujoco
def test_gymnasium_and_sb3_checks(
    moving_reach: Any, gymnasium_checks: Callable[[str], None]
) -> None:
    gymnasium_checks(ENV_ID)
    checker = pytest.importorskip("stable_baselines3.common.env_checker", exc_type=ImportError)
    checker.check_env(moving_reach, warn=False)


@pytest.mark.mujoco
def test_observation_is_fetch_reachs_and_the_targets_velocity(moving_reach: Any) -> None:
    observation, info = moving_reach.reset(seed=3)
    assert observation.shape == (19,)
    reach = gym.make("diffpolicy_envs:diffpolicy/FetchReach-v0")
    np.testing.assert_array_equal(observation[:10], reach.reset(seed=3)[0][:10])
    for step in range(20):
        motion = moving_reach.motion
        np.testing.assert_allclose(observation[10:13], motion.position[step], atol=1e-6)
        np.testing.assert_allclose(
            observation[13:16], observation[10:13] - observation[:3], atol=1e-6
        )
        np.testing.assert_allclose(observation[16:19], motion.velocity[step], atol=1e-6)
        assert info["distance"] == pytest.approx(np.linalg.norm(observation[13:16]), abs=1e-5)
        assert info["quality"] == fetch_moving.quality(info["distance"])
        observation, reward, *_, info = moving_reach.step(np.zeros(4, np.float32))
        assert reward == pytest.approx(info["quality"] / 100)


@pytest.mark.mujoco
def test_the_course_depends_on_the_seed_alone(moving_reach: Any) -> None:
    rng = np.random.default_rng(0)
    runs = []
    for scale in (0.0, 1.0, 1.0):
        run = [moving_reach.reset(seed=7)[0]]
        rng = np.random.default_rng(1)
        for _ in range(30):
            action = scale * rng.uniform(-1, 1, 4)
            run.append(moving_reach.step(action.astype(np.float32))[0])
        runs.append(np.stack(run))
    for part in (slice(10, 13), slice(16, 19)):
        np.testing.assert_array_equal(runs[0][:, part], runs[1][:, part])
    assert not np.array_equal(runs[0][:, :3], runs[1][:, :3])
    np.testing.assert_array_equal(runs[1], runs[2])
    assert not np.array_equal(moving_reach.reset(seed=8)[0][10:13], runs[0][0, 10:13])


@pytest.mark.mujoco
def test_success_is_said_at_the_end_and_the_return_is_the_mean_quality(moving_reach: Any) -> None:
    moving_reach.reset(seed=0)
    rng, qualities, total = np.random.default_rng(0), [], 0.0
    for step in range(100):
        action = moving_reach.expert_action(rng)
        _, reward, terminated, truncated, info = moving_reach.step(action)
        qualities.append(info["quality"])
        total += reward
        assert not terminated
        assert truncated == (step == 99)
        assert info["is_success"] == (step == 99)
    assert total == pytest.approx(np.mean(qualities))
    moving_reach.reset(seed=0)
    for _ in range(100):
        *_, info = moving_reach.step(np.zeros(4, np.float32))
    assert info["is_success"] is False


@pytest.mark.mujoco
def test_the_expert_follows_and_stale_actions_lose(moving_reach: Any) -> None:
    seeds = range(200_000, 200_005)
    fresh, late_1, late_3, late_28 = (
        np.array([run_late(moving_reach, seed, late) for seed in seeds]) for late in (0, 1, 3, 28)
    )
    assert fresh.mean() > 0.85
    assert (fresh > late_1).all()
    assert (late_1 > late_3 + 0.2).all()
    assert (late_3 > late_28 + 0.1).all()
    assert late_28.mean() < 0.2


@pytest.mark.mujoco
def test_pictures_are_of_the_present_target(
    moving_reach: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    del moving_reach
    env: Any = gym.make(f"diffpolicy_envs:{ENV_ID}", render_mode="rgb_array").unwrapped
    shown = []

    def draw(mode: str) -> Any:
        shown.append(env.simulator.data.site("target0").xpos.copy())
        return np.zeros((8, 8, 3), np.uint8)

    monkeypatch.setattr(env.simulator.mujoco_renderer, "render", draw)
    env.reset(seed=0)
    env.render()
    env.step(np.zeros(4, np.float32))
    env.render()
    np.testing.assert_allclose(shown, env.motion.position[:2])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"speed": 2.0}, r"speed must be in \[0, 0.6\] m/s, got 2.0"),
        ({"speed": -0.1}, "speed must be in"),
        ({"turn_rate": 1.5}, r"turn_rate is a probability per control step, in \[0, 1\]; got 1.5"),
        ({"jump_rate": float("nan")}, "jump_rate is a probability"),
        ({"camera": {"zoom": 1.0}}, "unknown camera entries"),
    ],
)
def test_bad_arguments_are_refused_at_construction(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fetch_moving.FetchReachMovingEnv(**kwargs)


def test_a_motion_needs_a_finite_speed() -> None:
    with pytest.raises(ValueError, match="speed must be 0 or more, and finite, got inf"):
        MotionSettings(float("inf"), 0.1, 0.1)
