"""MeanFlow: one-step policies from scratch, by an identity between mean and momentary velocity.

Geng et al. 2025, Mean Flows for One-step Generative Modeling (arXiv 2505.13447).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffpolicy.core.denoiser import Denoiser
from diffpolicy.learn.cloning.flow_map import FlowMapObjective
from diffpolicy.settings import ranged


@dataclass(frozen=True, kw_only=True)
class MeanFlow(FlowMapObjective):
    """``u = v - (t - s) du/dt`` (its eq. 6), where ``u`` is the mean velocity from ``t`` to ``s``.

    The derivative is that along the path, ``v`` times the network's slope in the state plus its
    slope in the level (eq. 8), by forward-mode differentiation of the network as it is. ``v`` is
    ``noise - x0`` of the example, and the right side a target whose gradient is not followed.

    Args:
        share: of the examples that are asked for a step; see :class:`FlowMapObjective`.
        level_mean: of the logit-normal law of both levels, whose larger is ``t``.
        level_std: likewise.
        power: p of the weight ``1 / (error + 1e-3)^p`` of an example's squared error, which is not
            differentiated; 0: all count alike.

    Raises:
        ValueError: a value out of range.
    """

    level_mean: float = -0.4
    level_std: float = ranged("(0, inf)", 1.0)
    power: float = ranged("[0, inf)", 1.0)

    def draw_steps(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        drawn = torch.randn(2, count, 1, 1, generator=generator, device=generator.device)
        levels = (self.level_mean + self.level_std * drawn).sigmoid()
        return levels.amax(0), levels.amin(0)

    # Compilers cannot trace layer normalisation in forward mode.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def target(
        self,
        denoiser: Denoiser,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        velocity: Tensor,
        cond: Tensor | None,
    ) -> Tensor:
        def mean_velocity(x_t: Tensor, t: Tensor) -> Tensor:
            return denoiser.raw(x_t, t, cond, s)

        # Of the kernels of attention only the plain one has a derivative in forward mode.
        with sdpa_kernel(SDPBackend.MATH):
            along = (velocity, torch.ones_like(t))
            slope: Tensor = torch.func.jvp(mean_velocity, (x_t, t), along)[1]
        return velocity - (t - s) * slope

    def weighted(self, error: Tensor) -> Tensor:
        return error / (error.detach() + 1e-3) ** self.power
