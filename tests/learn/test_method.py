"""A method is one class and a line of the registry: two of a stranger's, run by a policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpolicy import DiffusionPolicy, TrainerConfig, TuningData
from diffpolicy.core import prior_start, sample
from diffpolicy.core.denoiser import BaseDenoiser
from diffpolicy.core.sampler import Sampler
from diffpolicy.data.preferences.records import Pair, Span
from diffpolicy.data.preferences.set import PreferenceSet
from diffpolicy.data.store import EpisodeStore
from diffpolicy.learn import METHODS, LossOutput, Method, make_method
from diffpolicy.learn.reward.pathwise import Pathwise

CONFIG = TrainerConfig(
    steps=60, batch_size=32, lr=3e-3, warmup_steps=1, ema_power=None, progress=False
)


class FarApartLoss(nn.Module):
    """Clean estimates from pure noise are near chosen plans and at a distance from rejected ones.

    Not a function of scores: the estimate itself is compared.
    """

    def __init__(self, denoiser: BaseDenoiser, distance: float) -> None:
        super().__init__()
        self.denoiser, self.distance = denoiser, distance

    def forward(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> LossOutput:
        x = torch.randn(batch["chosen_action"][:, 0].shape, generator=generator)
        found = self.denoiser(x, torch.ones(len(x), 1, 1), batch["chosen_obs"][:, 0].flatten(1))
        near, far = (
            (found.x0_hat - batch[f"{side}_action"][:, 0]).square().mean((1, 2))
            for side in ("chosen", "rejected")
        )
        return LossOutput(near + F.relu(self.distance - far), {"near": near.detach().mean()})


@dataclass(frozen=True)
class FarApart(Method):
    """A preference loss that is no function of four scores."""

    command: ClassVar[str] = "prefer"

    distance: float = 1.0

    def reads(self) -> frozenset[str]:
        return frozenset({"pairs"})

    def objective(self, denoiser: BaseDenoiser, material: Any) -> nn.Module:
        return FarApartLoss(denoiser, self.distance)


class BestOfLoss(nn.Module):
    """Cloning of the best of N plans by a reward that needs no gradient."""

    def __init__(self, denoiser: Any, reward: Any, settings: BestOf) -> None:
        super().__init__()
        self.denoiser, self._reward, self.settings = denoiser, [reward], settings

    def forward(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> LossOutput:
        many, process = self.settings.candidates, self.denoiser.process
        cond = batch["cond"].repeat_interleave(many, 0)
        noise = torch.randn((len(cond), 4, 2), generator=generator)
        sampler = self.settings.sampler
        with torch.no_grad():
            start = prior_start(process, noise)
            drawn = sample(self.denoiser, sampler.make(), start, sampler.grid(process), cond=cond)
            worth = self._reward[0](drawn, cond).view(-1, many)
        best = drawn.view(-1, many, 4, 2)[torch.arange(len(worth)), worth.argmax(1)]
        noise = torch.randn(best.shape, generator=generator)
        t = torch.rand(len(best), 1, 1, generator=generator)
        x_t = process.add_noise(best, t, noise)
        error = self.denoiser.raw(x_t, t, batch["cond"]) - self.denoiser.target(best, noise, t)
        return LossOutput(error.square().mean((1, 2)), {"reward": worth.mean()})


@dataclass(frozen=True)
class BestOf(Method):
    """A reward method of plans, with a group of settings."""

    candidates: int = 4
    sampler: Sampler = Sampler(num_steps=3)  # noqa: RUF009 -- frozen

    def objective(self, denoiser: BaseDenoiser, material: Any) -> nn.Module:
        return BestOfLoss(denoiser, material.reward, self)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(METHODS, "far_apart", FarApart)
    monkeypatch.setitem(METHODS, "best_of", BestOf)


@pytest.fixture
def store():
    """Even episodes act near +0.5 and odd ones near -0.5."""
    rng = np.random.default_rng(0)
    side = np.repeat(np.where(np.arange(20) % 2 == 0, 0.5, -0.5), 8)[:, None]
    obs = rng.uniform(-1, 1, (160, 2)).astype(np.float32)
    action = (side + 0.05 * rng.standard_normal((160, 2))).astype(np.float32)
    return EpisodeStore.from_arrays({"obs": obs, "action": action}, np.arange(8, 161, 8))


@pytest.fixture
def policy(store, tmp_path):
    spec = {
        "horizon": 4,
        "n_obs_steps": 1,
        "n_action_steps": 4,
        "network": {"type": "mlp", "width": 32, "depth": 1},
        "prediction": "v",
    }
    policy = DiffusionPolicy.from_dataset(store, spec=spec)
    return policy.learn(store, CONFIG, tmp_path / "cloned")


def mean_action(policy):
    obs = np.random.default_rng(1).uniform(-1, 1, (200, 2)).astype(np.float32)
    return float(policy.predict(obs)[0].mean())


def test_a_preference_loss_of_a_stranger(registered, policy, store, tmp_path):
    pairs = [Pair((Span(i, 0, 4),), (Span(i + 1, 0, 4),)) for i in range(0, 20, 2)]
    data = TuningData(PreferenceSet(store, pairs))
    policy.prefer(data, {"type": "far_apart", "distance": 0.5}, CONFIG, tmp_path / "run")
    assert mean_action(policy) > 0.25
    adapted = {"adapters": {"type": "lora"}, "overwrite": True}
    policy.prefer(data, FarApart(), CONFIG, tmp_path / "run", **adapted)
    assert mean_action(policy) > 0.25


def test_a_reward_method_of_a_stranger(registered, policy, store, tmp_path):
    data = TuningData(reward=lambda action, obs: action.mean((1, 2)), observations=store)
    method = {"type": "best_of", "candidates": 6, "sampler": {"num_steps": 2}}
    assert make_method(method) == BestOf(6, Sampler(num_steps=2))
    before = mean_action(policy)
    policy.tune(data, method, CONFIG, tmp_path / "run")
    assert mean_action(policy) > before + 0.2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"type": "far_appart"}, "unknown method 'far_appart'.*did you mean 'far_apart'"),
        ({"type": "best_of", "candidate": 2}, "did you mean 'best_of.candidates'"),
        ({"type": "best_of", "sampler": {"num_step": 2}}, "key 'best_of.sampler.num_step'"),
        ({"type": "far_apart", "distance": "far"}, "far_apart.distance must be float, got 'far'"),
    ],
)
def test_what_is_mistyped_is_said(registered, values, message):
    with pytest.raises(ValueError, match=message):
        make_method(values)


def test_a_method_of_another_command_or_kind_is_refused(policy, store, tmp_path):
    data = TuningData(reward=lambda action, obs: action.mean((1, 2)), observations=store)
    with pytest.raises(ValueError, match=r"not of 'tune': use policy\.prefer"):
        policy.tune(data, FarApart(), CONFIG, tmp_path / "run")
    with pytest.raises(ValueError, match="tunes models of sequences"):
        policy.tune(data, Pathwise(), CONFIG, tmp_path / "run")
    with pytest.raises(ValueError, match=r"TuningData\(reward=\.\.\.\)"):
        policy.tune(TuningData(), BestOf(), CONFIG, tmp_path / "run")


def test_registered_methods_say_what_they_are():
    assert {m.command for m in METHODS.values()} == {"tune", "prefer", "distill"}
    for name, method in METHODS.items():
        assert make_method({"type": name, "name": "any"}) == method()
        assert method.items in ("plans", "sequences")
        assert method().reads()
