"""Guidance of plans towards a high value, by the gradient of a value of noisy plans."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffpolicy.core.denoiser import BaseDenoiser, Denoised
from diffpolicy.core.noise import GaussianProcess
from diffpolicy.guidance.base import Run, Wrapper, differentiable

Value = Callable[[Tensor, Tensor, Any], Tensor]


class ValueGuidance(Wrapper):
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
        super().__init__(denoiser)
        self.value, self.scale, self.clip = value, float(scale), clip
        end = torch.ones((), dtype=torch.float64)
        if self.process.alpha(end) < self.ALPHA_MIN:
            end = self.process.t_from_log_snr(torch.full_like(end, 2 * math.log(self.ALPHA_MIN)))
        self.t_max = float(self.process.snap(end))

    def constants(self, t: Tensor) -> tuple[Tensor, ...]:
        """The level that the value is asked at, and ``scale sigma^2 / alpha`` there."""
        t = t.clamp(max=self.t_max)
        return t, self.scale * self.process.sigma(t).square() / self.process.alpha(t)

    def guide(self, run: Run, x_t: Tensor, cond: Any, *constants: Tensor) -> Denoised:
        out = run(x_t)
        x0_hat = out.x0_hat
        if self.scale != 0:
            t, gain = (constant.to(x_t) for constant in constants)
            x0_hat = torch.addcmul(x0_hat, gain, value_gradient(self.value, x_t, t, cond))
        return Denoised(x0_hat.clamp(-1, 1) if self.clip else x0_hat, out.aux)


def value_gradient(value: Value, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
    """The gradient of ``value`` at ``x_t`` for every row, ``[B, H, D]``, in any gradient mode.

    It carries a graph exactly if gradients are enabled.

    Raises:
        ValueError: in inference mode.
    """
    x, recording = differentiable(x_t, "the value"), torch.is_grad_enabled()
    with torch.enable_grad():
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
