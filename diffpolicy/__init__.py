"""diffpolicy: diffusion policies for reinforcement learning and robotics.

One denoiser, one sampling loop, many starts. The names below are loaded on first use, so that
importing the package costs no more than importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffpolicy.api import DiffusionPolicy
    from diffpolicy.core.sampler import Sampler
    from diffpolicy.data.action_groups import ActionGroup
    from diffpolicy.data.normalize import Normalizer
    from diffpolicy.data.store import EpisodeStore
    from diffpolicy.learn.learning import Learning
    from diffpolicy.learn.material import TuningData
    from diffpolicy.policies.anchors import Anchors
    from diffpolicy.policies.boundary import Gripper
    from diffpolicy.policies.chunking import Chunking
    from diffpolicy.policies.ensemble import TemporalEnsemble
    from diffpolicy.policies.rti import RTI
    from diffpolicy.policies.spec import PolicySampler, PolicySpec
    from diffpolicy.policies.streaming import Streaming
    from diffpolicy.policies.truncated import Truncated
    from diffpolicy.rollout.env_spec import EnvSpec
    from diffpolicy.rollout.evaluate import evaluate
    from diffpolicy.rollout.latency import DelayedPolicy
    from diffpolicy.rollout.pool.supervisor import Workers
    from diffpolicy.rollout.record.experts import collect
    from diffpolicy.rollout.record.making import make_set
    from diffpolicy.training.settings import TrainerConfig

__version__ = "0.1.0"

_HOMES = {
    "DiffusionPolicy": "diffpolicy.api",
    "Sampler": "diffpolicy.core.sampler",
    **dict.fromkeys(("PolicySpec", "PolicySampler"), "diffpolicy.policies.spec"),
    "ActionGroup": "diffpolicy.data.action_groups",
    "Gripper": "diffpolicy.policies.boundary",
    "RTI": "diffpolicy.policies.rti",
    "Truncated": "diffpolicy.policies.truncated",
    "Anchors": "diffpolicy.policies.anchors",
    "Chunking": "diffpolicy.policies.chunking",
    "Streaming": "diffpolicy.policies.streaming",
    "TrainerConfig": "diffpolicy.training.settings",
    "Learning": "diffpolicy.learn.learning",
    "TuningData": "diffpolicy.learn.material",
    "TemporalEnsemble": "diffpolicy.policies.ensemble",
    "DelayedPolicy": "diffpolicy.rollout.latency",
    "Normalizer": "diffpolicy.data.normalize",
    "EpisodeStore": "diffpolicy.data.store",
    "collect": "diffpolicy.rollout.record.experts",
    "make_set": "diffpolicy.rollout.record.making",
    "evaluate": "diffpolicy.rollout.evaluate",
    "EnvSpec": "diffpolicy.rollout.env_spec",
    "Workers": "diffpolicy.rollout.pool.workers",
}

__all__ = [
    "RTI",
    "ActionGroup",
    "Anchors",
    "Chunking",
    "DelayedPolicy",
    "DiffusionPolicy",
    "EnvSpec",
    "EpisodeStore",
    "Gripper",
    "Learning",
    "Normalizer",
    "PolicySampler",
    "PolicySpec",
    "Sampler",
    "Streaming",
    "TemporalEnsemble",
    "TrainerConfig",
    "Truncated",
    "TuningData",
    "Workers",
    "__version__",
    "collect",
    "evaluate",
    "make_set",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'diffpolicy' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
