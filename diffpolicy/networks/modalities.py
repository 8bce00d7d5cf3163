"""One network for plans whose positions hold several things: images and actions, say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from diffpolicy.networks.base import Network, as_time, check_positive


class Modalities(Network):
    """Any network between a projection into, and a head out of, each part of a position.

    A position of 576 pixels and 2 actions is brought to ``width`` numbers of each, so that neither
    drowns the other. Each part has a noise level of its own: ``t [B, 1, D]`` must be the same
    within a part. What comes out of a part has rank ``width``: of parts with more entries predict
    ``x0``, since noise does not pass.

    Args:
        horizon: H.
        dim: D.
        cond_dim: C; 0 = unconditional.
        sizes: Entries of each part, D together, in their order.
        base: Type and settings of the network between, without the three sizes above.
        width: Numbers that each part becomes.

    Raises:
        ValueError: A size is out of range, or ``base`` is not a network's config.
    """

    TYPE = "modalities"

    def __init__(
        self,
        horizon: int,
        dim: int,
        cond_dim: int = 0,
        *,
        sizes: Sequence[int],
        base: Mapping[str, Any],
        width: int = 64,
    ) -> None:
        from diffpolicy.networks.registry import sized_network  # the registry knows this class

        check_positive(width=width, **{f"sizes[{i}]": size for i, size in enumerate(sizes)})
        if sum(sizes) != dim:
            raise ValueError(f"sizes must be dim={dim} together, got {list(sizes)}")
        if not isinstance(base, Mapping) or base.get("type") in (self.TYPE, "anchored"):
            raise ValueError(f"base must be another network's config, with a type; got {base!r}")
        super().__init__(horizon, dim, cond_dim, t_kinds=("row", "dim"))
        self.sizes, self.base, self.width = tuple(sizes), dict(base), width
        self.starts = [0, *accumulate(self.sizes)][:-1]
        self.inner = sized_network(base, horizon, width * len(self.sizes), cond_dim)
        self.inward = nn.ModuleList(nn.Linear(size, width) for size in self.sizes)
        self.outward = nn.ModuleList(nn.Linear(width, size) for size in self.sizes)
        embed = self.inner.embed_time(torch.zeros(1, 1, 1)).shape[-1]
        self.time = nn.Linear(embed * len(self.sizes), embed)

    @property
    def modulate(self) -> Callable[..., Tensor] | None:
        """That of the network between, if it has one."""
        return getattr(self.inner, "modulate", None)

    def embed_time(self, t: Tensor) -> Tensor:
        """Embed ``t [..., 1, 1 or D]``, as the network between does the level of one part."""
        columns = [t if t.shape[-1] == 1 else t[..., i : i + 1] for i in self.starts]
        out: Tensor = self.time(torch.cat([self.inner.embed_time(c) for c in columns], dim=-1))
        return out

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Tensor | None = None,
        *,
        time_emb: Tensor | None = None,
        film: Tensor | None = None,
    ) -> Tensor:
        """Apply the network; see :meth:`Network.forward`."""
        self.check_inputs(x, cond)
        if film is not None:
            told = {"film": film}
        else:
            told = {"time_emb": self.embed_time(as_time(t, x)) if time_emb is None else time_emb}
        parts = zip(self.inward, torch.split(x, list(self.sizes), dim=-1), strict=True)
        h = self.inner(torch.cat([into(part) for into, part in parts], dim=-1), t, cond, **told)
        heads = zip(self.outward, h.chunk(len(self.sizes), dim=-1), strict=True)
        return torch.cat([head(part) for head, part in heads], dim=-1)
