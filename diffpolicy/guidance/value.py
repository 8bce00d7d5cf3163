"""Guidance of plans towards a high value, by the gradient of a value of noisy plans."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffpolicy.core.denoiser import BaseDenoiser, Denoised, GridDenoise
from diffpolicy.core.noise import GaussianProcess

Value = Callable[[Tensor, Tensor, Any], Tensor]


class ValueGuidance(BaseDenoiser):
    """``x0_hat + scale sigma^2 / alpha grad J(x_t, t)``: guidance by the gradient of a value.

    This is classifier guidance (Dhariwal & Nichol 2021) as a shift of the clean estimate. With
    ``J(x_t, t) = log E[exp(J(x0)) | x_t]`` and ``scale = 1`` it is the exact denoiser of
    ``p(x0) exp(J(x0))``, by Tweedie's formula. Diffuser (Janner et al. 2022, eq. 3) uses a
    regression of the return on noisy plans for J; its shift of the mean of a DDPM step by
    ``scale Sigma grad J`` is this shift of the clean estimate, but with the noise scales of the
    level gone to in place of the one left.

    Where ``alpha`` is below ``ALPHA_MIN`` (flow matching ends at 0), shift and value are those of
    the level where it is that, because they are 0 times infinity at the end.

    Inside a :class:`~diffpolicy.guidance.pinned.Pinned` denoiser the value sees the known entries
    clean, as the network does, and cannot move them.

    Args:
        denoiser: any denoiser.
        value: ``(x_t [B, H, D], t, cond) -> [B]``, with levels of the library's clock
            (:func:`head_value` makes one of a network) and the condition of ``denoiser``.
        scale: guidance strength; 0 is the denoiser alone.
        clip: clamp the guided estimate to [-1, 1].

    Raises:
        ValueError: when called under ``torch.inference_mode()``, which cannot differentiate.
    """

    ALPHA_MIN = 1e-3

    def __init__(
        self, denoiser: BaseDenoiser, value: Value, scale: float, *, clip: bool = False
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.process = denoiser.process
        self.value = value
        self.scale = float(scale)
        self.clip = clip
        end = torch.ones((), dtype=torch.float64)
        if self.process.alpha(end) < self.ALPHA_MIN:
            end = self.process.t_from_log_snr(torch.full_like(end, 2 * math.log(self.ALPHA_MIN)))
        self.t_max = float(self.process.snap(end))

    def check_t(self, t: Tensor) -> None:
        self.denoiser.check_t(t)

    def gain(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The level that the value is asked at, and ``scale sigma^2 / alpha`` there."""
        t = t.clamp(max=self.t_max)
        return t, self.scale * self.process.sigma(t).square() / self.process.alpha(t)

    def forward(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Denoised:
        at, gain = self.gain(t)
        return self.moved(self.denoiser(x_t, t, cond), x_t, at.to(x_t), gain, cond)

    def on_grid(self, t: Tensor) -> GridDenoise:
        return _ValueOnGrid(self, t)

    def moved(self, out: Denoised, x_t: Tensor, t: Tensor, gain: Tensor, cond: Any) -> Denoised:
        """The guided answer, where ``out`` is the denoiser's at ``x_t``."""
        if self.scale == 0:
            x0_hat = out.x0_hat
        else:
            slope = value_gradient(self.value, x_t, t, cond)
            x0_hat = torch.addcmul(out.x0_hat, gain.to(x_t), slope)
        return Denoised(x0_hat.clamp(-1, 1) if self.clip else x0_hat, out.aux)


def value_gradient(value: Value, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
    """The gradient of ``value`` at ``x_t`` for every row, ``[B, H, D]``, in any gradient mode.

    It carries a graph exactly if gradients are enabled.

    Raises:
        ValueError: in inference mode.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "value guidance differentiates the value: call it under torch.no_grad(), not "
            "torch.inference_mode()"
        )
    recording = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x_t if recording and x_t.requires_grad else x_t.detach().requires_grad_()
        (slope,) = torch.autograd.grad(value(x, t, cond).sum(), x, create_graph=recording)
    return slope


def head_value(head: Callable[..., Tensor], process: GaussianProcess) -> Value:
    """A value of noisy plans as :class:`ValueGuidance` wants it, made of a network.

    The network takes ``(x, network time, cond)``, as
    :class:`diffpolicy.networks.heads.TrajectoryValue` does. ``x`` is scaled by
    ``input_scale(t) / input_scale(0)``, which is 1 but for EDM, so that clean plans enter as they
    are.
    """

    def value(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        scale = process.input_scale(t) / process.input_scale(torch.zeros_like(t))
        return head((scale * x).to(x.dtype), process.network_time(t).to(x.dtype), cond)

    return value


class _ValueOnGrid:
    """A guided denoiser at the levels of a grid; precomputed modulations pass through."""

    def __init__(self, guidance: ValueGuidance, t: Tensor) -> None:
        self._guidance, self._inner = guidance, guidance.denoiser.on_grid(t)
        t, gain = guidance.gain(t)
        self._t, self._gain = guidance.placed(t).unbind(0), guidance.placed(gain).unbind(0)

    def modulations(self, x: Tensor, cond: Any) -> Sequence[Tensor] | None:
        inner = getattr(self._inner, "modulations", None)
        films: Sequence[Tensor] | None = None if inner is None else inner(x, cond)
        return films

    def __call__(self, row: int, x: Tensor, cond: Any, film: Tensor | None = None) -> Denoised:
        extra = () if film is None else (film,)
        out = self._inner(row, x, cond, *extra)
        return self._guidance.moved(out, x, self._t[row].to(x), self._gain[row], cond)
