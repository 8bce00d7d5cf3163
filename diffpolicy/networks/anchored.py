"""A network that refines noised anchors and says how much it trusts each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffpolicy.networks.base import Network, as_time, check_positive
from diffpolicy.settings import check_range


class Anchored(Network):
    """Any network with a confidence per plan, and optionally a cascade of refinements.

    The decoder of DiffusionDrive (Liao et al. 2025) without its driving-specific attention: every
    row of a batch is one noised anchor; the output is a plan, and beside it the logit that this
    anchor is the right one. The confidence is one more channel of the base network, averaged over
    the plan, so every type of network can be the base.

    A cascade has ``stages`` networks. Each later one sees the noisy plan and what the previous
    stage made of it, detached, and adds a correction.

    Args:
        horizon: H.
        dim: D.
        cond_dim: C; 0 = unconditional.
        base: type and settings of the network of each stage, without the three sizes above.
        stages: networks in the cascade.
        prior: confidence at the start of training, in (0, 1); about one over the anchors.

    Raises:
        ValueError: a size or setting is out of range, or ``base`` is not a network's config.
    """

    TYPE = "anchored"

    def __init__(
        self,
        horizon: int,
        dim: int,
        cond_dim: int = 0,
        *,
        base: Mapping[str, Any],
        stages: int = 1,
        prior: float = 0.05,
    ) -> None:
        from diffpolicy.networks.registry import sized_network  # the registry knows this class

        check_positive(horizon=horizon, dim=dim, stages=stages)
        if not isinstance(base, Mapping) or base.get("type") == "anchored":
            raise ValueError(f"base must be another network's config, with a type; got {base!r}")
        check_range("(0, 1)", prior=prior)
        sizes = [dim + 1] + [2 * dim + 1] * (stages - 1)
        networks = [sized_network(base, horizon, size, cond_dim) for size in sizes]
        # A level per dimension has no meaning for the channels that are added here.
        super().__init__(horizon, dim, cond_dim, t_kinds=networks[0].t_kinds - {"dim"})
        self.base, self.prior = dict(base), prior
        self.stages = nn.ModuleList(networks)
        self.gain = nn.Parameter(torch.ones(stages))
        self.bias = nn.Parameter(torch.full((stages,), math.log(prior / (1 - prior))))

    def embed_time(self, t: Tensor) -> Tensor:
        """The embeddings of all stages side by side, ``[..., stages * E]``."""
        return torch.cat([stage.embed_time(t) for stage in self.stages], dim=-1)  # type: ignore[operator]

    def cascade(
        self, x: Tensor, t: Tensor, cond: Tensor | None = None, *, time_emb: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """What every stage answers: ``(output [B, H, D], logit [B])``, the last one the best.

        The arguments are those of :meth:`forward`. Gradients do not cross from one stage to the
        one before.
        """
        self.check_inputs(x, cond)
        emb = self.embed_time(as_time(t, x)) if time_emb is None else time_emb
        parts = emb.chunk(len(self.stages), dim=-1)
        empty = x.new_zeros(*x.shape[:2], 1)
        answers: list[tuple[Tensor, Tensor]] = []
        for number, (stage, part) in enumerate(zip(self.stages, parts, strict=True)):
            before = answers[-1][0].detach() if answers else None
            inputs = [x, empty] if before is None else [x, before, empty]
            raw = stage(torch.cat(inputs, dim=-1), t, cond, time_emb=part)
            output = raw[..., : self.dim] if before is None else before + raw[..., : self.dim]
            logit = self.gain[number] * raw[..., -1].mean(1) + self.bias[number]
            answers.append((output, logit))
        return answers

    def with_aux(
        self, x: Tensor, t: Tensor, cond: Tensor | None = None, *, time_emb: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The output and ``{"confidence": logit [B]}``; what a denoiser calls if it is there."""
        output, logit = self.cascade(x, t, cond, time_emb=time_emb)[-1]
        return output, {"confidence": logit}

    def forward(
        self, x: Tensor, t: Tensor, cond: Tensor | None = None, *, time_emb: Tensor | None = None
    ) -> Tensor:
        """Apply the network; see :meth:`Network.forward`."""
        return self.cascade(x, t, cond, time_emb=time_emb)[-1][0]

    def config(self) -> dict[str, Any]:
        """See :meth:`Network.config`."""
        return {**super().config(), "stages": len(self.stages)}
