"""OCBench: a UR5e arm moves blocks, a chamber, switches, a tower of Hanoi and a bowling ball.

The 28 tasks, and the 27 of them that are also `lite` (ten decisions a second instead of fifty), are
named as the package names its data sets, without the version: ``block-lite-single-task1``. Their
experts are the package's controllers, which make mistakes on purpose and repair them. In the tasks
that are not lite they move at half the speed, and the step limits are short for them: of eight
episodes that moved blocks three were solved in time.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from diffpolicy_envs.base import Action, FlatEnv, Info, Observation
from diffpolicy_envs.recipes import Recipe
from diffpolicy_envs.simulators import import_benchmark

# The package's name of what is to be done; the length of an observation; of the expert's episodes
# the mean length, how many were solved, and of how many (ocbench 1.0.2, MuJoCo 3.3.0). Of none: the
# length is estimated, by ten times that of the lite task, within the limit.
_MEASURED: Mapping[str, tuple[str, int, int, int, int]] = {
    "block-lite-single-task1": ("move", 28, 76, 195, 200),
    "block-lite-double-task1": ("double_pnp", 37, 143, 3, 3),
    "block-lite-double-task2": ("stack_anywhere", 37, 117, 3, 3),
    "block-lite-triple-task1": ("triple_pnp", 46, 229, 3, 3),
    "block-lite-triple-task2": ("stack_anywhere", 46, 210, 3, 3),
    "block-lite-quadruple-task1": ("quadruple_pnp", 55, 346, 3, 3),
    "block-lite-quadruple-task2": ("stack_anywhere", 55, 457, 3, 3),
    "block-lite-quadruple-task3": ("grid", 55, 701, 2, 3),
    "chamber-lite-easy-task1": ("open_all", 53, 160, 3, 3),
    "chamber-lite-easy-task2": ("put_in", 53, 326, 3, 3),
    "chamber-lite-easy-task3": ("take_out", 53, 288, 3, 3),
    "chamber-lite-medium-task1": ("put_all_in", 62, 542, 2, 3),
    "chamber-lite-medium-task2": ("stack_anywhere", 62, 441, 2, 3),
    "chamber-lite-hard-task1": ("put_all_in", 71, 531, 3, 3),
    "chamber-lite-hard-task2": ("stack_anywhere", 71, 487, 3, 3),
    "switch-lite-3x3-task1": ("monochrome", 64, 288, 1, 3),
    "switch-lite-3x3-task2": ("monochrome_drop", 64, 206, 1, 3),
    "switch-lite-4x4-task1": ("monochrome", 99, 224, 1, 3),
    "switch-lite-4x4-task2": ("monochrome_drop", 99, 258, 1, 3),
    "switch-lite-5x5-task1": ("monochrome", 144, 618, 1, 3),
    "switch-lite-5x5-task2": ("monochrome_drop", 144, 800, 0, 3),
    "hanoi-lite-single-task1": ("fixed", 39, 144, 3, 3),
    "hanoi-lite-single-task2": ("random", 39, 145, 3, 3),
    "hanoi-lite-double-task1": ("fixed", 44, 544, 3, 3),
    "hanoi-lite-double-task2": ("random", 44, 617, 2, 3),
    "hanoi-lite-triple-task1": ("fixed", 49, 1270, 0, 0),
    "hanoi-lite-triple-task2": ("random", 49, 1270, 0, 0),
    "block-single-task1": ("move", 28, 762, 1, 1),
    "block-double-task1": ("double_pnp", 37, 2500, 0, 1),
    "block-double-task2": ("stack_anywhere", 37, 557, 1, 1),
    "block-triple-task1": ("triple_pnp", 46, 3750, 0, 1),
    "block-triple-task2": ("stack_anywhere", 46, 3750, 0, 1),
    "block-quadruple-task1": ("quadruple_pnp", 55, 3518, 1, 1),
    "block-quadruple-task2": ("stack_anywhere", 55, 5000, 0, 1),
    "block-quadruple-task3": ("grid", 55, 5000, 0, 1),
    "chamber-easy-task1": ("open_all", 53, 1297, 1, 1),
    "chamber-easy-task2": ("put_in", 53, 3260, 0, 0),
    "chamber-easy-task3": ("take_out", 53, 2880, 0, 0),
    "chamber-medium-task1": ("put_all_in", 62, 5000, 0, 0),
    "chamber-medium-task2": ("stack_anywhere", 62, 4410, 0, 0),
    "chamber-hard-task1": ("put_all_in", 71, 5310, 0, 0),
    "chamber-hard-task2": ("stack_anywhere", 71, 4870, 0, 0),
    "switch-3x3-task1": ("monochrome", 64, 1500, 0, 1),
    "switch-3x3-task2": ("monochrome_drop", 64, 800, 1, 1),
    "switch-4x4-task1": ("monochrome", 99, 1500, 0, 1),
    "switch-4x4-task2": ("monochrome_drop", 99, 1500, 0, 1),
    "switch-5x5-task1": ("monochrome", 144, 4000, 0, 0),
    "switch-5x5-task2": ("monochrome_drop", 144, 4000, 0, 0),
    "hanoi-single-task1": ("fixed", 39, 760, 1, 1),
    "hanoi-single-task2": ("random", 39, 768, 1, 1),
    "hanoi-double-task1": ("fixed", 44, 3000, 0, 0),
    "hanoi-double-task2": ("random", 44, 3000, 0, 0),
    "hanoi-triple-task1": ("fixed", 49, 7000, 0, 0),
    "hanoi-triple-task2": ("random", 49, 7000, 0, 0),
    "bowling-task1": ("knock_down", 102, 500, 0, 2),
}

TASKS: tuple[str, ...] = (*_MEASURED,)
"""The names of the tasks."""

PROPRIOCEPTION = 19
"""The first entries of every observation, which are the arm's own; what follows is the scene's."""


class OCBenchEnv(FlatEnv):
    """A task of OCBench, with the benchmark's own observations, rewards, success and step limits.

    Observation [O], scaled by the benchmark: the arm (19 entries: six joint angles and velocities,
    position, and cosine and sine of the yaw, of the gripper, its opening and contact), then the
    scene's positions, angles and states. Action [7] in [-1, 1]: by how much the six joints and the
    gripper's opening are to change. Reward 1 where the task is solved, which ends the episode, else
    0; an episode also ends where it has failed (a disk on the floor, an object out of reach).
    Bowling has no success of its own: its reward is 0.1 for every pin that falls, and a strike is
    called a success here.

    Args:
        task: one of `TASKS`, such as ``"block-lite-single-task1"``.
        render_mode: None or ``"rgb_array"``.
        targets: whether pictures and cameras show the goals, and light up what has arrived. The
            benchmark's own tasks from pixels do not.
        width: width of pictures in pixels, the largest that a camera may have.
        height: height of pictures in pixels, likewise.

    Raises:
        gymnasium.error.DependencyNotInstalled: ocbench or MuJoCo is missing.
        ValueError: an unknown task.

    Example:
        >>> env = gym.make("diffpolicy_envs:diffpolicy/OCBench-v0", task="block-lite-single-task1")
    """

    def __init__(
        self,
        task: str,
        render_mode: str | None = None,
        *,
        targets: bool = True,
        width: int = 480,
        height: int = 480,
    ) -> None:
        if task not in TASKS:
            near = difflib.get_close_matches(str(task), TASKS, n=3, cutoff=0.3) or TASKS[:1]
            raise ValueError(f"OCBench has no task {task!r}; did you mean {' or '.join(near)}?")
        import_benchmark("ocbench", "oracles")
        self.task = task
        family, kind = task.split("-", 1)
        spec = gym.spec(f"{family}-cpu-{kind}-v0")  # the package's name for "not on a GPU"
        simulator: Any = gym.make(
            spec,
            max_episode_steps=-1,
            disable_env_checker=True,
            width=width,
            height=height,
            visualize_info=targets,
        ).unwrapped
        raw, self._info = simulator.reset(seed=0)  # compiles the model, which cameras ask for
        super().__init__(simulator, len(raw), render_mode)
        self.metadata = {  # type: ignore[misc]  # the lite tasks have a rate of their own
            "render_modes": ["rgb_array"],
            "render_fps": round(1 / simulator.control_timestep()),
            "packages": ["ocbench", "mujoco", "dm-control"],
        }
        self.max_episode_steps = int(spec.max_episode_steps or 0)
        self._family, self._raw = family, raw
        self._controller: Any = None
        self._steps, self._return = 0, 0.0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        """Start an episode, and the expert's memory with it; see `FlatEnv.reset`."""
        self._controller, self._steps, self._return = None, 0, 0.0
        observation, self._info = super().reset(seed=seed, options=options)
        return observation, self._info

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, Info]:
        """Advance one control step of 0.02 s (lite: 0.1 s); see `FlatEnv.step`."""
        observation, reward, terminated, _, self._info = super().step(action)
        self._steps += 1
        self._return += reward
        self._info["is_success"] = self._success(self._info)
        truncated = self._steps >= self.max_episode_steps and not terminated
        return observation, reward, terminated, truncated, self._info

    def expert_action(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """The action of the benchmark's controller, which plans, errs and tries again.

        Args:
            rng: of everything that the controller draws.

        Returns:
            Action [7] in [-1, 1].
        """
        with _lent(rng):
            if self._controller is None:
                oracles = importlib.import_module("ocbench.oracles")
                self._controller = getattr(oracles, f"{self._family.title()}Controller")(
                    self.simulator
                )
                self._controller.reset(self._raw, self._info)
            action = self._controller.select_action(self._raw, self._info)
        return np.asarray(action, np.float32)

    def _flatten(self, raw: NDArray[np.float64]) -> Observation:
        self._raw = raw
        return raw.astype(np.float32)

    def _success(self, info: Mapping[str, Any]) -> bool:
        return self._return > 0.95 if self._family == "bowling" else bool(info["success"])


@contextlib.contextmanager
def _lent(rng: np.random.Generator) -> Iterator[None]:
    """Seed NumPy's global generator, from which the controllers draw, and put it back after."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(rng.integers(2**32))  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


_WORK = {
    "block": "blocks brought to their places, or stacked; a tenth of the subtasks are mistakes",
    "chamber": "a drawer, a window, their locks, and blocks; a fifth of the subtasks are mistakes",
    "switch": "switches that turn their neighbours too; of the presses 20 to 100 % are mistakes",
    "hanoi": "a tower of Hanoi, moved disk by disk; of the moves 0.2 % are mistakes",
    "bowling": "a ball pushed at ten pins, each time in another way",
}


def _recipe(task: str) -> Recipe:
    name, length, steps, solved, tried = _MEASURED[task]
    trials = f"solved in {solved} of {tried} trials" if tried else "not tried to the end"
    episodes = 200 if "-lite-" in task else 100
    rate = 130 if "-lite-" in task else 400  # control steps in a CPU second, of a busy machine
    return Recipe(
        env="diffpolicy_envs:diffpolicy/OCBench-v0",
        kwargs={"task": task},
        episodes=episodes,
        keep="all",  # failed episodes too: mistakes, and how they are repaired, are the point
        about=f"{name}: {_WORK[task.split('-')[0]]}; {trials}",
        licence="MIT (ocbench; its robots BSD)",
        extra="ocbench",
        minutes=round(episodes * steps / rate / 60, 1),
        megabytes=round(episodes * steps * (4 * length + 34) * 0.86 / 1e6, 1),  # 0.86: compressed
    )


RECIPES = {f"ocbench/{task}": _recipe(task) for task in _MEASURED}
"""Demonstrations by the benchmark's controllers."""
