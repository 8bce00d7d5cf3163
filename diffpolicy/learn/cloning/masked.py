"""Masked cross-entropy: the training loss and the likelihood bound of masked sequences."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffpolicy.core.masked_denoiser import MaskedDenoiser
from diffpolicy.learn.cloning.denoising import LossOutput, drop_cond
from diffpolicy.learn.method import Batch
from diffpolicy.settings import check_range


def masked_cross_entropy(
    denoiser: MaskedDenoiser,
    tokens: Tensor,
    t: Tensor,
    masked: Tensor,
    *,
    cond: Tensor | None = None,
    scored: Tensor | None = None,
) -> Tensor:
    """``sum_{i masked} -log p(x0_i | x_t)`` per example, unweighted.

    Two denoisers scored under the same masks can be differenced (preference losses do).

    Args:
        denoiser: whose probabilities.
        tokens: clean ``[B, L]``.
        t: levels ``[B, 1, 1]`` that the denoiser is told.
        masked: bool ``[B, L]``; what the process never masks counts as not masked.
        cond: ``[B, C]``.
        scored: bool ``[B, L]``, which of them count; None: all.

    Returns:
        ``[B]``.
    """
    masked = denoiser.process.free(masked, tokens)
    state = torch.where(masked, denoiser.mask_id, tokens)
    log_p = denoiser.log_probs(state, t, cond).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return -(log_p * (masked if scored is None else masked & scored)).sum(-1)


def draw_masks(
    denoiser: MaskedDenoiser, tokens: Tensor, t: Tensor, generator: torch.Generator
) -> Tensor:
    """Which positions are masked at levels ``t [B, 1, 1]``, bool ``[B, L]``."""
    chance = denoiser.process.mask_probability(t).squeeze(-1)
    u = torch.rand(tokens.shape, generator=generator, device=generator.device)
    return u.to(tokens.device) < chance.to(tokens.device)


def antithetic_levels(count: int, generator: torch.Generator, *, t_min: float = 1e-3) -> Tensor:
    """Levels ``[count, 1, 1]``: one uniform offset on an even grid of ``[t_min, 1)`` (MDLM)."""
    device = generator.device
    offset = torch.rand(1, generator=generator, device=device)
    u = (torch.arange(count, device=device) + offset) / count
    order = torch.randperm(count, generator=generator, device=device)
    return (t_min + (1 - t_min) * u[order]).view(-1, 1, 1)


class MaskedDenoisingLoss(nn.Module):
    """The continuous-time bound of MDLM (Sahoo et al. 2024, eq. 10), in nats per sequence.

    ``E_t [ m'_t / m_t  sum_{i masked} -log p(x0_i | x_t) ]`` with antithetic levels: an upper bound
    of the negative log-likelihood.

    ``forward(batch, generator)`` takes ``tokens [B, L]`` (integers below V) and optionally ``cond
    [B, C]``. Levels, masks and dropped conditions come from ``generator`` alone.

    Args:
        denoiser: what is trained.
        cond_dropout: fraction of examples whose condition is zeroed, for classifier-free guidance.

    Raises:
        ValueError: ``cond_dropout`` outside [0, 1).
    """

    def __init__(self, denoiser: MaskedDenoiser, *, cond_dropout: float = 0.0) -> None:
        super().__init__()
        check_range("[0, 1)", cond_dropout=cond_dropout)
        self.denoiser, self.cond_dropout = denoiser, cond_dropout

    def forward(self, batch: Batch, generator: torch.Generator) -> LossOutput:
        tokens, cond = batch["tokens"].long(), batch.get("cond")
        t = antithetic_levels(len(tokens), generator).to(tokens.device)
        masked = draw_masks(self.denoiser, tokens, t, generator)
        masked = self.denoiser.process.free(masked, tokens)
        cond = drop_cond(cond, self.cond_dropout, generator)
        error = masked_cross_entropy(self.denoiser, tokens, t, masked, cond=cond)
        loss = self.denoiser.process.weight(t).view(-1) * error
        right = error.detach().sum() / masked.sum().clamp_min(1)
        return LossOutput(loss, {"nats_per_mask": right})


@torch.no_grad()
def elbo(
    denoiser: MaskedDenoiser,
    tokens: Tensor,
    generator: torch.Generator,
    *,
    draws: int = 16,
    cond: Tensor | None = None,
) -> Tensor:
    """A lower bound of the log-likelihood of sequences, in nats, estimated without bias.

    ``L E_k E_S [ mean_{i in S} log p(x0_i | x_t) ]``, where k masks, uniform in 1..L, hide a
    uniformly drawn set S: the bound of MDLM with its time integral solved, which is the expected
    log-likelihood under a random order of reveals. The number of masks is stratified over draws.
    Denoisers that depend on the level are told the one with ``m_t = k / L``.

    Args:
        denoiser: whose likelihood.
        tokens: ``[N, L]``.
        generator: of the masks, on the device of ``tokens``.
        draws: masks per sequence.
        cond: ``[N, C]``.

    Returns:
        ``[N]``.
    """
    check_range("[1, inf)", draws=draws)
    total = torch.zeros(len(tokens), device=tokens.device)
    for draw in range(draws):
        u = torch.rand(len(tokens), generator=generator, device=tokens.device)
        masked, t, weight = random_masks(denoiser, (draw + u) / draws, generator)
        total -= weight * masked_cross_entropy(denoiser, tokens, t, masked, cond=cond)
    return total / draws + denoiser.process.log_length(tokens)


def random_masks(
    denoiser: MaskedDenoiser, u: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Masks over ``k = 1 + floor(u L)`` positions, drawn uniformly.

    Args:
        denoiser: tells L and the level with ``m_t = k / L``, which it may look at.
        u: in [0, 1), ``[N]``: how many, as a fraction.
        generator: on the device of ``u``.

    Returns:
        ``masked`` bool ``[N, L]``, levels ``[N, 1, 1]``, and weights ``L / k [N]`` with which the
        masked log-probability is the likelihood bound without bias, for uniform ``u``.
    """
    length = denoiser.length
    masks = (u * length).long().clamp(max=length - 1) + 1
    order = torch.rand(len(u), length, generator=generator, device=u.device)
    masked = order.argsort(1).argsort(1) < masks[:, None]
    fraction = masks / length
    t = fraction if denoiser.time_free else _level_of(denoiser, fraction)
    return masked, t.view(-1, 1, 1), 1 / fraction


def _level_of(denoiser: MaskedDenoiser, fraction: Tensor) -> Tensor:
    """The level at which this fraction is masked, by bisection (any process)."""
    low, high = torch.zeros_like(fraction), torch.ones_like(fraction)
    for _ in range(30):
        middle = (low + high) / 2
        less = denoiser.process.mask_probability(middle) < fraction
        low, high = torch.where(less, middle, low), torch.where(less, high, middle)
    return high
