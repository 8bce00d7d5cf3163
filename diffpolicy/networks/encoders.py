"""Encoders: from normalised observations to the condition ``[B, C]`` that networks are given.

One with weights is part of its denoiser: trained, saved and loaded with it. A kind of one's own is
a subclass of :class:`Encoder` with a line ``ENCODERS["mine"] = Mine``;
``policy.encoder={type: mine}`` chooses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffpolicy.networks.registry import construct


class Field(Protocol):
    """What an encoder is told of an array that it is given."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one step of one row."""


Fields = Field | Mapping[str, Any]
"""One field, or fields by name."""


class Encoder(nn.Module):
    """What encoders are: made with ``(fields, n_obs_steps, **settings)``, called with observations.

    Attributes:
        cond_dim: C.
    """

    cond_dim: int

    def forward(self, obs: Any) -> Tensor:
        """The condition ``[B, C]`` of observations ``[B, To, ...]``: one tensor, or by name."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward(obs)")


class StateEncoder(Encoder):
    """Vectors side by side, the oldest step first; it has no weights.

    Args:
        fields: what is observed in a step: one vector, or vectors by name.
        n_obs_steps: To.

    Raises:
        ValueError: a field that is no vector.
    """

    def __init__(self, fields: Fields, n_obs_steps: int) -> None:
        super().__init__()
        self.names = tuple(fields) if isinstance(fields, Mapping) else ()
        each = fields if isinstance(fields, Mapping) else {"obs": fields}
        for name, field in each.items():
            if len(field.shape) != 1:
                raise ValueError(
                    f"the encoder 'state' takes vectors, {name!r} has the shape "
                    f"{list(field.shape)}; choose or write another encoder"
                )
        self.cond_dim = n_obs_steps * sum(field.shape[0] for field in each.values())

    def forward(self, obs: Tensor | Mapping[str, Tensor]) -> Tensor:
        """``[B, C]``, C = To times the sum of the vectors' sizes."""
        if isinstance(obs, Mapping):
            obs = torch.cat([obs[name] for name in self.names], dim=-1)
        return obs.flatten(1)


ENCODERS: dict[str, type[Encoder]] = {"state": StateEncoder}


def make_encoder(config: Mapping[str, Any], fields: Fields, n_obs_steps: int) -> Encoder:
    """Build an encoder from plain values.

    Args:
        config: "type" (a key of ``ENCODERS``) and the class' own arguments.
        fields: what is observed in a step, for the class.
        n_obs_steps: To, likewise.

    Raises:
        ValueError: Unknown type, unknown or missing key, or fields that it cannot take.
    """
    given = {"fields": fields, "n_obs_steps": n_obs_steps}
    made: Encoder = construct(ENCODERS, {**config, **given}, "encoder")
    return made
