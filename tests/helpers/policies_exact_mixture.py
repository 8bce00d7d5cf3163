"""A policy whose denoiser is exact: each episode keeps to one of some modes around its observation.

``action = mode + gain observation + noise``, and the observation walks at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffpolicy.core.denoiser import Denoiser
from diffpolicy.core.processes import DiscreteVP
from diffpolicy.core.sampler import Sampler
from diffpolicy.data.normalize import Normalizer
from diffpolicy.policies.base import Array
from diffpolicy.policies.diffusion import DiffusionPlanner
from diffpolicy.policies.recorded import Demonstrations, replay
from diffpolicy.policies.spec import PolicySpec

HORIZON = 8


@dataclass(frozen=True)
class World:
    """Its modes, how far the observation moves a step, and what an action makes of it."""

    modes: tuple[float, ...]
    step: float
    gain: float
    noise: float = 0.03

    def demonstrations(self, episodes: int, length: int, seed: int) -> Demonstrations:
        rng = np.random.default_rng(seed)
        obs = np.cumsum(self.step * rng.normal(size=(episodes, length)), 1)
        obs = np.sin(rng.uniform(-0.2, 0.2, (episodes, 1)) + obs)[..., None]
        mode = rng.choice(self.modes, (episodes, 1, 1))
        action = mode + self.gain * obs + self.noise * rng.normal(size=obs.shape)
        valid = np.ones(obs.shape[:2], bool)
        return Demonstrations(obs.astype(np.float32), action.astype(np.float32), valid)

    def cost(self, policy: DiffusionPlanner, episodes: int = 150, length: int = 40) -> float:
        """Mean square of what actions miss, in the mode that the first one is nearest to."""
        obs = self.demonstrations(episodes, length, seed=99).obs
        own = replay(policy, obs, range(5000, 5000 + episodes)) - self.gain * obs  # [E, T, 1]
        modes = np.array(self.modes)
        mode = modes[np.abs(own[:, :1] - modes).argmin(-1)][..., None]
        return float(np.square(own - mode).mean())

    def planner(self, **changes: Any) -> DiffusionPlanner:
        ahead = np.sqrt(self.noise**2 + (self.gain * self.step) ** 2 * np.arange(HORIZON))
        process = DiscreteVP.cosine(100)
        network = MixtureNetwork(process, self.modes, self.gain, ahead)
        values: dict[str, Any] = {
            "horizon": HORIZON,
            "n_obs_steps": 1,
            "n_action_steps": 1,
            "prediction": "x0",
            "clip": False,
            "process": {"type": "ddpm_cosine"},
            "sampler": Sampler(num_steps=10),
        }
        spec = PolicySpec(1, 1, **{**values, **changes})
        ranges = {"min": [-1.0], "max": [1.0], "mean": [0.0], "std": [0.5]}
        statistics = {n: {**ranges, "q01": [-1.0], "q99": [1.0]} for n in ("obs", "action")}
        normalizer = Normalizer.fit(statistics, {"obs": "identity", "action": "identity"})
        return DiffusionPlanner(spec, Denoiser(network, process, "x0"), normalizer)


class MixtureNetwork(nn.Module):
    """``x0_hat`` of an even mixture of ``N(mode + gain cond, std_h^2)``, one mode for a plan."""

    t_kinds = frozenset({"row"})

    def __init__(
        self, process: DiscreteVP, modes: Sequence[float], gain: float, std: Array
    ) -> None:
        super().__init__()
        self.process, self.gain, self.modes = process, gain, torch.tensor(modes)
        self.std = torch.from_numpy(std.astype(np.float32)).view(-1, 1, 1)
        self.unused = nn.Parameter(torch.zeros(1))

    def embed_time(self, t: Tensor) -> Tensor:
        return (t + 1) / len(self.process.betas)

    def forward(
        self, x: Tensor, t: Tensor, cond: Tensor | None = None, *, time_emb: Tensor | None = None
    ) -> Tensor:
        level = self.embed_time(t) if time_emb is None else time_emb
        alpha, sigma = (v(level)[..., None] for v in (self.process.alpha, self.process.sigma))
        assert cond is not None
        mean = self.modes + self.gain * cond[:, None, :, None]  # [B, 1, A, modes]
        variance = (alpha * self.std).square() + sigma.square()
        away = x[..., None] - alpha * mean
        share = (-away.square() / (2 * variance)).sum((1, 2), keepdim=True).softmax(-1)
        return (share * (mean + alpha * self.std.square() / variance * away)).sum(-1)
