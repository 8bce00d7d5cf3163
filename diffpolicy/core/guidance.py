"""Guidance and constraints as wrapper denoisers: same face.

So every start and solver works with them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffpolicy.core.denoiser import BaseDenoiser, Denoised, GridDenoise


class _Wrapper(BaseDenoiser):
    def __init__(self, denoiser: BaseDenoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.process = denoiser.process

    def check_t(self, t: Tensor) -> None:
        self.denoiser.check_t(t)


class ClassifierFreeGuidance(_Wrapper):
    """``x0 = x0_u + scale (x0_c - x0_u)`` (Ho & Salimans 2022.

    As an extrapolation of clean estimates).

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
        self.scale = float(scale)
        self.clip = clip
        self.register_buffer("null_cond", null_cond, persistent=False)

    def _guided(
        self, run: Callable[[Tensor, Tensor], Denoised], x: Tensor, cond: Tensor | None
    ) -> Denoised:
        if cond is None:
            raise ValueError("classifier-free guidance needs cond [B, C]; got None")
        if self.scale == 1.0:
            return run(x, cond)
        null = torch.zeros_like(cond) if self.null_cond is None else self.null_cond.expand_as(cond)
        both = run(torch.cat([x, x]), torch.cat([cond, null]))
        conditional, unconditional = both.x0_hat.chunk(2)
        x0_hat = torch.lerp(unconditional, conditional, self.scale)
        aux = {name: value.chunk(2)[0] for name, value in both.aux.items()}
        return Denoised(x0_hat.clamp(-1, 1) if self.clip else x0_hat, aux)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Denoised:
        return self._guided(lambda x, c: self.denoiser(x, _match(t, x), c), x_t, cond)

    def on_grid(self, t: Tensor) -> GridDenoise:
        if self.scale != 1.0 and t.shape[1] > 1:
            t = torch.cat([t, t], dim=1)
        inner = self.denoiser.on_grid(t)
        return lambda row, x, cond: self._guided(lambda both, c: inner(row, both, c), x, cond)


class Guidance(_Wrapper):
    """Moves every clean estimate along a user's direction.

    That is ``x0_hat + scale * direction(x0_hat, t, cond)``.

    ``direction`` is for instance the gradient of a value, cost or classifier at the clean estimate,
    ``[B, H, D]``.
    """

    def __init__(
        self,
        denoiser: BaseDenoiser,
        direction: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        *,
        scale: float = 1.0,
    ) -> None:
        super().__init__(denoiser)
        self.direction = direction
        self.scale = scale

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Denoised:
        return self._moved(self.denoiser(x_t, t, cond), t, cond)

    def on_grid(self, t: Tensor) -> GridDenoise:
        inner, rows = self.denoiser.on_grid(t), t.unbind(0)
        return lambda row, x, cond: self._moved(inner(row, x, cond), rows[row], cond)

    def _moved(self, out: Denoised, t: Tensor, cond: Tensor | None) -> Denoised:
        return Denoised(out.x0_hat + self.scale * self.direction(out.x0_hat, t, cond), out.aux)


class Inpaint(_Wrapper):
    """Known entries of the clean sample are given: ``x0_hat = where(known, values, x0_hat)``.

    The state's known entries then follow ``alpha values + sigma noise`` exactly (with a
    deterministic solver), and end at ``values``. Broadcasts; ``torch.where`` keeps the loop free of
    host synchronisation.

    Args:
        denoiser: the denoiser of the free entries.
        known: bool, broadcastable to ``[B, H, D]``.
        values: normalised clean values, broadcastable to ``[B, H, D]``.
    """

    known: Tensor
    values: Tensor

    def __init__(self, denoiser: BaseDenoiser, known: Tensor, values: Tensor) -> None:
        super().__init__(denoiser)
        if known.dtype != torch.bool:
            raise ValueError(f"known must be a bool tensor, got {known.dtype}")
        self.register_buffer("known", known, persistent=False)
        self.register_buffer("values", values, persistent=False)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Denoised:
        return self._filled(self.denoiser(x_t, t, cond))

    def on_grid(self, t: Tensor) -> GridDenoise:
        inner = self.denoiser.on_grid(t)
        return lambda row, x, cond: self._filled(inner(row, x, cond))

    def _filled(self, out: Denoised) -> Denoised:
        return Denoised(torch.where(self.known, self.values, out.x0_hat), out.aux)


def _match(t: Tensor, x: Tensor) -> Tensor:
    """Levels for a batch stacked twice: shared levels broadcast, per-row ones are stacked too."""
    return t if t.shape[0] in (1, x.shape[0]) else torch.cat([t, t])
