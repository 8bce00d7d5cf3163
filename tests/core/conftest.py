"""Exact problems: Gaussian mixtures whose denoiser and probability-flow ODE are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from diffpolicy.core import AnalyticDenoiser, GaussianProcess


@dataclass(frozen=True)
class Mixture:
    """``x0 ~ sum_k w_k N(mu_k, diag std_k^2)`` over the last dimension; all ``[K.

    D]`` but ``weights`` ``[K]``.
    """

    weights: Tensor
    means: Tensor
    stds: Tensor

    def x0_hat(self, process: GaussianProcess, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = process.alpha(t).unsqueeze(-2), process.sigma(t).unsqueeze(-2)
        var = alpha**2 * self.stds**2 + sigma**2  # [..., K, D]
        residual = x.unsqueeze(-2) - alpha * self.means
        log_r = self.weights.log() - 0.5 * (residual**2 / var + var.log()).sum(-1)
        r = log_r.softmax(-1).unsqueeze(-1)
        return (r * (self.means + alpha * self.stds**2 / var * residual)).sum(-2)

    def denoiser(self, process: GaussianProcess) -> AnalyticDenoiser:
        return AnalyticDenoiser(process, lambda x, t, cond: self.x0_hat(process, x, t))

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        k = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        z = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[k] + self.stds[k] * z


@pytest.fixture
def mixture() -> Mixture:
    """Three modes in two dimensions."""
    as64 = lambda v: torch.tensor(v, dtype=torch.float64)  # noqa: E731
    return Mixture(
        as64([0.5, 0.3, 0.2]),
        as64([[-0.7, 0.4], [0.6, 0.5], [0.1, -0.8]]),
        as64([[0.15, 0.25], [0.2, 0.1], [0.3, 0.2]]),
    )


@pytest.fixture
def gaussian() -> Callable[[float, float], Mixture]:
    """``N(mean, std^2)`` in one dimension."""

    def make(mean: float, std: float) -> Mixture:
        one = torch.ones(1, dtype=torch.float64)
        return Mixture(one, mean * one[None], std * one[None])

    return make
