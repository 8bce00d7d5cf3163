"""D4RL's datasets without the d4rl package: catalogue, files, transforms and D4RL's own views.

- `catalogue`: the 155 dataset ids with file names, step limits and reference scores;
- `location`: where a dataset's file is looked for;
- `file`: [`D4RLFile`][diffpolicy.data.d4rl.file.D4RLFile], a lazy reader of whole episodes;
- `transforms`: named changes of rewards and episodes, recorded with everything made of them;
- `inspection`: checks of every value;
- `views`: what D4RL's `qlearning_dataset` and `sequence_dataset` return.

The names are loaded on first use: the catalogue needs neither numpy nor h5py.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffpolicy.data.d4rl.catalogue import DATASETS, DatasetInfo, lookup, normalized_score
    from diffpolicy.data.d4rl.file import D4RLFile, load_d4rl
    from diffpolicy.data.d4rl.location import find_dataset, scan
    from diffpolicy.data.d4rl.transforms import parse_transforms
    from diffpolicy.data.d4rl.views import qlearning_dataset, sequence_dataset

_HOMES = {
    "DATASETS": "catalogue",
    "D4RLFile": "file",
    "DatasetInfo": "catalogue",
    "find_dataset": "location",
    "load_d4rl": "file",
    "lookup": "catalogue",
    "normalized_score": "catalogue",
    "parse_transforms": "transforms",
    "qlearning_dataset": "views",
    "scan": "location",
    "sequence_dataset": "views",
}

__all__ = [
    "DATASETS",
    "D4RLFile",
    "DatasetInfo",
    "find_dataset",
    "load_d4rl",
    "lookup",
    "normalized_score",
    "parse_transforms",
    "qlearning_dataset",
    "scan",
    "sequence_dataset",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
