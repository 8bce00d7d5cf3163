"""Films as rows of images, by PyAV: read at the times that rows have, and written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffpolicy.extras import need

# H.264 plays everywhere. Every second picture stands by itself: whoever wants one decodes two. No
# picture looks ahead, so that each stands at its own time; one thread writes the same bits again.
_OPTIONS = {"crf": "18", "g": "2", "bf": "0", "threads": "1"}


def read_frames(
    path: Path, times: Sequence[float] | NDArray[np.floating[Any]], tolerance: float
) -> NDArray[np.uint8]:
    """Read the pictures that a film shows at some times; what lies between is decoded once.

    Args:
        path: The film.
        times: T times in seconds, in any order; the nearest picture to each is taken.
        tolerance: By how many seconds it may be off.

    Returns:
        Pixels ``[T, H, W, 3]``.

    Raises:
        ImportError: PyAV is not installed.
        FileNotFoundError: There is no such film.
        ValueError: No picture is near enough to one of the times, or the film is damaged.
    """
    av = need("av")
    wanted = np.asarray(times, np.float64)
    found: NDArray[np.uint8] | None = None
    try:
        with av.open(str(path)) as film:
            frames = _decoded(film, wanted.min() - tolerance)
            now, after, pixels = next(frames), next(frames, None), None
            for index in np.argsort(wanted, kind="stable").tolist():
                time = wanted[index]
                while after is not None and abs(after[0] - time) < abs(now[0] - time):
                    now, after, pixels = after, next(frames, None), None
                if abs(now[0] - time) > tolerance:
                    raise ValueError(
                        f"{path} shows nothing at {time:.6f} s: the nearest picture is that of "
                        f"{now[0]:.6f} s, more than {tolerance:.6f} s away"
                    )
                if pixels is None:
                    pixels = now[1].to_ndarray(format="rgb24")
                if found is None:
                    found = np.empty((len(wanted), *pixels.shape), np.uint8)
                found[index] = pixels
    except (av.FFmpegError, IndexError, StopIteration) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(
            f"{path} holds no pictures that can be decoded ({error!r}): download or copy it again "
            "(a clone needs `git lfs pull`)"
        ) from None
    assert found is not None
    return found


def _decoded(film: Any, start: float) -> Iterator[tuple[float, Any]]:
    """Time and picture of each frame from (at the latest) ``start`` on."""
    stream = film.streams.video[0]
    stream.thread_type = "NONE"  # threads wait for each other longer than small pictures take
    if start > 0:
        film.seek(int(start / stream.time_base), stream=stream)  # to the key frame before it
    for frame in film.decode(stream):
        yield float(frame.pts * stream.time_base), frame


class FilmWriter:
    """Writes pictures at a steady rate into an mp4 file.

    Args:
        path: The file; its folder is made.
        fps: Pictures a second.
        shape: ``(H, W, 3)``. Colours are stored at half the resolution where both sizes are even,
            as most players expect.
        lossless: Store colours as they are.
    """

    def __init__(
        self, path: Path, fps: Fraction, shape: tuple[int, ...], *, lossless: bool = False
    ) -> None:
        self._av = need("av")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._film = self._av.open(str(path), "w")
        codec, options = ("libx264rgb", {"crf": "0"}) if lossless else ("libx264", {})
        self._stream = self._film.add_stream(codec, rate=fps, options=_OPTIONS | options)
        self._stream.height, self._stream.width = shape[:2]
        half = "yuv444p" if shape[0] % 2 or shape[1] % 2 else "yuv420p"
        self._stream.pix_fmt = "rgb24" if lossless else half
        self.path, self._fps, self.count = path, fps, 0

    def append(self, pictures: NDArray[np.uint8]) -> None:
        """Write pictures ``[n, H, W, 3]`` behind the last one."""
        for pixels in pictures:
            frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = self.count, 1 / self._fps
            self._film.mux(self._stream.encode(frame))
            self.count += 1

    def close(self) -> None:
        """Finish the file."""
        self._film.mux(self._stream.encode(None))
        self._film.close()

    @property
    def described(self) -> dict[str, Any]:
        """What LeRobot keeps of a film."""
        return {
            "video.height": self._stream.height,
            "video.width": self._stream.width,
            "video.codec": "h264",
            "video.pix_fmt": self._stream.pix_fmt,
            "video.fps": float(self._fps),
            "video.channels": 3,
            "is_depth_map": False,
            "has_audio": False,
        }


def decibels(error: float) -> float:
    """The peak signal-to-noise ratio of bytes with this mean squared error, in dB."""
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)
