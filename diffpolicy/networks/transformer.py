"""Diffusion transformer over the positions of a plan (DiT: Peebles & Xie, arXiv 2212.09748)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpolicy.networks.base import Network, as_time, check_positive
from diffpolicy.networks.embeddings import (
    TimeMLP,
    check_embedding_dim,
    condition_mlp,
    sinusoidal,
    zeroed,
)


class TransformerBlock(nn.Module):
    """Self-attention and MLP, each modulated and gated (adaLN-zero)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)

    def forward(self, h: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """Apply the block to h [B, H, W]; six modulations, each [B or 1, 1 or H, W]."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        h = torch.addcmul(h, gate_a, self._attend(_modulate(h, shift_a, scale_a, self.width)))
        hidden = F.gelu(self.expand(_modulate(h, shift_m, scale_m, self.width)), approximate="tanh")
        return torch.addcmul(h, gate_m, self.contract(hidden))

    def _attend(self, h: Tensor) -> Tensor:
        qkv = self.qkv(h).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.project(mixed.transpose(1, 2).flatten(2))
        return out


class Transformer(Network):
    """Transformer whose tokens are the positions of the plan.

    Time and observation enter through adaLN-zero: one linear layer makes the shifts, scales and
    gates of all blocks from ``SiLU(time + observation embedding)``, and starts at zero, so that
    every block begins as the identity. With one level per position, each token is modulated by its
    own level. Integer tokens [B, H] in 0 .. D - 1 are looked up, in place of their one-hot.

    Args:
        horizon: H.
        dim: D.
        cond_dim: C; 0 = unconditional.
        width: Size of a token, even, a multiple of ``heads``.
        depth: Number of blocks.
        heads: Attention heads.
        expansion: Hidden size of a block's MLP as a multiple of ``width``.

    Raises:
        ValueError: A size is out of range.
    """

    TYPE = "transformer"
    takes_tokens = True

    def __init__(
        self,
        horizon: int,
        dim: int,
        cond_dim: int = 0,
        *,
        width: int = 256,
        depth: int = 6,
        heads: int = 4,
        expansion: int = 4,
    ) -> None:
        super().__init__(horizon, dim, cond_dim, t_kinds=("row", "position"))
        check_positive(width=width, depth=depth, heads=heads, expansion=expansion)
        check_embedding_dim(width, "width")
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got {width} and {heads}")
        self.width, self.depth, self.heads, self.expansion = width, depth, heads, expansion
        self.time = TimeMLP(width, width, width, activation=nn.SiLU())
        self.cond = condition_mlp(cond_dim, width)
        self.inward = nn.Linear(dim, width)
        self.positions = nn.Parameter(0.1 * sinusoidal(torch.arange(horizon), width))
        self.blocks = nn.ModuleList(
            TransformerBlock(width, heads, expansion * width) for _ in range(depth)
        )
        # Six modulations for every block, and the last layer's shift and scale.
        self.modulation = zeroed(nn.Linear(width, (6 * depth + 2) * width))
        self.outward = zeroed(nn.Linear(width, dim))

    def embed_time(self, t: Tensor) -> Tensor:
        """Embed ``t [..., 1 or H, 1]`` to ``[..., 1 or H, width]``."""
        out: Tensor = self.time(t)
        return out

    def forward(
        self, x: Tensor, t: Tensor, cond: Tensor | None = None, *, time_emb: Tensor | None = None
    ) -> Tensor:
        """Apply the network; see :meth:`Network.forward`. ``time_emb`` is [B or 1, 1 or H, W]."""
        self.check_inputs(x, cond)
        emb = self.embed_time(as_time(t, x)) if time_emb is None else time_emb
        if self.cond is not None:
            emb = emb + self.cond(cond).unsqueeze(1)
        parts = self.modulation(F.silu(emb)).chunk(6 * self.depth + 2, dim=-1)
        weight, bias = self.inward.weight, self.inward.bias
        h = self.inward(x) if x.is_floating_point() else F.embedding(x, weight.T) + bias
        h = h + self.positions
        for i, block in enumerate(self.blocks):
            h = block(h, parts[6 * i : 6 * i + 6])
        out: Tensor = self.outward(_modulate(h, parts[-2], parts[-1], self.width))
        return out


def _modulate(h: Tensor, shift: Tensor, scale: Tensor, width: int) -> Tensor:
    # The width is told, not read from h: in the loop of an exported graph shapes are not constant.
    return torch.addcmul(shift, F.layer_norm(h, (width,)), 1 + scale)
