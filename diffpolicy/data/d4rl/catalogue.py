"""The 155 D4RL datasets: ids, file names, step limits and the 147 published reference scores.

The table ``catalogue.csv`` restates D4RL's ``d4rl/infos.py`` (ids, base names of the files,
reference returns) and the step limits of its environment registrations, in full precision. D4RL
publishes no hashes of its files, so there are none here; a file that broke off while it was
downloaded is still noticed, because HDF5 records its own length. A file is taken for a dataset's if
its name is and its rows have the sizes of the dataset's environment; whether scores may stand
beside published ones also asks for the number of rows (Fu et al. 2020, table of datasets; the
locomotion data of versions 1 and 2 as they are published). Published files have up to one row in a
hundred less than the round number. Nothing in this module needs numpy.
"""

from __future__ import annotations

import csv
import difflib
import re
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SOURCE = "D4RL d4rl/infos.py"
"""Where the reference scores come from, for labels."""


_TOLERANCE = 0.01


@dataclass(frozen=True)
class DatasetInfo:
    """One dataset of D4RL.

    Attributes:
        id: such as ``"hopper-medium-v2"``.
        file: base name of its HDF5 file, different for every dataset.
        max_episode_steps: the step limit of its environment in D4RL.
        ref_min: return of the reference random policy, scored 0; None where D4RL gives none.
        ref_max: return of the reference expert, scored 100; None where D4RL gives none.
    """

    id: str
    file: str
    max_episode_steps: int
    ref_min: float | None
    ref_max: float | None

    @property
    def has_score(self) -> bool:
        """Whether D4RL publishes reference returns."""
        return self.ref_min is not None


def _table(name: str) -> list[dict[str, str]]:
    text = files(__package__).joinpath(name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def _parsed(row: dict[str, str]) -> DatasetInfo:
    low, high = (float(row[k]) if row[k] else None for k in ("ref_min", "ref_max"))
    return DatasetInfo(row["id"], row["file"], int(row["max_episode_steps"]), low, high)


DATASETS = {row["id"]: _parsed(row) for row in _table("catalogue.csv")}
"""Every dataset by its id, in D4RL's order."""

_BY_FILE = {info.file: info for info in DATASETS.values()}
# Sizes of a row of observations and of actions, by the family of datasets.
_SIZES = {r["family"]: (int(r["observation"]), int(r["action"])) for r in _table("sizes.csv")}
# Rows of datasets, by a pattern of their ids; the first that matches counts.
_ROWS = [(row["pattern"], int(row["rows"])) for row in _table("rows.csv")]


def lookup(dataset: str) -> DatasetInfo:
    """Look up what is known about a dataset.

    Args:
        dataset: Its id.

    Returns:
        File name, step limit and reference returns.

    Raises:
        ValueError: D4RL has no such id; the message names the nearest ones.
    """
    if dataset in DATASETS:
        return DATASETS[dataset]
    near = difflib.get_close_matches(dataset, DATASETS, n=4, cutoff=0.6)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    raise ValueError(
        f"D4RL has no dataset {dataset!r}{hint or '.'} `diffpolicy data d4rl` lists all of them"
    )


def by_file(name: str) -> DatasetInfo | None:
    """Find the dataset whose file has this base name, if there is one."""
    return _BY_FILE.get(name)


@overload
def normalized_score(dataset: str, episode_return: float) -> float: ...
@overload
def normalized_score(
    dataset: str, episode_return: NDArray[Any] | list[float]
) -> NDArray[np.float64]: ...
def normalized_score(dataset: str, episode_return: Any) -> Any:
    """Compute the score ``100 * (R - min) / (max - min)`` of Fu et al. (2020), section 6.

    0 is the reference random policy and 100 the reference expert; it may lie outside.

    Args:
        dataset: A dataset's id.
        episode_return: Undiscounted return(s) of whole episodes, of untransformed rewards: a number
            or an array of any shape.

    Returns:
        The score(s), a float for a number and a float64 array of the same shape for an array.

    Raises:
        ValueError: No such dataset, or one of the 8 for which D4RL gives no reference returns.
    """
    info = lookup(dataset)
    if info.ref_min is None or info.ref_max is None:
        raise ValueError(
            f"D4RL gives no reference returns for {dataset!r}, so it has no normalised score; "
            "report the return itself"
        )
    if not isinstance(episode_return, float | int):
        import numpy as np

        episode_return = np.asarray(episode_return, np.float64)
    score = 100.0 * ((episode_return - info.ref_min) / (info.ref_max - info.ref_min))
    return score if getattr(score, "ndim", 0) else float(score)


def misfit(info: DatasetInfo, observation: tuple[int, ...], action: tuple[int, ...]) -> str | None:
    """Tell why rows of these shapes cannot be the dataset's; None if they can, or if unknown."""
    family, _, rest = info.id.partition("-")
    sizes = _SIZES.get(f"bullet-{rest.partition('-')[0]}" if family == "bullet" else family)
    if sizes is None or (observation, action) == ((sizes[0],), (sizes[1],)):
        return None
    return (
        f"rows of observations {list(observation)} and actions {list(action)}, where {info.id!r} "
        f"has [{sizes[0]}] and [{sizes[1]}]"
    )


def doubts(info: DatasetInfo, rows: int | None) -> list[str]:
    """List what speaks against data of so many rows being all of a dataset.

    Rows that nobody counted (``None``) do.
    """
    if rows is None:
        return ["the data are no longer there, so their rows were not counted"]
    known = next((n for pattern, n in _ROWS if re.fullmatch(pattern, info.id)), None)
    if known is None:
        return [f"how many rows D4RL's file of {info.id} has is not known here"]
    if abs(rows - known) > _TOLERANCE * known:
        return [f"the data have {rows} rows, D4RL's {info.id} has {known}"]
    return []
