"""Push-T with kicks and a moving goal, and the scripted expert of both Push-T tasks."""

from collections import deque
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from diffpolicy_envs import pusht_disturbed, pusht_expert
from diffpolicy_envs.pusht_disturbed import GOAL, draw_kicks, from_goal_frame, to_goal_frame
from diffpolicy_envs.pusht_features import KEYPOINTS

ENV_ID = "diffpolicy/PushTDisturbed-v0"
CALM: dict[str, Any] = {"kick_rate": 0.0, "goal_speed": 0.0, "goal_jump_rate": 0.0}
ON_GOAL = [50.0, 450.0, *GOAL]


@pytest.fixture
def make_pusht() -> Callable[..., Any]:
    pytest.importorskip("gym_pusht", exc_type=ImportError)

    def make(name: str = "PushTDisturbed", **kwargs: Any) -> Any:
        return gym.make(f"diffpolicy_envs:diffpolicy/{name}-v0", **kwargs).unwrapped

    return make


def run_pusht_expert(env: Any, seed: int, late: int, steps: int = 150) -> float:
    """Mean quality of so many steps in which the expert's actions are applied late."""
    observation, _ = env.reset(seed=seed)
    rng, queue = np.random.default_rng(0), deque([observation[:2]] * late)
    total = 0.0
    for _ in range(steps):
        queue.append(env.expert_action(rng))
        *_, info = env.step(queue.popleft())
        total += info["quality"] / steps
    return total


def test_goal_frame_is_a_rigid_motion_that_takes_the_goal_home() -> None:
    rng = np.random.default_rng(0)
    goal = np.array([210.0, 300.0, -0.4])
    points = rng.uniform(0, 512, (40, 2))
    moved = to_goal_frame(points, goal)
    np.testing.assert_allclose(from_goal_frame(moved, goal), points, atol=1e-9)
    np.testing.assert_allclose(to_goal_frame(goal[:2], goal), GOAL[:2], atol=1e-9)
    distances = np.linalg.norm(points[:, None] - points, axis=-1)
    np.testing.assert_allclose(np.linalg.norm(moved[:, None] - moved, axis=-1), distances)
    # A point ten pixels along the goal's own x axis stays there.
    along = goal[:2] + 10 * np.array([np.cos(goal[2]), np.sin(goal[2])])
    home = GOAL[:2] + 10 * np.array([np.cos(GOAL[2]), np.sin(GOAL[2])])
    np.testing.assert_allclose(to_goal_frame(along, goal), home, atol=1e-9)
    np.testing.assert_array_equal(to_goal_frame(points, GOAL), points)
    np.testing.assert_array_equal(from_goal_frame(points, GOAL), points)


def test_kicks_have_the_rate_the_strength_and_the_length_asked_for() -> None:
    kicks = draw_kicks(np.random.default_rng(0), 20_000, 0.02, 50.0)
    shift = np.linalg.norm(kicks.shift, axis=1)
    kicked = shift > 0
    assert kicked.mean() == pytest.approx(0.04, abs=0.005)
    assert (shift[kicked] <= 25.0 + 1e-9).all()
    assert (shift[kicked] >= 12.5 - 1e-9).all()
    assert np.abs(kicks.turn).max() <= 0.25
    np.testing.assert_array_equal(kicked, kicks.turn != 0)
    assert not draw_kicks(np.random.default_rng(0), 100, 0.0, 50.0).shift.any()


def test_gymnasium_and_sb3_checks(
    make_pusht: Callable[..., Any], gymnasium_checks: Callable[[str], None]
) -> None:
    env = make_pusht()
    gymnasium_checks(ENV_ID)
    checker = pytest.importorskip("stable_baselines3.common.env_checker", exc_type=ImportError)
    checker.check_env(env, warn=False)


@pytest.mark.parametrize("resets", ["gym_pusht", "diffusion_policy"])
def test_without_disturbances_it_is_push_t(make_pusht: Callable[..., Any], resets: str) -> None:
    env, plain = make_pusht(resets=resets, **CALM), make_pusht("PushT", resets=resets)
    for seed in range(3):
        observation, expected = env.reset(seed=seed)[0], plain.reset(seed=seed)[0]
        np.testing.assert_array_equal(observation, expected)
        rng = np.random.default_rng(seed)
        for step in range(120):
            if step % 5 == 0:
                action = (expected[2:4] + rng.normal(0, 60, 2)).clip(0, 512).astype(np.float32)
            observation, reward, terminated, _, info = env.step(action)
            expected, value, _, _, plain_info = plain.step(action)
            # Two instances of the engine agree but for the order in which they add up contacts.
            np.testing.assert_allclose(observation, expected, rtol=1e-6, atol=1e-6)
            assert info["quality"] == pytest.approx(value, abs=1e-9)
            assert reward == info["quality"] / 300
            assert info["is_success"] == plain_info["is_success"]
            assert not terminated


def test_a_moving_goal_moves_observation_and_action_with_it(
    make_pusht: Callable[..., Any],
) -> None:
    env = make_pusht(kick_rate=0.0, goal_speed=100.0, goal_jump_rate=0.1)
    observation, _ = env.reset(seed=0)
    goals = env.goals
    assert goals.shape == (301, 3)
    np.testing.assert_array_equal(goals[0], GOAL)
    assert np.abs((goals - GOAL) * [1, 1, 100]).max() <= 60.0
    for step in range(30):
        point = np.array([200.0 + 3 * step, 300.0])
        action = to_goal_frame(point, goals[step]).astype(np.float32)
        observation, *_, info = env.step(action)
        goal, state = goals[step + 1], env.state()
        np.testing.assert_array_equal(info["goal_pose"], goal)
        world = from_goal_frame(observation[:4].reshape(2, 2).astype(np.float64), goal)
        np.testing.assert_allclose(world.reshape(4), state[:4], atol=1e-3)
        angle = np.arctan2(observation[5], observation[4]) + goal[2] - GOAL[2]
        assert np.cos(angle - state[4]) == pytest.approx(1.0, abs=1e-6)
        # The simulator was told the point on the table.
        np.testing.assert_allclose(env._physics._last_action, point, atol=1e-3)
    assert np.abs(goals[30] - GOAL).max() > 5


def test_points_off_the_table_are_clipped(make_pusht: Callable[..., Any]) -> None:
    env = make_pusht(kick_rate=0.0, goal_speed=200.0)
    env.reset(seed=0)
    for _ in range(20):
        env.step(np.array([512.0, 0.0], np.float32))
        assert (env._physics._last_action >= 0).all()
        assert (env._physics._last_action <= 512).all()


def test_a_kick_moves_a_free_block_as_far_as_it_says(make_pusht: Callable[..., Any]) -> None:
    env = make_pusht(kick_rate=0.1, kick_distance=50.0, goal_speed=0.0, goal_jump_rate=0.0)
    env.reset(seed=2, options={"state": ON_GOAL})
    body, corner, kicked = env._physics.block, np.array([0.0, 0.0], np.float32), 0
    for step in range(30):
        before, angle = np.array(body.local_to_world(body.center_of_gravity)), body.angle
        env.step(corner)
        after = np.array(body.local_to_world(body.center_of_gravity))
        shift, turn = env.kicks.shift[step], env.kicks.turn[step]
        # The engine moves bodies before it changes velocities: one of ten substeps is put off.
        allowed = 0.11 * np.linalg.norm(env.kicks.shift[max(step - 1, 0) : step + 1], axis=1).sum()
        assert np.linalg.norm(after - before - shift) <= allowed + 1e-6
        assert abs(body.angle - angle - turn) <= 0.11 * 0.5 + 1e-6
        kicked += turn != 0
    assert kicked >= 2


def test_disturbances_depend_on_the_seed_alone(make_pusht: Callable[..., Any]) -> None:
    env = make_pusht()
    seen, runs = [], []
    for point in (10.0, 300.0, 300.0):
        run = [env.reset(seed=4)[0]]
        seen.append((env.kicks.shift, env.kicks.turn, env.goals))
        run.extend(env.step(np.full(2, point, np.float32))[0] for _ in range(60))
        runs.append(np.stack(run))
    for one, other in zip(seen[0], seen[1], strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(runs[1], runs[2])
    assert not np.array_equal(runs[0], runs[1])
    env.reset(seed=5)
    assert not np.array_equal(env.goals, seen[0][2])


def test_the_block_starts_near_the_goal_clear_of_the_disc(make_pusht: Callable[..., Any]) -> None:
    env = make_pusht(**CALM)
    for seed in range(30):
        _, info = env.reset(seed=seed)
        state = env.state()
        assert (np.abs(state[2:] - GOAL) <= [40, 40, 0.4]).all()
        assert 0.1 < info["coverage"] < 1
        env.step(state[:2].astype(np.float32))
        np.testing.assert_allclose(env.state()[2:], state[2:], atol=1e-9)


def test_the_return_is_the_mean_quality_and_success_does_not_end_it(
    make_pusht: Callable[..., Any],
) -> None:
    env = make_pusht(**CALM)
    env.reset(seed=0, options={"state": ON_GOAL})
    total = 0.0
    for step in range(300):
        _, reward, terminated, truncated, info = env.step(np.array([50, 450], np.float32))
        total += reward
        assert info["is_success"]
        assert not terminated
        assert truncated == (step == 299)
    assert total == pytest.approx(1.0)


def test_pictures_show_the_present_goal(make_pusht: Callable[..., Any]) -> None:
    env = make_pusht(
        render_mode="rgb_array", width=512, height=512, kick_rate=0.0, goal_jump_rate=1.0
    )
    env.reset(seed=0)
    corner = np.array([0, 0], np.float32)
    env.step(corner)
    for step in range(1, 4):
        env.set_state(np.array([500.0, 500.0, 60.0, 60.0, 0.0]))
        image = env.render().astype(int)
        green = (image == (144, 238, 144)).all(axis=-1)
        centre = env.goals[step, :2] + pusht_expert.place(
            np.array([[0.0, 45.0]]), np.array([0.0, 0.0, env.goals[step, 2]])
        )
        seen = np.argwhere(green).mean(axis=0)[::-1]
        assert np.linalg.norm(seen - centre) < 15
        env.step(corner)


def test_the_expert_solves_push_t(make_pusht: Callable[..., Any]) -> None:
    env = make_pusht("PushT")
    for seed in (200_000, 200_001):
        env.reset(seed=seed)
        rng, terminated, steps = np.random.default_rng(0), False, 0
        while not terminated and steps < 300:
            action = env.expert_action(rng)
            assert action.dtype == np.float32
            assert env.action_space.contains(action)
            *_, terminated, _, info = env.step(action)
            steps += 1
        assert info["is_success"]


def test_stale_expert_actions_lose(make_pusht: Callable[..., Any]) -> None:
    env = make_pusht()
    fresh, stale = (
        np.mean([run_pusht_expert(env, seed, late) for seed in range(200_000, 200_002)])
        for late in (0, 28)
    )
    assert fresh > 0.5
    assert fresh > stale + 0.15


def test_the_expert_keeps_clear_of_the_block_on_its_way() -> None:
    points = np.array([[0.0, -20.0], [0.0, 140.0], [80.0, 15.0], [0.0, 60.0], [45.0, 40.0]])
    np.testing.assert_allclose(pusht_expert._distances(points), [20, 20, 20, 0, 10])
    ring = pusht_expert._ring()
    assert pusht_expert._distances(ring).min() > pusht_expert.AGENT_RADIUS
    starts, normals = pusht_expert._starts()
    assert pusht_expert._distances(starts).min() > pusht_expert.AGENT_RADIUS
    ends = pusht_expert._distances(starts + 18 * normals)
    np.testing.assert_allclose(ends, 0, atol=1e-9)


def test_the_experts_error_is_the_mean_distance_of_the_key_points() -> None:
    shifted = GOAL + np.array([3.0, 4.0, 0.0])
    assert pusht_expert.keypoint_error(shifted, GOAL) == pytest.approx(5.0)
    np.testing.assert_allclose(
        pusht_expert._keypoint_errors(np.stack([shifted, GOAL]), GOAL), [5, 0], atol=1e-9
    )
    np.testing.assert_allclose(pusht_expert.place(KEYPOINTS, np.zeros(3)), KEYPOINTS)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kick_rate": 2.0}, "kick_rate is a probability per control step"),
        ({"goal_jump_rate": -1.0}, "goal_jump_rate is a probability per control step"),
        ({"kick_distance": 500.0}, r"kick_distance must be in \[0, 200\], got 500.0"),
        ({"goal_speed": float("nan")}, r"goal_speed must be in \[0, 200\]"),
        ({"resets": "mine"}, "resets must be one of .*near_goal"),
    ],
)
def test_bad_arguments_are_refused_at_construction(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pusht_disturbed.PushTDisturbedEnv(**kwargs)
