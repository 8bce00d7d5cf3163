"""How different the plans of one state are from each other."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_pairwise_distance(plans: Tensor) -> Tensor:
    """Mean distance between two different plans of a set: 0 if all are the same.

    Args:
        plans: ``[n, M, H, A]``, M at least 2; normalised, so that dimensions weigh alike.

    Returns:
        ``[n]``, root mean square per coordinate of the difference, averaged over the pairs.
    """
    flat = _checked(plans, least=2).flatten(2)
    distance = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
    many = plans.shape[1]
    mean: Tensor = distance.sum((1, 2)) / (many * (many - 1)) / flat.shape[2] ** 0.5
    return mean


def footprint_diversity(
    paths: Tensor, *, radius: float, cell: float | None = None, origin: bool = True
) -> Tensor:
    """DiffusionDrive's mode diversity of planar paths: 1 minus the mean overlap with their union.

    ``D = 1 - mean_i area(F_i and U) / area(F_i or U)`` with ``F_i`` the ground that path i sweeps
    and ``U`` the union of all of them (Liao et al. 2025, eq. 3): 0 for equal paths, ``1 - 1/M``
    for M paths of equal area that do not overlap. Areas are counted on a raster.

    Args:
        paths: ``[n, M, H, 2]`` positions, metres.
        radius: half the width of what moves, metres.
        cell: side of a raster cell, metres; default a quarter of the radius.
        origin: paths begin at (0, 0), which is not among their positions.

    Returns:
        ``[n]`` in [0, 1).

    Raises:
        ValueError: paths that are not planar, or a radius or cell that is not positive.
    """
    if _checked(paths, least=1).shape[-1] != 2:
        raise ValueError(f"paths must be planar, [n, M, H, 2], got {list(paths.shape)}")
    size = radius / 4 if cell is None else cell
    if radius <= 0 or size <= 0:
        raise ValueError(f"radius and cell must be positive, got {radius} and {size}")
    if origin:
        paths = torch.cat([torch.zeros_like(paths[:, :, :1]), paths], dim=2)
    return torch.stack([_overlap(one, radius, size) for one in paths])


def _overlap(paths: Tensor, radius: float, cell: float) -> Tensor:
    """D of one set of paths ``[M, P, 2]``."""
    low = paths.amin((0, 1)) - radius
    counts = ((paths.amax((0, 1)) + radius - low) / cell).ceil().long().tolist()
    axes = [
        low[i] + cell * (torch.arange(n, device=paths.device, dtype=paths.dtype) + 0.5)
        for i, n in enumerate(counts)
    ]
    covered = torch.stack([_swept(path, axes, radius, cell) for path in paths])
    union = covered.any(0).sum().clamp_min(1)
    return 1 - covered.sum((1, 2)).to(paths.dtype).mean() / union


def _swept(path: Tensor, axes: list[Tensor], radius: float, cell: float) -> Tensor:
    """Which cells have their centre within ``radius`` of the line ``[P, 2]``: bool ``[X, Y]``."""
    covered = torch.zeros(len(axes[0]), len(axes[1]), dtype=torch.bool, device=path.device)
    if len(path) == 1:
        path = path.expand(2, 2)
    first = torch.stack([axis[0] for axis in axes])
    shape = torch.tensor(covered.shape, device=path.device)
    # One segment touches few cells: look only at those in its box.
    box_low = ((torch.minimum(path[:-1], path[1:]) - radius - first) / cell).floor().long()
    box_high = ((torch.maximum(path[:-1], path[1:]) + radius - first) / cell).ceil().long() + 1
    box_low, box_high = box_low.clamp_min(0), torch.minimum(box_high, shape)
    for i, ((x0, y0), (x1, y1)) in enumerate(zip(box_low.tolist(), box_high.tolist(), strict=True)):
        at = torch.stack(torch.meshgrid(axes[0][x0:x1], axes[1][y0:y1], indexing="ij"), dim=-1)
        along = path[i + 1] - path[i]
        length = along.square().sum().clamp_min(torch.finfo(path.dtype).tiny)
        fraction = ((at - path[i]) @ along / length).clamp(0, 1)
        away = at - path[i] - fraction[..., None] * along
        covered[x0:x1, y0:y1] |= away.square().sum(-1) <= radius**2
    return covered


def _checked(plans: Tensor, *, least: int) -> Tensor:
    if plans.dim() != 4 or plans.shape[1] < least:
        raise ValueError(
            f"plans must be [n, M, H, A] with at least {least} plan(s) per state, got "
            f"{list(plans.shape)}"
        )
    return plans
