"""A small diffusion policy with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from diffpolicy.core.sampler import Sampler
from diffpolicy.data.normalize import Normalizer
from diffpolicy.policies.anchors import Anchors
from diffpolicy.policies.diffusion import DiffusionPlanner
from diffpolicy.policies.spec import PolicySpec

OBS_DIM, ACTION_DIM = 3, 2


def statistics() -> dict[str, dict[str, Any]]:
    """Of data in [-2, 2] (observations) and [-1, 1] (actions)."""
    out = {}
    for name, dim, high in (("obs", OBS_DIM, 2.0), ("action", ACTION_DIM, 1.0)):
        full = np.full(dim, high)
        out[name] = {
            "min": (-full).tolist(),
            "max": full.tolist(),
            "mean": [0.0] * dim,
            "std": [0.5] * dim,
            "q01": (-full).tolist(),
            "q99": full.tolist(),
            "count": 100,
        }
    return out


@pytest.fixture
def make_planner() -> Callable[..., DiffusionPlanner]:
    """``make_planner(**spec entries)``."""

    def make(**changes: Any) -> DiffusionPlanner:
        torch.manual_seed(0)
        values: dict[str, Any] = {
            "horizon": 8,
            "n_obs_steps": 2,
            "n_action_steps": 3,
            "network": {"type": "mlp", "width": 16, "depth": 1},
            "sampler": Sampler(num_steps=4),
            "action_low": (-0.5,) * ACTION_DIM,
            "action_high": (0.5,) * ACTION_DIM,
        }
        spec = PolicySpec(OBS_DIM, ACTION_DIM, **{**values, **changes})
        denoiser, heads = spec.make_denoiser(), spec.make_heads()
        with torch.no_grad():
            for parameter in [*denoiser.parameters(), *heads.parameters()]:
                parameter.add_(0.2 * torch.randn_like(parameter))
        normalizer = Normalizer.fit(statistics(), {"obs": "minmax", "action": "minmax"})
        anchors = None
        if spec.truncated is not None and "anchors" in spec.truncated.sources:
            sizes = 3, spec.horizon, spec.planned_dim
            anchors = Anchors(torch.randn(sizes), torch.ones(3) / 3, 0.3, torch.zeros(spec.horizon))
        return DiffusionPlanner(spec, denoiser, normalizer, anchors, heads)

    return make
