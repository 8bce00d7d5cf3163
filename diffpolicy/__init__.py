"""diffpolicy: diffusion policies for reinforcement learning and robotics.

One denoiser, one sampling loop, many starts. The names below are loaded on first use, so that
importing the package costs no more than importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffpolicy.api import DiffusionPolicy, PolicySpec, Sampler, TrainerConfig
    from diffpolicy.data.normalize import Normalizer
    from diffpolicy.data.store import EpisodeStore
    from diffpolicy.rollout.collect import collect
    from diffpolicy.rollout.evaluate import evaluate
    from diffpolicy.rollout.spec import EnvSpec

__version__ = "0.1.0"

_HOMES = {
    "DiffusionPolicy": "diffpolicy.api",
    "PolicySpec": "diffpolicy.api",
    "Sampler": "diffpolicy.api",
    "TrainerConfig": "diffpolicy.api",
    "Normalizer": "diffpolicy.data.normalize",
    "EpisodeStore": "diffpolicy.data.store",
    "collect": "diffpolicy.rollout.collect",
    "evaluate": "diffpolicy.rollout.evaluate",
    "EnvSpec": "diffpolicy.rollout.spec",
}

__all__ = [
    "DiffusionPolicy",
    "EnvSpec",
    "EpisodeStore",
    "Normalizer",
    "PolicySpec",
    "Sampler",
    "TrainerConfig",
    "__version__",
    "collect",
    "evaluate",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'diffpolicy' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
