"""Episodes in, windows out: storage, checks, normalisation and batched gathering.

The names below are loaded on first use, so that a deployed policy, which needs only the
[`Normalizer`][diffpolicy.data.normalize.Normalizer], does not pay for importing zarr.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffpolicy.data.check import Issue, check_store, format_issue, info
    from diffpolicy.data.conversion import convert
    from diffpolicy.data.d4rl import (
        D4RLFile,
        load_d4rl,
        normalized_score,
        qlearning_dataset,
        sequence_dataset,
    )
    from diffpolicy.data.fields import FieldSpec
    from diffpolicy.data.layout import StoreDamagedError
    from diffpolicy.data.normalize import Normalizer
    from diffpolicy.data.statistics import compute_statistics
    from diffpolicy.data.store import EpisodeStore
    from diffpolicy.data.transitions import Transitions
    from diffpolicy.data.windows import Windows, split_episodes

_HOMES = {
    "D4RLFile": "d4rl",
    "EpisodeStore": "store",
    "FieldSpec": "fields",
    "Issue": "check",
    "Normalizer": "normalize",
    "StoreDamagedError": "layout",
    "Transitions": "transitions",
    "Windows": "windows",
    "check_store": "check",
    "compute_statistics": "statistics",
    "convert": "conversion",
    "format_issue": "check",
    "info": "check",
    "load_d4rl": "d4rl",
    "normalized_score": "d4rl",
    "qlearning_dataset": "d4rl",
    "sequence_dataset": "d4rl",
    "split_episodes": "windows",
}

__all__ = [
    "D4RLFile",
    "EpisodeStore",
    "FieldSpec",
    "Issue",
    "Normalizer",
    "StoreDamagedError",
    "Transitions",
    "Windows",
    "check_store",
    "compute_statistics",
    "convert",
    "format_issue",
    "info",
    "load_d4rl",
    "normalized_score",
    "qlearning_dataset",
    "sequence_dataset",
    "split_episodes",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
