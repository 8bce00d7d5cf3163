"""What objectives of networks of steps share: a part of the examples is asked for whole steps.

A network of prediction ``mean_velocity`` says how the state moves, on average, on the way from a
level ``t`` to a lower one ``s``. Where ``s = t`` this is flow matching's velocity, which data tell.
Where ``s < t`` it is learned from itself: MeanFlow and shortcut models differ in how.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffpolicy.core.denoiser import Denoiser
from diffpolicy.learn.cloning.denoising import DenoisingLoss, mean_over_plan
from diffpolicy.settings import check_settings, ranged


@dataclass(frozen=True, kw_only=True)
class FlowMapObjective:
    """Settings of all objectives of networks of steps.

    Args:
        share: of the examples, those that are asked for a step of some length; the others learn
            the velocity. At least one is.

    Raises:
        ValueError: a value out of range.
    """

    share: float = ranged("(0, 1]", 0.25)

    def __post_init__(self) -> None:
        check_settings(self)

    def draw_steps(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Levels ``(t, s)`` of steps, each ``[count, 1, 1]``, ``0 <= s < t <= 1``."""
        raise NotImplementedError(f"{type(self).__name__} defines no draw_steps()")

    def target(
        self,
        denoiser: Denoiser,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        velocity: Tensor,
        cond: Tensor | None,
    ) -> Tensor:
        """What the network should say ``[B, H, D]`` of steps from ``x_t`` at ``t`` to ``s``.

        Called without gradients. ``velocity`` is ``noise - x0`` of these examples.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no target()")

    def weighted(self, error: Tensor) -> Tensor:
        """The loss ``[B]`` of mean squared errors ``[B]``."""
        return error


class FlowMapLoss(DenoisingLoss):
    """Squared error of the network's mean velocity, ``[B]``, for plans of actions.

    ``forward(batch, generator)`` takes what :class:`DenoisingLoss` takes. It logs the mean squared
    errors of examples without and with a step, ``velocity_error`` and ``step_error``.

    Args:
        denoiser: of prediction ``mean_velocity``.
        settings: which objective.
        how: ``cond_dropout``, ``mask_padding`` and ``draws`` of :class:`DenoisingLoss`.

    Raises:
        ValueError: another prediction.
    """

    def __init__(self, denoiser: Denoiser, settings: FlowMapObjective, **how: Any) -> None:
        super().__init__(denoiser, **how)
        if denoiser.prediction != "mean_velocity":
            raise ValueError(
                f"{type(settings).__name__} learns steps: it needs a denoiser of prediction "
                f"'mean_velocity', not {denoiser.prediction!r}"
            )
        self.settings = settings

    def errors(
        self,
        x0: Tensor,
        t: Tensor,
        noise: Tensor,
        cond: Tensor | None,
        valid: Tensor | None,
        generator: torch.Generator,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        count = max(1, round(self.settings.share * len(x0)))
        order = torch.randperm(len(x0), generator=generator, device=generator.device)
        order = order.to(x0.device)
        rows, others = order[:count], order[count:]
        start, end = (v.to(x0) for v in self.settings.draw_steps(count, generator))
        t, s = t.index_copy(0, rows, start), t.index_copy(0, rows, end)
        x_t, velocity = self.denoiser.process.add_noise(x0, t, noise), noise - x0
        with torch.no_grad():
            given = x_t[rows], start, end, velocity[rows], None if cond is None else cond[rows]
            target = velocity.index_copy(0, rows, self.settings.target(self.denoiser, *given))
        output = self.denoiser.raw(x_t, t, cond, s)
        error = mean_over_plan((output - target).square().mean(-1), valid)
        told = error.detach()
        metrics = {"step_error": told[rows].mean()}
        metrics |= {"velocity_error": told[others].mean()} if len(others) else {}
        return self.settings.weighted(error), metrics
