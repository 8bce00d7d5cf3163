"""Plans some entries of which are known: clean in the network's input and in its answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffpolicy.core.denoiser import BaseDenoiser, Denoised, GridDenoise


class PinCond(NamedTuple):
    """The condition of a :class:`Pinned` denoiser: that of the one inside, and what is known.

    Attributes:
        cond: ``[B, C]``, or None for an unconditional network.
        values: ``[B, H, D]`` normalised clean values; what they hold at unknown entries does not
            matter.
    """

    cond: Any
    values: Tensor


class Pinned(BaseDenoiser):
    """A denoiser of the unknown entries of a plan, given the known ones.

    The denoiser inside sees ``where(known, values, x_t)`` and its answer is
    ``where(known, values, x0_hat)``. A network trained so (the loss with a
    :class:`~diffpolicy.guidance.layout.Layout` does it) models ``p(unknown | known)`` exactly,
    whereas :class:`~diffpolicy.guidance.cfg.Inpaint` shows a network of the joint law noised known
    entries, and is an approximation between the levels.

    Its ``cond`` is a :class:`PinCond`, so that it stays a pure function and one prepared grid
    serves every observation. The known entries of the sampled state end at ``values`` exactly with
    solvers whose last step goes to level 0.

    Args:
        denoiser: of plans whose known entries are clean; may itself be a wrapper (classifier-free
            or value guidance), which then sees the network's own input.
        known: bool ``[1, H, D]``.

    Raises:
        ValueError: ``known`` is not such a tensor.
    """

    known: Tensor

    def __init__(self, denoiser: BaseDenoiser, known: Tensor) -> None:
        super().__init__()
        if known.dtype != torch.bool or known.dim() != 3 or known.shape[0] != 1:
            raise ValueError(
                f"known must be a bool tensor [1, H, D], got {known.dtype} {list(known.shape)}"
            )
        self.denoiser = denoiser
        self.process = denoiser.process
        self.register_buffer("known", known, persistent=False)

    def check_t(self, t: Tensor) -> None:
        self.denoiser.check_t(t)

    def forward(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Denoised:
        given = _pin_cond(cond)
        return self._filled(self.denoiser(self._pinned(x_t, given), t, given.cond), given)

    def on_grid(self, t: Tensor) -> GridDenoise:
        return _PinnedOnGrid(self, t)

    def _pinned(self, x_t: Tensor, given: PinCond) -> Tensor:
        return torch.where(self.known, given.values.to(x_t), x_t)

    def _filled(self, out: Denoised, given: PinCond) -> Denoised:
        return Denoised(torch.where(self.known, given.values.to(out.x0_hat), out.x0_hat), out.aux)


class _PinnedOnGrid:
    """A pinned denoiser at the levels of a grid; precomputed modulations pass through."""

    def __init__(self, pinned: Pinned, t: Tensor) -> None:
        self._pinned, self._inner = pinned, pinned.denoiser.on_grid(t)

    def modulations(self, x: Tensor, cond: Any) -> Sequence[Tensor] | None:
        inner = getattr(self._inner, "modulations", None)
        films: Sequence[Tensor] | None = None if inner is None else inner(x, _pin_cond(cond).cond)
        return films

    def __call__(self, row: int, x: Tensor, cond: Any, film: Tensor | None = None) -> Denoised:
        given = _pin_cond(cond)
        extra = () if film is None else (film,)
        out = self._inner(row, self._pinned._pinned(x, given), given.cond, *extra)
        return self._pinned._filled(out, given)


def _pin_cond(cond: Any) -> PinCond:
    if not isinstance(cond, PinCond):
        raise ValueError(
            "a pinned denoiser needs cond=PinCond(cond, values [B, H, D]); got "
            f"{type(cond).__name__}"
        )
    return cond
