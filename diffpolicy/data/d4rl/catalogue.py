"""The 155 D4RL datasets: ids, file names, step limits and the 147 published reference scores.

The table `catalogue.csv` restates D4RL's `d4rl/infos.py` (ids, base names of the files, reference
returns) and the step limits of its environment registrations, in full precision. D4RL publishes no
hashes of its files, so there are none here; a file that broke off while it was downloaded is still
noticed, because HDF5 records its own length. Nothing in this module needs numpy.
"""

from __future__ import annotations

import csv
import difflib
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SOURCE = "D4RL d4rl/infos.py"
"""Where the reference scores come from, for labels."""


@dataclass(frozen=True)
class DatasetInfo:
    """One dataset of D4RL.

    Attributes:
        id: such as `"hopper-medium-v2"`.
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


def _read() -> dict[str, DatasetInfo]:
    text = files(__package__).joinpath("catalogue.csv").read_text(encoding="utf-8")
    return {
        row["id"]: DatasetInfo(
            row["id"],
            row["file"],
            int(row["max_episode_steps"]),
            float(row["ref_min"]) if row["ref_min"] else None,
            float(row["ref_max"]) if row["ref_max"] else None,
        )
        for row in csv.DictReader(text.splitlines())
    }


DATASETS: dict[str, DatasetInfo] = _read()
"""Every dataset by its id, in D4RL's order."""

_BY_FILE = {info.file: info for info in DATASETS.values()}


def lookup(dataset: str) -> DatasetInfo:
    """What is known about a dataset.

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
    """The dataset whose file has this base name, if there is one."""
    return _BY_FILE.get(name)


@overload
def normalized_score(dataset: str, episode_return: float) -> float: ...
@overload
def normalized_score(
    dataset: str, episode_return: NDArray[Any] | list[float]
) -> NDArray[np.float64]: ...
def normalized_score(dataset: str, episode_return: Any) -> Any:
    """D4RL's normalised score, `100 * (R - min) / (max - min)` (Fu et al. 2020, section 6).

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
