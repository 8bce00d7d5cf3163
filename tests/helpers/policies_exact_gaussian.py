"""A policy whose denoiser is exact: plans are N(last observation, std^2) at every position."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffpolicy.core.denoiser import Denoiser
from diffpolicy.core.processes import DiscreteVP
from diffpolicy.core.sampler import Sampler
from diffpolicy.data.normalize import Normalizer
from diffpolicy.policies.anchors import Anchors
from diffpolicy.policies.diffusion import DiffusionPlanner
from diffpolicy.policies.spec import PolicySpec

DIM, HORIZON = 2, 6


class GaussianNetwork(nn.Module):
    """``x0_hat`` of ``N(cond, std^2)``; its time embedding is the level itself."""

    t_kinds = frozenset({"row", "dim"})

    def __init__(self, std: float, process: DiscreteVP) -> None:
        super().__init__()
        self.std, self.process = std, process
        self.unused = nn.Parameter(torch.zeros(1))

    def embed_time(self, t: Tensor) -> Tensor:
        return (t + 1) / len(self.process.betas)

    def forward(
        self, x: Tensor, t: Tensor, cond: Tensor | None = None, *, time_emb: Tensor | None = None
    ) -> Tensor:
        level = self.embed_time(t) if time_emb is None else time_emb
        alpha, sigma = self.process.alpha(level), self.process.sigma(level)
        assert cond is not None
        mean = cond[:, None]
        gain = alpha * self.std**2 / ((alpha * self.std).square() + sigma.square())
        return mean + gain * (x - alpha * mean)


def gaussian_planner(
    std: float = 0.1, *, anchors: Anchors | None = None, **changes: Any
) -> DiffusionPlanner:
    """``gaussian_planner(std, **spec entries)``: observations and actions are their own units."""
    values: dict[str, Any] = {
        "horizon": HORIZON,
        "n_obs_steps": 1,
        "n_action_steps": 1,
        "prediction": "x0",
        "clip": False,
        "process": {"type": "ddpm_cosine"},
        "sampler": Sampler(num_steps=100),
    }
    spec = PolicySpec(DIM, DIM, **{**values, **changes})
    process = DiscreteVP.cosine(100)
    denoiser = Denoiser(GaussianNetwork(std, process), process, "x0")
    ones = np.ones(DIM)
    statistics = {
        name: {k: (v * ones).tolist() for k, v in STATISTICS.items()} for name in ("obs", "action")
    }
    normalizer = Normalizer.fit(statistics, {"obs": "identity", "action": "identity"})
    return DiffusionPlanner(spec, denoiser, normalizer, anchors)


STATISTICS = {"min": -1.0, "max": 1.0, "mean": 0.0, "std": 0.5, "q01": -1.0, "q99": 1.0}
