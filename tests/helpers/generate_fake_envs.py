"""Small environments for the tests of made datasets."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Corridor(gym.Env):
    """A point on a line that the action moves; it ends at |x| > 3, else at the time limit."""

    def __init__(self):
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = spaces.Box(np.float32([-2.0]), np.float32([4.0]))  # not symmetric

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-1, 1)
        return np.array([self.x, 1.0]), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.x += 0.2 * float(action[0])
        return np.array([self.x, 1.0]), -abs(self.x), abs(self.x) > 3, False, {}


class LineMaze(gym.Env):
    """A maze of one dimension with the convention that a maze with an expert keeps."""

    GOAL_ENTRIES = (2, 3)

    def __init__(self, stop_at_goal=True, new_goals=False, controller=None, stuck=False):
        self.continuing = new_goals and not stop_at_goal
        self.controller, self.stuck = controller, stuck
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        assert self.continuing
        self.x, self.v = self.np_random.uniform(-2, 2), 0.0
        self.goal = self.np_random.uniform(-2, 2)
        return self._obs(self.goal), {"is_success": self._near()}

    def step(self, action):
        self.v = 0.0 if self.stuck else 0.3 * float(action[0])
        self.x += self.v
        shown, near = self.goal, self._near()
        while self._near():
            self.goal = self.np_random.uniform(-2, 2)
        return self._obs(shown), float(near), False, False, {"is_success": near}

    def expert_action(self, rng):
        return np.clip([self.controller["kp"] * (self.shown - self.x)], -1, 1).astype(np.float32)

    def simulator_state(self):
        return {"qpos": np.array([self.x]), "qvel": np.array([self.v])}

    def _near(self):
        return abs(self.x - self.goal) <= 0.45

    def _obs(self, shown):
        self.shown = shown
        return np.array([self.x, self.v, shown], np.float32)


gym.register("GenerateCorridor-v0", Corridor, max_episode_steps=30)
gym.register("GenerateLine-v0", LineMaze, max_episode_steps=40)
