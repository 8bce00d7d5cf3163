"""Cameras that froze, went dark or changed their colours: frames that can be read and are wrong.

Frames are compared by a grid of their pixels; only where that says "the same" are all pixels
looked at, so that a check costs little more than reading the frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffpolicy.data.blocks import by_episode, spans
from diffpolicy.data.fields import FieldSpec
from diffpolicy.data.suspects import FROZEN_STEPS, FROZEN_TIMES, STILL, Suspect, longest_run

_GRID = 16  # pixels of a side that are compared first
_PLAIN = 8  # levels of 255 within which all pixels are one colour: codecs leave some
_DARK, _BRIGHT = 16, 239
_CHANNELS = (1, 3, 4)
_CELLS = 4  # of a side, in which colours are summed
_ENOUGH, _COLOURED, _ALIKE = 4, 1.0, 0.3  # episodes, levels and cosine that colours are judged from
_LISTED = 10


def layout_problem(name: str, spec: FieldSpec) -> tuple[str, str] | None:
    """Return what is wrong with how the images of an observation are stored, and the fix."""
    shape = list(spec.shape)
    if len(shape) == 3 and spec.dtype.startswith("float"):
        message = f"rows {shape} of {spec.dtype} are not taken for images, which are bytes (uint8)"
        return message, "store uint8: the values themselves, or 255 times those from 0 to 1"
    if spec.dtype == "uint8" and len(shape) == 1 and shape[0] >= 3 * _GRID**2:
        message = f"a vector of {shape[0]} bytes looks like an image that was flattened"
        return message, "store it as [T, height, width, channels]"
    if not spec.is_image or len(shape) != 3 or shape[2] in _CHANNELS:
        return None
    if shape[0] in _CHANNELS:
        message = f"images have the shape {shape}, channels first; environments and encoders here "
        return f"{message}take [height, width, channels]", f"store np.moveaxis({name}, 1, -1)"
    message = f"images have the shape {shape}: the last number is no number of channels (1, 3, 4)"
    return message, "store [T, height, width, channels]"


class Frames:
    """Notes on the frames of a field, made as its blocks are read in order.

    Args:
        spec: The field; see :meth:`fit`.
        ends: ``[E]`` cumulative ends of the episodes.

    Attributes:
        repeats: ``[T]`` whether a frame is that before it, pixel by pixel.
        level: ``[T]`` mean level of a frame of one colour; -1 of others.
    """

    @staticmethod
    def fit(spec: FieldSpec) -> bool:
        """Return whether rows are single images, ``[H, W]``, ``[H, W, C]`` or ``[C, H, W]``."""
        return spec.is_image and len(spec.shape) <= 3

    def __init__(self, spec: FieldSpec, ends: NDArray[np.int64]) -> None:
        total = int(ends.max(initial=0))
        self._first = len(spec.shape) == 3 and spec.shape[2] not in _CHANNELS
        self._ends = ends
        self.repeats, self.level = np.zeros(total, np.bool_), np.full(total, -1.0)
        self._redder = np.zeros((len(ends), _CELLS, _CELLS))
        self._last: NDArray[Any] | None = None

    def note(self, start: int, block: NDArray[Any]) -> None:
        """Look at the rows from ``start`` on; what was before is the last block's end."""
        if self._first:
            block = np.moveaxis(block, 1, -1)
        block = block if block.ndim == 4 else block[..., None]
        height, width = (-(-n // _GRID) for n in block.shape[1:3])
        grid = np.ascontiguousarray(np.moveaxis(block[:, ::height, ::width], -1, 1))
        flat = grid.reshape(len(block), -1)
        same = np.zeros(len(block), np.bool_)
        same[1:] = (flat[1:] == flat[:-1]).all(axis=1)
        for i in np.flatnonzero(same).tolist():
            same[i] = np.array_equal(block[i], block[i - 1])
        same[0] = self._last is not None and np.array_equal(block[0], self._last)
        self.repeats[start : start + len(block)] = same
        first = grid[:, 0].reshape(len(block), -1)
        for i in np.flatnonzero(first.max(axis=1) - first.min(axis=1) <= _PLAIN).tolist():
            if (np.ptp(block[i].reshape(-1, block.shape[-1]), axis=0) <= _PLAIN).all():
                self.level[start + i] = block[i].mean()
        if grid.shape[1] == 3 and min(grid.shape[2:]) >= _CELLS:
            self._note_colours(start, grid)
        self._last = block[-1].copy()

    def _note_colours(self, start: int, grid: NDArray[Any]) -> None:
        redder = grid[:, 0].astype(np.int64) - grid[:, 2]
        episode = np.searchsorted(self._ends, np.arange(start, start + len(grid)), side="right")
        numbers, begins = np.unique(episode, return_index=True)
        sums = np.add.reduceat(redder, begins, axis=0)
        for axis in (1, 2):
            cuts = np.arange(_CELLS) * sums.shape[axis] // _CELLS
            sums = np.add.reduceat(sums, cuts, axis=axis)
        self._redder[numbers] += sums

    def suspects(self, name: str, moving: NDArray[np.bool_]) -> Iterator[Suspect]:
        """Yield what is wrong with the frames of a field.

        Args:
            name: The field.
            moving: ``[T]`` whether other observations changed since the row before.
        """
        places = spans(self._ends)
        yield from self._frozen(name, moving, places)
        fix = "leave the episode out, and look whether the camera or its light failed"
        for index, rows in by_episode(np.flatnonzero(self.level >= 0), self._ends):
            (start, stop), level = places[index], float(self.level[rows[0]])
            colour = "black" if level <= _DARK else "white" if level >= _BRIGHT else "one colour"
            message = (
                f"{len(rows)} of the episode's {stop - start} frames have no picture, first in "
                f"step {rows[0] - start}: it is {colour} (level {level:.0f} of 255)"
            )
            yield Suspect(name, "plain", index, int(rows[0]), message, fix)
        yield from self._swapped(name)

    def _frozen(
        self, name: str, moving: NDArray[np.bool_], places: list[tuple[int, int]]
    ) -> Iterator[Suspect]:
        still = self.repeats & moving
        runs = [longest_run(still[start + 1 : stop]) for start, stop in places]
        usual = max(FROZEN_STEPS, FROZEN_TIMES * np.median([length for length, _ in runs]))
        lively = np.median([still[start:stop].mean() for start, stop in places]) <= STILL
        for index, ((start, stop), (length, begin)) in enumerate(zip(places, runs, strict=True)):
            # For half of an episode a camera that shows the robot cannot stay the same, usual or
            # not; for less, this one must be unlike the others.
            half = max(FROZEN_STEPS, (stop - start) / 2)
            if length >= half or (lively and length >= usual):
                message = (
                    f"the camera is frozen: its frames stay the same, pixel by pixel, in steps "
                    f"{begin}..{begin + length - 1} of the episode, while other observations change"
                )
                fix = "leave the episode out, and look whether the recorder lost this camera"
                yield Suspect(name, "frozen", index, start + begin, message, fix)

    def _swapped(self, name: str) -> Iterator[Suspect]:
        """Episodes in which what is redder than blue elsewhere is bluer, and the other way round.

        Which of two groups is right nobody can tell from them, nor whether all are wrong; and
        nothing is said where episodes do not look alike, or are grey.
        """
        lengths = np.diff(self._ends, prepend=0)
        maps = self._redder.reshape(len(lengths), -1) / lengths[:, None]
        sizes = np.linalg.norm(maps, axis=1, keepdims=True)
        if len(maps) < _ENOUGH or np.median(sizes) < _COLOURED:
            return
        maps = maps / np.maximum(sizes, 1e-9)
        signs = np.sign(maps @ maps[0])  # which half is which is found from the first episode on
        for _ in range(4):
            turned = signs[:, None] * maps
            others = turned.sum(axis=0) - turned  # each would be like itself
            sizes = np.linalg.norm(others, axis=1)
            likeness = (maps * others).sum(axis=1) / np.maximum(sizes, 1e-9)
            signs = np.sign(likeness)
        if (np.abs(likeness) >= _ALIKE).mean() < 0.95:
            return
        found = np.flatnonzero(likeness <= -_ALIKE)
        if len(found) > len(maps) / 2:
            found = np.flatnonzero(likeness >= _ALIKE)
        if not len(found):
            return
        first = int(found[0])
        listed = ", ".join(map(str, found[:_LISTED])) + (", ..." if len(found) > _LISTED else "")
        message = (
            f"red and blue look exchanged in {len(found)} of {len(maps)} episodes ({listed}): what "
            "is redder than blue in the others is bluer there"
        )
        fix = "look at a frame of each kind, and reverse the channels of those in BGR: [..., ::-1]"
        yield Suspect(name, "channels", first, spans(self._ends)[first][0], message, fix)
