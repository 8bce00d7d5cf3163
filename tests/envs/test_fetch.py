"""The Fetch tasks: layout of the observation, experts, and rendering that leaves no trace."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

pytest.importorskip("mujoco", exc_type=ImportError)
pytest.importorskip("gymnasium_robotics", exc_type=ImportError)
pytestmark = pytest.mark.mujoco

PICK = "diffpolicy/FetchPickAndPlace-v0"
TASKS = [PICK, "diffpolicy/FetchPush-v0", "diffpolicy/FetchReach-v0"]


def make(env_id: str, **kwargs: Any) -> gym.Env[Any, Any]:
    return gym.make(f"diffpolicy_envs:{env_id}", **kwargs)


@pytest.mark.parametrize("env_id", TASKS)
def test_gymnasium_checks(env_id: str, gymnasium_checks: Callable[[str], None]) -> None:
    gymnasium_checks(env_id)


@pytest.mark.parametrize("env_id", TASKS)
def test_experts_reach_the_goal_in_spite_of_noise(
    env_id: str, expert_successes: Callable[..., list[bool]]
) -> None:
    assert all(expert_successes(env_id, range(20)))


def test_observation_holds_gripper_block_goal_and_their_differences() -> None:
    env = make(PICK)
    observation, _ = env.reset(seed=3)
    assert observation.shape == (31,)
    gripper, block, goal = observation[0:3], observation[3:6], observation[25:28]
    np.testing.assert_allclose(observation[6:9], block - gripper, atol=1e-6)
    np.testing.assert_allclose(observation[28:31], goal - block, atol=1e-6)
    assert make(TASKS[2]).reset(seed=3)[0].shape == (16,)


def test_reward_and_time_limit_are_the_simulators() -> None:
    env = make(PICK)
    env.reset(seed=0)
    for step in range(50):
        _, reward, terminated, truncated, info = env.step(np.zeros(4, np.float32))
        assert reward == (0.0 if info["is_success"] else -1.0)
        assert not terminated
        assert truncated == (step == 49)
    dense = make(PICK, reward_type="dense")
    observation, _ = dense.reset(seed=0)
    _, reward, *_ = dense.step(np.zeros(4, np.float32))
    assert reward == pytest.approx(-float(np.linalg.norm(observation[28:31])), abs=1e-3)


def test_the_expert_starts_over_on_reset() -> None:
    env = make(PICK)
    expert: Callable[..., Any] = env.get_wrapper_attr("expert_action")
    rng = np.random.default_rng(0)
    runs = []
    for length in (17, 50):  # cut the first episode while the block is held
        env.reset(seed=5)
        actions = []
        for _ in range(length):
            actions.append(expert(rng))
            env.step(actions[-1])
        runs.append(np.stack(actions))
    np.testing.assert_array_equal(runs[0], runs[1][:17])


def test_the_expert_picks_up_a_block_that_slipped() -> None:
    env = make(PICK, max_episode_steps=100)
    expert: Callable[..., Any] = env.get_wrapper_attr("expert_action")
    rng = np.random.default_rng(0)
    env.reset(seed=0)
    for step in range(100):
        action = expert(rng)
        if 18 <= step < 24:
            action[:] = (0, 0, 1, 1)  # someone opens the gripper and pulls it up
        *_, info = env.step(action)
    assert info["is_success"]


def test_filming_does_not_change_the_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for filmed in (False, True):
        env = make(PICK, render_mode="rgb_array")
        image = np.zeros((8, 8, 3), np.uint8)
        renderer = env.unwrapped.simulator.mujoco_renderer  # type: ignore[attr-defined]
        monkeypatch.setattr(renderer, "render", lambda mode, image=image: image)
        rng = np.random.default_rng(0)
        run = [env.reset(seed=2)[0]]
        for _ in range(40):
            run.append(env.step(env.get_wrapper_attr("expert_action")(rng))[0])
            if filmed:
                env.render()
        runs.append(np.stack(run))
    np.testing.assert_array_equal(runs[0], runs[1])


def test_pictures_have_the_size_asked_for_and_show_the_goal_move() -> None:
    code = """
import gymnasium as gym, numpy as np
env = gym.make("diffpolicy_envs:diffpolicy/FetchReach-v0", render_mode="rgb_array",
               width=64, height=48, camera={"distance": 1.0})
frames = []
for seed in (0, 1):
    env.reset(seed=seed)
    try:
        frames.append(env.render())
    except Exception as error:
        raise SystemExit(f"NO-GL {error!r}")
assert frames[0].shape == (48, 64, 3) and frames[0].dtype == np.uint8
red = [(f[..., 0] > 150) & (f[..., 1] < 60) for f in frames]
assert red[0].any() and (red[0] != red[1]).any()
env.close()
"""
    done = subprocess.run(
        ["env", "MUJOCO_GL=egl", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if "NO-GL" in done.stderr or ("EGL" in done.stderr and done.returncode):
        pytest.skip(f"no EGL here: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


def test_rendering_without_a_mode_is_an_error() -> None:
    env = make(PICK)
    env.reset(seed=0)
    with pytest.raises(gym.error.Error, match="render_mode"):
        env.unwrapped.render()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"task": "juggle"}, "expected one of .*'push'"),
        ({"reward_type": "shaped"}, "reward_type must be"),
        ({"camera": {"zoom": 2.0}}, r"unknown camera entries \['zoom'\]"),
    ],
)
def test_bad_arguments_are_refused_at_construction(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(PICK, **kwargs)
