"""Networks of steps: told the level that a step begins at, and the one that it leads to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffpolicy.networks.base import Network, as_time
from diffpolicy.networks.direct import Direct
from diffpolicy.networks.embeddings import TimeMLP, zeroed

SLOWER = 0.01  # see FlowMap


class FlowMap(Network):
    """Any network that is also told where a step of its path ends (a two-time flow map).

    MeanFlow and shortcut models, and other one-step models, learn how the state moves from one
    level to any lower one. The length of the step, ``t - s``, is embedded as the level is, and the
    two embeddings are added, so that all networks between take it in the one way that they take a
    level. That of the length starts at zero: at first a step makes no difference.

    Both are embedded a hundredth as fast as elsewhere (0 .. 10 rather than 0 .. 1000): MeanFlow
    differentiates the network by its level, and the derivative of the fast sinusoids of the usual
    scale is mostly noise.

    A policy with ``prediction="mean_velocity"`` wraps its network so by itself.

    Args:
        horizon: H.
        dim: D.
        cond_dim: C; 0 = unconditional.
        base: type and settings of the network between, without the three sizes above.
        step_dim: size of the sinusoidal embedding of a length, even.

    Raises:
        ValueError: a size is out of range, or ``base`` is not the config of a network of one level
            a plan.

    Example:
        >>> network = FlowMap(16, 4, 20, base={"type": "transformer", "width": 128})
        >>> denoiser = Denoiser(network, make_process("flow"), "mean_velocity")
    """

    TYPE = "flow_map"
    takes_steps = True

    def __init__(
        self,
        horizon: int,
        dim: int,
        cond_dim: int = 0,
        *,
        base: Mapping[str, Any],
        step_dim: int = 64,
    ) -> None:
        from diffpolicy.networks.registry import (  # they know this class
            network_class,
            sized_network,
        )

        kind = base.get("type") if isinstance(base, Mapping) else None
        if kind in (None, self.TYPE, "anchored", "modalities") or issubclass(
            network_class(kind), Direct
        ):
            raise ValueError(
                "a network of steps (prediction 'mean_velocity') is made around one that takes a "
                f"level per plan, such as mlp, unet1d or transformer; got {base!r}"
            )
        super().__init__(horizon, dim, cond_dim, t_kinds=("row",))
        self.base, self.step_dim = dict(base), step_dim
        self.inner = sized_network(base, horizon, dim, cond_dim)
        size = self.inner.embed_time(torch.zeros(1, 1, 1)).shape[-1]
        self.step = TimeMLP(step_dim, size, size, activation=nn.SiLU())
        zeroed(self.step.second)

    @property
    def modulate(self) -> Callable[..., Tensor] | None:
        """That of the network between, if it has one."""
        return getattr(self.inner, "modulate", None)

    def embed_time(self, t: Tensor, s: Tensor | None = None) -> Tensor:
        """Embed steps from ``t`` to ``s``, both ``[..., 1, 1]`` in network time; None: to ``t``."""
        length = torch.zeros_like(t) if s is None else t - s
        level: Tensor = self.inner.embed_time(SLOWER * t)
        step: Tensor = self.step(SLOWER * length[..., 0, :1])
        return level + (step.unsqueeze(-2) if level.dim() == t.dim() else step)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Tensor | None = None,
        *,
        time_emb: Tensor | None = None,
        film: Tensor | None = None,
    ) -> Tensor:
        """Apply the network; see :meth:`Network.forward`. Without ``time_emb`` no step is made."""
        if film is not None:
            told = {"film": film}
        else:
            told = {"time_emb": self.embed_time(as_time(t, x)) if time_emb is None else time_emb}
        out: Tensor = self.inner(x, t, cond, **told)
        return out
