"""OGBench's robot arm, made so that every draw of an episode follows from the episode's seed."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import load_env_creator
from numpy.typing import NDArray

from diffpolicy_envs.base import Action, FlatEnv, Info, Observation
from diffpolicy_envs.simulators import import_benchmark

NAMES = (
    "cube-single",
    "cube-double",
    "cube-triple",
    "cube-quadruple",
    "scene",
    "puzzle-3x3",
    "puzzle-4x4",
    "puzzle-4x5",
    "puzzle-4x6",
)
"""The benchmark's manipulation environments."""


def family(name: str) -> str:
    """The kind of an environment: ``"cube"``, ``"scene"`` or ``"puzzle"``."""
    return name.split("-")[0]


def make_simulator(name: str, **settings: Any) -> tuple[Any, int]:
    """Make one of OGBench's manipulation environments.

    The wheel hands out a new, unseeded action space at every access and draws the steps before a
    goal from it, so that the same seed shows another goal every time. Here the space is one, and
    is seeded with the episode.

    Args:
        name: one of ``NAMES``.
        settings: of the wheel's class, beside those that it registers the name with.

    Returns:
        The environment, and the step limit that the benchmark gives it.

    Raises:
        ValueError: an unknown name.
        gymnasium.error.DependencyNotInstalled: ogbench is missing.
    """
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}; got {name!r}")
    import_benchmark("ogbench", "manipspace")
    spec = gym.spec(f"{name}-v0")
    kind: Any = load_env_creator(str(spec.entry_point))
    limit = int(spec.max_episode_steps or 0)

    class Seeded(kind):  # type: ignore[misc]
        _renderer: Any

        @cached_property
        def action_space(self) -> gym.spaces.Box:
            return gym.spaces.Box(-1.0, 1.0, (5,), np.float32)

        def reset(
            self, options: dict[str, Any] | None = None, *, seed: int | None = None
        ) -> tuple[Any, Info]:
            if seed is not None:
                self.action_space.seed(seed)
            found: tuple[Any, Info] = super().reset(options, seed=seed)
            return found

        def close(self) -> None:
            # The wheel leaves its renderer to the end of the process, which is too late to free it.
            renderer: Any = self._renderer
            if renderer is not None:
                renderer.close()
            self._renderer: Any = None
            super().close()

    return Seeded(**{**spec.kwargs, **settings}), limit


class ManipulationEnv(FlatEnv):
    """A UR5e arm with a gripper before cubes, buttons, a drawer or a window.

    Action [5] in [-1, 1]: relative move along x, y and z (1 is 5 cm), relative yaw (1 is 0.3 rad)
    and relative opening of the gripper; 20 a second. Observation [O] float32: the arm, then
    every object.

    Args:
        simulator: of `make_simulator`.
        max_episode_steps: steps after which an episode is truncated.
        first: options of the reset that compiles the model.
        render_mode: None or ``"rgb_array"``.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": ["rgb_array"],
        "render_fps": 20,
        "packages": ["ogbench", "mujoco", "dm-control"],
    }

    def __init__(
        self,
        simulator: Any,
        max_episode_steps: int,
        render_mode: str | None,
        first: dict[str, Any] | None = None,
    ) -> None:
        raw, _ = simulator.reset(first, seed=0)
        super().__init__(simulator, len(raw), render_mode)
        self.max_episode_steps = max_episode_steps
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, Info]:
        self._steps = 0
        return super().reset(seed=seed, options=options)

    def step(self, action: Action) -> tuple[Any, float, bool, bool, Info]:
        self._steps += 1
        observation, reward, terminated, _, info = super().step(action)
        return observation, reward, terminated, self._steps >= self.max_episode_steps, info

    def _flatten(self, raw: NDArray[np.float64]) -> Observation:
        return raw.astype(np.float32)
