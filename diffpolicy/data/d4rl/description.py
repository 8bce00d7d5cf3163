"""What stands beside the arrays of a D4RL file: attributes, notes in words, and what it lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from diffpolicy.data.d4rl.catalogue import SOURCE
from diffpolicy.data.formats import Gap

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffpolicy.data.d4rl.file import D4RLFile


def describe(file: D4RLFile) -> dict[str, Any]:
    """See `D4RLFile.attrs`."""
    info, said = file.info, file.raw.notes()
    references = (info.ref_min, info.ref_max) if info else (None, None)
    known = {"env_id": said["env_id"]} if isinstance(said.get("env_id"), str) else {}
    return known | {
        "origin": "d4rl",
        "dataset": info.id if info else file.raw.path.stem,
        "file": file.raw.path.name,
        "file_bytes": file.raw.path.stat().st_size,
        "file_sha256": file.digest,
        "transforms": list(file.transforms),
        "reward_scale": file.reward_map.scale,
        "reward_shift": file.reward_map.shift,
        "goal_radius": file._goal_radius,
        "references": {"min": references[0], "max": references[1], "source": SOURCE},
        "max_episode_steps": file._limit or file._dataset_limit,
        "notes": file.notes,
        "metadata": said,
    }


def notes_of(file: D4RLFile) -> list[str]:
    """See `D4RLFile.notes`."""
    _, how = file._found
    found = []
    if how:
        of_dataset = file.info is not None and file._limit is None
        found.append(f"{how}, the limit of {file.info.id}" if file.info and of_dataset else how)
    if file._foreign:
        found.append(file._foreign)
    if file._whole.episodes.partial:
        what = "kept, marked partial" if file._keep_partial else "left out"
        found.append(f"the file ends within an episode, which was {what}")
    return found


def gaps_of(file: D4RLFile, arrays: Sequence[str]) -> list[Gap]:
    """The rows of some arrays that were never written, as ranges of episodes."""
    ends, found = file.episodes.ends, []
    for name, start, stop in file.raw.unwritten(arrays):
        first, last = np.searchsorted(ends, [start, stop - 1], side="right").tolist()
        if first < len(ends):
            reason = f"{name}: rows {start}..{stop - 1} were never written, and read as zeros"
            found.append(Gap(first, min(last, len(ends) - 1), reason))
    return found
