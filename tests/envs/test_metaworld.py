"""Meta-World: every seed its own goal, the package's own simulation, experts, sets of tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from diffpolicy_envs.metaworld import GROUPS, RECIPES, TASKS

NAME = "diffpolicy/MetaWorld-v0"
DEMONSTRATIONS, SCORES = range(50), range(300_000, 300_050)


@pytest.fixture
def package() -> Any:
    return pytest.importorskip("metaworld", exc_type=ImportError)


def made(**kwargs: Any) -> gym.Env[Any, Any]:
    pytest.importorskip("metaworld", exc_type=ImportError)
    return gym.make(f"diffpolicy_envs:{NAME}", disable_env_checker=True, **kwargs)


def expert_episode(env: gym.Env[Any, Any], seed: int) -> list[dict[str, Any]]:
    """What the infos say from the reset to the end of an episode of the expert."""
    _, info = env.reset(seed=seed)
    infos, over = [info], False
    while not over:
        action = env.get_wrapper_attr("expert_action")(np.random.default_rng(0))
        assert env.action_space.contains(action)
        *_, terminated, truncated, info = env.step(action)
        infos.append(info)
        over = terminated or truncated
    assert terminated == any(one["is_success"] for one in infos)
    return infos


def test_names_and_recipes_are_the_benchmarks(package: Any) -> None:
    assert {f"{name}-v3" for name in TASKS} == set(package.env_dict.ALL_V3_ENVIRONMENTS)
    assert [len(names) for names in GROUPS.values()] == [28, 11, 6, 5]
    assert set(RECIPES) == {f"metaworld/{name}" for name in (*TASKS, "mt10", "mt50")}
    for number, names in ((10, package.MT10.__name__), (50, package.MT50.__name__)):
        env = made(tasks=names).unwrapped
        classes = getattr(package.env_dict, f"{names}_V3")
        assert [f"{name}-v3" for name in env.tasks] == list(classes)  # type: ignore[attr-defined]
        assert len(classes) == number == env.observation_space["task"].high[0] + 1  # type: ignore[index]
        env.close()


@pytest.mark.parametrize("first_of_ten", range(5))
def test_every_task_starts_where_its_seed_says_and_nowhere_else(first_of_ten: int) -> None:
    env = made(tasks="MT50")
    action = np.array([0.5, -0.5, -1.0, 1.0], np.float32)
    for number in range(first_of_ten, 50, 5):
        first, info = env.reset(seed=number)
        steps = [env.step(action)[0]["observation"] for _ in range(3)]
        other, _ = env.reset(seed=number + 50)
        again, _ = env.reset(seed=number)
        name = info["task"]
        assert first["task"] == again["task"] == other["task"] == [number]
        np.testing.assert_array_equal(first["observation"], again["observation"], err_msg=name)
        # Entries 4 to 17 are the objects, the last three the goal.
        moved = np.abs(first["observation"] - other["observation"])[[*range(4, 18), 36, 37, 38]]
        assert moved.max() > 0.005, name
        after = [env.step(action)[0]["observation"] for _ in range(3)]
        np.testing.assert_array_equal(steps, after, err_msg=name)
        # Nothing that is observed jumps in the first step: the reset shows where things are.
        assert np.abs(steps[0] - first["observation"]).max() < 0.02, name
    env.close()


@pytest.mark.parametrize("task", ["pick-place", "window-open"])
def test_no_goal_that_is_scored_was_demonstrated(task: str) -> None:
    env = made(task=task)
    drawn = [env.reset(seed=s)[0][[*range(4, 18), 36, 37, 38]] for s in (*DEMONSTRATIONS, *SCORES)]
    apart = np.linalg.norm(np.array(drawn)[:50, None] - np.array(drawn)[None, 50:], axis=-1)
    assert apart.min() > 1e-5
    assert len(np.unique(drawn, axis=0)) == 100
    env.close()


@pytest.mark.parametrize("task", ["drawer-open", "pick-place"])
def test_the_simulation_is_the_packages(task: str, package: Any) -> None:
    """Beside its own environment, prepared as its classes with observable goals are."""
    own, env = package.env_dict.ALL_V3_ENVIRONMENTS[f"{task}-v3"](), made(task=f"{task}-v3")
    own._partially_observable, own._freeze_rand_vec, own._set_task_called = False, False, True
    del own.sawyer_observation_space
    own.seeded_rand_vec = True
    own.seed(7)
    stale, _ = own.reset()
    seen, _ = env.reset(seed=7)
    if task == "pick-place":  # of drawer-open it shows the drawer of another draw
        np.testing.assert_array_equal(seen, stale.astype(np.float32))
    for step, action in enumerate(np.random.default_rng(0).uniform(-1, 1, (40, 4))):
        expected, reward, *_, info = own.step(action.astype(np.float32))
        got, value, *_, said = env.step(action.astype(np.float32))
        # The step before the first is the reset, which both show in their own way.
        same = [*range(18), 36, 37, 38] if step == 0 else slice(None)
        np.testing.assert_array_equal(got[same], expected[same].astype(np.float32))
        assert value == pytest.approx(reward, abs=1e-12)
        assert said["is_success"] == bool(info["success"])
    own.close()
    env.close()


def test_gymnasium_checks(gymnasium_checks: Callable[[str], None], package: Any) -> None:
    gymnasium_checks(NAME)


@pytest.mark.parametrize("task", ["reach", "button-press", "peg-insert-side", "assembly"])
def test_experts_succeed_and_an_episode_ends_soon_after(task: str) -> None:
    env = made(task=task, after_success=4)
    for seed in (0, 1):
        said = [info["is_success"] for info in expert_episode(env, seed)]
        assert said.index(True) == len(said) - 5  # the reset is the first
    env.close()


def test_without_success_an_episode_takes_500_steps() -> None:
    env = made(task="hammer")
    env.reset(seed=0)
    ends = [env.step(np.zeros(4, np.float32))[2:4] for _ in range(500)]
    assert ends[-1] == (False, True)
    assert not any(any(end) for end in ends[:-1])
    env.close()


def test_several_tasks_take_turns_and_say_so() -> None:
    env = made(tasks=["door-close", "reach-v3"])
    names = []
    for seed in (300_000, 300_001, 300_002):
        obs, info = env.reset(seed=seed)
        assert env.observation_space.contains(obs)
        assert obs["task"] == [seed % 2]
        names.append(info["task"])
        assert env.step(np.zeros(4, np.float32))[4]["task"] == names[-1]
    assert names == ["door-close", "reach", "door-close"]
    alone = made(task="reach")
    np.testing.assert_array_equal(
        env.reset(seed=5)[0]["observation"], alone.reset(seed=5)[0], strict=True
    )
    env.close()
    alone.close()


def test_tasks_are_told_by_vectors_of_a_file(tmp_path: Any) -> None:
    file = str(tmp_path / "sentences.npy")
    vectors = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    np.save(file, vectors)
    env = made(tasks=["door-close", "reach"], task_vectors=file)
    for seed in (4, 5):
        obs, _ = env.reset(seed=seed)
        assert env.observation_space.contains(obs)
        np.testing.assert_array_equal(obs["task"], vectors[seed % 2])
    env.close()
    for kwargs, message in (
        ({"task": "reach"}, "give tasks, not task"),
        ({"tasks": ["reach", "push", "hammer"]}, r"shape \[2, 5\], not \[3, D\].*reach, push"),
    ):
        with pytest.raises(ValueError, match=message):
            made(**kwargs, task_vectors=file)
    with pytest.raises(ValueError, match=r"none.npy' is no .npy of numbers"):
        made(tasks=["reach", "push"], task_vectors="none.npy")


@pytest.mark.mujoco
def test_cameras_see_the_task_of_the_episode() -> None:
    kwargs = {"cameras": {"front": 32, "corner2": 32}, "entries": [0, 1, 2, 3]}
    try:
        env = made(tasks=["door-open", "reach"], **kwargs)
    except gym.error.Error as error:
        pytest.skip(str(error))
    alone = made(task="reach", **kwargs)
    pictures = []
    for seed in (0, 1, 2, 3):
        obs, _ = env.reset(seed=seed)
        assert obs["observation"].shape == (4,)
        pictures.append(obs["front"])
        if seed % 2:
            np.testing.assert_array_equal(obs["front"], alone.reset(seed=seed)[0]["front"])
    assert all(picture.std() > 10 for picture in pictures)
    assert np.abs(pictures[0].astype(float) - pictures[1]).mean() > 1
    env.close()
    alone.close()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"task": "pick-plaec"}, "no task 'pick-plaec'; did you mean pick-place"),
        ({"task": "reach", "tasks": "MT10"}, "task or tasks, not both"),
        ({"tasks": "MT11"}, "one of .*MT50.* or a list of names"),
        ({"tasks": []}, "tasks must be names, no two alike"),
        ({"tasks": ["reach", "reach-v3"]}, "no two alike"),
        ({"after_success": -1}, "a number of steps, got -1"),
    ],
)
def test_bad_input_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gym.make(f"diffpolicy_envs:{NAME}", **kwargs)


def test_a_policy_is_trained_on_a_recipe_and_told_the_task(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, package: Any, capsys: Any
) -> None:
    from diffpolicy.cli import main

    monkeypatch.chdir(tmp_path)
    quick = ["episodes=2", "workers=0", "kwargs={tasks: [reach, push]}"]
    assert main(["data", "make", "metaworld/mt10", *quick]) == 0
    settings = ["trainer.steps=2", "trainer.batch_size=16", "network.width=16", "threads=1"]
    settings += [
        "evaluation.episodes=2",
        "evaluation.num_workers=0",
        "env.max_episode_steps=10",
        "trainer.progress=false",
    ]
    settings += ["env.kwargs.tasks=[reach,push]", "run_dir=run"]
    assert main(["train", "experiment=metaworld_mt10", *settings]) == 0
    assert "metaworld_mt10" in capsys.readouterr().out
