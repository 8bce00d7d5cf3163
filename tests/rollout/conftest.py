from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _our_fakes_are_trusted(monkeypatch):
    """Stores of these tests name environments of our own."""
    monkeypatch.setenv("DIFFPOLICY_TRUST_ENVS", "rollout_fake_envs,branch_fake_envs")


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


def _diffusion(network):
    """A small diffusion policy with warm starts, on 3 observations and 2 actions."""
    torch = pytest.importorskip("torch")
    from diffpolicy.core.denoiser import Denoiser
    from diffpolicy.data.normalize import Normalizer
    from diffpolicy.policies.diffusion import DiffusionPlanner
    from diffpolicy.policies.spec import PolicySpec

    spec = PolicySpec.from_config(
        {"obs_dim": 3, "action_dim": 2, "horizon": 8, "n_obs_steps": 2, "n_action_steps": 3}
        | {"network": network, "sampler": {"num_steps": 3}, "rti": {"t_start": 0.4}}
    )
    torch.manual_seed(0)
    denoiser: Denoiser = spec.make_denoiser()
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    unit = {"min": -1.0, "max": 1.0, "mean": 0.0, "std": 1.0, "q01": -1.0, "q99": 1.0}
    statistics = {
        name: {key: [value] * dim for key, value in unit.items()}
        for name, dim in (("obs", 3), ("action", 2))
    }
    normalizer = Normalizer.fit(statistics, dict.fromkeys(statistics, "minmax"))
    return DiffusionPlanner(spec, denoiser, normalizer)


@pytest.fixture
def make_diffusion_policy():
    return _diffusion
