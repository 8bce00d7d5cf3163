"""Pedestrians of ETH and UCY: trajectories in world metres, cut into examples to predict from.

The protocol of the field: 2.5 frames a second, 8 positions (3.2 s) observed, the next 12 (4.8 s)
predicted, for every pedestrian present in 20 consecutive frames; one scene is held out at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray
    from torch import Tensor

    from diffpolicy.data.normalize import Normalizer

OBSERVED, PREDICTED = 8, 12
STANDSTILL = 0.1  # metres: net motion over the observation below which there is no heading

# Held-out scenes of each fold. `students001` and `students003` are one place, and `uni_examples`
# the same again: it is left out of that fold altogether.
FOLDS: Mapping[str, tuple[str, ...]] = {
    "eth": ("biwi_eth",),
    "univ": ("students001", "students003"),
    "zara01": ("crowds_zara01",),
    "zara02": ("crowds_zara02",),
    # Two more, which the usual protocol never holds out: no setting was ever chosen on them.
    "zara03": ("crowds_zara03",),
    "uni_examples": ("uni_examples",),
    "hotel": ("biwi_hotel",),
}
# Recordings of the same crowd as the held-out one are neither trained on nor scored.
_UNUSED: Mapping[str, tuple[str, ...]] = {
    "univ": ("uni_examples",),
    "uni_examples": ("students001", "students003"),
}


@dataclass(frozen=True)
class Trajectories:
    """Examples in the frame of their pedestrian.

    The origin is the last observed position and the x axis the direction of the last observed
    motion (see :func:`pedestrian_frame`), so a network need not learn that walking east is like
    walking north. Rotations and translations keep distances: errors are metres in any frame.

    It is a source of windows for the trainer and for anchors.

    Attributes:
        observed: ``[N, 8, 2]`` metres, the last one at the origin.
        future: ``[N, 12, 2]`` metres.
        episode: ``[N]`` number of the pedestrian (all its examples overlap).
        frame: ``[N, 3]`` world x and y of the origin, and heading of the x axis in radians.
        now: ``[N]`` frame number, divided by the step, of the last observation.
        mirror: add each example's mirror image, so that left and right turns are alike.
        normalizer: applied by :meth:`gather` to ``obs`` and ``action``.
    """

    observed: Tensor
    future: Tensor
    episode: Tensor
    frame: Tensor
    now: Tensor
    mirror: bool = False
    normalizer: Normalizer | None = None

    def __len__(self) -> int:
        return len(self.observed) * (2 if self.mirror else 1)

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        """A batch: ``obs [B, 8, 2]`` and ``action [B, 12, 2]``, normalised if there is how."""
        rows = indices % len(self.observed)
        flip = torch.ones(len(indices), 1, 2)
        flip[:, 0, 1] -= 2 * (indices >= len(self.observed)).float()
        batch = {"obs": self.observed[rows] * flip, "action": self.future[rows] * flip}
        if self.normalizer is None:
            return batch
        normalize = self.normalizer.normalize
        return {name: normalize(name, value) for name, value in batch.items()}

    def locate(self, index: int) -> tuple[int, int]:
        """The pedestrian of an example, and its frame."""
        row = index % len(self.observed)
        return int(self.episode[row]), int(self.now[row])

    def rows(self, chosen: Tensor) -> Trajectories:
        """Some of the examples, by index or bool."""
        names = ("observed", "future", "episode", "frame", "now")
        return replace(self, **{name: getattr(self, name)[chosen] for name in names})

    def statistics(self) -> dict[str, dict[str, NDArray[np.float64]]]:
        """Per field what a :class:`~diffpolicy.data.normalize.Normalizer` is fitted to.

        Pooled over positions, and over left and right when mirrored.
        """
        fields = {"obs": self.observed, "action": self.future}
        result = {}
        for name, values in fields.items():
            flat = values.reshape(-1, 2).double().numpy()
            if self.mirror:
                flat = np.concatenate([flat, flat * [1, -1]])
            low, high = np.quantile(flat, [0.01, 0.99], axis=0)
            result[name] = {
                "min": flat.min(0),
                "max": flat.max(0),
                "mean": flat.mean(0),
                "std": flat.std(0),
                "q01": low,
                "q99": high,
            }
        return result


def read_scenes(*paths: str | os.PathLike[str]) -> dict[str, NDArray[np.float64]]:
    """Read the rows ``[frame, pedestrian, x, y]`` (metres) of all scenes.

    Args:
        paths: ``.npz`` files with one array ``[N, 4]`` per scene, or a scene's text file as it is
            published, named after it (``biwi_hotel.txt``).

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: rows of another shape, or values that are not finite.
    """
    scenes: dict[str, NDArray[np.float64]] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"no file at {path}")
        if path.suffix == ".txt":
            scenes[path.stem] = np.loadtxt(path, np.float64, ndmin=2)
            continue
        with np.load(path, allow_pickle=False) as arrays:
            scenes |= {name: np.asarray(arrays[name], np.float64) for name in arrays.files}
    for name, rows in scenes.items():
        if rows.ndim != 2 or rows.shape[1] != 4 or not np.isfinite(rows).all():
            raise ValueError(
                f"scene {name!r} must be finite rows [frame, pedestrian, x, y], got shape "
                f"{list(rows.shape)}"
            )
    return scenes


def windows(
    scene: NDArray[np.float64], *, observed: int = OBSERVED, predicted: int = PREDICTED
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Every run of consecutive frames of every pedestrian.

    Args:
        scene: ``[N, 4]`` rows of frame, pedestrian, x, y in any order.
        observed: positions to predict from.
        predicted: positions to predict.

    Returns:
        Positions ``[W, observed + predicted, 2]`` in metres, and ``[W, 2]``: the pedestrian, and
        the frame of the last observation in units of the frame step. No run spans a gap.
    """
    length = observed + predicted
    frames = np.unique(scene[:, 0])
    step = np.diff(frames).min() if len(frames) > 1 else 1.0
    order = np.lexsort((scene[:, 0], scene[:, 1]))
    person, place = scene[order, 1].astype(np.int64), scene[order, 2:]
    number = np.round(scene[order, 0] / step).astype(np.int64)
    starts = np.arange(max(0, len(order) - length + 1))
    last = starts + length - 1
    # Sorted by pedestrian and frame: a run is whole when its ends are this far apart.
    whole = (person[starts] == person[last]) & (number[last] - number[starts] == length - 1)
    starts = starts[whole]
    runs = place[starts[:, None] + np.arange(length)]
    return runs, np.stack([person[starts], number[starts + observed - 1]], axis=1)


def pedestrian_frame(observed: NDArray[np.float64]) -> NDArray[np.float64]:
    """Origin and heading to see a pedestrian's trajectory from.

    Only observations decide. The heading is that of the last displacement; of one who has just
    stopped, that of the motion over the whole observation; of one who stands, 0.

    Args:
        observed: ``[W, T, 2]`` metres.

    Returns:
        ``[W, 3]``: x and y of the last position, heading in radians.
    """
    last, whole = observed[:, -1] - observed[:, -2], observed[:, -1] - observed[:, 0]
    moving = np.linalg.norm(last, axis=1) * (observed.shape[1] - 1) >= STANDSTILL
    direction = np.where(moving[:, None], last, whole)
    standing = ~moving & (np.linalg.norm(whole, axis=1) < STANDSTILL)
    heading = np.where(standing, 0.0, np.arctan2(direction[:, 1], direction[:, 0]))
    return np.concatenate([observed[:, -1], heading[:, None]], axis=1)


def to_frame(points: NDArray[np.float64], frame: NDArray[np.float64]) -> NDArray[np.float64]:
    """World positions ``[W, T, 2]`` in the frames ``[W, 3]``."""
    cos, sin = np.cos(frame[:, 2])[:, None], np.sin(frame[:, 2])[:, None]
    x, y = np.moveaxis(points - frame[:, None, :2], -1, 0)
    return np.stack([cos * x + sin * y, cos * y - sin * x], axis=-1)


def to_world(points: NDArray[np.float64], frame: NDArray[np.float64]) -> NDArray[np.float64]:
    """The inverse of :func:`to_frame`."""
    cos, sin = np.cos(frame[:, 2])[:, None], np.sin(frame[:, 2])[:, None]
    x, y = np.moveaxis(points, -1, 0)
    return np.stack([cos * x - sin * y, sin * x + cos * y], axis=-1) + frame[:, None, :2]


def trajectories(
    scenes: Mapping[str, NDArray[np.float64]], names: Sequence[str], *, mirror: bool = False
) -> Trajectories:
    """The examples of some scenes, each in the frame of its pedestrian.

    Raises:
        ValueError: an unknown scene, or no example at all.
    """
    unknown = sorted(set(names) - set(scenes))
    if unknown:
        raise ValueError(f"unknown scenes {unknown}; the file holds {sorted(scenes)}")
    parts: list[tuple[NDArray[np.float64], NDArray[np.int64]]] = []
    people = 0
    for name in names:
        runs, label = windows(scenes[name])
        _, person = np.unique(label[:, 0], return_inverse=True)
        label = np.stack([person + people, label[:, 1]], axis=1)
        people += len(np.unique(person))
        parts.append((runs, label))
    runs = np.concatenate([part[0] for part in parts])
    label = np.concatenate([part[1] for part in parts])
    if not len(runs):
        raise ValueError(f"no pedestrian of {list(names)} is present in 20 consecutive frames")
    frame = pedestrian_frame(runs[:, :OBSERVED])
    local = torch.from_numpy(to_frame(runs, frame)).float()
    return Trajectories(
        local[:, :OBSERVED],
        local[:, OBSERVED:],
        torch.from_numpy(label[:, 0]),
        torch.from_numpy(frame),
        torch.from_numpy(label[:, 1]),
        mirror,
    )


def fold_scenes(scenes: Mapping[str, Any], fold: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Training and held-out scenes of a fold.

    Raises:
        ValueError: an unknown fold.
    """
    if fold not in FOLDS:
        raise ValueError(f"unknown fold {fold!r}; expected one of {sorted(FOLDS)}")
    out = FOLDS[fold]
    # biwi_hotel came last: it is only ever held out, so that the other folds stay as they were.
    unused = (*out, *_UNUSED.get(fold, ()), "biwi_hotel")
    return tuple(name for name in scenes if name not in unused), out


def split(data: Trajectories, val_fraction: float, seed: int) -> tuple[Trajectories, Trajectories]:
    """Training and validation examples; no pedestrian is in both."""
    people = torch.unique(data.episode)
    count = max(1, round(val_fraction * len(people)))
    order = torch.randperm(len(people), generator=torch.Generator().manual_seed(seed))
    out = torch.isin(data.episode, people[order[:count]])
    return data.rows(~out), data.rows(out)
