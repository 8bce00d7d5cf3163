"""Registration on import, and what happens where a simulator is missing or too new."""

import subprocess
import sys

import gymnasium as gym
import pytest
from gymnasium.error import DependencyNotInstalled

import diffpolicy_envs
from diffpolicy_envs import simulators

DESIGN = {
    f"diffpolicy/{n}-v0" for n in ("GB1", "LacPromoter", "RNAFolding", "SpliceSite", "TFBind8")
}


def test_every_id_is_registered_with_a_time_limit_or_ends_by_itself() -> None:
    for env_id in diffpolicy_envs.ENV_IDS:
        # As the environment in which they are, or the task.
        of_task = tuple(f"diffpolicy/{n}" for n in ("Agent", "Cameras", "OGBench", "OCBench"))
        free = env_id in DESIGN or env_id.startswith(of_task)
        limits = (None,) if free else (50, 100, 280, 300, 500, 600, 700, 800, 1000)
        assert gym.spec(env_id).max_episode_steps in limits
    assert set(diffpolicy_envs.ENV_IDS) >= DESIGN


def test_an_unknown_id_is_gymnasiums_error() -> None:
    with pytest.raises(gym.error.Error, match="FetchJuggle"):
        gym.make("diffpolicy_envs:diffpolicy/FetchJuggle-v0")


def test_import_needs_gymnasium_and_numpy_alone() -> None:
    code = """
import sys
simulators = ("mujoco", "gymnasium_robotics", "gym_pusht", "pymunk")
benchmarks = ("metaworld", "ogbench", "ocbench")
for name in (*simulators, *benchmarks, "torch", "zarr", "diffpolicy"):
    sys.modules[name] = None
import diffpolicy_envs, numpy
assert diffpolicy_envs.observation_from_state(numpy.zeros((2, 5))).shape == (2, 26)
import diffpolicy_envs.fetch, diffpolicy_envs.pointmaze, diffpolicy_envs.pusht
import diffpolicy_envs.metaworld, diffpolicy_envs.ogbench, diffpolicy_envs.ocbench
import diffpolicy_envs.sequences
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("env_id", "extra"),
    [
        ("FetchReach", "robotics"),
        ("PointMazeUMaze", "robotics"),
        ("PushT", "pusht"),
        ("MetaWorld", "metaworld"),
    ],
)
def test_a_missing_simulator_names_the_pip_command(
    monkeypatch: pytest.MonkeyPatch, env_id: str, extra: str
) -> None:
    monkeypatch.setattr(simulators, "installed_version", lambda name: None)
    with pytest.raises(DependencyNotInstalled, match=rf'pip install "diffpolicy\[{extra}\]"'):
        gym.make(f"diffpolicy_envs:diffpolicy/{env_id}-v0")


def test_mujoco_too_new_for_fetch_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"mujoco": (3, 12, 0), "gymnasium-robotics": (1, 4, 2)}
    monkeypatch.setattr(simulators, "installed_version", found.get)
    with pytest.raises(
        DependencyNotInstalled, match=r'3\.12\.0.*pip install "mujoco>=3\.3,<3\.12"'
    ):
        gym.make("diffpolicy_envs:diffpolicy/FetchPickAndPlace-v0")


@pytest.mark.parametrize(
    ("mujoco", "robotics"), [((3, 3, 0), (1, 4, 2)), ((3, 11, 5), (1, 4, 1)), ((4, 0, 0), (1, 5))]
)
def test_fitting_pairs_pass(mujoco: tuple[int, ...], robotics: tuple[int, ...]) -> None:
    simulators.check_mujoco(mujoco, robotics)


def test_pymunk_too_new_is_explained() -> None:
    simulators.check_pymunk((6, 11, 1), (0, 1, 8))
    with pytest.raises(DependencyNotInstalled, match=r"pymunk < 7.*found 7\.0"):
        simulators.check_pymunk((7, 0), (0, 1, 8))


def test_installed_versions_are_numbers() -> None:
    assert (simulators.installed_version("gymnasium") or ())[:2] >= (1, 1)
    assert simulators.installed_version("no-such-distribution") is None


def test_a_broken_simulator_points_to_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("libmujoco.so.4.0.0: cannot open shared object file")

    monkeypatch.setattr(simulators, "installed_version", {"mujoco": (3, 3)}.get)
    monkeypatch.setattr(simulators, "check_mujoco", lambda *versions: None)
    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(DependencyNotInstalled, match=r"libmujoco.so.4.*diffpolicy doctor"):
        simulators.import_robotics(fetch=True)
