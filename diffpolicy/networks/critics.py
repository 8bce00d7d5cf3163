"""Critics: how good a plan is where it starts (Q), and how good the place itself is (V)."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpolicy.networks.base import Configured, check_positive
from diffpolicy.settings import check_shape


class StackedLinear(nn.Module):
    """The same linear layer in several independent copies, applied in one matrix product.

    Each copy is initialised as ``nn.Linear`` is.

    Args:
        members: Copies M.
        inward: Size of the input.
        outward: Size of the output.
    """

    def __init__(self, members: int, inward: int, outward: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inward)
        self.weight = nn.Parameter(torch.empty(members, inward, outward).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, outward).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[M, B, inward]`` to ``[M, B, outward]``."""
        return torch.baddbmm(self.bias, x, self.weight)


class StackedMLP(nn.Module):
    """Independent MLPs from ``[B, inward]`` to one number each, ``[M, B]``.

    Args:
        members: How many, M.
        inward: Size of the input.
        width: Size of the hidden layers.
        depth: Number of hidden layers.
        layer_norm: Normalise before each activation, which bounds how far the value can grow away
            from the data (Ball et al. 2023, section 4.2).

    Raises:
        ValueError: A size is not a positive integer.
    """

    def __init__(
        self, members: int, inward: int, *, width: int, depth: int, layer_norm: bool
    ) -> None:
        super().__init__()
        check_positive(members=members, width=width, depth=depth)
        self.members, self.width, self.depth = members, width, depth
        self.layer_norm = layer_norm
        sizes = [inward] + [width] * depth
        self.hidden = nn.ModuleList(StackedLinear(members, a, b) for a, b in pairwise(sizes))
        self.outward = StackedLinear(members, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The value of every member, ``[M, B]``."""
        h = x.expand(self.members, *x.shape)
        for layer in self.hidden:
            h = layer(h)
            if self.layer_norm:
                h = F.layer_norm(h, (self.width,))
            h = F.silu(h)
        out: Tensor = self.outward(h)
        return out.squeeze(-1)


class _Critic(Configured):
    """A critic whose sizes are those of its MLP."""

    mlp: StackedMLP

    @property
    def members(self) -> int:
        """How many critics M."""
        return self.mlp.members

    def argument(self, name: str) -> Any:
        return getattr(self.mlp if hasattr(self.mlp, name) else self, name)


class QEnsemble(_Critic):
    """Q(observation, plan) by several independent MLPs; two of them are the usual twin critic.

    The discounted return of executing the plan from the current step on, then following the policy.

    Args:
        cond_dim: Size C = To * O of the flat observation.
        horizon: Positions H of a plan.
        action_dim: Size A of one action.
        width: Size of the hidden layers.
        depth: Number of hidden layers.
        members: Independent critics M; their minimum is the pessimistic estimate (Fujimoto et al.
            2018, eq. 10).
        layer_norm: Normalise the hidden layers, which keeps the values of unseen actions in bounds.

    Raises:
        ValueError: A size is not a positive integer.
    """

    TYPE = "q_ensemble"

    def __init__(
        self,
        cond_dim: int,
        horizon: int,
        action_dim: int,
        *,
        width: int = 256,
        depth: int = 2,
        members: int = 2,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        check_positive(cond_dim=cond_dim, horizon=horizon, action_dim=action_dim)
        self.cond_dim, self.horizon, self.action_dim = cond_dim, horizon, action_dim
        inward, options = cond_dim + horizon * action_dim, {"width": width, "depth": depth}
        self.mlp = StackedMLP(members, inward, **options, layer_norm=layer_norm)

    def forward(self, cond: Tensor, chunk: Tensor) -> Tensor:
        """Every member's value.

        Args:
            cond: Flat normalised observations [B, C].
            chunk: Normalised plans [B, H, A].

        Returns:
            [M, B], in the units of the scaled reward.

        Raises:
            ValueError: A shape does not fit.
        """
        check_shape("chunk", chunk.shape, ("B", self.horizon, self.action_dim))
        check_shape("cond", cond.shape, ("B", self.cond_dim))
        out: Tensor = self.mlp(torch.cat([cond, chunk.flatten(1)], dim=1))
        return out

    def score(self, cond: Tensor, plan: Tensor) -> Tensor:
        """The least value of the members, [B]: by it candidates are chosen."""
        return self.forward(cond, plan).amin(0)


class StateValue(_Critic):
    """V(observation) by an MLP.

    Args:
        cond_dim: Size C = To * O of the flat observation.
        width: Size of the hidden layers.
        depth: Number of hidden layers.
        layer_norm: Normalise the hidden layers.

    Raises:
        ValueError: A size is not a positive integer.
    """

    TYPE = "state_value"

    def __init__(
        self, cond_dim: int, *, width: int = 256, depth: int = 2, layer_norm: bool = False
    ) -> None:
        super().__init__()
        check_positive(cond_dim=cond_dim)
        self.cond_dim = cond_dim
        self.mlp = StackedMLP(1, cond_dim, width=width, depth=depth, layer_norm=layer_norm)

    def forward(self, cond: Tensor) -> Tensor:
        """The value of flat normalised observations [B, C] as [B].

        Raises:
            ValueError: A shape that does not fit.
        """
        check_shape("cond", cond.shape, ("B", self.cond_dim))
        out: Tensor = self.mlp(cond)
        return out.squeeze(0)
