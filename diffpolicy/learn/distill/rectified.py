"""Rectified Diffusion: a denoiser trained anew on its own pairs of noise and sample.

Wang et al. 2024, Rectified Diffusion (arXiv 2410.07303), for any process; of straight paths
Liu et al. 2023, Rectified Flow (arXiv 2209.03003).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffpolicy.core.sampler import Sampler
from diffpolicy.core.starts import prior_start
from diffpolicy.learn.cloning.denoising import LossOutput, denoising_error, standard_normal
from diffpolicy.learn.distill.teaching import Distillation, Taught
from diffpolicy.learn.method import Batch, encoded, plan_shape
from diffpolicy.settings import ranged


@dataclass(frozen=True, kw_only=True)
class Rectified(Sampler, Distillation):
    """A student of the teacher's own plans, each noised by the very noise that it was drawn from.

    Where noise and plan belong together, the path between them is no longer an average over plans,
    and the estimate at its beginning is its end. Plans are drawn anew for every batch: of
    demonstrations only what was observed is looked at.

    Args:
        solver: of the teacher, as ``num_steps``, ``spacing``, ``options`` and ``t_min``, see
            :class:`diffpolicy.core.Sampler`; one that adds no noise.
        draws: levels per plan of the teacher, which costs ``num_steps`` evaluations.

    Raises:
        ValueError: a value out of range, or a solver that adds noise.
    """

    draws: int = ranged("[1, inf)", 8)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.make().stochastic:
            raise ValueError(
                f"plans must belong to the noise that they are drawn from, but {self.solver!r} "
                f"with {dict(self.options)} adds noise; use solver='ddim', or eta=0"
            )

    def reads(self) -> frozenset[str]:
        return frozenset({"observations"})

    def teacher_sampler(self) -> Sampler:
        return self

    def student_sampler(self) -> Mapping[str, Any]:
        return {"solver": "ddim", "num_steps": 1, "spacing": "t", "options": {}}

    def objective(self, denoiser: Any, material: Any) -> nn.Module:
        """See :class:`RectifiedLoss`."""
        return RectifiedLoss.of(denoiser, self, material)  # type: ignore[no-any-return]


class RectifiedLoss(Taught):
    """The denoising loss ``[B]`` of the teacher's plans and their own noise.

    ``forward(batch, generator)`` takes ``obs``, normalised.
    """

    settings: Rectified

    def forward(self, batch: Batch, generator: torch.Generator) -> LossOutput:
        cond = self.repeated(encoded(self.denoiser, batch))
        weight = next(self.denoiser.parameters())
        rows = len(next(iter(batch.values())))
        like = weight.new_zeros(rows, *plan_shape(self.denoiser))
        noise = standard_normal(like.shape, like, generator)
        process = self.denoiser.process
        with torch.no_grad():
            start = prior_start(process, noise)
            plan = self.settings.draw(self.teacher, start, cond=self.told(batch))
        plan, noise = self.repeated(plan), self.repeated(noise)
        t = process.sample_t((len(plan), 1, 1), generator).to(plan.device, plan.dtype)
        loss = denoising_error(self.denoiser, plan, t, noise, cond=cond)
        return LossOutput(self.mean_of_draws(loss), {})
