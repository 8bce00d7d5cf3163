"""ACT: action chunking with transformers, a CVAE (Zhao et al. 2023, arXiv 2304.13705)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpolicy.networks.base import check_positive
from diffpolicy.networks.direct import Direct, Errors, mean_over_valid
from diffpolicy.settings import check_range


class Attention(nn.Module):
    """Multi-head attention of tokens ``[B, N, W]`` to others ``[B, M, W]``.

    torch's own module runs a fused kernel when acting, which cannot be exported.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ask, self.answer = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.project = nn.Linear(width, width)

    def forward(self, tokens: Tensor, others: Tensor, there: Tensor | None = None) -> Tensor:
        """``there``: bool ``[B, M]``, the others that can be looked at; None: all."""
        parts = [self.ask(tokens), *self.answer(others).chunk(2, dim=-1)]
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mask = None if there is None else there[:, None, None]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out: Tensor = self.project(mixed.transpose(1, 2).flatten(2))
        return out


class Layer(nn.Module):
    """Attention among tokens, to what they ask (if they do), and an MLP, each normed before."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float, *, asks: bool) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3 if asks else 2))
        self.among = Attention(width, heads)
        self.asks = Attention(width, heads) if asks else None
        mlp = nn.Linear(width, hidden), nn.ReLU(), self.dropout, nn.Linear(hidden, width)
        self.mlp = nn.Sequential(*mlp)

    def forward(self, h: Tensor, there: Tensor | None, read: Tensor | None) -> Tensor:
        """See :meth:`Stack.forward`."""
        normed = self.norms[0](h)
        h = h + self.dropout(self.among(normed, normed, there))
        if self.asks is not None:
            h = h + self.dropout(self.asks(self.norms[1](h), read))
        out: Tensor = h + self.dropout(self.mlp(self.norms[-1](h)))
        return out


class Stack(nn.Module):
    """Layers one after the other, and a last norm."""

    def __init__(self, depth: int, *sizes: Any, asks: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(*sizes, asks=asks) for _ in range(depth))
        self.norm = nn.LayerNorm(sizes[0])

    def forward(
        self, h: Tensor, *, there: Tensor | None = None, read: Tensor | None = None
    ) -> Tensor:
        """Tokens ``[B, N, W]`` to tokens.

        ``there``: bool ``[B, N]``, those that are no padding; ``read``: what they ask
        ``[B, M, W]``.
        """
        for layer in self.layers:
            h = layer(h, there, read)
        out: Tensor = self.norm(h)
        return out


class ACT(Direct):
    """A transformer from the observation and a style ``z`` to the plan.

    In training an encoder reads the demonstrated plan and says a Gaussian of ``z``; the loss is the
    absolute error of the plan decoded from a draw, plus ``kl_weight`` times the divergence of that
    Gaussian from the standard normal. When acting ``z`` is 0, the mean of the prior, and the
    encoder is not used. Published beside it is temporal ensembling, which is
    ``diffpolicy eval ... ensemble=0.01`` here.

    The observation is one token, made of the condition; the paper gives each place of a camera's
    map a token, and hides the cameras from the style encoder.

    Args:
        horizon: H.
        dim: D.
        cond_dim: C.
        width: Size of a token, a multiple of ``heads``.
        depth: Layers of the two encoders.
        decoder_depth: Layers of the decoder.
        heads: Attention heads.
        expansion: Hidden size of a layer's MLP as a multiple of ``width``.
        dropout: In training, in [0, 1).
        latent: Size of the style.
        kl_weight: Of the divergence (in nats, summed over the style) beside the absolute error
            (the mean over the plan's entries).

    Raises:
        ValueError: A size or weight is out of range.

    Example:
        >>> spec = {"network": {"type": "act", "width": 256}, **ONE_CALL}
        >>> policy = DiffusionPolicy.from_dataset("data/demos.zarr", spec=spec)
        >>> policy.learn(store, config, "runs/act", learning=Learning(mask_padding=True))
    """

    TYPE = "act"

    def __init__(
        self,
        horizon: int,
        dim: int,
        cond_dim: int = 0,
        *,
        width: int = 128,
        depth: int = 2,
        decoder_depth: int = 1,
        heads: int = 4,
        expansion: int = 4,
        dropout: float = 0.1,
        latent: int = 32,
        kl_weight: float = 10.0,
    ) -> None:
        super().__init__(horizon, dim, cond_dim)
        check_positive(width=width, depth=depth, decoder_depth=decoder_depth, heads=heads)
        check_positive(expansion=expansion, latent=latent)
        check_range("[0, 1)", dropout=dropout)
        check_range("[0, inf)", kl_weight=kl_weight)
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got {width} and {heads}")
        self.width, self.depth, self.decoder_depth = width, depth, decoder_depth
        self.heads, self.expansion, self.dropout = heads, expansion, dropout
        self.latent, self.kl_weight = latent, kl_weight
        sizes = width, heads, expansion * width, dropout
        # The style encoder: a summary, the observation, the actions.
        self.style_cond, self.style_action = nn.Linear(cond_dim, width), nn.Linear(dim, width)
        self.style_places = _learned(2 + horizon, width)
        self.style = Stack(depth, *sizes)
        self.style_out = nn.Linear(width, 2 * latent)
        # The policy: the style and the observation are read, the plan's positions ask.
        self.cond, self.z = nn.Linear(cond_dim, width), nn.Linear(latent, width)
        self.places, self.queries = _learned(2, width), _learned(horizon, width)
        self.context = Stack(depth, *sizes)
        self.decoder = Stack(decoder_depth, *sizes, asks=True)
        self.outward = nn.Linear(width, dim)

    def style_of(self, cond: Tensor, plan: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Say the Gaussian of the style of demonstrated plans.

        Args:
            cond: ``[B, C]``.
            plan: ``[B, H, D]``.
            valid: bool ``[B, H]``; positions where it is False are not looked at.

        Returns:
            Means and logarithms of variances, each ``[B, latent]``.
        """
        seen = self.style_cond(cond).unsqueeze(1)
        tokens = torch.cat([torch.zeros_like(seen), seen, self.style_action(plan)], dim=1)
        tokens = tokens + self.style_places
        there = torch.cat([valid.new_ones(len(valid), 2), valid], dim=1)
        summary = self.style(tokens, there=there)[:, 0]
        mean, log_variance = self.style_out(summary).chunk(2, dim=-1)
        return mean, log_variance

    def decoded(self, cond: Tensor, z: Tensor) -> Tensor:
        """Return the plan ``[B, H, D]`` of a condition ``[B, C]`` and a style ``[B, latent]``."""
        read = self.context(torch.stack([self.z(z), self.cond(cond)], dim=1) + self.places)
        asked = self.queries.unsqueeze(0).expand(cond.shape[0], -1, -1)
        out: Tensor = self.outward(self.decoder(asked, read=read))
        return out

    def plan(
        self, cond: Tensor, noise: Tensor, *, temperature: float = 1.0, likeliest: bool = False
    ) -> Tensor:
        """See :meth:`Direct.plan`; nothing is drawn, the style is 0."""
        return self.decoded(cond, cond.new_zeros(cond.shape[0], self.latent))

    def errors(self, cond: Tensor, plan: Tensor, valid: Tensor, generator: Any) -> Errors:
        """See :meth:`Direct.errors`."""
        mean, log_variance = self.style_of(cond, plan, valid)
        noise = torch.randn(mean.shape, generator=generator, device=generator.device)
        z = mean + torch.exp(0.5 * log_variance) * noise.to(mean)
        error = mean_over_valid((self.decoded(cond, z) - plan).abs().mean(-1), valid)
        kl = divergence(mean, log_variance)
        metrics = {"l1": error.detach().mean(), "kl": kl.detach().mean()}
        return error + self.kl_weight * kl, metrics


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the divergence ``[B]`` of Gaussians ``[B, N]`` from the standard normal, in nats."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)


def _learned(count: int, width: int) -> nn.Parameter:
    """Places of ``count`` tokens, learned, as ``nn.Embedding`` begins them."""
    return nn.Parameter(torch.randn(count, width))
