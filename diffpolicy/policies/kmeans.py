"""Clusters of plans: k-means, and a classifier that tells which clusters a state makes likely."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 2**22  # distances held at a time


def assign(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre of every point, and its squared distance; a chunk of points at a time.

    Args:
        points: ``[N, F]``.
        centres: ``[K, F]``.

    Returns:
        Index ``[N]`` int64 and squared Euclidean distance ``[N]``.
    """
    size = max(1, _CHUNK // len(centres))
    norms = centres.square().sum(1)
    labels = [
        (norms - 2 * (part @ centres.T)).argmin(1) for part in torch.split(points, size)
    ]  # |p|^2 does not change the winner
    label = torch.cat(labels)
    # The distance itself from the difference: the expanded square loses digits near a centre.
    return label, (points - centres[label]).square().sum(1)


def kmeans(
    points: Tensor, count: int, *, seed: int = 0, iterations: int = 100, restarts: int = 4
) -> Tensor:
    """Centres of ``count`` clusters by Lloyd's algorithm from k-means++ starts.

    Deterministic for a seed (Arthur & Vassilvitskii 2007). Every start draws several candidates
    per centre and keeps the best; an empty cluster is moved to the point that is worst served.

    Args:
        points: ``[N, F]`` finite, N at least ``count``.
        count: clusters K >= 1.
        seed: of the starts.
        iterations: most passes of Lloyd's algorithm per start; it stops when no point changes.
        restarts: starts; the one with the least squared distance wins.

    Returns:
        ``[K, F]``, the most populated cluster first.

    Raises:
        ValueError: fewer points than clusters, values that are not finite, or a count below 1.
    """
    if points.dim() != 2 or not bool(torch.isfinite(points).all()):
        raise ValueError(f"points must be finite and [N, F], got shape {list(points.shape)}")
    if not 1 <= count <= len(points):
        raise ValueError(f"need 1 <= count <= {len(points)} (the points), got count={count}")
    if iterations < 1 or restarts < 1:
        raise ValueError(f"iterations and restarts must be >= 1, got {iterations}, {restarts}")
    generator = torch.Generator().manual_seed(seed)
    values = points.detach().to("cpu", torch.float64)
    best, least = values[:count], float("inf")
    for _ in range(restarts):
        centres = _plus_plus(values, count, generator)
        centres, cost = _lloyd(values, centres, iterations)
        if cost < least:
            best, least = centres, cost
    sizes = torch.bincount(assign(values, best)[0], minlength=count)
    return best[torch.argsort(sizes, descending=True, stable=True)].to(points)


def _plus_plus(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    first = int(torch.randint(len(points), (1,), generator=generator))
    chosen = [first]
    nearest = (points - points[first]).square().sum(1)
    tries = 2 + int(torch.tensor(float(count)).log())
    for _ in range(count - 1):
        if float(nearest.sum()) <= 0:  # fewer distinct points than centres
            chosen.append(int(torch.randint(len(points), (1,), generator=generator)))
            continue
        cumulative = nearest.cumsum(0)
        draws = torch.rand(tries, generator=generator, dtype=points.dtype) * cumulative[-1]
        candidates = torch.searchsorted(cumulative, draws).clamp_max(len(points) - 1)
        after = [nearest.minimum((points - points[c]).square().sum(1)) for c in candidates]
        winner = int(torch.stack([a.sum() for a in after]).argmin())
        chosen.append(int(candidates[winner]))
        nearest = after[winner]
    return points[chosen]


def _lloyd(points: Tensor, centres: Tensor, iterations: int) -> tuple[Tensor, float]:
    label, distance = assign(points, centres)
    for _ in range(iterations):
        sums = torch.zeros_like(centres).index_add_(0, label, points)
        sizes = torch.bincount(label, minlength=len(centres))
        centres = sums / sizes.clamp_min(1)[:, None]
        for empty in (sizes == 0).nonzero().flatten().tolist():
            worst = int(distance.argmax())
            centres[empty], distance[worst] = points[worst], 0.0
        before = label
        label, distance = assign(points, centres)
        if torch.equal(before, label):
            break
    return centres, float(distance.sum())


class ClusterClassifier:
    """A small MLP from a flat condition to the log-probability of each cluster; frozen once fit.

    Args:
        tensors: ``weight<i>`` and ``bias<i>`` of its three layers, float32.
    """

    NAMES = tuple(f"{kind}{i}" for i in range(3) for kind in ("weight", "bias"))

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        missing = [name for name in self.NAMES if name not in tensors]
        if missing:
            raise ValueError(f"the anchor classifier lacks the tensors {missing}")
        self._layers = [(tensors[f"weight{i}"], tensors[f"bias{i}"]) for i in range(3)]

    @classmethod
    def fit(
        cls,
        cond: Tensor,
        label: Tensor,
        count: int,
        *,
        held_out: Tensor,
        seed: int = 0,
        steps: int = 1500,
        width: int = 128,
    ) -> ClusterClassifier:
        """Train with cross-entropy, and keep the weights that are best on ``held_out``.

        Judged every 100 steps; three times without progress end the training.

        Args:
            cond: ``[N, C]`` normalised conditions.
            label: ``[N]`` their clusters.
            count: clusters.
            held_out: bool ``[N]``, examples to judge on (all False: the last weights are kept).
            seed: of the weights and batches.
            steps: most optimiser steps, of 256 examples.
            width: of the two hidden layers.
        """
        generator = torch.Generator().manual_seed(seed)
        sizes = [cond.shape[1], width, width, count]
        tensors: dict[str, Tensor] = {}
        for i in range(3):
            bound = sizes[i] ** -0.5
            weight = torch.rand(sizes[i + 1], sizes[i], generator=generator)
            tensors[f"weight{i}"] = ((2 * weight - 1) * bound).requires_grad_()
            tensors[f"bias{i}"] = torch.zeros(sizes[i + 1], requires_grad=True)
        model = cls(tensors)
        optimizer = torch.optim.AdamW(tensors.values(), lr=2e-3, weight_decay=1e-2, fused=True)
        fitted = (~held_out).nonzero().flatten()
        judged = held_out.nonzero().flatten()
        best, least, stale = {k: v.detach().clone() for k, v in tensors.items()}, float("inf"), 0
        for step in range(1, steps + 1):
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / (steps + 1))
            rows = fitted[torch.randint(len(fitted), (256,), generator=generator)]
            with torch.enable_grad():
                loss = F.cross_entropy(model._logits(cond[rows]), label[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if step % 100 and step < steps:
                continue
            value, stale = model._judge(cond[judged], label[judged]), stale + 1
            if not len(judged) or value < least:
                best, least, stale = {k: v.detach().clone() for k, v in tensors.items()}, value, 0
            if stale == 3:
                break
        return cls(best)

    @torch.no_grad()
    def _judge(self, cond: Tensor, label: Tensor) -> float:
        return float(F.cross_entropy(self._logits(cond), label)) if len(cond) else 0.0

    def _logits(self, cond: Tensor) -> Tensor:
        h = cond
        for i, (weight, bias) in enumerate(self._layers):
            h = F.linear(F.silu(h) if i else h, weight, bias)
        return h

    def log_prob(self, cond: Tensor) -> Tensor:
        """``[N, C]`` to ``[N, count]``."""
        return F.log_softmax(self._logits(cond), dim=-1)

    @property
    def count(self) -> int:
        """Clusters."""
        return len(self._layers[-1][1])

    @property
    def cond_dim(self) -> int:
        """Size of the condition."""
        return self._layers[0][0].shape[1]

    def to_tensors(self) -> dict[str, Tensor]:
        """Weights by name, as the constructor takes them."""
        return {
            name: tensor
            for i, layer in enumerate(self._layers)
            for name, tensor in zip((f"weight{i}", f"bias{i}"), layer, strict=True)
        }

    def to(self, device: torch.device | str) -> ClusterClassifier:
        """The same classifier on ``device``."""
        return ClusterClassifier({k: v.to(device) for k, v in self.to_tensors().items()})
