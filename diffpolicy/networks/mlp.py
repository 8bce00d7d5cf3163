"""Residual MLP over the flattened plan: the small and fast network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpolicy.networks.base import T_KINDS, Network, as_time, check_positive, one_hot
from diffpolicy.networks.embeddings import TimeMLP, check_embedding_dim, condition_mlp, zeroed
from diffpolicy.settings import check_choice


class MLPBlock(nn.Module):
    """``h + Linear(SiLU(Linear(shift + scale * LayerNorm(h))))``; the last layer starts at zero."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.width = width
        self.expand = nn.Linear(width, hidden)
        self.project = zeroed(nn.Linear(hidden, width))

    def forward(self, h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Apply the block to h [B, W] with FiLM scale and shift, each [B, W] or [1, W]."""
        modulated = torch.addcmul(shift, F.layer_norm(h, (self.width,)), scale)
        out: Tensor = h + self.project(F.silu(self.expand(modulated)))
        return out


class MLP(Network):
    """Residual MLP with FiLM (arXiv 1709.07871) from time and observation.

    The plan is flattened to [B, H * D]. One linear layer makes the scales and shifts of all blocks
    from ``SiLU(time + observation embedding)``, so a forward pass of batch 1 stays at few kernels.
    Integer tokens [B, H] in 0 .. D - 1 are taken in place of their one-hot.

    Args:
        horizon: H.
        dim: D.
        cond_dim: C; 0 = unconditional.
        width: Size of the residual stream.
        depth: Number of residual blocks.
        expansion: Hidden size of a block as a multiple of ``width``.
        time_dim: Size of the sinusoidal embedding of one time, even.
        t_kind: The finest kind of ``t`` to take besides "row": "row" (one level per plan),
            "position" (H levels) or "dim" (D levels).

    Raises:
        ValueError: A size or ``t_kind`` is out of range.
    """

    TYPE = "mlp"
    takes_tokens = True

    def __init__(
        self,
        horizon: int,
        dim: int,
        cond_dim: int = 0,
        *,
        width: int = 256,
        depth: int = 3,
        expansion: int = 2,
        time_dim: int = 64,
        t_kind: str = "row",
    ) -> None:
        check_choice("t_kind", t_kind, T_KINDS)
        super().__init__(horizon, dim, cond_dim, t_kinds={"row", t_kind})
        check_positive(width=width, depth=depth, expansion=expansion)
        check_embedding_dim(time_dim, "time_dim")
        self.width, self.depth, self.expansion = width, depth, expansion
        self.time_dim, self.t_kind = time_dim, t_kind
        slots = {"row": 1, "position": horizon, "dim": dim}[t_kind]
        self.time = TimeMLP(time_dim, width, width, activation=nn.SiLU(), slots=slots)
        self.cond = condition_mlp(cond_dim, width)
        self.film = nn.Linear(width, 2 * depth * width)
        self.inward = nn.Linear(horizon * dim, width)
        self.blocks = nn.ModuleList(MLPBlock(width, expansion * width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.outward = nn.Linear(width, horizon * dim)
        with torch.no_grad():
            self.film.weight.mul_(0.1)
            self.outward.weight.mul_(0.1)
        nn.init.zeros_(self.film.bias)
        nn.init.zeros_(self.outward.bias)

    def embed_time(self, t: Tensor) -> Tensor:
        """Embed ``t [..., 1 or H, 1 or D]`` to ``[..., width]``."""
        if self.t_kind == "position":
            t = t[..., 0].expand(*t.shape[:-2], self.horizon)
        elif self.t_kind == "dim":
            t = t[..., 0, :].expand(*t.shape[:-2], self.dim)
        else:
            t = t[..., 0, :1]
        out: Tensor = self.time(t)
        return out

    def modulate(self, time_emb: Tensor, cond: Tensor | None) -> Tensor:
        """Scales and shifts of all blocks for embedded times [..., B or 1, width] and cond [B, C].

        They do not depend on ``x``, so a sampler computes those of all its levels as one product
        and hands each to :meth:`forward` as ``film`` [B or 1, 2 * depth * width].
        """
        emb = time_emb if self.cond is None else time_emb + self.cond(cond)
        film: Tensor = self.film(F.silu(emb))
        return film

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Tensor | None = None,
        *,
        time_emb: Tensor | None = None,
        film: Tensor | None = None,
    ) -> Tensor:
        """Apply the network; see :meth:`Network.forward`. ``time_emb`` is [B or 1, width]."""
        self.check_inputs(x, cond)
        if film is None:
            emb = self.embed_time(as_time(t, x)) if time_emb is None else time_emb
            film = self.modulate(emb, cond)
        film = film.view(film.shape[0], 2, self.depth, self.width)
        scales = (film[:, 0] + 1).unbind(1)
        shifts = film[:, 1].unbind(1)
        if not x.is_floating_point():
            x = one_hot(x, self.dim, self.inward.weight.dtype)
        h = self.inward(x.flatten(1))
        for block, scale, shift in zip(self.blocks, scales, shifts, strict=True):
            h = block(h, scale, shift)
        out: Tensor = self.outward(F.silu(self.norm(h)))
        return out.view(out.shape[0], self.horizon, self.dim)
