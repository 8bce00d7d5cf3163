"""KL divergence of sampling chains to those of a reference, step by step and in closed form.

A chain's law of paths factorises over its steps, so the divergence is the sum of those of the
steps' kernels, in expectation over the states visited. It bounds that of the final samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffpolicy.core.denoiser import Denoised
from diffpolicy.core.masking import MaskingProcess
from diffpolicy.core.reveal import RevealRow
from diffpolicy.core.solvers import Row

StepKL = Callable[[Any, Tensor, Denoised, Denoised], Tensor]  # (row, x, answer, reference's)


def masked_step_kl(row: RevealRow, x: Tensor, out: Denoised, reference: Denoised) -> Tensor:
    """``reveal sum_{i masked} KL(p(x0_i | x) || p_ref(x0_i | x))``, ``[B]``.

    Staying masked is equally probable under both, so nothing else remains of the divergence of the
    two kernels. Where positions to reveal were drawn before the loop, ``reveal`` is the fraction of
    masks revealed in this step: given their number, which ones is uniform. Relaxed states weigh
    each position with its mask's share.
    """
    mask = x[..., -1]
    inner = categorical_kl(out.aux["log_p"], reference.aux["log_p"])
    if row.which is None:
        return (row.reveal.flatten() * (mask * inner).sum(-1)).expand(len(x))
    revealed = (row.which.squeeze(-1).to(mask.dtype) * mask).sum(-1)
    return revealed / mask.sum(-1).clamp_min(1e-6) * (mask * inner).sum(-1)


def categorical_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``KL(p || q)`` over the last dimension."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def released_step_kl(process: MaskingProcess) -> StepKL:
    """The divergence that DRAKES' released code computes, for comparison and nothing else.

    ``sum_{i, a} c_i x_ia (-p + q + p (log p - log q)) / m_t`` with ``c = 1 - x_mask``, ``p`` and
    ``q`` equal where the state's largest entry is a token. It is 0 on hard states.
    """

    def step(row: RevealRow, x: Tensor, out: Denoised, reference: Denoised) -> Tensor:
        log_p, log_q = out.aux["log_p"], reference.aux["log_p"]
        still_masked = x.argmax(-1) == x.shape[-1] - 1
        rate = log_q.exp() - log_p.exp() + log_p.exp() * (log_p - log_q)
        weight = (1 - x[..., -1:]) * x[..., :-1] * still_masked.unsqueeze(-1)
        total = (weight * rate).sum((1, 2))
        return total / process.mask_probability(row.t).flatten().to(x)

    return step


def gaussian_step_kl(row: Row, x: Tensor, out: Denoised, reference: Denoised) -> Tensor:
    """``||mean - mean_ref||^2 / (2 std^2)`` of a stochastic step, ``[B]``.

    The last step, to clean, adds no noise, so its kernels share no support: it is left out, and the
    divergence is that of the chain up to it.
    """
    assert row.g is not None
    scaled = row.b[0] * (out.x0_hat - reference.x0_hat)
    noisy = row.g > 0
    std = torch.where(noisy, row.g, torch.ones_like(row.g))
    return torch.where(noisy, 0.5 * (scaled / std).square(), 0.0).flatten(1).sum(1)
