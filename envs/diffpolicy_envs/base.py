"""What the environments share: a simulator inside, one flat float32 vector outside."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

Observation = NDArray[np.float32]
Action = NDArray[np.float32]
Info = dict[str, Any]


class FlatEnv(gym.Env[Observation, Action], ABC):
    """A simulator behind a flat float32 observation.

    A subclass says how a raw observation becomes a vector (`_flatten`) and what counts as a success
    (`_success`). Seeds, rewards, `terminated` and `truncated` are the simulator's own.

    Args:
        simulator: the wrapped environment, without a time limit of its own.
        observation_dim: length O of the flat observation.
        render_mode: None, or one of ``metadata["render_modes"]``.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": ["rgb_array", "human"],
        "render_fps": 25,
        # Distributions whose versions can change a score, for whoever records them.
        "packages": ["gymnasium-robotics", "mujoco"],
    }

    def __init__(
        self, simulator: gym.Env[Any, Any], observation_dim: int, render_mode: str | None
    ) -> None:
        self.simulator = simulator
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Box(
            -np.inf, np.inf, shape=(observation_dim,), dtype=np.float32
        )
        self.action_space = simulator.action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        """Start an episode; see `gymnasium.Env.reset`.

        Args:
            seed: seeds the simulator's own generator; None goes on with it.
            options: handed to the simulator.

        Returns:
            The observation [O] and an info with ``is_success``.
        """
        super().reset(seed=seed)
        raw, info = self.simulator.reset(seed=seed, options=options)
        return self._flatten(raw), {**info, "is_success": self._success(info)}

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, Info]:
        """Advance one control step; see `gymnasium.Env.step`.

        Args:
            action: action [A] in the simulator's units.

        Returns:
            Observation [O], reward, terminated, truncated and an info with ``is_success``.
        """
        raw, reward, terminated, truncated, info = self.simulator.step(action)
        info = {**info, "is_success": self._success(info)}
        return self._flatten(raw), float(reward), bool(terminated), bool(truncated), info

    def render(self) -> Any:
        """Draw the scene.

        Returns:
            A uint8 image [height, width, 3] for ``render_mode="rgb_array"``, None for ``"human"``.

        Raises:
            gymnasium.error.Error: the environment was made without a `render_mode`.
        """
        if self.render_mode is None:
            raise gym.error.Error(
                'cannot render: make the environment with render_mode="rgb_array"'
            )
        return self.simulator.render()

    def close(self) -> None:
        """Free the simulator and its windows."""
        self.simulator.close()

    @abstractmethod
    def _flatten(self, raw: Any) -> Observation:
        """The raw observation of the simulator as one vector [O]."""

    @abstractmethod
    def _success(self, info: Mapping[str, Any]) -> bool:
        """Whether the task is solved, from the info of the simulator's reset or step."""
