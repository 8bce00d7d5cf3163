from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # workers inherit the path and find the fake envs


@dataclass(frozen=True)
class FakeState:
    seeds: np.ndarray
    steps: np.ndarray
    nfe: np.ndarray
    plans: np.ndarray

    def take(self, rows):
        return FakeState(self.seeds[rows], self.steps[rows], self.nfe[rows], self.plans[rows])

    def put(self, rows, other):
        out = {}
        for name in ("seeds", "steps", "nfe", "plans"):
            array = getattr(self, name).copy()
            array[rows] = getattr(other, name)
            out[name] = array
        return FakeState(**out)


class FakePolicy:
    """Walks towards the origin with noise that is a function of (row seed, counter)."""

    def __init__(self, gain=0.8, noise=0.3, every=3, nan_at=None):
        self.gain, self.noise, self.every, self.nan_at = gain, noise, every, nan_at
        self.batches: list[int] = []

    def initial_state(self, seeds):
        zeros = np.zeros(len(seeds), np.int64)
        return FakeState(np.array(seeds, np.int64), zeros, zeros.copy(), zeros.copy())

    def act(self, obs, state, *, deterministic=False):
        self.batches.append(len(obs))
        actions = np.clip(-self.gain * obs[:, :2], -1, 1)
        if not deterministic:
            for row, (seed, step) in enumerate(zip(state.seeds, state.steps, strict=True)):
                draw = np.random.default_rng([seed, step]).standard_normal(2)
                actions[row] += self.noise * draw
        plans = (state.steps % self.every == 0).astype(np.int64)
        if self.nan_at is not None:
            actions[state.seeds == self.nan_at] = np.nan
        state = replace(
            state, steps=state.steps + 1, nfe=state.nfe + 10 * plans, plans=state.plans + plans
        )
        return np.clip(actions, -1, 1).astype(np.float32), state

    def forget(self, state, done, seeds=None):
        new = state.seeds.copy()
        if seeds is not None:
            new[done] = seeds
        return replace(state, seeds=new, steps=np.where(done, 0, state.steps))


@pytest.fixture
def fake_policy():
    return FakePolicy()


@pytest.fixture
def make_fake_policy():
    return FakePolicy
