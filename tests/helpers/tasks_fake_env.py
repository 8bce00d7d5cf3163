"""A point with three tasks, in two groups; worker processes import this module by its name."""

from __future__ import annotations

from typing import ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces

TASKS = ("reach", "push <hard>", "door|open")


class ManyTasks(gym.Env):
    """The task is the seed modulo three; reach always succeeds, the door never, push in odd seeds.

    Each step pays 1, 2 or 3. ``broken``: seeds whose reset or third step raises; ``groups`` replace
    those that are declared.
    """

    metadata: ClassVar[dict] = {
        "render_modes": ["rgb_array"],
        "task_groups": {"easy": [TASKS[0], TASKS[1]], "hard": [TASKS[2], "drawer"], "none": ["x"]},
    }

    def __init__(self, broken=(), broken_reset=(), groups=None, render_mode=None):
        self.render_mode, self.broken, self.broken_reset = render_mode, broken, broken_reset
        if groups is not None:
            self.metadata = {**self.metadata, "task_groups": groups}
        self.observation_space = spaces.Box(-1, 1, (3,), np.float32)
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed in self.broken_reset:
            raise RuntimeError("the gripper is on fire")
        self.now, self.t = seed, 0
        return np.zeros(3, np.float32), {"task": TASKS[seed % 3]}

    def step(self, action):
        self.t += 1
        if self.t == 3 and self.now in self.broken:
            raise RuntimeError("the gripper is on fire")
        won = (True, bool(self.now % 2), False)[self.now % 3]
        said = {"task": TASKS[self.now % 3], "is_success": won and self.t == 4}
        return np.zeros(3, np.float32), float(1 + self.now % 3), False, False, said

    def expert_action(self, rng):
        return np.zeros(2)

    def render(self):
        return np.full((32, 32, 3), 10 * self.t, np.uint8)


gym.register("tasks_fake/Many-v0", entry_point=f"{__name__}:ManyTasks", max_episode_steps=4)
