"""A clip as one picture, for a page to cut up; by the standard library alone."""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

import numpy as np


class Sheet(NamedTuple):
    """All frames of a clip in one picture, row by row.

    Attributes:
        png: the file.
        frames: how many.
        columns: per row.
        width: of a frame, in pixels.
        height: likewise.
    """

    png: bytes
    frames: int
    columns: int
    width: int
    height: int


def frame_sheet(frames: np.ndarray) -> Sheet:
    """Packs a clip ``[F, height, width, 3]`` into one PNG, which every browser can cut up.

    A film would need a codec on both sides.
    """
    count, height, width, _ = frames.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    grid = np.zeros((rows * columns, height, width, 3), np.uint8)
    grid[:count] = frames
    picture = grid.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
    flat = picture.reshape(rows * height, columns * width, 3)
    return Sheet(encode_png(flat), count, columns, width, height)


def encode_png(picture: np.ndarray) -> bytes:
    """A PNG file of ``[height, width, 3]`` uint8, by the standard library alone."""
    height, width, _ = picture.shape
    # Every line says first how it was filtered: 1, each byte less the one of the pixel before.
    lines = np.empty((height, 1 + 3 * width), np.uint8)
    lines[:, 0] = 1
    flat = picture.reshape(height, 3 * width)
    lines[:, 1:4] = flat[:, :3]
    lines[:, 4:] = flat[:, 3:] - flat[:, :-3]
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines.tobytes(), 3)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in parts)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
