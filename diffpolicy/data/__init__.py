"""Episodes in, windows out: storage, checks, normalisation, preferences, batched gathering.

The names below are loaded on first use, so that a deployed policy, which needs only the
:class:`~diffpolicy.data.normalize.Normalizer`, does not pay for importing zarr.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffpolicy.data.check import Issue as Issue
    from diffpolicy.data.check import check_store as check_store
    from diffpolicy.data.check import format_issue as format_issue
    from diffpolicy.data.conversion import convert as convert
    from diffpolicy.data.d4rl.catalogue import normalized_score as normalized_score
    from diffpolicy.data.d4rl.file import D4RLFile as D4RLFile
    from diffpolicy.data.d4rl.file import load_d4rl as load_d4rl
    from diffpolicy.data.d4rl.views import qlearning_dataset as qlearning_dataset
    from diffpolicy.data.d4rl.views import sequence_dataset as sequence_dataset
    from diffpolicy.data.fields import FieldSpec as FieldSpec
    from diffpolicy.data.hindsight import Hindsight as Hindsight
    from diffpolicy.data.hindsight import relabelled as relabelled
    from diffpolicy.data.normalize import Normalizer as Normalizer
    from diffpolicy.data.opening import StoreDamagedError as StoreDamagedError
    from diffpolicy.data.preferences.check import check_preferences as check_preferences
    from diffpolicy.data.preferences.examples import LabelExamples as LabelExamples
    from diffpolicy.data.preferences.examples import PairExamples as PairExamples
    from diffpolicy.data.preferences.published import from_indices as from_indices
    from diffpolicy.data.preferences.published import qlearning_rows as qlearning_rows
    from diffpolicy.data.preferences.published import read_label_file as read_label_file
    from diffpolicy.data.preferences.records import Label as Label
    from diffpolicy.data.preferences.records import Pair as Pair
    from diffpolicy.data.preferences.records import Ranking as Ranking
    from diffpolicy.data.preferences.records import Span as Span
    from diffpolicy.data.preferences.scored import by_return as by_return
    from diffpolicy.data.preferences.scored import from_scores as from_scores
    from diffpolicy.data.preferences.set import PreferenceSet as PreferenceSet
    from diffpolicy.data.reader import info as info
    from diffpolicy.data.statistics import compute_statistics as compute_statistics
    from diffpolicy.data.store import EpisodeStore as EpisodeStore
    from diffpolicy.data.transitions import Transitions as Transitions
    from diffpolicy.data.windows import Windows as Windows
    from diffpolicy.data.windows import split_episodes as split_episodes

_NAMES = {
    "check": ["Issue", "check_store", "format_issue"],
    "conversion": ["convert"],
    "d4rl.catalogue": ["normalized_score"],
    "d4rl.file": ["D4RLFile", "load_d4rl"],
    "d4rl.views": ["qlearning_dataset", "sequence_dataset"],
    "fields": ["FieldSpec"],
    "hindsight": ["Hindsight", "relabelled"],
    "normalize": ["Normalizer"],
    "opening": ["StoreDamagedError"],
    "preferences.check": ["check_preferences"],
    "preferences.examples": ["LabelExamples", "PairExamples"],
    "preferences.published": ["from_indices", "qlearning_rows", "read_label_file"],
    "preferences.records": ["Label", "Pair", "Ranking", "Span"],
    "preferences.scored": ["by_return", "from_scores"],
    "preferences.set": ["PreferenceSet"],
    "reader": ["info"],
    "statistics": ["compute_statistics"],
    "store": ["EpisodeStore"],
    "transitions": ["Transitions"],
    "windows": ["Windows", "split_episodes"],
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
