"""Consistency distillation: every state of a path is mapped to where the path ends.

Song et al. 2023, Consistency Models (arXiv 2303.01469), algorithm 2.
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
    unclipped,
)
from diffpolicy.learn.method import Batch
from diffpolicy.learn.reference import check_no_dropout
from diffpolicy.settings import ranged


@dataclass(frozen=True, kw_only=True)
class Consistency(Distillation):
    """A student whose clean estimate is the end of the teacher's path, from any level in one step.

    A demonstration is noised to a level of a grid, the teacher takes one step of DDIM down, and the
    student's estimate before the step is drawn to its own after it, whose gradient is not followed.
    At level 0 the estimate is the state itself. There is no moving average of the student as target
    (Song and Dhariwal 2023, arXiv 2310.14189, found that it does harm).

    Predictions ``v``, ``x0``, ``edm`` and ``velocity`` suit it; of ``eps`` there is a warning, see
    :class:`~diffpolicy.learn.distill.halving.Halving`.

    With ``sub_path`` the student's estimate is also learned between the ends of the teacher's step
    (SLAM, "sub-path linear approximation", Xu et al. 2024, arXiv 2404.13903): from a point of the
    line that the step is, at the level of that point, which takes the place of an embedding of the
    share of the line. Levels off the grid, where warm starts and other numbers of steps begin, are
    learned so too.

    The student draws plans in one evaluation, or in more by estimating and noising in turns:
    solver ``ddim`` with the options ``eta: 1, variance: renoise``.

    Args:
        num_steps: K of the grid, ``"t"``-spaced. More: less error per step, more steps that the
            end has to travel over.
        sub_path: see above; the point is drawn evenly along the clock. Without it the point is
            always the beginning of the step.
        draws: see :class:`~diffpolicy.learn.distill.teaching.Distillation`.

    Raises:
        ValueError: a value out of range.
    """

    num_steps: int = ranged("[2, inf)", 10)
    sub_path: bool = False

    def teacher_sampler(self) -> Sampler:
        return Sampler(num_steps=self.num_steps)

    def student_sampler(self) -> Mapping[str, Any]:
        renoise = {"eta": 1.0, "variance": "renoise"}
        return {"solver": "ddim", "num_steps": 1, "spacing": "t", "options": renoise}

    def objective(self, denoiser: Any, material: Any) -> nn.Module:
        """See :class:`ConsistencyLoss`."""
        check_no_dropout(denoiser)  # the two estimates that are compared would drop other units
        return ConsistencyLoss.of(denoiser, self, material)  # type: ignore[no-any-return]


class ConsistencyLoss(Taught):
    """Squared difference of clean estimates at both ends of one step of the teacher, ``[B]``.

    ``forward(batch, generator)`` takes ``obs`` and ``action [B, H, A]``, normalised, and with
    ``mask_padding`` also ``valid [B, H]``.
    """

    settings: Consistency

    def forward(self, batch: Batch, generator: torch.Generator) -> LossOutput:
        process = self.denoiser.process
        x_t, (t, s), cond, told = self.noised(batch, generator, 1)
        with torch.no_grad():
            x0_hat = self.teacher(x_t, t, told).x0_hat
            x_s = ddim_move(process, x_t, x0_hat, t, s)
            target = torch.where(s > 0, self.denoiser(x_s, s, cond).x0_hat, x_s)
            if self.settings.sub_path:
                share = torch.rand(t.shape, generator=generator, device=generator.device)
                between = s + share.to(t) * (t - s)
                x_t, t = ddim_move(process, x_t, x0_hat, t, between), between
        error = (unclipped(self.denoiser, x_t, t, cond) - target).square()
        return self.output(error, batch)
