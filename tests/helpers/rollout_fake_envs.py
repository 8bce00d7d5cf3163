"""Small environments for the rollout tests; worker processes import this module by its name."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class FakePoint(gym.Env):
    """A point that the action moves; it is to come near the origin.

    ``fault`` = {"kind", "seed", "step", "once": path of a marker file}: what goes wrong, and when.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, fault=None, render_mode=None, size=64, render_fault=None, reward_scale=1.0):
        if render_fault == "make" and render_mode is not None:
            raise RuntimeError("no graphics library here")
        self.render_mode = render_mode
        self.fault, self.size, self.render_fault = fault, size, render_fault
        self.reward_scale = reward_scale
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed_now, self.t = seed, 0
        self.x = self.np_random.uniform(-2, 2, size=2)
        self._fail()
        return self._obs(), {}

    def step(self, action):
        self.t += 1
        self._fail()
        self.x = self.x + 0.5 * np.asarray(action, np.float64)
        distance = float(np.linalg.norm(self.x))
        near = distance < 0.3
        info = {"is_success": near}
        return self._obs(), -self.reward_scale * distance, near, False, info

    def _obs(self):
        return np.array([*self.x, self.t])

    def _fail(self):
        fault = self.fault
        if fault is None or (self.seed_now, self.t) != (fault["seed"], fault["step"]):
            return
        if "once" in fault:
            marker = Path(fault["once"])
            if marker.exists():
                return
            marker.touch()
        if fault["kind"] == "raise":
            raise RuntimeError("the gripper is on fire")
        if fault["kind"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault["kind"] == "hang":
            time.sleep(3600)
        if fault["kind"] == "nan":
            self.x = self.x * np.nan

    def render(self):
        if self.render_fault == "draw":
            raise RuntimeError("no framebuffer")
        if self.render_fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return np.full((self.size, self.size, 3), 10 * self.t % 256, np.uint8)


class FakeExpertPoint(FakePoint):
    """The same, with a scripted expert that is sometimes too weak to arrive."""

    expert_noise_mask = np.array([1.0, 0.0])

    def expert_action(self, rng):
        gain = 0.05 if self.seed_now % 7 == 3 else 2.0
        return np.clip(-gain * self.x, -1, 1)


class FakeRecorded(FakeExpertPoint):
    """Gives, beside the observation, where it is to the last bit and how often it moved."""

    def reset(self, **how):
        obs, info = super().reset(**how)
        return obs, {**info, "record": self._record()}

    def step(self, action):
        obs, reward, near, cut, info = super().step(action)
        return obs, reward, near, cut, {**info, "record": self._record()}

    def _record(self):
        return {"place": self.x, "moves": np.int64(self.t), "words": "left out"}


def relabel(episode, *, radius=1.0):
    """Rewards of a task that ends ``radius`` from the origin."""
    near = np.linalg.norm(episode["info.place"], axis=1) < radius
    return {"reward": near.astype(np.float32) - 1, "terminated": near, "success": near}


class FakeModules(FakePoint):
    """Shows which heavy modules a worker has loaded."""

    def _obs(self):
        import sys

        return np.array(["torch" in sys.modules, "zarr" in sys.modules, float(os.getpid())])


class FakeDict(FakeExpertPoint):
    """Observes a dict of a float64 vector, a float32 goal, bytes of a picture and whole numbers."""

    def __init__(self, fault=None, render_mode=None):
        super().__init__(fault, render_mode)
        self.observation_space = spaces.Dict(
            {
                "state": spaces.Box(-np.inf, np.inf, (2,), np.float64),
                "desired_goal": spaces.Box(-1, 1, (2,), np.float32),
                "camera": spaces.Box(0, 255, (6, 8, 3), np.uint8),
                "clock": spaces.Box(0, 1000, (1,), np.int64),
            }
        )

    def _obs(self):
        return {
            "state": self.x.copy(),
            "desired_goal": np.zeros(2, np.float32),
            "camera": np.full((6, 8, 3), self.t % 256, np.uint8),
            "clock": np.array([self.t]),
        }


class FakeCameras(FakeExpertPoint):
    """Observes where it is, and two cameras whose pixels depend on the seed, the step and both."""

    def __init__(self, size=96, length=1000, fault=None, render_mode=None, render_fault=None):
        super().__init__(fault, render_mode, render_fault=render_fault)
        self.length = length
        view = spaces.Box(0, 255, (size, size, 3), np.uint8)
        place = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.observation_space = spaces.Dict({"place": place, "front": view, "wrist": view})
        self.noise = np.random.default_rng(0).integers(0, 256, view.shape, np.uint8)

    def step(self, action):
        obs, reward, _, cut, _ = super().step(action)
        return obs, reward, self.t >= self.length, cut, {"is_success": True}

    def _obs(self):
        front = self.noise + np.uint8((self.seed_now or 0) % 256)
        front[0, 0] = (self.seed_now or 0) % 256, self.t % 256, self.t // 256
        self.wrist = front[::-1]  # not contiguous
        return {"place": self.x.astype(np.float32), "front": front, "wrist": self.wrist}


class FakeImage(FakePoint):
    """Observes a picture alone."""

    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Box(0, 255, (6, 8, 3), np.uint8)

    def _obs(self):
        return np.full((6, 8, 3), self.t % 256, np.uint8)


class FakeGrid(FakePoint):
    """Observes a matrix of numbers, which is neither a vector nor a picture."""

    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Box(-1, 1, (2, 2), np.float32)


class FakeTuple(FakePoint):
    """Observes a tuple."""

    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Tuple([self.observation_space])


class FakeWords(FakePoint):
    """Takes discrete actions."""

    def __init__(self):
        super().__init__()
        self.action_space = spaces.Text(3)


class FakeDials(FakePoint):
    """Two dials of 3 and 4 places, the second one's numbers from -1; its expert knows the way."""

    def __init__(self):
        super().__init__()
        self.action_space = spaces.MultiDiscrete([3, 4], start=[0, -1])

    def step(self, action):
        assert self.action_space.contains(action), action
        return super().step(action - 1.0)

    def expert_action(self, rng):
        return np.array([0, 2])


class FakeChaos(gym.Env):
    """Magnifies the last bit of an action; the episodes of some seeds fail on the way."""

    def __init__(self, broken=()):
        self.broken = broken
        self.observation_space = spaces.Box(-1, 1, (3,), np.float32)
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 7 if seed in self.broken else 1000
        self.length = int(self.np_random.integers(12, 18))
        self.x = self.np_random.uniform(0, 1, 3)
        return (2 * self.x - 1).astype(np.float32), {}

    def step(self, action):
        self.left, self.length = self.left - 1, self.length - 1
        if not self.left:
            raise RuntimeError("the gripper is on fire")
        self.x = np.clip(3.99 * self.x * (1 - self.x) + 1e-3 * float(action[0]), 0, 1)
        return (2 * self.x - 1).astype(np.float32), float(self.x[0]), not self.length, False, {}


class FakeForker(FakePoint):
    """Starts a process of its own; with ``once``, cannot be made again after its process died."""

    def __init__(self, pids, once=None, fault=None):
        if once is not None and Path(once).exists():
            raise RuntimeError("the licence server says no")
        super().__init__(fault)
        self.once = once
        child = os.fork()
        if not child:
            time.sleep(3600)
            os._exit(0)
        with Path(pids).open("a") as file:
            file.write(f"{child}\n")

    def step(self, action):
        if self.once is not None and self.seed_now == 1:
            Path(self.once).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


class FakeOdd(gym.Env):
    """Takes whole numbers; everything that it says is in arrays of one entry."""

    def __init__(self, low=0):
        self.observation_space = spaces.Box(-1, 1, (1,), np.float32)
        self.action_space = spaces.Box(0, 3, (2,), np.int64)
        self.action_space.low[:] = low  # as an environment may do after making its space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros((1, 1)), {}

    def step(self, action):
        said = {"is_success": np.array([1.0])}
        return np.zeros((1, 1)), np.array([action.sum()]), np.array([True]), False, said


for _name, _limit in (
    ("Point", 12),
    ("ExpertPoint", 12),
    ("Recorded", 12),
    ("Modules", 12),
    ("Dict", 12),
    ("Cameras", 1000),
    ("Image", 12),
    ("Grid", 12),
    ("Tuple", 12),
    ("Words", 12),
    ("Dials", 12),
    ("Odd", 3),
    ("Chaos", 60),
    ("Forker", 12),
    ("Endless", None),
):
    _id = f"rollout_fakes/{_name}-v0"
    if _id not in gym.registry:
        _class = "FakePoint" if _name == "Endless" else f"Fake{_name}"
        gym.register(_id, entry_point=f"{__name__}:{_class}", max_episode_steps=_limit)
