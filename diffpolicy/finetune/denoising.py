"""Denoising losses: per example, for given clean sample, level and noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffpolicy.core.denoiser import Denoiser
from diffpolicy.core.ramp import Ramp

LEVEL_LAWS = ("row", "position", "dim")


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
        level_law: which noise levels a plan is trained at. ``"row"``: one for the whole plan.
            ``"position"``: rising along the plan as streaming has them (``ramp`` at a random
            phase). ``"dim"``: an independent one per action dimension, for warm starts whose level
            differs between dimensions.
        ramp: the chunks of ``"position"``.
        constant_fraction: with the two finer laws, the fraction of plans at one level throughout
            (0.2 in the streaming paper); these also train full sampling.

    Raises:
        ValueError: settings out of range, or levels that the network cannot take.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        cond_dropout: float = 0.0,
        mask_padding: bool = False,
        level_law: str = "row",
        ramp: Ramp | None = None,
        constant_fraction: float = 0.2,
    ) -> None:
        super().__init__()
        if not 0 <= cond_dropout < 1:
            raise ValueError(f"cond_dropout must be in [0, 1), got {cond_dropout}")
        if not 0 <= constant_fraction <= 1:
            raise ValueError(f"constant_fraction must be in [0, 1], got {constant_fraction}")
        check_level_law(level_law, denoiser, ramp)
        self.denoiser = denoiser
        self.cond_dropout = cond_dropout
        self.mask_padding = mask_padding
        self.level_law = level_law
        self.ramp = ramp
        self.constant_fraction = constant_fraction

    def draw_levels(self, count: int, dim: int, generator: torch.Generator) -> Tensor:
        """Levels ``[count, 1 or H, 1 or D]`` of the law, on the generator's device."""
        process = self.denoiser.process
        constant = process.sample_t((count, 1, 1), generator)
        if self.level_law == "row":
            return constant
        if self.ramp is not None:
            finer = self.ramp.levels(_stratified(count, generator))
        else:
            # One call per dimension: within a call, the entries of a row share their stratum.
            each = [process.sample_t((count, 1, 1), generator) for _ in range(dim)]
            finer = torch.cat(each, dim=2)
        coin = torch.rand(count, 1, 1, generator=generator, device=generator.device)
        return torch.where(coin < self.constant_fraction, constant, finer)

    def forward(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> LossOutput:
        x0 = batch["action"]
        cond = batch["obs"].flatten(1) if "obs" in batch else None
        t = self.draw_levels(x0.shape[0], x0.shape[2], generator).to(x0.device, x0.dtype)
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


def check_level_law(level_law: str, denoiser: Denoiser, ramp: Ramp | None) -> None:
    """Raise ``ValueError`` unless the denoiser's network can be trained at such levels."""
    if level_law not in LEVEL_LAWS:
        raise ValueError(f"unknown level_law {level_law!r}; expected one of {LEVEL_LAWS}")
    if (ramp is not None) != (level_law == "position"):
        raise ValueError(
            "level_law='position' needs ramp=Ramp(horizon, n_obs_steps, n_action_steps), and no "
            f"other law takes one; got level_law={level_law!r}, ramp={ramp}"
        )
    network = denoiser.network
    kinds: frozenset[str] = getattr(network, "t_kinds", frozenset({"row"}))
    if level_law not in kinds:
        hint = "; unet1d and transformer take levels per position" * (level_law == "position")
        raise ValueError(
            f"level_law={level_law!r} needs a network that takes levels per {level_law}, but "
            f"{type(network).__name__} takes {sorted(kinds)}. Build an mlp with "
            f"t_kind={level_law!r} (network={{'type': 'mlp', 't_kind': {level_law!r}}}){hint}"
        )
    horizon = getattr(network, "horizon", None)
    if ramp is not None and horizon not in (None, ramp.horizon):
        raise ValueError(f"the ramp has horizon={ramp.horizon}, the network {horizon}")


def _stratified(count: int, generator: torch.Generator) -> Tensor:
    """Uniform in (0, 1], one per stratum of a batch in random order, ``[count, 1, 1]``."""
    device = generator.device
    rows = torch.arange(count, device=device)
    rows = (rows + torch.rand(count, generator=generator, device=device)) / count
    return 1 - rows[torch.randperm(count, generator=generator, device=device)].view(-1, 1, 1)
