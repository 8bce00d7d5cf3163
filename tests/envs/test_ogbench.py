"""OGBench: recording as the published script does, tasks and rewards as the wheel has them."""

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from diffpolicy.data import convert
from diffpolicy.rollout.record.making import make_set
from diffpolicy_envs import simulators
from diffpolicy_envs.ogbench import RECIPES, relabel
from diffpolicy_envs.ogbench.collecting import RANDOM, make_oracles
from diffpolicy_envs.ogbench.simulator import NAMES
from diffpolicy_envs.ogbench.tasks import task_number

COLLECT = "diffpolicy_envs:diffpolicy/OGBenchCollect-v0"
SINGLE = "diffpolicy_envs:diffpolicy/OGBench-v0"
GOALS = "diffpolicy_envs:diffpolicy/OGBenchGoals-v0"
STEPS = 130
RNG = np.random.default_rng(0)
# Observation lengths of the published files.
SIZES = {"cube-double": 37, "puzzle-3x3": 55}


class TestRecipes:
    def test_they_are_as_many_as_published(self) -> None:
        for name in NAMES:
            for style in ("play", "noisy"):
                train, val = (RECIPES[f"ogbench/{name}-{style}{end}"] for end in ("", "-val"))
                assert train.episodes == 10 * val.episodes
                assert train.seeds_from + 1.2 * train.episodes < val.seeds_from
        many = {f"ogbench/{name}-play" for name in ("cube-quadruple", "puzzle-4x6")}
        assert {n for n, r in RECIPES.items() if r.episodes == 5000 and not r.derived} >= many

    def test_rewards_are_derived_from_recorded_sets(self) -> None:
        derived = {name: recipe for name, recipe in RECIPES.items() if recipe.derived}
        assert len(derived) == 9 * 5 + 2 * 5
        for name, recipe in derived.items():
            assert name.startswith(f"{recipe.derived}-task")
            base = RECIPES[str(recipe.derived)]
            assert base.kwargs["name"] == recipe.kwargs["name"]
            assert "qpos" in base.fields
        assert RECIPES["ogbench/scene-play-task1-sparse"].kwargs["sparse"] is True


@pytest.mark.parametrize("env_id", [COLLECT, SINGLE, GOALS])
def test_a_missing_simulator_names_the_pip_command(
    monkeypatch: pytest.MonkeyPatch, env_id: str
) -> None:
    monkeypatch.setattr(simulators, "installed_version", lambda name: None)
    with pytest.raises(gym.error.DependencyNotInstalled, match=r'"diffpolicy\[ogbench\]"'):
        gym.make(env_id)


@pytest.mark.parametrize(
    ("env_id", "kwargs", "message"),
    [
        (COLLECT, {"name": "cube"}, "name must be one of cube-single, .*; got 'cube'"),
        (COLLECT, {"style": "human"}, "style must be"),
        (COLLECT, {"steps": 0}, "at least one step"),
        (SINGLE, {"task": 6}, "task must be 1 to 5, or 0"),
        (SINGLE, {"success_timing": "now"}, "success_timing must be"),
        (GOALS, {"task": 7}, "task must be 1 to 5"),
    ],
)
def test_bad_arguments_are_explained(env_id: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gym.make(env_id, **kwargs)


def test_default_tasks_are_those_of_the_benchmark() -> None:
    assert [task_number(n, 0) for n in ("scene", "puzzle-3x3", "puzzle-4x6")] == [2, 4, 2]
    assert task_number("puzzle-4x4", 5) == 5


def make(env_id: str, **kwargs: Any) -> Any:
    return gym.make(env_id, disable_env_checker=True, **kwargs)


def episode(env: Any, seed: int, steps: int) -> dict[str, np.ndarray]:
    """What is recorded of an episode's first steps, as `collect` records it."""
    observation, info = env.reset(seed=seed)
    rng, rows = np.random.default_rng([seed, 1]), []
    for _ in range(steps):
        action = env.get_wrapper_attr("expert_action")(rng)
        rows.append({"obs": observation, "action": action, **info["record"]})
        observation, _, _, _, info = env.step(action)
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def straight_loop(name: str, style: str, seed: int, steps: int) -> dict[str, np.ndarray]:
    """The published recording in a few lines: the wheel's environment and oracles, NumPy's draws.

    Unlike there, random actions are drawn from the same generator: the wheel's space has no seed.
    """
    from ogbench.manipspace.oracles.markov import cube_markov
    from ogbench.manipspace.oracles.plan import button_plan, cube_plan, drawer_plan, window_plan

    env = gym.make(f"{name}-v0", terminate_at_goal=False, mode="data_collection")
    plans = {"noise": 0.1, "noise_smoothing": 0.5}
    oracles: dict[str, Any] = {
        ("cube-double", "noisy"): {"cube": cube_markov.CubeMarkovOracle(env=env, min_norm=0.4)},
        ("scene", "play"): {
            "cube": cube_plan.CubePlanOracle(env=env, **plans),
            "button": button_plan.ButtonPlanOracle(env=env, **plans),
            "drawer": drawer_plan.DrawerPlanOracle(env=env, **plans),
            "window": window_plan.WindowPlanOracle(env=env, **plans),
        },
    }[name, style]
    noisy = style == "noisy"
    np.random.seed(np.random.default_rng([seed, 1]).integers(2**32))  # noqa: NPY002
    observation, info = env.reset(seed=seed)
    stacking = np.random.uniform(0, 0.25) if name == "cube-double" else 0.5  # noqa: NPY002
    level = np.random.uniform(0, 0.1) if noisy else 0.0  # noqa: NPY002
    oracle = oracles[info["privileged/target_task"]]
    oracle.reset(observation, info)
    rows = []
    for _ in range(steps):
        if np.random.rand() < (0.1 if noisy else 0.0):  # noqa: NPY002
            action = np.random.uniform(-1, 1, 5)  # noqa: NPY002
        else:
            action = np.array(oracle.select_action(observation, info))
            if noisy:
                scale = [level, level, level, level * 3, level * 10]
                action = action + np.random.normal(0, scale, 5)  # noqa: NPY002
        action = np.clip(action, -1, 1).astype(np.float32)  # as it is stored
        following, _, _, _, info = env.step(action)
        if oracle.done:
            asked = env.unwrapped.set_new_target(p_stack=stacking)  # type: ignore[attr-defined]
            oracle = oracles[asked[1]["privileged/target_task"]]
            oracle.reset(*asked)
        row = {"obs": observation, "action": action}
        row |= {
            k: info[f"prev_{k}"] for k in ("qpos", "qvel", "button_states") if f"prev_{k}" in info
        }
        rows.append(row)
        observation = following
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.fixture(scope="module")
def ogbench() -> Iterator[None]:
    """The wheel, which spends most of a short test on compiling: every model once."""
    pytest.importorskip("ogbench", exc_type=ImportError)
    mujoco = pytest.importorskip("mujoco", exc_type=ImportError)
    compile_model, compiled = mujoco.MjModel.from_xml_string, {}

    def once(xml: str, assets: Any) -> Any:
        if xml not in compiled:
            compiled[xml] = compile_model(xml, assets)
        return copy.copy(compiled[xml])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mujoco.MjModel, "from_xml_string", staticmethod(once))
        yield


@pytest.mark.mujoco
@pytest.mark.usefixtures("ogbench")
class TestCollecting:
    def test_oracles_have_the_published_settings(self) -> None:
        simulator = SimpleNamespace(_control_timestep=0.05)
        simulator.unwrapped = simulator
        noisy = make_oracles(simulator, "puzzle-3x3", "noisy")
        assert list(noisy) == ["button"]
        assert noisy["button"]._gripper_always_closed
        assert noisy["button"]._min_norm == 0.4
        play = make_oracles(simulator, "scene", "play")
        assert list(play) == ["cube", "button", "drawer", "window"]
        assert {(one._noise, one._noise_smoothing) for one in play.values()} == {(0.1, 0.5)}
        assert not play["button"]._gripper_always_closed
        assert RANDOM == {"cube": 0.1, "scene": 0.1, "puzzle": 0.2}

    @pytest.mark.parametrize(("name", "style"), [("cube-double", "noisy"), ("scene", "play")])
    @pytest.mark.filterwarnings("ignore:.*Box (low|high)'s precision lowered:UserWarning")
    def test_equals_the_published_script_bit_for_bit(self, name: str, style: str) -> None:
        env = make(COLLECT, name=name, style=style, steps=STEPS)
        global_state = np.random.get_state()[1].copy()  # noqa: NPY002
        got = episode(env, 7, STEPS)
        np.testing.assert_array_equal(np.random.get_state()[1], global_state)  # noqa: NPY002
        # Nothing of one episode is left in the next, nor do others' draws matter.
        np.random.seed(5)  # noqa: NPY002
        again = episode(env, 7, 30)
        known = straight_loop(name, style, 7, STEPS)
        for field, values in got.items():
            np.testing.assert_array_equal(values, known[field].astype(values.dtype), field)
            np.testing.assert_array_equal(values[:30], again[field], field)
        env.close()

    def test_an_episode_is_a_success_at_its_end_if_it_is_fit_to_be_kept(self) -> None:
        env = make(COLLECT, name="scene", steps=3)
        assert env.get_wrapper_attr("max_episode_steps") == 3
        cube = slice(14, 17)
        for place, fit in (([0.4, 0.1, 0.02], True), ([0.4, 0.31, 0.02], False)):
            _, info = env.reset(seed=0)
            said = [info["is_success"]]
            simulator = env.unwrapped.simulator
            qpos = simulator.data.qpos.copy()
            qpos[cube] = place
            simulator.set_state(qpos, simulator.data.qvel, info["record"]["button_states"])
            for step in range(3):
                *_, truncated, info = env.step(env.get_wrapper_attr("expert_action")(RNG))
                assert truncated == (step == 2)
                said.append(info["is_success"])
            assert said == [False, False, False, fit]
        env.close()


def states(simulator: Any, goal: dict[str, Any], rng: np.random.Generator) -> Iterator[Any]:
    """States from "nothing is where it should be" to "everything is", of ``scene``."""
    for wrong in range(16):
        qpos = simulator.data.qpos.copy()
        bad = [bool(wrong >> bit & 1) for bit in range(4)]
        qpos[14:17] = goal["block_xyzs"][0] + bad[0] * np.array([0.06, 0, 0])
        qpos[23] = goal["drawer_pos"] + 0.1 * bad[1]
        qpos[24] = goal["window_pos"] - 0.1 * bad[2]
        buttons = goal["button_states"] ^ np.array([bad[3], 0])
        qpos[:6] += rng.normal(0, 0.01, 6)
        yield qpos.astype(np.float32), buttons


@pytest.mark.mujoco
@pytest.mark.usefixtures("ogbench")
class TestTasks:
    def test_relabelling_is_the_wheels_and_the_environments(self) -> None:
        from ogbench.relabel_utils import relabel_dataset

        env = make(SINGLE, name="scene", task=4)
        env.reset(seed=0)
        simulator = env.unwrapped.simulator
        goal, rng = simulator.task_infos[3]["goal"], np.random.default_rng(0)
        qpos, buttons = map(np.array, zip(*states(simulator, goal, rng), strict=True))
        theirs: dict[str, Any] = {"qpos": qpos, "button_states": buttons}
        relabel_dataset("scene-singletask-task4-v0", simulator, theirs)
        ours = {"info.qpos": qpos, "info.button_states": buttons}
        got = relabel(ours, name="scene", task=4)
        np.testing.assert_array_equal(got["reward"], theirs["rewards"])
        np.testing.assert_array_equal(got["terminated"], theirs["masks"] == 0)
        assert sorted(set(got["reward"])) == [-4, -3, -2, -1, 0]
        for q, b, reward in zip(qpos, buttons, got["reward"], strict=True):
            simulator.set_state(q.astype(np.float64), simulator.data.qvel, b)
            assert simulator.compute_reward() == reward
        sparse = relabel(ours, name="scene", task=4, sparse=True)
        np.testing.assert_array_equal(sparse["reward"], -1.0 * (theirs["rewards"] != 0))
        env.close()

    def test_the_authors_file_gets_rewards(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        arrays = {"observations": rng.normal(size=(8, 40)), "actions": rng.normal(size=(8, 5))}
        arrays |= {"terminals": np.arange(8) % 4 == 3, "button_states": np.zeros((8, 2), np.int64)}
        qpos = np.zeros((8, 25), np.float32)
        qpos[:, 14:17] = [0.35, -0.05, 0.02]  # where task 2 wants the cube
        qpos[:3, 23] = -0.16  # the drawer is open
        np.savez(tmp_path / "scene-play-v0.npz", **arrays, qpos=qpos)
        convert(tmp_path / "scene-play-v0.npz", tmp_path / "scene.zarr").close()
        for end in ("", "-sparse"):
            name = f"ogbench/scene-play-task2{end}"
            place = tmp_path / f"{end}.zarr"
            store = make_set(name, place, base=tmp_path / "scene.zarr", episodes=2, progress=False)
            assert store.read("reward").tolist() == [-1] * 3 + [0] * 5
            assert store.read("terminated").tolist() == [False] * 3 + [True] * 5
            assert store.read("truncated").tolist() == arrays["terminals"].tolist()
            assert sorted(store.fields) == ["action", "obs", "reward", "terminated", "truncated"]
            store.close()

    @pytest.mark.parametrize("name", ["cube-double", "puzzle-3x3"])
    def test_relabelling_of_recorded_steps_is_the_wheels(self, name: str) -> None:
        from ogbench.relabel_utils import relabel_dataset

        env, size = make(SINGLE, name=name, task=1), SIZES[name]
        observation, info = env.reset(seed=0)
        assert observation.shape == (size,)
        assert info["task"].startswith("task1")
        simulator = env.unwrapped.simulator
        rng, rows = np.random.default_rng(0), []
        for _ in range(40):
            rows.append((simulator.data.qpos.astype(np.float32), simulator.compute_reward()))
            env.step(rng.uniform(-1, 1, 5).astype(np.float32))
        qpos, rewards = map(np.array, zip(*rows, strict=True))
        theirs: dict[str, Any] = {"qpos": qpos}
        ours = {"info.qpos": qpos}
        if name == "puzzle-3x3":
            pressed = simulator._target_button_states ^ rng.integers(0, 2, (40, 9))
            pressed[20:] = simulator._target_button_states
            theirs["button_states"] = ours["info.button_states"] = pressed
        relabel_dataset(f"{name}-singletask-task1-v0", simulator, theirs)
        got = relabel(ours, name=name, task=1)
        np.testing.assert_array_equal(got["reward"], theirs["rewards"])
        np.testing.assert_array_equal(got["terminated"], theirs["masks"] == 0)
        if name != "puzzle-3x3":
            np.testing.assert_array_equal(got["reward"], rewards)
        env.close()

    @pytest.mark.parametrize(("timing", "late"), [("pre", True), ("post", False)])
    def test_a_task_ends_where_the_benchmark_ends_it(self, timing: str, late: bool) -> None:
        env = make(SINGLE, name="puzzle-3x3", sparse=True, success_timing=timing)
        _, info = env.reset(seed=0)
        assert not info["is_success"]
        still = np.zeros(5, np.float32)
        _, reward, terminated, _, info = env.step(still)
        assert (reward, terminated, info["is_success"]) == (-1.0, False, False)
        simulator = env.unwrapped.simulator
        simulator._cur_button_states = simulator._target_button_states.copy()
        for over in (False, True) if late else (True,):
            _, reward, terminated, _, info = env.step(still)
            assert terminated == info["is_success"] == over
            assert reward == 0.0
        env.close()

    def test_goals_are_the_five_of_the_benchmark_and_follow_from_the_seed(self) -> None:
        env = make(GOALS, name="cube-double")
        seen = {}
        for seed in (10, 11, 12, 13, 14, 10):
            observation, info = env.reset(seed=seed)
            assert env.observation_space.contains(observation)
            known = env.unwrapped.simulator.task_infos[seed % 5]
            assert info["task"] == known["task_name"]
            goal = observation["desired_goal"]
            # Scaled as observations are: from the middle of the table, in decimetres.
            cubes = goal[19:].reshape(2, 9)[:, :3] / 10 + np.array([0.425, 0, 0])
            near = np.linalg.norm(cubes[:, None] - known["goal_xyzs"], axis=-1) < 0.01
            assert near.any(1).all()
            np.testing.assert_array_equal(goal, seen.setdefault(seed, goal))
            following, reward, terminated, truncated, info = env.step(np.zeros(5, np.float32))
            np.testing.assert_array_equal(following["desired_goal"], goal)
            assert (reward, terminated, truncated, info["is_success"]) == (0.0, False, False, False)
        assert env.get_wrapper_attr("max_episode_steps") == 500
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check_env(env.unwrapped, skip_render_check=True)
        env.close()

    def test_goals_behind_the_state_in_one_vector(self) -> None:
        env, flat = (make(GOALS, name="cube-single", flat=one) for one in (False, True))
        observation, vector = (one.reset(seed=2)[0] for one in (env, flat))
        assert flat.observation_space.contains(vector)
        both = [observation["observation"], observation["desired_goal"]]
        np.testing.assert_array_equal(vector, np.concatenate(both))
        env.close()
        flat.close()
