"""Further networks: inverse dynamics, values of plans, drafts, critics, oracles of sequences.

Everything that the head of a policy sees is normalised as the policy's network sees it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffpolicy.networks.base import Configured, as_time, check_positive
from diffpolicy.networks.critics import QEnsemble, StateValue
from diffpolicy.networks.draft import Draft
from diffpolicy.networks.registry import construct, sized_network
from diffpolicy.networks.sequence import SequenceRegressor
from diffpolicy.settings import check_shape


class InverseDynamics(Configured):
    """The action that leads from an observation to the next one.

    Args:
        obs_dim: O.
        action_dim: A.
        width: units of a hidden layer.
        depth: hidden layers.

    Raises:
        ValueError: a size is not a positive integer.
    """

    TYPE = "inverse"

    def __init__(self, obs_dim: int, action_dim: int, width: int = 256, depth: int = 2) -> None:
        super().__init__()
        check_positive(obs_dim=obs_dim, action_dim=action_dim, width=width, depth=depth)
        self.obs_dim, self.action_dim, self.width, self.depth = obs_dim, action_dim, width, depth
        layers: list[nn.Module] = []
        for number in range(depth):
            layers += [nn.Linear(width if number else 2 * obs_dim, width), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, action_dim))

    def forward(self, obs: Tensor, next_obs: Tensor) -> Tensor:
        """The action ``[..., A]`` between ``obs`` and ``next_obs``, each ``[..., O]``."""
        # The change beside the observation: small steps are not lost between large numbers.
        out: Tensor = self.layers(torch.cat([obs, next_obs - obs], dim=-1))
        return out


class TrajectoryValue(Configured):
    """The value of a noisy or clean plan; any network of plans can be its base.

    The value is one more channel of the base network, averaged over the plan (the trick of
    :class:`~diffpolicy.networks.anchored.Anchored`), times a learned gain plus a learned bias.

    Args:
        horizon: H.
        dim: D.
        cond_dim: C; 0: the value of the plan alone, whatever else the policy is conditioned on.
        base: type and settings of the base network, without the three sizes above.
        clean_time: network time of a clean plan; ``process.network_time(0)``, 0 but for EDM.

    Raises:
        ValueError: a size is out of range, or ``base`` is not a network's config.
    """

    TYPE = "value"

    def __init__(
        self,
        horizon: int,
        dim: int,
        cond_dim: int = 0,
        base: Mapping[str, Any] | None = None,
        clean_time: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive(horizon=horizon, dim=dim)
        base = {"type": "mlp"} if base is None else dict(base)
        self.horizon, self.dim, self.cond_dim = horizon, dim, cond_dim
        self.base, self.clean_time = base, float(clean_time)
        self.network = sized_network(base, horizon, dim + 1, cond_dim)
        self.gain = nn.Parameter(torch.ones(()))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor | float, cond: Tensor | None = None) -> Tensor:
        """The value of every plan.

        Args:
            x: noisy plans ``[B, H, D]``.
            t: network time, one per plan: a number, ``[1, 1, 1]`` or ``[B, 1, 1]``.
            cond: ``[B, C]``; not looked at if ``cond_dim`` is 0.

        Returns:
            ``[B]``.

        Raises:
            ValueError: a shape does not fit.
        """
        check_shape("x", x.shape, ("B", self.horizon, self.dim))
        time = as_time(t, x)
        check_shape("t (one level per plan)", time.shape, ("B", 1, 1))
        padded = torch.cat([x, x.new_zeros(*x.shape[:2], 1)], dim=-1)
        out: Tensor = self.network(padded, time.to(x.dtype), cond if self.cond_dim else None)
        return self.gain * out[..., -1].mean(1) + self.bias

    def score(self, cond: Tensor | None, plan: Tensor) -> Tensor:
        """The value ``[B]`` of clean plans ``[B, H, D]``, for choosing among candidates."""
        return self.forward(plan, self.clean_time, cond)


_PLANNING: tuple[type[Configured], ...] = (Draft, InverseDynamics, TrajectoryValue)
_OTHERS: tuple[type[Configured], ...] = (QEnsemble, SequenceRegressor, StateValue)
HEADS: Mapping[str, type[nn.Module]] = {kind.TYPE: kind for kind in (*_PLANNING, *_OTHERS)}


def make_head(config: Mapping[str, Any]) -> nn.Module:
    """Build a head from plain values.

    Args:
        config: "type" (a key of ``HEADS``) and the arguments of that class, as its ``config``
            returns them.

    Returns:
        The head, freshly initialised.

    Raises:
        ValueError: unknown type, unknown or missing key, or a value out of range.
    """
    head: nn.Module = construct(HEADS, config, "head")
    return head
