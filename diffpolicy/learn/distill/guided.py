"""Distillation of classifier-free guidance: one call of the student for two of its teacher.

Meng et al. 2023, On Distillation of Guided Diffusion Models (arXiv 2210.03142), its first stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffpolicy.core.sampler import Sampler
from diffpolicy.learn.cloning.denoising import LossOutput, standard_normal
from diffpolicy.learn.distill.teaching import Distillation, Taught
from diffpolicy.learn.method import Batch


@dataclass(frozen=True, kw_only=True)
class Guided(Distillation):
    """A student whose clean estimate is its teacher's guided one, at every level.

    It is sampled as its teacher is, at half the cost, and may be the teacher of
    :class:`~diffpolicy.learn.distill.halving.Halving`, which is the paper's second stage. The scale
    is one number; the paper's student takes any of a range as a further input.

    Args:
        guidance_scale: of the teacher; None: that which its ``sampler`` has.
        draws: see :class:`~diffpolicy.learn.distill.teaching.Distillation`.

    Raises:
        ValueError: a value out of range, or a teacher that is not guided, or cannot be.

    Example:
        >>> student = policy.distill(data, Guided(guidance_scale=2.0), config, "runs/guided")
        >>> student.distill(data, Halving(num_steps=4), config, "runs/four")
    """

    guidance_scale: float | None = None

    def teacher_sampler(self) -> Sampler:
        return Sampler(num_steps=1)  # it takes no step

    def student_sampler(self) -> Mapping[str, Any]:
        return {}

    def guidance_of(self, spec: Any) -> float:
        return super().guidance_of(spec) if self.guidance_scale is None else self.guidance_scale

    def objective(self, denoiser: Any, material: Any) -> nn.Module:
        """See :class:`GuidedLoss`."""
        dropout, scale = material.spec.cond_dropout, self.guidance_of(material.spec)
        if scale == 1 or dropout == 0:
            raise ValueError(
                "Guided makes guidance a student's own: it needs a policy trained with "
                "policy.cond_dropout above 0, and a scale other than 1 (method.guidance_scale=2); "
                f"got cond_dropout={dropout} and the scale {scale:g}"
            )
        return GuidedLoss.of(denoiser, self, material)  # type: ignore[no-any-return]


class GuidedLoss(Taught):
    """Squared error ``[B]`` of the network's output to that of the guided estimate.

    ``forward(batch, generator)`` takes ``obs`` and ``action [B, H, A]``, normalised, and with
    ``mask_padding`` also ``valid [B, H]``.
    """

    takes_steps = False  # nor are errors of one level divided by its alpha

    def forward(self, batch: Batch, generator: torch.Generator) -> LossOutput:
        denoiser, process = self.denoiser, self.denoiser.process
        x0 = self.repeated(batch["action"])
        t = process.sample_t((len(x0), 1, 1), generator).to(x0)
        x_t = process.add_noise(x0, t, standard_normal(x0.shape, x0, generator))
        cond, told = self.conditions(batch)
        with torch.no_grad():
            x0_hat = self.teacher(x_t, t, told).x0_hat
            noise = (x_t - process.alpha(t) * x0_hat) / process.sigma(t)
            target = denoiser.target(x0_hat, noise, t)
        return self.output((denoiser.raw(x_t, t, cond) - target).square(), batch)
