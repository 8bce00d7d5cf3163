"""What a store of ours has and LeRobot no place for, in a file beside the dataset's own metadata.

LeRobot's package passes it over. By it a store that was written as a dataset is read again as it
was: observations by their names, how actions are meant, what is known of each episode.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diffpolicy.settings import from_values, named_settings

FILE = "meta/diffpolicy.json"


@named_settings
@dataclass(frozen=True)
class StoreNotes:
    """The content of the file.

    Args:
        fields: of the store's fields, under which name the dataset has them.
        attrs: of the store.
        episodes: attributes of each episode.
    """

    fields: Mapping[str, str] = field(default_factory=dict)
    attrs: Mapping[str, Any] = field(default_factory=dict)
    episodes: Sequence[Mapping[str, Any]] = ()

    def write(self, root: Path) -> None:
        """Write the file into the dataset at ``root``."""
        (root / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def read_notes(root: Path, names: Sequence[str], episodes: int) -> tuple[StoreNotes, str]:
    """Return the notes of the dataset at ``root``, and why they are not used; both may be empty.

    Args:
        root: The dataset's directory.
        names: The fields that it has.
        episodes: How many it has.

    Raises:
        ValueError: The file is none of ours.
    """
    path = root / FILE
    if not path.is_file():
        return StoreNotes(), ""
    notes = from_values(StoreNotes, json.loads(path.read_text(encoding="utf-8")), "")
    lost = sorted(set(notes.fields.values()) - set(names))
    if not lost and len(notes.episodes) == episodes:
        return notes, ""
    why = f"has no {lost}" if lost else f"has {episodes} episodes, not {len(notes.episodes)}"
    return StoreNotes(), f"of the store that was written; the dataset {why}: it was changed since"
