"""Shortcut models: one-step policies from scratch, whose steps agree with two of half their length.

Frans et al. 2024, One Step Diffusion via Shortcut Models (arXiv 2410.12557).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffpolicy.core.denoiser import Denoiser
from diffpolicy.learn.cloning.flow_map import FlowMapObjective
from diffpolicy.settings import ranged


@dataclass(frozen=True, kw_only=True)
class Shortcut(FlowMapObjective):
    """The mean velocity of a step is the mean of those of its two halves (self-consistency).

    Lengths are powers of a half. Halves of the shortest take the velocity for their mean. A step
    begins at any level from its length up to 1, rather than at multiples of its length, so that
    warm and truncated starts are trained as well.

    Args:
        share: of the examples that are asked for a step; see :class:`FlowMapObjective`.
        halvings: of the longest step, 1, to the shortest, ``0.5 ** halvings``.

    Raises:
        ValueError: a value out of range.
    """

    halvings: int = ranged("[0, 20]", 6)

    def draw_steps(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        how = {"generator": generator, "device": generator.device}
        length = 0.5 ** torch.randint(self.halvings + 1, (count, 1, 1), **how)  # type: ignore[call-overload]
        end = torch.rand(count, 1, 1, **how) * (1 - length)  # type: ignore[call-overload]
        return end + length, end

    def target(
        self,
        denoiser: Denoiser,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        velocity: Tensor,
        cond: Tensor | None,
    ) -> Tensor:
        half = (t - s) / 2
        shortest = half < 0.75 * 0.5**self.halvings  # whose own halves are never asked for
        told = torch.where(shortest, 0.0, half)
        first = denoiser.raw(x_t, t, cond, t - told)
        between = t - half
        second = denoiser.raw(x_t - half * first, between, cond, between - told)
        return (first + second) / 2
