"""Networks that answer with a plan in one call: what baselines without noise levels are made of."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor, nn

from diffpolicy.networks.base import Network, check_positive

Errors = tuple[Tensor, Mapping[str, Tensor]]
"""What a network's own loss is: ``[B]``, and 0-dim tensors to log, detached."""


class Direct(Network):
    """A map from the condition ``[B, C]`` to a plan ``[B, H, D]``, with the loss that trains it.

    To a denoiser it is a network that is asked once, at ``t = 1``. The noisy plan that it is given
    there is pure noise, which a network that draws its plans takes as the noise of its draw, and
    any other does not look at. A baseline of one's own is a subclass that defines :meth:`plan` and
    :meth:`errors`.

    Args:
        horizon: H.
        dim: D.
        cond_dim: C, at least 1.

    Attributes:
        DRAWS: whether plans are drawn (and ``temperature`` and ``likeliest`` mean something).

    Raises:
        ValueError: a size is not a positive integer.
    """

    DRAWS: ClassVar[bool] = False

    def __init__(self, horizon: int, dim: int, cond_dim: int) -> None:
        check_positive(cond_dim=cond_dim)
        super().__init__(horizon, dim, cond_dim, t_kinds=("row",))

    @abstractmethod
    def plan(
        self, cond: Tensor, noise: Tensor, *, temperature: float = 1.0, likeliest: bool = False
    ) -> Tensor:
        """Answer with a plan for every row.

        Args:
            cond: ``[B, C]``.
            noise: standard normal ``[B, H, D]``, for networks that draw.
            temperature: of a draw; 1 is what was learned.
            likeliest: rather than a draw.

        Returns:
            ``[B, H, D]``, normalised, not clipped.
        """

    @abstractmethod
    def errors(self, cond: Tensor, plan: Tensor, valid: Tensor, generator: Any) -> Errors:
        """Say how far the network is from demonstrated plans: the loss of each row.

        Args:
            cond: ``[B, C]``.
            plan: demonstrated, normalised ``[B, H, D]``.
            valid: bool ``[B, H]``, the positions that count.
            generator: what all randomness comes from, a ``torch.Generator``.
        """

    def embed_time(self, t: Tensor) -> Tensor:
        """Return ``t`` as it is: nothing depends on it."""
        return t

    def forward(
        self, x: Tensor, t: Tensor, cond: Tensor | None = None, *, time_emb: Tensor | None = None
    ) -> Tensor:
        """Answer with the plan of ``cond``, drawn (if at all) with the noise ``x``."""
        self.check_inputs(x, cond)
        assert cond is not None  # checked above
        return self.plan(cond, x)


def mean_over_valid(error: Tensor, valid: Tensor) -> Tensor:
    """Return the mean ``[B]`` of ``error [B, H]`` over the positions that count; 0 without any."""
    weight = valid.to(error.dtype)
    return (error * weight).sum(-1) / weight.sum(-1).clamp_min(1)


def layers(cond_dim: int, width: int, depth: int) -> nn.Sequential:
    """Make ``depth`` layers with ReLU, from ``[B, C]`` to ``[B, width]``."""
    sizes = [cond_dim, *[width] * depth]
    parts: list[nn.Module] = []
    for before, after in pairwise(sizes):
        parts += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*parts)
