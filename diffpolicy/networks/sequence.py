"""Convolutions over sequences of tokens: a denoiser's network and a regressor.

Everything is kept ``[B, L, channels]`` in memory, so that layer norms and 1x1 convolutions need no
copy; a convolution sees its input as an image of one row in channels-last order, which is two to
three times faster on a CPU than ``conv1d`` on ``[B, channels, L]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpolicy.networks.base import Configured, Network, as_time, check_positive, one_hot
from diffpolicy.networks.embeddings import TimeMLP, check_embedding_dim, condition_mlp, zeroed
from diffpolicy.settings import check_range, check_shape

DILATIONS = (1, 1, 4, 16, 64)


class PositionConv(nn.Module):
    """Dilated convolution and ReLU along the positions of [B, L, inner]; keeps L.

    Taps that fall outside of every sequence of this length multiply padding alone and are left
    out: at L = 75 a kernel of 9 with dilation 64 has 3 taps.

    Args:
        inner: channels of the input.
        out: channels of the output.
        kernel_size: taps, odd.
        length: L.
        dilation: distance of neighbouring taps.
    """

    def __init__(
        self, inner: int, out: int, kernel_size: int, *, length: int, dilation: int = 1
    ) -> None:
        super().__init__()
        taps = 2 * min(kernel_size // 2, (length - 1) // dilation) + 1
        self.dilation, self.padding = dilation, taps // 2 * dilation
        # Stored in the order in which it is used, so that its channels-last view is free.
        bound = 1 / math.sqrt(inner * taps)
        self.weight = nn.Parameter(torch.empty(out, taps, inner).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(out).uniform_(-bound, bound))

    def forward(self, h: Tensor) -> Tensor:
        """Map h [B, L, inner] to [B, L, out]."""
        image = h.transpose(1, 2).unsqueeze(2)
        kernel = self.weight.transpose(1, 2).unsqueeze(2)
        padding, dilation = (0, self.padding), (1, self.dilation)
        out = F.conv2d(image, kernel, self.bias, padding=padding, dilation=dilation)
        # In place before the views below: on a view, autograd would copy the whole base.
        return F.relu(out, inplace=True).squeeze(2).transpose(1, 2)


class ConvBlock(nn.Module):
    """``h + ReLU(conv(dropout(LayerNorm(h + shift))))`` over [B, L, channels]."""

    def __init__(
        self, width: int, kernel_size: int, *, length: int, dilation: int, dropout: float
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm = nn.LayerNorm(width)
        self.conv = PositionConv(width, width, kernel_size, length=length, dilation=dilation)

    def forward(self, h: Tensor, shift: Tensor | None = None) -> Tensor:
        """Apply the block to h [B, L, W] with a shift [B or 1, 1, W]."""
        branch = self.norm(h if shift is None else h + shift)
        if self.dropout:
            branch = F.dropout(branch, self.dropout, self.training)
        out: Tensor = h + self.conv(branch)
        return out


class SequenceCNN(Network):
    """Dilated CNN over a sequence, as discrete diffusion of DNA uses it.

    The network of Dirichlet flow matching (Stark et al. 2024, arXiv 2402.05841) and DRAKES (Wang et
    al. 2024, arXiv 2410.13643; there width 128, 4 stacks, no ``positions``): a convolution, then
    ``stacks`` times one residual block per dilation, each shifted by the embedding of time and
    observation, then two 1x1 convolutions. The last one starts at zero: uniform logits.

    Integer tokens [B, H] in 0 .. D - 1 are taken in place of their one-hot [B, H, D].

    Args:
        horizon: H, the length L of a sequence.
        dim: D; for masked diffusion the size of the vocabulary plus one, mask last.
        cond_dim: C; 0 = unconditional.
        width: Channels, even.
        kernel_size: Taps of every convolution, odd.
        dilations: Dilation of each residual block of a stack.
        stacks: How often the dilations are repeated.
        positions: Add a learned vector per position after the first convolution. Without, only the
            padding tells positions apart, and a fully masked input looks alike almost everywhere.
        dropout: Share of a block's activations zeroed in training, in [0, 1).

    Raises:
        ValueError: A size is out of range.
    """

    TYPE = "sequence_cnn"
    takes_tokens = True

    def __init__(
        self,
        horizon: int,
        dim: int,
        cond_dim: int = 0,
        *,
        width: int = 64,
        kernel_size: int = 9,
        dilations: Sequence[int] = DILATIONS,
        stacks: int = 1,
        positions: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(horizon, dim, cond_dim, t_kinds=("row",))
        check_positive(stacks=stacks)
        check_embedding_dim(width, "width")
        self.dilations = _check_dilations(dilations)
        _check_options(kernel_size, dropout)
        self.width, self.kernel_size, self.stacks = width, kernel_size, stacks
        self.dropout = float(dropout)
        self.time = TimeMLP(width, width, width, activation=nn.SiLU())
        self.cond = condition_mlp(cond_dim, width)
        self.inward = PositionConv(dim, width, kernel_size, length=horizon)
        self.positions = nn.Parameter(0.1 * torch.randn(horizon, width)) if positions else None
        self.blocks = nn.ModuleList(
            ConvBlock(width, kernel_size, length=horizon, dilation=dilation, dropout=self.dropout)
            for dilation in self.dilations * stacks
        )
        self.shifts = nn.Linear(width, len(self.blocks) * width)
        self.between = nn.Linear(width, width)
        self.outward = zeroed(nn.Linear(width, dim))

    def embed_time(self, t: Tensor) -> Tensor:
        """Embed ``t [..., 1, 1]`` to ``[..., width]``."""
        out: Tensor = self.time(t[..., 0, :1])
        return out

    def forward(
        self, x: Tensor, t: Tensor, cond: Tensor | None = None, *, time_emb: Tensor | None = None
    ) -> Tensor:
        """Apply the network; see :meth:`Network.forward`. ``time_emb`` is [B or 1, width]."""
        self.check_inputs(x, cond)
        emb = self.embed_time(as_time(t, x)) if time_emb is None else time_emb
        if self.cond is not None:
            emb = emb + self.cond(cond)
        shifts = self.shifts(F.silu(emb)).unflatten(-1, (len(self.blocks), 1, self.width))
        if not x.is_floating_point():
            x = one_hot(x, self.dim, self.outward.weight.dtype)
        h = self.inward(x)
        if self.positions is not None:
            h = h + self.positions
        for block, shift in zip(self.blocks, shifts.unbind(1), strict=True):
            h = block(h, shift)
        out: Tensor = self.outward(F.relu(self.between(h)))
        return out

    def config(self) -> dict[str, Any]:
        """See :meth:`Network.config`."""
        return {**super().config(), "positions": self.positions is not None}


class SequenceRegressor(Configured):
    """Properties of a sequence from its tokens: the network of a learned oracle.

    A convolution, a learned vector per position, and residual blocks with dilations 1, 2, 4, ...
    The activations are averaged over the positions (motifs anywhere) and beside it, narrowed to
    ``pool`` channels, kept per position (motifs at a place, as in promoters); a hidden layer reads
    both. Differentiable in a soft ``x``.

    Args:
        length: L.
        vocab_size: V; there is no mask token.
        outputs: Numbers per sequence.
        width: Channels.
        depth: Residual blocks.
        kernel_size: Taps of every convolution, odd.
        pool: Channels kept per position.
        dropout: Share of activations zeroed in training, in [0, 1).

    Raises:
        ValueError: A size is out of range.
    """

    TYPE = "sequence_regressor"

    def __init__(
        self,
        length: int,
        vocab_size: int,
        outputs: int = 1,
        *,
        width: int = 32,
        depth: int = 3,
        kernel_size: int = 7,
        pool: int = 4,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        check_positive(length=length, vocab_size=vocab_size, outputs=outputs)
        check_positive(width=width, depth=depth, pool=pool)
        _check_options(kernel_size, dropout)
        self.length, self.vocab_size, self.outputs = length, vocab_size, outputs
        self.width, self.depth, self.kernel_size = width, depth, kernel_size
        self.pool, self.dropout = pool, float(dropout)
        self.inward = PositionConv(vocab_size, width, kernel_size, length=length)
        self.positions = nn.Parameter(0.1 * torch.randn(length, width))
        self.blocks = nn.ModuleList(
            ConvBlock(width, kernel_size, length=length, dilation=2**i, dropout=self.dropout)
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.narrow = nn.Linear(width, pool)
        self.mix = nn.Linear(width + length * pool, 2 * width)
        self.outward = nn.Linear(2 * width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """The properties of every sequence.

        Args:
            x: soft or hard one-hot ``[B, L, V]``, or int64 tokens ``[B, L]`` in 0 .. V - 1.

        Returns:
            ``[B, outputs]``, or ``[B]`` if ``outputs`` is 1.

        Raises:
            ValueError: ``x`` has another shape or type.
        """
        x = self._as_soft(x)
        h = self.inward(x) + self.positions
        for block in self.blocks:
            h = block(h)
        h = self.norm(h)
        places = F.relu(self.narrow(h)).flatten(1)
        features = torch.cat([h.mean(1), places], dim=-1)
        hidden = F.relu(self.mix(F.dropout(features, self.dropout, self.training)))
        hidden = F.dropout(hidden, self.dropout, self.training)
        out: Tensor = self.outward(hidden)
        return out.squeeze(-1) if self.outputs == 1 else out

    def _as_soft(self, x: Tensor) -> Tensor:
        if x.is_floating_point():
            check_shape("x", x.shape, ("B", self.length, self.vocab_size))
            return x
        check_shape("tokens", x.shape, ("B", self.length))
        if x.dtype != torch.int64:
            raise ValueError(f"tokens must be int64, got {x.dtype}")
        return one_hot(x, self.vocab_size, self.outward.weight.dtype)


def _check_dilations(dilations: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(dilations, list | tuple) or not dilations:
        raise ValueError(f"dilations must be a list such as {list(DILATIONS)}, got {dilations!r}")
    check_positive(**{f"dilations[{i}]": value for i, value in enumerate(dilations)})
    return tuple(dilations)


def _check_options(kernel_size: int, dropout: float) -> None:
    check_positive(kernel_size=kernel_size)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd (an even one changes L), got {kernel_size}")
    check_range("[0, 1)", dropout=dropout)
