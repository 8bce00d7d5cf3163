"""Classifier-free guidance: a conditional model moved away from the unconditional one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffpolicy.core.denoiser import BaseDenoiser, Denoised, GridDenoise
from diffpolicy.core.masked_denoiser import masked_answer
from diffpolicy.guidance.base import Run, Wrapper, WrapperOnGrid


class ClassifierFreeGuidance(Wrapper):
    """``x0 = x0_u + scale (x0_c - x0_u)`` (Ho & Salimans 2022), an extrapolation of estimates.

    Of masked sequences it extrapolates log-probabilities.

    Both branches run as one batch. ``scale = 1`` is the conditional model alone and costs one
    branch; so do the levels of a grid from ``t_min`` down, where the two have come to agree
    (Adaptive Guidance, Castillo et al. 2023; the switch is fixed beforehand, because a loop decides
    nothing from data: :func:`diffpolicy.policies.adaptive_guidance.switching_level`).

    Args:
        denoiser: trained with condition dropout.
        scale: guidance strength w, 0 unconditional, 1 conditional, above 1 sharper.
        null_cond: the condition ``[C]`` that training used for "none" (zeros unless given).
        clip: clamp the guided estimate to [-1, 1].
        t_min: at this level and below, the conditional model alone is asked.
    """

    null_cond: Tensor | None

    def __init__(
        self,
        denoiser: BaseDenoiser,
        scale: float,
        *,
        null_cond: Tensor | None = None,
        clip: bool = False,
        t_min: float = 0.0,
    ) -> None:
        super().__init__(denoiser)
        self.scale, self.clip, self.t_min = float(scale), clip, t_min
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

    def constants(self, t: Tensor) -> tuple[Tensor, ...]:
        """The scale of each level, where they differ."""
        if self.t_min <= 0:
            return ()
        return (torch.where(t <= self.t_min, 1.0, self.scale).to(t),)

    def on_grid(self, t: Tensor, s: Tensor | None = None) -> GridDenoise:
        alone = (t <= self.t_min).flatten(1).all(1).tolist()
        return _SwitchedOnGrid(self, t, s, alone) if any(alone) else super().on_grid(t, s)

    def guide(self, run: Run, x_t: Tensor, cond: Any, *constants: Any) -> Denoised:
        both = run(x_t)
        if self.scale == 1.0:
            return both
        scale = constants[0].to(x_t) if constants else self.scale
        if "log_p" in both.aux:  # tokens: the same line on log-probabilities, then renormalised
            log_p, log_u = both.aux["log_p"].chunk(2)
            return masked_answer(x_t, torch.lerp(log_u, log_p, scale).log_softmax(-1))
        conditional, unconditional = both.x0_hat.chunk(2)
        x0_hat = torch.lerp(unconditional, conditional, scale)
        aux = {name: value.chunk(2)[0] for name, value in both.aux.items()}
        return Denoised(x0_hat.clamp(-1, 1) if self.clip else x0_hat, aux)


class _SwitchedOnGrid(WrapperOnGrid):
    """Both branches at the first levels of a grid, the conditional one alone at the others."""

    alike = False

    def __init__(
        self, wrapper: ClassifierFreeGuidance, t: Tensor, s: Tensor | None, alone: list[bool]
    ) -> None:
        super().__init__(wrapper, t, s)
        self._alone, self._conditional = alone, wrapper.denoiser.on_grid(t, s)

    def __call__(self, row: int, x: Tensor, cond: Any, film: Tensor | None = None) -> Denoised:
        if not self._alone[row]:
            return super().__call__(row, x, cond, film)
        extra = () if film is None else (film[: len(x)],)  # modulations are of both branches
        return self._conditional(row, x, cond, *extra)
