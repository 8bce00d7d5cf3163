"""Gaussian noise processes by name: variance preserving, discrete betas, EDM, flow matching."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffpolicy.core.noise import GaussianProcess, device_of
from diffpolicy.settings import check_choice, check_known, check_range, settings_of


@dataclass(frozen=True)
class VPCosine(GaussianProcess):
    """Variance-preserving cosine schedule (Nichol & Dhariwal 2021, eq. 17), continuous in ``t``.

    ``t = 1`` is placed where ``alpha = alpha_min`` instead of 0, so that noise-prediction networks
    are defined there.
    """

    s: float = 0.008
    alpha_min: float = 1e-2
    type: ClassVar[str] = "vp_cosine"

    def __post_init__(self) -> None:
        check_range("[0, 1)", s=self.s)
        check_range("(0, 1)", alpha_min=self.alpha_min)

    @property
    def _start(self) -> float:
        return self.s / (1 + self.s) * math.pi / 2

    @property
    def _stop(self) -> float:
        return math.acos(self.alpha_min * math.cos(self._start))

    def _angle(self, t: Tensor) -> Tensor:
        return self._start + t * (self._stop - self._start)

    def alpha(self, t: Tensor) -> Tensor:
        return self._angle(t).cos() / math.cos(self._start)

    def sigma(self, t: Tensor) -> Tensor:
        # sin(a-b) sin(a+b) = sin^2 a - sin^2 b: no cancellation near t = 0.
        angle = self._angle(t)
        square = (t * (self._stop - self._start)).sin() * (angle + self._start).sin()
        return square.clamp_min(0).sqrt() / math.cos(self._start)

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        ratio = (-log_snr).exp()
        opposite = (ratio + math.sin(self._start) ** 2).sqrt()
        angle = torch.atan2(opposite, torch.full_like(ratio, math.cos(self._start)))
        return (angle - self._start) / (self._stop - self._start)


@dataclass(frozen=True)
class VPLinear(GaussianProcess):
    """Variance-preserving schedule with ``beta(t)`` linear (Song et al. 2021, eq. 32)."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    type: ClassVar[str] = "vp_linear"

    def __post_init__(self) -> None:
        check_range("(0, inf)", beta_min=self.beta_min)
        check_range(f"({self.beta_min}, inf)", beta_max=self.beta_max)

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * t.square() * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt()

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        loss = 0.5 * torch.nn.functional.softplus(-log_snr)  # -log alpha
        slope = self.beta_max - self.beta_min
        return 2 * loss / (0.5 * self.beta_min + (0.25 * self.beta_min**2 + slope * loss).sqrt())


@dataclass(frozen=True)
class DiscreteVP(GaussianProcess):
    """The variance-preserving process of given discrete ``betas`` (DDPM).

    Exact at its knots ``t = k / T``.

    Between knots ``beta`` is constant, so the process is continuous and foreign ``T``-step
    checkpoints load exactly: knot ``k`` is their step index ``k - 1``.
    """

    betas: tuple[float, ...]
    type: ClassVar[str] = "discrete_vp"
    _log_alphas: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(float(b) for b in self.betas))
        if not self.betas or not all(0 < b < 1 for b in self.betas):
            raise ValueError("there must be betas, and every beta must be in (0, 1)")
        steps = torch.log1p(-torch.tensor(self.betas, dtype=torch.float64))
        log_alphas = torch.cat([steps.new_zeros(1), 0.5 * steps.cumsum(0)])
        object.__setattr__(self, "_log_alphas", log_alphas)

    @classmethod
    def cosine(cls, num_steps: int, *, s: float = 0.008, beta_max: float = 0.999) -> DiscreteVP:
        """The ``squaredcos_cap_v2`` betas of the field's published policies."""
        share = [k / num_steps for k in range(num_steps + 1)]
        bar = [math.cos((k + s) / (1 + s) * math.pi / 2) ** 2 for k in share]
        return cls(tuple(min(1 - after / before, beta_max) for before, after in pairwise(bar)))

    @classmethod
    def linear(
        cls, num_steps: int, *, beta_start: float | None = None, beta_end: float | None = None
    ) -> DiscreteVP:
        """Betas spaced evenly between two ends, by default as much noise for any number of steps.

        Ho et al. (2020) have 1e-4 to 0.02 in 1000 steps. With fewer steps these would stop long
        before pure noise (at alpha = 0.60 after 100), so an end that is not given is theirs times
        ``1000 / num_steps``, as Nichol & Dhariwal (2021) have it, and below 1 for a handful of
        steps. Given ends are taken as they are.
        """
        low, high = (
            min(published * 1000 / num_steps, 0.999) if given is None else given
            for given, published in ((beta_start, 1e-4), (beta_end, 0.02))
        )
        return cls(tuple(torch.linspace(low, high, num_steps, dtype=torch.float64).tolist()))

    @property
    def first_level(self) -> float:  # type: ignore[override]
        return 1 / len(self.betas)

    def _log_alpha(self, t: Tensor) -> Tensor:
        table = self._log_alphas.to(t.device, t.dtype, non_blocking=True)
        position = t * len(self.betas)
        low = position.floor().clamp(0, len(self.betas) - 1).long()
        return torch.lerp(table[low], table[low + 1], position - low)

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self._log_alpha(t))).clamp_min(0).sqrt()

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        target = -0.5 * torch.nn.functional.softplus(-log_snr)
        table = self._log_alphas.to(log_snr.device, log_snr.dtype, non_blocking=True)
        low = (torch.searchsorted(-table, -target.contiguous()) - 1).clamp(0, len(self.betas) - 1)
        return (low + (target - table[low]) / (table[low + 1] - table[low])) / len(self.betas)

    def network_time(self, t: Tensor) -> Tensor:
        return (t * len(self.betas) - 1).clamp_min(0)

    def sample_t(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        count, device = len(self.betas), device_of(generator)
        return (1 + torch.randint(count, tuple(shape), generator=generator, device=device)) / count

    def snap(self, t: Tensor) -> Tensor:
        return (t * len(self.betas)).round() / len(self.betas)

    def config(self) -> dict[str, Any]:
        return {"type": self.type, "betas": list(self.betas)}


@dataclass(frozen=True)
class EDM(GaussianProcess):
    """Variance-exploding process of Karras et al. 2022 (eq. 5).

    ``alpha = 1`` and ``sigma^(1/rho)`` linear in ``t``.

    Below ``t = ramp`` sigma falls linearly to 0, so that ``t = 0`` is clean and the clock stays
    invertible.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    data_std: float = 0.5
    ramp: float = 1e-3
    log_sigma_mean: float = -1.2
    log_sigma_std: float = 1.2
    type: ClassVar[str] = "edm"

    def __post_init__(self) -> None:
        check_range("(0, inf)", sigma_min=self.sigma_min, rho=self.rho, data_std=self.data_std)
        check_range(f"({self.sigma_min}, inf)", sigma_max=self.sigma_max)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        fraction = ((t - self.ramp) / (1 - self.ramp)).clamp_min(0)
        sigma = (low + fraction * (high - low)) ** self.rho
        return torch.where(t < self.ramp, self.sigma_min / self.ramp * t, sigma)

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        sigma = (-0.5 * log_snr).exp()
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        fraction = (sigma.clamp_min(self.sigma_min) ** (1 / self.rho) - low) / (high - low)
        on_ramp, t = sigma * self.ramp / self.sigma_min, self.ramp + fraction * (1 - self.ramp)
        return torch.where(sigma < self.sigma_min, on_ramp, t)

    def network_time(self, t: Tensor) -> Tensor:
        return self.sigma(t).clamp_min(1e-2 * self.sigma_min).log() / 4

    def input_scale(self, t: Tensor) -> Tensor:
        return (self.sigma(t).square() + self.data_std**2).rsqrt()

    def sample_t(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        normal = torch.randn(*shape, generator=generator, device=device_of(generator))
        log_sigma = self.log_sigma_mean + self.log_sigma_std * normal
        return self.t_from_log_snr(-2 * log_sigma).clamp(max=1.0)


@dataclass(frozen=True)
class FlowMatching(GaussianProcess):
    """Straight path ``alpha = 1 - t``, ``sigma = t`` (Lipman et al. 2023; rectified flow)."""

    type: ClassVar[str] = "flow"

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t.clone()

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-0.5 * log_snr)

    def ode_scale(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)  # alpha + sigma: keeps t = 1, where alpha = 0, regular


PROCESSES: dict[str, type[GaussianProcess]] = {
    p.type: p for p in (VPCosine, VPLinear, DiscreteVP, EDM, FlowMatching)
}
_DISCRETE_NAMES: dict[str, Callable[..., DiscreteVP]] = {
    "ddpm_cosine": DiscreteVP.cosine,
    "ddpm_linear": DiscreteVP.linear,
}


def make_process(config: Mapping[str, Any] | str) -> GaussianProcess:
    """Build a process from ``{"type": name, **parameters}`` or from its name alone.

    ``ddpm_cosine`` and ``ddpm_linear`` are :class:`DiscreteVP` with ``num_steps`` (100 unless
    given) standard betas; those of ``ddpm_linear`` grow with fewer steps, see
    :meth:`DiscreteVP.linear`.

    Raises:
        ValueError: unknown name or parameter, with the valid ones.
    """
    values: dict[str, Any] = {"type": config} if isinstance(config, str) else dict(config)
    name = values.pop("type", None)
    if name in _DISCRETE_NAMES:
        parameters = inspect.signature(_DISCRETE_NAMES[name]).parameters
        check_known(values, parameters, f"noise process {name!r}")
        return _DISCRETE_NAMES[name](values.pop("num_steps", 100), **values)
    check_choice("noise process", name, sorted([*PROCESSES, *_DISCRETE_NAMES]))
    return settings_of(PROCESSES[name], values, f"noise process {name!r}")


def explicit_process(config: Mapping[str, Any] | str) -> dict[str, Any]:
    """``config`` with the betas that it leaves to :meth:`DiscreteVP.linear`, as files keep them."""
    values: dict[str, Any] = {"type": config} if isinstance(config, str) else dict(config)
    if values.get("type") == "ddpm_linear" and {"beta_start", "beta_end"} - set(values):
        process = make_process(values)
        assert isinstance(process, DiscreteVP)
        values = {"beta_start": process.betas[0], "beta_end": process.betas[-1], **values}
    return values
