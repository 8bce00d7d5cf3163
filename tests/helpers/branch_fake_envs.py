"""Environments that branches cannot be made in, or cannot be judged in."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
from rollout_fake_envs import FakePoint


class Restless(FakePoint):
    """Draws from a generator that reset() does not seed."""

    draws = np.random.default_rng(0)

    def step(self, action):
        self.x = self.x + 1e-3 * self.draws.standard_normal(2)
        return super().step(action)


class Silent(FakePoint):
    """Does not say whether it succeeded."""

    def step(self, action):
        obs, reward, terminated, truncated, _ = super().step(action)
        return obs, reward, terminated, truncated, {}


class Fragile(FakePoint):
    """Breaks in its third episode."""

    resets = 0

    def reset(self, *, seed=None, options=None):
        Fragile.resets += 1
        return super().reset(seed=seed, options=options)

    def step(self, action):
        if Fragile.resets == 3 and self.t == 0:
            raise RuntimeError("broken")
        return super().step(action)


class Drawn(FakePoint):
    """Its picture says the step."""


class Shown(FakePoint):
    """Can be put into the state of an observation."""

    def show_observation(self, obs):
        self.x, self.t = np.asarray(obs[:2], np.float64), int(obs[2])


for _name in ("Restless", "Silent", "Fragile", "Drawn", "Shown"):
    if f"branch_fakes/{_name}-v0" not in gym.registry:
        gym.register(
            f"branch_fakes/{_name}-v0", entry_point=f"{__name__}:{_name}", max_episode_steps=12
        )
