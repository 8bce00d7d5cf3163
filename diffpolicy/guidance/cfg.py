"""Classifier-free guidance: a conditional model moved away from the unconditional one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffpolicy.core.denoiser import BaseDenoiser, Denoised
from diffpolicy.core.masked_denoiser import masked_answer
from diffpolicy.guidance.base import Run, Wrapper


class ClassifierFreeGuidance(Wrapper):
    """``x0 = x0_u + scale (x0_c - x0_u)`` (Ho & Salimans 2022), an extrapolation of estimates.

    Of masked sequences it extrapolates log-probabilities.

    Both branches run as one batch. ``scale = 1`` is the conditional model alone and costs one
    branch.

    Args:
        denoiser: trained with condition dropout.
        scale: guidance strength w, 0 unconditional, 1 conditional, above 1 sharper.
        null_cond: the condition ``[C]`` that training used for "none" (zeros unless given).
        clip: clamp the guided estimate to [-1, 1].
    """

    null_cond: Tensor | None

    def __init__(
        self,
        denoiser: BaseDenoiser,
        scale: float,
        *,
        null_cond: Tensor | None = None,
        clip: bool = False,
    ) -> None:
        super().__init__(denoiser)
        self.scale, self.clip = float(scale), clip
        self.register_buffer("null_cond", null_cond, persistent=False)

    def inside(self, x_t: Tensor, cond: Any) -> tuple[Tensor, Any]:
        if cond is None:
            raise ValueError("classifier-free guidance needs cond [B, C]; got None")
        if self.scale == 1.0:
            return x_t, cond
        null = torch.zeros_like(cond) if self.null_cond is None else self.null_cond.to(cond)
        return torch.cat([x_t, x_t]), torch.cat([cond, null.expand_as(cond)])

    def inside_levels(self, t: Tensor) -> Tensor:
        shared = self.scale == 1.0 or t.shape[-3] == 1  # levels per row stand there twice, as rows
        return t if shared else torch.cat([t, t], dim=-3)

    def guide(self, run: Run, x_t: Tensor, cond: Any, *constants: Tensor) -> Denoised:
        both = run(x_t)
        if self.scale == 1.0:
            return both
        if "log_p" in both.aux:  # tokens: the same line on log-probabilities, then renormalised
            log_p, log_u = both.aux["log_p"].chunk(2)
            return masked_answer(x_t, torch.lerp(log_u, log_p, self.scale).log_softmax(-1))
        conditional, unconditional = both.x0_hat.chunk(2)
        x0_hat = torch.lerp(unconditional, conditional, self.scale)
        aux = {name: value.chunk(2)[0] for name, value in both.aux.items()}
        return Denoised(x0_hat.clamp(-1, 1) if self.clip else x0_hat, aux)
