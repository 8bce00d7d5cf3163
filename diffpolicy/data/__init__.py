"""Episodes in, windows out: storage, checks, normalisation, preferences, batched gathering.

The names below are loaded on first use, so that a deployed policy, which needs only the
[`Normalizer`][diffpolicy.data.normalize.Normalizer], does not pay for importing zarr.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffpolicy.data.check import Issue, check_store, format_issue, info
    from diffpolicy.data.conversion import convert
    from diffpolicy.data.d4rl.catalogue import normalized_score
    from diffpolicy.data.d4rl.file import D4RLFile, load_d4rl
    from diffpolicy.data.d4rl.views import qlearning_dataset, sequence_dataset
    from diffpolicy.data.damage import StoreDamagedError
    from diffpolicy.data.fields import FieldSpec
    from diffpolicy.data.normalize import Normalizer
    from diffpolicy.data.preferences.check import check_preferences
    from diffpolicy.data.preferences.examples import LabelExamples, PairExamples
    from diffpolicy.data.preferences.published import (
        from_indices,
        qlearning_rows,
        read_label_file,
    )
    from diffpolicy.data.preferences.records import Label, Pair, Ranking, Span
    from diffpolicy.data.preferences.scored import by_return, from_scores
    from diffpolicy.data.preferences.set import PreferenceSet
    from diffpolicy.data.statistics import compute_statistics
    from diffpolicy.data.store import EpisodeStore
    from diffpolicy.data.transitions import Transitions
    from diffpolicy.data.windows import Windows, split_episodes

_HOMES = {
    "D4RLFile": "d4rl.file",
    "EpisodeStore": "store",
    "FieldSpec": "fields",
    "Issue": "check",
    "Label": "preferences.records",
    "LabelExamples": "preferences.examples",
    "Normalizer": "normalize",
    "Pair": "preferences.records",
    "PairExamples": "preferences.examples",
    "PreferenceSet": "preferences.set",
    "Ranking": "preferences.records",
    "Span": "preferences.records",
    "StoreDamagedError": "damage",
    "Transitions": "transitions",
    "Windows": "windows",
    "by_return": "preferences.scored",
    "check_preferences": "preferences.check",
    "check_store": "check",
    "compute_statistics": "statistics",
    "convert": "conversion",
    "format_issue": "check",
    "from_indices": "preferences.published",
    "from_scores": "preferences.scored",
    "info": "check",
    "load_d4rl": "d4rl.file",
    "normalized_score": "d4rl.catalogue",
    "qlearning_dataset": "d4rl.views",
    "qlearning_rows": "preferences.published",
    "read_label_file": "preferences.published",
    "sequence_dataset": "d4rl.views",
    "split_episodes": "windows",
}

__all__ = [
    "D4RLFile",
    "EpisodeStore",
    "FieldSpec",
    "Issue",
    "Label",
    "LabelExamples",
    "Normalizer",
    "Pair",
    "PairExamples",
    "PreferenceSet",
    "Ranking",
    "Span",
    "StoreDamagedError",
    "Transitions",
    "Windows",
    "by_return",
    "check_preferences",
    "check_store",
    "compute_statistics",
    "convert",
    "format_issue",
    "from_indices",
    "from_scores",
    "info",
    "load_d4rl",
    "normalized_score",
    "qlearning_dataset",
    "qlearning_rows",
    "read_label_file",
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
