"""Pictures in files of others: told from other grids of numbers, and made rows of bytes HWC."""

from __future__ import annotations

import io
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from diffpolicy.data.fields import FieldSpec
from diffpolicy.extras import need

_CHANNELS = (1, 3, 4)
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# Rows of two sizes are few key points or short histories, unless both are at least so large.
_SIDE = 12


def is_grid(spec: FieldSpec) -> bool:
    """Return whether rows would make thousands of numbers, flattened: images, depths, maps."""
    return len(spec.shape) >= 3 or (len(spec.shape) == 2 and min(spec.shape) >= _SIDE)


def is_picture(spec: FieldSpec) -> bool:
    """Return whether rows are images: grids of bytes, or of colours in numbers of another type."""
    colours = len(spec.shape) == 3 and {spec.shape[0], spec.shape[-1]} & {3, 4}
    return is_grid(spec) and (
        spec.is_image or (bool(colours) and min(hwc(spec.shape)[:2]) >= _SIDE)
    )


def hwc(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return an image's shape with its channels last."""
    return (*shape[1:], shape[0]) if _channels_first(shape) else shape


def as_bytes(name: str, rows: NDArray[np.generic]) -> NDArray[np.generic]:
    """Return images ``[T, ...]`` as bytes ``[T, H, W, C]``: no value is changed.

    Channels that come first are moved to the end. Grids of one channel that are no bytes (depths)
    keep their type.

    Raises:
        ValueError: Colours that are no whole numbers of 0 to 255.

    Example:
        >>> as_bytes("img", np.full((2, 3, 16, 16), 255.0)).shape
        (2, 16, 16, 3)
    """
    if _channels_first(rows.shape[1:]):
        rows = np.ascontiguousarray(np.moveaxis(rows, 1, -1))
    if rows.dtype == np.uint8 or rows.shape[-1] not in (3, 4):
        return rows
    with np.errstate(invalid="ignore"):  # NaN becomes some byte, and is told by the comparison
        whole = rows.astype(np.uint8)
    if (odd := whole != rows).any():
        raise ValueError(
            f"{name!r} has colours of {rows.dtype}, such as {rows[odd][0]}; an image is whole "
            "numbers of 0 to 255: multiply them by 255 and round, or keep it under another name "
            f"than obs: fields={{{name}: {name}}}"
        )
    return whole


def decoded(files: Iterable[bytes], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return the pixels ``[T, *shape]`` of PNG or JPEG files, H x W x C.

    Raises:
        ImportError: Pillow is not installed.
        ValueError: A picture of another size.
    """
    image = need("PIL.Image")
    mode = _MODES[shape[2] if len(shape) == 3 else 1]
    rows = [np.asarray(image.open(io.BytesIO(file)).convert(mode)) for file in files]
    if sizes := {row.shape[:2] for row in rows} - {shape[:2]}:
        raise ValueError(f"pictures of {sorted(sizes)} pixels; expected {list(shape[:2])}")
    return np.stack(rows).reshape(len(rows), *shape)


def _channels_first(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and shape[0] in _CHANNELS and shape[-1] not in _CHANNELS
