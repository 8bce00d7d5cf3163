"""OCBench: the benchmark's tasks, limits and successes; controllers that depend on seeds alone."""

from __future__ import annotations

from collections.abc import Iterator

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import DependencyNotInstalled

from diffpolicy.rollout.env_spec import EnvSpec
from diffpolicy.rollout.pool.supervisor import Workers
from diffpolicy.rollout.record.experts import collect
from diffpolicy_envs import simulators
from diffpolicy_envs.ocbench import PROPRIOCEPTION, RECIPES, TASKS

ID = "diffpolicy_envs:diffpolicy/OCBench-v0"
BLOCK, SWITCH = "block-lite-single-task1", "switch-lite-3x3-task1"
STILL = np.zeros(7, np.float32)
needs_ocbench = pytest.mark.skipif(
    simulators.installed_version("ocbench") is None, reason="needs the ocbench extra"
)


def made(task: str, **kwargs) -> gym.Env:
    return gym.make(ID, task=task, disable_env_checker=True, **kwargs)


@pytest.fixture(scope="module")
def switch() -> Iterator[gym.Env]:
    """Making one takes a second, so tests share it."""
    env = made(SWITCH)
    yield env
    env.close()


def episode(env: gym.Env, seed: int, steps: int) -> list[np.ndarray]:
    observation, _ = env.reset(seed=seed)
    rng, expert = np.random.default_rng(seed), env.get_wrapper_attr("expert_action")
    seen = [observation]
    while len(seen) <= steps:
        observation, _, terminated, truncated, _ = env.step(expert(rng))
        seen.append(observation)
        if terminated or truncated:
            break
    return seen


def test_without_the_package_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulators, "installed_version", lambda name: None)
    with pytest.raises(DependencyNotInstalled, match=r'pip install "diffpolicy\[ocbench\]"'):
        made(BLOCK)
    with pytest.raises(ValueError, match="did you mean block-lite-single-task1"):
        made("block-lite-single")


def test_every_recipe_is_of_a_task() -> None:
    assert [f"ocbench/{recipe.kwargs['task']}" for recipe in RECIPES.values()] == list(RECIPES)
    assert {str(recipe.kwargs["task"]) for recipe in RECIPES.values()} <= set(TASKS)


@needs_ocbench
@pytest.mark.mujoco
class TestSimulated:
    def test_the_tasks_are_the_packages(self) -> None:
        simulators.import_benchmark("ocbench", "oracles")
        own = [i for i in gym.registry if "-cpu-" in i and not i.startswith("visual-")]
        assert sorted(i.replace("-cpu-", "-").removesuffix("-v0") for i in own) == sorted(TASKS)

    def test_gymnasiums_checks(self, gymnasium_checks) -> None:
        gymnasium_checks("diffpolicy/OCBench-v0", task=SWITCH)

    def test_success_is_the_benchmarks_on_recorded_states(self) -> None:
        env = made(BLOCK)
        simulator = env.unwrapped.simulator
        env.reset(seed=1)
        rng, expert = np.random.default_rng(0), env.get_wrapper_attr("expert_action")
        states, said, rewards, terminated = [], [], [], False
        while not terminated:
            *_, reward, terminated, truncated, info = env.step(expert(rng))
            assert not truncated
            states.append((simulator.data.qpos.copy(), simulator.data.qvel.copy()))
            said.append(info["is_success"])
            rewards.append(reward)
        assert said == [False] * (len(said) - 1) + [True]  # which ends the episode
        assert rewards == [float(one) for one in said]
        for (qpos, qvel), expected in zip(states, said, strict=True):
            simulator.set_state(qpos, qvel)
            assert all(simulator._compute_successes()) == expected
            block = simulator.data.body("object_0").xpos  # within 4 cm of where it belongs
            assert (np.linalg.norm(block - [0.425, 0, 0.03]) <= 0.04) == expected
        env.close()

    def test_switches_are_solved_when_they_are_of_one_colour(self, switch: gym.Env) -> None:
        switch.reset(seed=0)
        for colours, solved in (([0] * 8 + [1], False), ([1] * 9, True)):
            switch.unwrapped.simulator._cur_button_states[:] = colours
            observation, reward, terminated, _, info = switch.step(STILL)
            assert (info["is_success"], terminated, reward) == (solved, solved, float(solved))
            states = observation[PROPRIOCEPTION:].reshape(9, 5)[:, :3]  # one-hot, of three states
            np.testing.assert_array_equal(states.argmax(1), colours)

    def test_the_limit_is_the_tasks(self, switch: gym.Env) -> None:
        assert switch.unwrapped.max_episode_steps == 300
        switch.reset(seed=0)
        switch.unwrapped._steps = 298
        assert [switch.step(STILL)[3] for _ in range(2)] == [False, True]

    def test_a_strike_is_ten_pins(self) -> None:
        env = made("bowling-task1")
        simulator, total, strike = env.unwrapped.simulator, 0.0, False
        env.reset(seed=0)
        for pins in (4, 7, 10, 10):  # a pin that was laid down may jump up again at once
            for pin in range(pins):
                simulator.data.joint(f"pin_joint_{pin}").qpos[3:] = [0.5, 0.5, 0.5, 0.5]
            _, reward, _, _, info = env.step(STILL)
            total += reward
            strike = bool(simulator._pin_knocked.all())
            assert total == pytest.approx(0.1 * simulator._pin_knocked.sum())
            assert info["is_success"] == strike
        assert strike
        env.close()

    def test_an_episode_depends_on_its_seed_alone(self) -> None:
        """Not on earlier episodes, which move the furniture, nor on NumPy's global generator."""
        env = made("chamber-lite-easy-task3")
        np.random.seed(0)  # noqa: NPY002
        state = np.random.get_state()[1].copy()  # noqa: NPY002
        first = [episode(env, seed, 25) for seed in (0, 1)]
        assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
        np.random.seed(7)  # noqa: NPY002
        second = [episode(env, seed, 25) for seed in (1, 0)][::-1]
        np.testing.assert_array_equal(first, second)
        assert not np.array_equal(first[0], first[1])
        env.close()

    def test_workers_and_this_process_record_the_same(self, tmp_path) -> None:
        spec = EnvSpec(ID, {"task": SWITCH}, max_episode_steps=12)
        stores = [
            collect(spec, range(4), tmp_path / name, workers=workers, keep="all", progress=False)
            for name, workers in (
                ("a", Workers(2, num_workers=0)),
                ("b", Workers(2, num_workers=2)),
            )
        ]
        assert [a["seed"] for a in stores[1].episode_attrs] == [0, 1, 2, 3]
        for name in ("obs", "action", "reward"):
            one, two = (store.read(name, 0, store.num_steps) for store in stores)
            np.testing.assert_array_equal(one, two)

    def test_the_benchmarks_cameras(self) -> None:
        views = {"front": 24, "wrist": {"size": 16, "view": "ur5e/wrist"}}
        try:
            env = made(BLOCK, targets=False, cameras=views, entries=list(range(PROPRIOCEPTION)))
        except gym.error.Error as error:
            if "cameras need MuJoCo to draw" in str(error):
                pytest.skip(str(error))
            raise
        observation, _ = env.reset(seed=0)
        shapes = {name: value.shape for name, value in observation.items()}
        assert shapes == {"observation": (19,), "front": (24, 24, 3), "wrist": (16, 16, 3)}
        assert observation["front"].std() > 10
        env.close()
