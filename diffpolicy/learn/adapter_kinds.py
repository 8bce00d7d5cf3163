"""The kinds of adapters, and their settings: low-rank changes and changes of the smallest weights.

See :mod:`diffpolicy.learn.adapters` for how a denoiser gets them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffpolicy.settings import check_range


class Adapter(nn.Module, ABC):
    """A change of one weight, from numbers of its own.

    Attributes:
        off: how many :func:`adapters_off` blocks are open.
        trained: names of the denoiser's parameters that took a gradient before it was adapted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.off = 0
        self.trained: frozenset[str] = frozenset()

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight, or ``weight`` itself while adapters are off."""
        if self.off:
            return weight
        return self.merged(weight, {**self._parameters, **self._buffers})  # type: ignore[dict-item]

    @abstractmethod
    def merged(self, weight: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
        """The adapted weight for given numbers: a pure function, whether adapters are off or not.

        Args:
            weight: the frozen weight, any shape.
            numbers: as this module's ``state_dict`` names them.
        """

    def __getstate__(self) -> dict[str, Any]:
        # A copy made while adapters are off is on: no block would ever switch it on.
        return {**self.__dict__, "off": 0}


class LowRank(Adapter):
    """``W + scale * up @ down``: ``up [rows, rank]`` starts at zero, ``down [rank, columns]`` not.

    A weight of more than two dimensions is the matrix of its first dimension by all others: the
    ``[out, inner, taps]`` of a convolution, ``[3 E, E]`` of a packed attention (queries, keys and
    values share ``down``).
    """

    def __init__(self, weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = scale
        rows, columns = _sides(weight)
        down = torch.empty(rank, columns)
        # The bound that the authors' code has: 1 / sqrt(columns).
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        self.down = nn.Parameter(down.to(weight))
        self.up = nn.Parameter(weight.new_zeros(rows, rank))

    def merged(self, weight: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
        """See :meth:`Adapter.merged`."""
        change = numbers["up"] @ numbers["down"]
        return torch.add(weight, change.view_as(weight), alpha=self.scale)


class Sparse(Adapter):
    """``W`` with a trainable ``change [count]`` added at its ``count`` smallest magnitudes."""

    index: Tensor

    def __init__(self, weight: Tensor, quantile: float) -> None:
        super().__init__()
        count = max(1, round(quantile * weight.numel()))
        smallest = weight.detach().abs().flatten().argsort(stable=True)[:count]
        self.register_buffer("index", smallest.sort().values.to(torch.int32))
        self.change = nn.Parameter(weight.new_zeros(count))

    def merged(self, weight: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
        """See :meth:`Adapter.merged`."""
        flat = weight.flatten().index_add(0, numbers["index"], numbers["change"])
        return flat.view_as(weight)


@dataclass(frozen=True)
class Lora:
    """Settings of low-rank adapters: ``W + scale * up @ down``.

    ``up`` starts at zero, ``down`` uniform in +-1 / sqrt(columns). ``scale`` is what is published
    as ``alpha / rank``: 1.0 is alpha = rank, and a published ``alpha`` is ``scale * rank``. An
    average of the weights (EMA) averages ``up`` and ``down`` themselves, not their product.

    Args:
        rank: of the change, at least 1.
        scale: factor of the change, above 0.
        targets: patterns (``*``, ``?``, ``[...]``; ``*`` crosses dots) of names of layers within
            the network, such as ``"blocks.*.expand"``; None: every layer with a weight matrix.
            Layers whose matrix has a side of ``rank`` or less are never adapted.
        seed: of ``down``.

    Raises:
        ValueError: a setting is out of range.
    """

    rank: int = 8
    scale: float = 1.0
    targets: Sequence[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(f"rank must be a positive integer, got {self.rank!r}")
        check_range("(0, inf)", scale=self.scale)
        _check_targets(self.targets)

    def takes(self, weight: Tensor) -> bool:
        """Whether a weight has room for a change of this rank."""
        return min(_sides(weight)) > self.rank

    def adapters(self, weights: Sequence[Tensor]) -> list[Adapter]:
        """One adapter for each weight."""
        generator = torch.Generator().manual_seed(self.seed)
        return [LowRank(w, self.rank, self.scale, generator) for w in weights]


@dataclass(frozen=True)
class Sara:
    """Settings of sparse adapters: the smallest weights are trained, all others stay.

    SaRA (arXiv 2409.06633) trains the entries below one threshold, 0.002, of large image models.
    Here the threshold is a quantile of every layer by itself. Layers of small networks differ in
    scale: below the 0.2 quantile of all weights of a trained ``mlp`` of 3 blocks of 256 are 4 % of
    its first layer and 30 % of its blocks' last ones (and 5 % of all below 0.002). What is trained
    is the change from the given value, so weight decay pulls towards the given weights.
    The paper's nuclear-norm penalty and its second selection during training are not part of it.

    Args:
        quantile: share of the entries of a layer that are trained, in (0, 1); the paper finds the
            smallest 0.1 to 0.2 to matter least.
        targets: as for :class:`Lora`.

    Raises:
        ValueError: a setting is out of range.
    """

    quantile: float = 0.2
    targets: Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_range("(0, 1)", quantile=self.quantile)
        _check_targets(self.targets)

    def takes(self, weight: Tensor) -> bool:
        """Every weight has a smallest entry."""
        return weight.numel() > 0

    def adapters(self, weights: Sequence[Tensor]) -> list[Adapter]:
        """One adapter for each weight."""
        return [Sparse(w, self.quantile) for w in weights]


KINDS: Mapping[str, type[Lora | Sara]] = {"lora": Lora, "sara": Sara}


def _sides(weight: Tensor) -> tuple[int, int]:
    """Rows and columns of a weight as a matrix."""
    return weight.shape[0], weight[0].numel()


def _check_targets(targets: Sequence[str] | None) -> None:
    if targets is None:
        return
    if isinstance(targets, str) or not targets or not all(isinstance(t, str) for t in targets):
        raise ValueError(
            "targets must be a list of patterns of layer names, such as ['blocks.*'], or None for "
            f"all layers; got {targets!r}"
        )
