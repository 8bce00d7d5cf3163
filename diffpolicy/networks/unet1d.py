"""Temporal 1-D U-Net of Diffusion Policy (Chi et al. 2023, arXiv 2303.04137, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpolicy.networks.base import Network, as_time, check_positive
from diffpolicy.networks.embeddings import TimeMLP, check_embedding_dim

# The published network always ends in a normalisation of 8 groups, whatever its other groups.
FINAL_GROUPS = 8


class Film(NamedTuple):
    """Modulation of one residual block, each [B or 1, channels, 1 or positions]."""

    scale: Tensor | None
    shift: Tensor


class ConvBlock(nn.Module):
    """Conv1d, GroupNorm, Mish over [B, channels, positions]; keeps the number of positions."""

    def __init__(self, inner: int, out: int, kernel_size: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inner, out, kernel_size, padding=kernel_size // 2)
        self.norm = nn.GroupNorm(groups, out)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        return F.mish(self.norm(self.conv(x)))


class ResidualBlock(nn.Module):
    """Two convolution blocks with FiLM between them, and a skip."""

    def __init__(self, inner: int, out: int, kernel_size: int, groups: int) -> None:
        super().__init__()
        self.first = ConvBlock(inner, out, kernel_size, groups)
        self.second = ConvBlock(out, out, kernel_size, groups)
        self.skip: nn.Module = nn.Conv1d(inner, out, 1) if inner != out else nn.Identity()

    def forward(self, x: Tensor, film: Film) -> Tensor:
        """Apply the block to x [B, inner, positions]."""
        h = self.first(x)
        h = h + film.shift if film.scale is None else torch.addcmul(film.shift, h, film.scale)
        out: Tensor = self.second(h) + self.skip(x)
        return out


class UNet1D(Network):
    """Temporal U-Net with FiLM from time and observation, laid out as Diffusion Policy's.

    Published weights load through ``diffpolicy.networks.convert``. The modulations of all blocks
    come from one linear layer instead of one each. With one level per position (streaming
    diffusion, arXiv 2406.04806) every position is modulated by its own level, averaged over the
    positions that a coarser resolution merges; equal levels give the per-row result.

    Args:
        horizon: H, a multiple of ``2 ** (len(down_dims) - 1)``.
        dim: D.
        cond_dim: C; 0 = unconditional.
        down_dims: Channels of each resolution, finest first; multiples of ``n_groups``, the first
            also of 8.
        kernel_size: Odd.
        n_groups: Groups of the normalisations.
        diffusion_step_embed_dim: Size of the time embedding, even.
        cond_predict_scale: Modulate by scale and shift; False: by shift alone.

    Raises:
        ValueError: A size is out of range, or the horizon cannot be halved often enough.
    """

    TYPE = "unet1d"

    def __init__(
        self,
        horizon: int,
        dim: int,
        cond_dim: int = 0,
        *,
        down_dims: Sequence[int] = (256, 512, 1024),
        kernel_size: int = 5,
        n_groups: int = 8,
        diffusion_step_embed_dim: int = 256,
        cond_predict_scale: bool = True,
    ) -> None:
        super().__init__(horizon, dim, cond_dim, t_kinds=("row", "position"))
        widths = tuple(down_dims)
        _check_sizes(horizon, widths, kernel_size, n_groups)
        check_embedding_dim(diffusion_step_embed_dim, "diffusion_step_embed_dim")
        self.down_dims, self.kernel_size, self.n_groups = widths, kernel_size, n_groups
        self.diffusion_step_embed_dim = embed = diffusion_step_embed_dim
        self.cond_predict_scale = cond_predict_scale

        def pair(inner: int, out: int) -> nn.ModuleList:
            return nn.ModuleList(ResidualBlock(i, out, kernel_size, n_groups) for i in (inner, out))

        self.time = TimeMLP(embed, 4 * embed, embed, activation=nn.Mish())
        self.down = nn.ModuleList(pair(i, o) for i, o in pairwise((dim, *widths)))
        self.middle = pair(widths[-1], widths[-1])
        self.up = nn.ModuleList(pair(2 * o, i) for i, o in reversed(list(pairwise(widths))))
        self.shrink = nn.ModuleList(nn.Conv1d(c, c, 3, stride=2, padding=1) for c in widths[:-1])
        self.grow = nn.ModuleList(
            nn.ConvTranspose1d(c, c, 4, stride=2, padding=1) for c in reversed(widths[:-1])
        )
        self.final = ConvBlock(widths[0], widths[0], kernel_size, FINAL_GROUPS)
        self.outward = nn.Conv1d(widths[0], dim, 1)
        parts = 2 if cond_predict_scale else 1
        self.film_sizes = [parts * c for _, c in film_layout(widths)]
        self.film = nn.Linear(embed + cond_dim, sum(self.film_sizes))

    def embed_time(self, t: Tensor) -> Tensor:
        """Embed ``t [..., 1 or H, 1]`` to ``[..., 1 or H, diffusion_step_embed_dim]``."""
        out: Tensor = self.time(t)
        return out

    def forward(
        self, x: Tensor, t: Tensor, cond: Tensor | None = None, *, time_emb: Tensor | None = None
    ) -> Tensor:
        """Apply the network; see :meth:`Network.forward`. ``time_emb`` is [B or 1, 1 or H, E]."""
        self.check_inputs(x, cond)
        emb = self.embed_time(as_time(t, x)) if time_emb is None else time_emb
        films = iter(self._films(emb, cond))
        h = x.transpose(1, 2)
        skips = []
        for level, blocks in enumerate(self.down):
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, next(films))
            skips.append(h)
            if level < len(self.shrink):
                h = self.shrink[level](h)
        for block in self.middle:
            h = block(h, next(films))
        for blocks, grow in zip(self.up, self.grow, strict=True):
            # The finest resolution has no decoder, so the first skip is never used.
            h = torch.cat((h, skips.pop()), dim=1)
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, next(films))
            h = grow(h)
        out: Tensor = self.outward(self.final(h))
        return out.transpose(1, 2)

    def _films(self, emb: Tensor, cond: Tensor | None) -> list[Film]:
        features = F.mish(emb)
        if cond is not None:
            batch, positions = max(features.shape[0], cond.shape[0]), features.shape[1]
            told = F.mish(cond).unsqueeze(1).expand(batch, positions, -1)
            features = torch.cat((features.expand(batch, -1, -1), told), dim=-1)
        if features.shape[1] == 1:
            films = torch.split(self.film(features).transpose(1, 2), self.film_sizes, dim=1)
            return [self._film(f) for f in films]
        weights = torch.split(self.film.weight, self.film_sizes)
        biases = torch.split(self.film.bias, self.film_sizes)
        pooled = [features]
        for _ in self.shrink:
            pooled.append((pooled[-1][:, ::2] + pooled[-1][:, 1::2]) / 2)
        inputs = [pooled[level] for level, _ in film_layout(self.down_dims)]
        parts = zip(inputs, weights, biases, strict=True)
        return [self._film(F.linear(*part).transpose(1, 2)) for part in parts]

    def _film(self, film: Tensor) -> Film:
        if not self.cond_predict_scale:
            return Film(None, film)
        scale, shift = film.chunk(2, dim=1)
        return Film(scale, shift)


def film_layout(down_dims: Sequence[int]) -> list[tuple[int, int]]:
    """(resolution, channels) of every residual block, in the order they run (0 = finest)."""
    levels = list(enumerate(down_dims))
    down = [entry for entry in levels for _ in range(2)]
    middle = [levels[-1]] * 2
    backwards = range(len(levels) - 1, 0, -1)
    up = [(level, down_dims[level - 1]) for level in backwards for _ in range(2)]
    return down + middle + up


def _check_sizes(horizon: int, down_dims: tuple[int, ...], kernel_size: int, n_groups: int) -> None:
    check_positive(kernel_size=kernel_size, n_groups=n_groups)
    if not down_dims:
        raise ValueError("down_dims must name the channels of at least one resolution, got none")
    check_positive(**{f"down_dims[{i}]": width for i, width in enumerate(down_dims)})
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd (an even one changes H), got {kernel_size}")
    bad = [width for width in down_dims if width % n_groups]
    if bad or down_dims[0] % FINAL_GROUPS:
        wanted = f"multiples of n_groups={n_groups}, and the first of {FINAL_GROUPS}"
        raise ValueError(f"down_dims must be {wanted}; got {list(down_dims)}")
    halvings = len(down_dims) - 1
    factor = 2**halvings
    if horizon % factor:
        above = (horizon // factor + 1) * factor
        raise ValueError(
            f"horizon={horizon} cannot be halved {halvings} times: with {halvings + 1} down_dims "
            f"it must be a multiple of {factor}, such as {above}"
        )
