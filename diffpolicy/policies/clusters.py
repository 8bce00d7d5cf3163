"""Clusters of plans, and a classifier of which are likely where: both by scikit-learn."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from diffpolicy.extras import need
from diffpolicy.settings import check_choice


class ClusterClassifier:
    """A small MLP from a flat condition to the log-probability of each cluster; frozen once fitted.

    Args:
        tensors: ``weight<i>`` and ``bias<i>`` of its linear layers, float32.
        activation: between them: ``"relu"``, or ``"silu"`` in files of before.

    Raises:
        ValueError: no layer, or an unknown activation.
    """

    def __init__(self, tensors: Mapping[str, Tensor], activation: str = "relu") -> None:
        if "weight0" not in tensors:
            raise ValueError(f"the anchor classifier lacks 'weight0'; it has {sorted(tensors)}")
        check_choice("activation", activation, ("relu", "silu"))
        depth = sum(name.startswith("weight") for name in tensors)
        self._layers = [(tensors[f"weight{i}"], tensors[f"bias{i}"]) for i in range(depth)]
        self.activation = activation

    @classmethod
    def fit(cls, cond: Tensor, label: Tensor, count: int, *, seed: int = 0) -> ClusterClassifier:
        """Train by cross-entropy (scikit-learn's ``MLPClassifier``).

        Args:
            cond: ``[N, C]`` normalised conditions.
            label: ``[N]`` their clusters; those that never come are impossible.
            count: clusters.
            seed: of weights and batches.
        """
        seen = torch.bincount(label, minlength=count).nonzero()[:, 0]
        if len(seen) == 1:
            bias = torch.full((count,), -1e4).index_fill(0, seen, 0.0)
            return cls({"weight0": torch.zeros(count, cond.shape[1]), "bias0": bias})
        model = need("sklearn.neural_network").MLPClassifier(
            (64, 64),
            batch_size=min(256, len(cond)),
            learning_rate_init=2e-3,
            alpha=1e-2,
            max_iter=60,
            random_state=seed,
        )
        with warnings.catch_warnings():  # of not having converged: so many passes are enough
            warnings.simplefilter("ignore")
            model.fit(cond.float().numpy(), label.numpy())
        tensors = {}
        for i, (weight, bias) in enumerate(zip(model.coefs_, model.intercepts_, strict=True)):
            tensors[f"weight{i}"] = torch.from_numpy(weight.T.copy()).float()
            tensors[f"bias{i}"] = torch.from_numpy(bias).float()
        # Of two classes scikit-learn has the second one's logit alone: the first's is 0.
        rows, weight, bias = seen[-len(bias) :], tensors["weight2"], tensors["bias2"]
        tensors["weight2"] = torch.zeros(count, weight.shape[1]).index_copy(0, rows, weight)
        impossible = torch.full((count,), -1e4).index_fill(0, seen, 0.0)
        tensors["bias2"] = impossible.index_copy(0, rows, bias)
        return cls(tensors)

    def log_prob(self, cond: Tensor) -> Tensor:
        """``[N, C]`` to ``[N, count]``."""
        between = F.relu if self.activation == "relu" else F.silu
        h = cond
        for i, (weight, bias) in enumerate(self._layers):
            h = F.linear(between(h) if i else h, weight, bias)
        return F.log_softmax(h, dim=-1)

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
        names = [(f"weight{i}", f"bias{i}") for i in range(len(self._layers))]
        return dict(zip(chain(*names), chain(*self._layers), strict=True))

    def to(self, device: torch.device | str) -> ClusterClassifier:
        """The same classifier on ``device``."""
        tensors = {name: value.to(device) for name, value in self.to_tensors().items()}
        return ClusterClassifier(tensors, self.activation)


def clusters(points: Tensor, count: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """k-means (scikit-learn): the centres, the most populated first, and each point's cluster.

    Args:
        points: ``[N, F]``, finite.
        count: clusters K, at most N.
        seed: of the starts.

    Returns:
        ``[K, F]`` and ``[N]`` int64.

    Raises:
        ValueError: fewer points than clusters.
    """
    if not 1 <= count <= len(points):
        raise ValueError(f"{count} anchors need at least as many windows, got {len(points)}")
    found = need("sklearn.cluster").KMeans(count, n_init=4, random_state=seed)
    with warnings.catch_warnings():  # of few windows some are alike: those share their anchor
        warnings.simplefilter("ignore", need("sklearn.exceptions").ConvergenceWarning)
        label = torch.from_numpy(found.fit_predict(points.double().numpy())).long()
    order = torch.bincount(label, minlength=count).argsort(descending=True, stable=True)
    centres = torch.from_numpy(found.cluster_centers_).to(points)
    return centres[order], order.argsort()[label]
