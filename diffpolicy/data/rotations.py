"""Rotations in the forms that robots and their data write them, by way of matrices.

Zhou et al. 2019 (arXiv 1812.07035): a network learns rotations best from six numbers, the first two
rows of the matrix, because no shorter form is continuous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffpolicy.settings import check_choice, check_shape

SIZES = {"quaternion_wxyz": 4, "quaternion_xyzw": 4, "axis_angle": 3, "matrix": 9, "rot6d": 6}
"""The forms, and how many numbers each takes.

``"matrix"`` is its nine entries row by row, ``"rot6d"`` the first six of them, ``"axis_angle"`` the
axis times the angle in radians; of quaternions the name says where the real part is.
"""


def to_matrix(form: str, values: Tensor) -> Tensor:
    """Rotation matrices of rotations in one of the forms.

    What is no rotation becomes one: quaternions are scaled to length one, and the rows of a matrix
    made orthonormal one after the other (Gram-Schmidt), so the output of a network will do.

    Args:
        form: one of :data:`SIZES`.
        values: ``[..., size]``.

    Returns:
        ``[..., 3, 3]``, orthonormal with determinant 1.

    Raises:
        ValueError: an unknown form, or another size.

    Example:
        >>> to_matrix("axis_angle", torch.zeros(3)).equal(torch.eye(3))
        True
    """
    check_choice("rotation", form, SIZES)
    check_shape(f"rotations {form}", values.shape[-1:], (SIZES[form],))
    if form in ("matrix", "rot6d"):
        x = _unit(values[..., :3])
        y = values[..., 3:6]
        y = _unit(y - (x * y).sum(-1, keepdim=True) * x)
        return torch.stack([x, y, torch.linalg.cross(x, y)], -2)
    if form == "axis_angle":
        angle = _length(values)
        tiny = angle < 1e-4  # where sin(a / 2) / a is 1 / 2 - a^2 / 48 to within rounding
        ratio = (angle / 2).sin() / angle.masked_fill(tiny, 1)
        ratio = torch.where(tiny, 0.5 - angle.square() / 48, ratio)
        w, x, y, z = torch.cat([(angle / 2).cos(), ratio * values], -1).unbind(-1)
    else:
        w, x, y, z = _real_first(form, _unit(values)).unbind(-1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def from_matrix(form: str, matrix: Tensor) -> Tensor:
    """Rotation matrices ``[..., 3, 3]`` in one of the forms ``[..., size]``.

    Quaternions have a real part of at least 0, angles are at most pi.

    Raises:
        ValueError: an unknown form.
    """
    check_choice("rotation", form, SIZES)
    if form in ("matrix", "rot6d"):
        return matrix.flatten(-2)[..., : SIZES[form]]
    quaternion = _quaternion(matrix)
    if form == "quaternion_wxyz":
        return quaternion
    if form == "quaternion_xyzw":
        return torch.cat([quaternion[..., 1:], quaternion[..., :1]], -1)
    real, vector = quaternion[..., :1], quaternion[..., 1:]
    sine = _length(vector)
    tiny = sine < 1e-6
    return vector * torch.where(tiny, 2.0, 2 * torch.atan2(sine, real) / sine.masked_fill(tiny, 1))


def _quaternion(matrix: Tensor) -> Tensor:
    """Of matrices, real part first and at least 0.

    Four times the products of a quaternion's entries are linear in the matrix. A row of that table
    is the quaternion times one of its entries; the row of the largest entry loses no digits.
    """
    (a, b, c), (d, e, f), (g, h, i) = (row.unbind(-1) for row in matrix.unbind(-2))
    table = (
        (1 + a + e + i, h - f, c - g, d - b),
        (h - f, 1 + a - e - i, b + d, c + g),
        (c - g, b + d, 1 - a + e - i, f + h),
        (d - b, c + g, f + h, 1 - a - e + i),
    )
    rows = torch.stack([torch.stack(row, -1) for row in table], -2)
    largest = rows.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None]
    found = _unit(rows.gather(-2, largest.expand(*largest.shape[:-1], 4))[..., 0, :])
    return torch.where(found[..., :1] < 0, -found, found)


def _real_first(form: str, quaternion: Tensor) -> Tensor:
    if form == "quaternion_wxyz":
        return quaternion
    return torch.cat([quaternion[..., 3:], quaternion[..., :3]], -1)


def _length(vector: Tensor) -> Tensor:
    return vector.square().sum(-1, keepdim=True).sqrt()


def _unit(vector: Tensor) -> Tensor:
    return vector / _length(vector).clamp_min(1e-12)
