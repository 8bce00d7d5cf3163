"""Noise processes: how a clean action plan or sequence becomes noise as `t` goes from 0 to 1.

All share one clock: ``t = 0`` is clean data, ``t = 1`` is the prior. The Gaussian ones are ``x_t =
alpha(t) x0 + sigma(t) noise``; those that mask tokens are in :mod:`diffpolicy.core.masking`.
Nothing else in the library knows a schedule; solvers and losses ask the process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

TIME_SCALE = 1000.0  # sinusoidal embeddings were designed for integer steps 0..999


class NoiseProcess:
    """What starts, denoisers and losses ask of a process, whatever its noise is."""

    type: ClassVar[str]
    first_level: float = 0.0  # below it there is no level that a network is trained on

    def alpha(self, t: Tensor) -> Tensor:
        """Signal scale, 1 at ``t = 0`` (of masking: the fraction of tokens that are left)."""
        raise TypeError(f"{type(self).__name__} must define alpha")

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """``x_t`` for given clean ``x0`` and a draw of :meth:`draw_noise` of the same shape."""
        raise TypeError(f"{type(self).__name__} must define add_noise")

    def draw_noise(
        self, shape: Sequence[int], generator: torch.Generator | None, like: Tensor
    ) -> Tensor:
        """The noise that :meth:`add_noise` and the sampling loop take, as ``like`` in type."""
        raise TypeError(f"{type(self).__name__} must define draw_noise")

    def prior(self, noise: Tensor) -> Tensor:
        """A state at ``t = 1`` made of a draw of :meth:`draw_noise`."""
        raise TypeError(f"{type(self).__name__} must define prior")

    def restart(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """A guess ``x0`` noised to host levels ``t``; at ``t = 1`` it is the prior, exactly."""
        raise TypeError(f"{type(self).__name__} must define restart")

    def network_time(self, t: Tensor) -> Tensor:
        """The number a network embeds for level ``t``."""
        return t * TIME_SCALE

    def sample_t(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """Levels to train on: stratified uniform in (0, 1], so that a batch covers the clock."""
        return stratified(shape, generator)

    def snap(self, t: Tensor) -> Tensor:
        """Nearest level that a network is trained on, or 0 (the identity unless discrete)."""
        return t

    def config(self) -> dict[str, Any]:
        """Plain values from which :func:`make_process` or ``make_masking`` rebuilds the process."""
        return {"type": self.type, **vars(self)}


class GaussianProcess(NoiseProcess):
    """A schedule ``(alpha, sigma)`` on the clock ``t`` in [0, 1].

    All methods take and return tensors of any shape, elementwise, in the dtype given. They are
    exact in float64, which is what :mod:`diffpolicy.core.solvers` computes its coefficients in.
    """

    def sigma(self, t: Tensor) -> Tensor:
        """Noise scale, 0 at ``t = 0``."""
        raise TypeError(f"{type(self).__name__} must define sigma")

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        """Inverse of :meth:`log_snr`, analytic for every process."""
        raise TypeError(f"{type(self).__name__} must define t_from_log_snr")

    def log_snr(self, t: Tensor) -> Tensor:
        """``log(alpha^2 / sigma^2)``; ``+inf`` at ``t = 0``."""
        return 2.0 * (self.alpha(t).log() - self.sigma(t).log())

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """``x_t`` for given clean ``x0`` and standard normal ``noise`` of the same shape."""
        return self.alpha(t) * x0 + self.sigma(t) * noise

    def draw_noise(
        self, shape: Sequence[int], generator: torch.Generator | None, like: Tensor
    ) -> Tensor:
        """Standard normal."""
        return torch.randn(tuple(shape), generator=generator, dtype=like.dtype, device=like.device)

    def prior(self, noise: Tensor) -> Tensor:
        one = torch.ones((1,) * noise.dim(), dtype=torch.float64)
        return self.sigma(one).to(noise.device, noise.dtype, non_blocking=True) * noise

    def restart(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        alpha, sigma = self.noising_scales(t, x0)
        return alpha * x0 + sigma * noise

    def noising_scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of guess and noise in a start at host levels ``t``.

        At ``t = 1`` the guess has no weight even where the process leaves it a trace (discrete
        schedules do): a start at 1 is the prior's, bit for bit.
        """
        host = torch.where(t >= 1, torch.zeros_like(t), self.alpha(t)), self.sigma(t)
        alpha, sigma = (v.to(like.device, like.dtype, non_blocking=True) for v in host)
        return alpha, sigma

    def input_scale(self, t: Tensor) -> Tensor:
        """Factor that brings ``x_t`` to about unit variance before it enters a network."""
        return torch.ones_like(t)

    def ode_scale(self, t: Tensor) -> Tensor:
        """Scale ``c`` of the coordinates ``(x / c, sigma / c)`` in which Heun's rule is applied."""
        return self.alpha(t)


class AtLevel(NoiseProcess):
    """A Gaussian process at one level, its two scales on the device already.

    Loops that begin at the same level every time make their starts with it: nothing travels from
    the host, so a CUDA graph can hold the start as well.

    Args:
        process: the noise process.
        t: host level(s) of the starts, as in :class:`diffpolicy.core.starts.Start`.
        like: a state, for device and dtype.
    """

    def __init__(self, process: GaussianProcess, t: Tensor, like: Tensor) -> None:
        self._alpha, self._sigma = process.noising_scales(t, like)

    @property
    def device(self) -> torch.device:
        """Where the scales are."""
        return self._sigma.device

    def prior(self, noise: Tensor) -> Tensor:
        return self._sigma * noise

    def restart(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return torch.addcmul(self._sigma * noise, self._alpha, x0)


def stratified(shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """Uniform in (0, 1], one per stratum of the first dimension, in random order."""
    count, device = shape[0], device_of(generator)
    strata = torch.arange(count, device=device).view(-1, *[1] * (len(shape) - 1))
    rows = (strata + torch.rand(*shape, generator=generator, device=device)) / count
    below = rows.clamp(max=1 - 2**-24)  # the sum rounds to 1 at times, and losses divide by t
    return 1.0 - below[torch.randperm(count, generator=generator, device=device)]


def device_of(generator: torch.Generator | None) -> torch.device:
    """Where a generator draws."""
    return torch.device("cpu") if generator is None else generator.device
