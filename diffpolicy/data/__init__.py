"""Episodes in, windows out: storage, checks, normalisation, preferences, batched gathering.

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
    from diffpolicy.data.damage import StoreDamagedError
    from diffpolicy.data.fields import FieldSpec
    from diffpolicy.data.human_labels import from_indices, qlearning_rows
    from diffpolicy.data.label_files import read_label_file
    from diffpolicy.data.normalize import Normalizer
    from diffpolicy.data.preference_check import check_preferences
    from diffpolicy.data.preference_examples import LabelExamples, PairExamples
    from diffpolicy.data.preference_records import Label, Pair, Ranking, Span
    from diffpolicy.data.preferences import PreferenceSet
    from diffpolicy.data.scored_pairs import by_return, from_scores
    from diffpolicy.data.statistics import compute_statistics
    from diffpolicy.data.store import EpisodeStore
    from diffpolicy.data.transitions import Transitions
    from diffpolicy.data.windows import Windows, split_episodes

_HOMES = {
    "D4RLFile": "d4rl",
    "EpisodeStore": "store",
    "FieldSpec": "fields",
    "Issue": "check",
    "Label": "preference_records",
    "LabelExamples": "preference_examples",
    "Normalizer": "normalize",
    "Pair": "preference_records",
    "PairExamples": "preference_examples",
    "PreferenceSet": "preferences",
    "Ranking": "preference_records",
    "Span": "preference_records",
    "StoreDamagedError": "damage",
    "Transitions": "transitions",
    "Windows": "windows",
    "by_return": "scored_pairs",
    "check_preferences": "preference_check",
    "check_store": "check",
    "compute_statistics": "statistics",
    "convert": "conversion",
    "format_issue": "check",
    "from_indices": "human_labels",
    "from_scores": "scored_pairs",
    "info": "check",
    "load_d4rl": "d4rl",
    "normalized_score": "d4rl",
    "qlearning_dataset": "d4rl",
    "qlearning_rows": "human_labels",
    "read_label_file": "label_files",
    "sequence_dataset": "d4rl",
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
