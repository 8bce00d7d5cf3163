"""The loss of networks that answer in one call: behaviour cloning without noise levels."""

from __future__ import annotations

import torch
from torch import nn

from diffpolicy.core.denoiser import Denoiser
from diffpolicy.learn.cloning.denoising import LossOutput
from diffpolicy.learn.method import Batch, encoded
from diffpolicy.networks.direct import Direct


class DirectLoss(nn.Module):
    """What a network says of its own answers: regression, likelihood, or a variational bound.

    ``forward(batch, generator)`` takes the batch of a
    :class:`~diffpolicy.learn.cloning.denoising.DenoisingLoss`.

    Args:
        denoiser: what is trained; its network is a :class:`~diffpolicy.networks.direct.Direct`.
        mask_padding: leave edge-padded positions out.

    Raises:
        ValueError: another network.
    """

    def __init__(self, denoiser: Denoiser, *, mask_padding: bool = False) -> None:
        super().__init__()
        if not isinstance(denoiser.network, Direct):
            name = type(denoiser.network).__name__
            raise ValueError(f"DirectLoss needs a network that answers in one call, got {name}")
        self.denoiser, self.mask_padding = denoiser, mask_padding

    def forward(self, batch: Batch, generator: torch.Generator) -> LossOutput:
        network, plan = self.denoiser.network, batch["action"]
        cond = encoded(self.denoiser, batch)
        assert isinstance(network, Direct)
        assert cond is not None  # windows hold observations
        whole = torch.ones(plan.shape[:2], dtype=torch.bool, device=plan.device)
        valid = batch["valid"] if self.mask_padding else whole
        return LossOutput(*network.errors(cond, plan, valid, generator))
