"""Progressive distillation: one step of the student is worth two of its teacher.

Salimans and Ho 2022 (arXiv 2202.00512), algorithm 2; of guided teachers Meng et al. 2023
(arXiv 2210.03142).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffpolicy.core.sampler import Sampler
from diffpolicy.learn.cloning.denoising import LossOutput
from diffpolicy.learn.distill.teaching import (
    Distillation,
    Taught,
    ddim_move,
)
from diffpolicy.learn.method import Batch
from diffpolicy.settings import ranged


@dataclass(frozen=True, kw_only=True)
class Halving(Distillation):
    """A student of K steps of DDIM for a teacher of 2 K.

    From a demonstration that is noised to a level of the student's grid the teacher takes two
    steps; the student learns the clean estimate from which one step leads to the same state. It is
    repeated, the student being the teacher of the next, until there are few enough: 16, 8, 4, 2, 1.
    Predictions ``v`` and ``x0`` suit it; ``eps`` does not (its error is divided by alpha, which is
    next to nothing where the first step begins).

    Args:
        num_steps: K.
        draws: see :class:`~diffpolicy.learn.distill.teaching.Distillation`.

    Raises:
        ValueError: a value out of range.
    """

    num_steps: int = ranged("[1, inf)", 4)

    def teacher_sampler(self) -> Sampler:
        return Sampler(num_steps=2 * self.num_steps)

    @property
    def student_steps(self) -> int:
        return self.num_steps

    def student_sampler(self) -> Mapping[str, Any]:
        return {"solver": "ddim", "num_steps": self.num_steps, "spacing": "t", "options": {}}

    def objective(self, denoiser: Any, material: Any) -> nn.Module:
        """See :class:`HalvingLoss`."""
        return HalvingLoss.of(denoiser, self, material)  # type: ignore[no-any-return]


class HalvingLoss(Taught):
    """Squared error ``[B]`` of the network's output to that which is worth two steps.

    The error is that of what the network predicts: of ``v`` the clean estimate's with the weight
    SNR + 1, which the paper offers beside max(SNR, 1); of ``x0`` its own, with the weight 1.

    ``forward(batch, generator)`` takes ``obs`` and ``action [B, H, A]``, normalised, and with
    ``mask_padding`` also ``valid [B, H]``.
    """

    settings: Halving

    def forward(self, batch: Batch, generator: torch.Generator) -> LossOutput:
        process = self.denoiser.process
        x_t, (t, between, s), cond, told = self.noised(batch, generator, 2)
        with torch.no_grad():
            half = ddim_move(process, x_t, self.teacher(x_t, t, told).x0_hat, t, between)
            x_s = ddim_move(process, half, self.teacher(half, between, told).x0_hat, between, s)
            # The clean estimate with which DDIM goes from x_t to x_s in one step (its eq. 8).
            ratio = process.sigma(s) / process.sigma(t)
            wanted = (x_s - ratio * x_t) / (process.alpha(s) - ratio * process.alpha(t))
            noise = (x_t - process.alpha(t) * wanted) / process.sigma(t)
            target = self.denoiser.target(wanted, noise, t)
        return self.output((self.denoiser.raw(x_t, t, cond) - target).square(), batch)
