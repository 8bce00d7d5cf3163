"""Denoising losses: per example, for given clean sample, level and noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffpolicy.core.denoiser import Denoiser


class LossOutput(NamedTuple):
    """What every objective of the library returns.

    Attributes:
        loss: per example, ``[B]``; the trainer averages it.
        metrics: 0-dim tensors to log, detached.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor]


def denoising_error(
    denoiser: Denoiser,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    cond: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the network's own output at given level and noise, per example.

    Two models scored at the same ``t`` and ``noise`` can be differenced (preference losses do).

    Args:
        denoiser: network and parameterisation; the regression target is its own (noise, velocity,
            ...).
        x0: clean, normalised ``[B, H, D]``.
        t: levels, broadcastable to ``x0``, on its device.
        noise: standard normal ``[B, H, D]``.
        cond: ``[B, C]``.
        valid: bool ``[B, H]``; positions left out of the mean where False.

    Returns:
        ``[B]``.
    """
    x_t = denoiser.process.add_noise(x0, t, noise)
    error = (denoiser.raw(x_t, t, cond) - denoiser.target(x0, noise, x_t, t)).square().mean(-1)
    if valid is None:
        return error.mean(-1)
    weight = valid.to(error.dtype)
    return (error * weight).sum(-1) / weight.sum(-1).clamp_min(1)


class DenoisingLoss(nn.Module):
    """The training objective of diffusion policies: behaviour cloning as denoising (Ho et al.

    2020, eq. 14).

    ``forward(batch, generator)`` takes a batch with ``obs [B, To, O]`` and ``action [B, H, A]``,
    both normalised, and optionally ``valid [B, H]``. Levels and noise come from ``generator``
    alone.

    Args:
        denoiser: what is trained.
        cond_dropout: fraction of examples whose condition is zeroed, for classifier-free guidance.
        mask_padding: leave edge-padded positions out (Diffusion Policy keeps them in).
    """

    def __init__(
        self, denoiser: Denoiser, *, cond_dropout: float = 0.0, mask_padding: bool = False
    ) -> None:
        super().__init__()
        if not 0 <= cond_dropout < 1:
            raise ValueError(f"cond_dropout must be in [0, 1), got {cond_dropout}")
        self.denoiser = denoiser
        self.cond_dropout = cond_dropout
        self.mask_padding = mask_padding

    def forward(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> LossOutput:
        x0 = batch["action"]
        cond = batch["obs"].flatten(1) if "obs" in batch else None
        t = self.denoiser.process.sample_t((x0.shape[0], 1, 1), generator).to(x0.device, x0.dtype)
        noise = torch.randn(
            x0.shape, generator=generator, device=generator.device, dtype=x0.dtype
        ).to(x0.device)
        if cond is not None and self.cond_dropout > 0:
            keep = (
                torch.rand(len(x0), 1, generator=generator, device=generator.device)
                >= self.cond_dropout
            )
            cond = cond * keep.to(cond.device, cond.dtype)
        valid = batch["valid"] if self.mask_padding else None
        loss = denoising_error(self.denoiser, x0, t, noise, cond=cond, valid=valid)
        return LossOutput(loss, {})
