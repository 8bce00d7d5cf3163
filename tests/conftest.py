"""Exact problems: Gaussian mixtures and joint Gaussian plans, whose denoisers are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from diffpolicy.core import AnalyticDenoiser, GaussianProcess
from diffpolicy.rollout.video import choose_gl_backend


def pytest_configure(config: pytest.Config) -> None:
    """Before anything imports mujoco: how it draws here, if at all."""
    choose_gl_backend()


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


@dataclass(frozen=True)
class JointGaussian:
    """Plans ``[B, H, D]`` whose flattened entries are ``N(mean [N], cov [N, N])``, N = H D."""

    mean: Tensor
    cov: Tensor

    def posterior(self, process: GaussianProcess, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``[B, N]`` and covariance of the clean entries given noisy ones ``[B, N]``."""
        alpha, sigma = process.alpha(t).flatten()[0], process.sigma(t).flatten()[0]
        noisy = alpha**2 * self.cov + sigma**2 * torch.eye(len(self.cov), dtype=self.cov.dtype)
        gain = torch.linalg.solve(noisy, alpha * self.cov).T
        return self.mean + (x - alpha * self.mean) @ gain.T, self.cov - alpha * gain @ self.cov

    def given(self, known: Tensor, values: Tensor) -> JointGaussian:
        """The law of the entries that are not ``known`` (bool ``[N]``), one ``values [N]``."""
        free = ~known
        gain = torch.linalg.solve(self.cov[known][:, known], self.cov[known][:, free]).T
        mean = self.mean[free] + gain @ (values[known] - self.mean[known])
        return JointGaussian(mean, self.cov[free][:, free] - gain @ self.cov[known][:, free])

    def denoiser(self, process: GaussianProcess, known: Tensor | None = None) -> AnalyticDenoiser:
        """Exact for plans whose ``known`` entries (bool ``[1, H, D]``) are clean."""

        def x0_hat(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
            if known is None:
                return self.posterior(process, x.flatten(1), t)[0].view_as(x)
            out, mask = x.flatten(1).clone(), known.flatten()
            for row in out:  # each row has its own values
                law = self.given(mask, row)
                row[~mask] = law.posterior(process, row[None, ~mask], t)[0][0]
            return out.view_as(x)

        return AnalyticDenoiser(process, x0_hat)


@pytest.fixture
def trajectories() -> JointGaussian:
    """Plans of 4 positions with 2 observations and 1 action, all of them correlated."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, dtype=torch.float64, generator=generator) / 12**0.5
    mean = 0.5 * torch.randn(12, dtype=torch.float64, generator=generator)
    return JointGaussian(mean, root @ root.T + 0.05 * torch.eye(12, dtype=torch.float64))
