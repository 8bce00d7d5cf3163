"""A point that is to come near the origin: an environment as a user's own package registers it."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Point(gym.Env):
    """``says``: whether ``info`` tells of success."""

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, says=True, render_mode=None):
        self.says, self.render_mode = says, render_mode
        self.observation_space = spaces.Box(-5, 5, (2,), np.float32)
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-1, 1, 2)
        return self.x.astype(np.float32), {}

    def step(self, action):
        self.x = np.clip(self.x + 0.3 * np.asarray(action), -5, 5)
        distance = float(np.linalg.norm(self.x))
        info = {"is_success": distance < 0.3} if self.says else {}
        return self.x.astype(np.float32), -distance, False, False, info

    def expert_action(self, rng):
        return np.clip(-self.x / 0.3, -1, 1)


class Keys(Point):
    """Three keys, 1 to 3: left, nothing and right; the second entry stays where it began."""

    def __init__(self, render_mode=None):
        super().__init__(render_mode=render_mode)
        self.action_space = spaces.Discrete(3, start=1)

    def step(self, action):
        assert self.action_space.contains(action), action
        self.x[0] = np.clip(self.x[0] + 0.3 * (int(action) - 2), -5, 5)
        near = abs(self.x[0]) <= 0.16
        return self.x.astype(np.float32), -abs(self.x[0]), False, False, {"is_success": near}

    def expert_action(self, rng):
        return 2 - int(np.sign(self.x[0])) * (abs(self.x[0]) > 0.15)


gym.register("cli_fake/Keys-v0", entry_point=f"{__name__}:Keys", max_episode_steps=10)
gym.register("cli_fake/Point-v0", entry_point=f"{__name__}:Point", max_episode_steps=10)
