"""An exact problem of reward tuning: a Gaussian mixture tilted by a quadratic reward.

Plans are ``[B, 1, N]``. With the prior ``p = sum_k w_k N(mu_k, S_k)``, the reward ``r(x) = -(x -
c)' A (x - c) / 2`` and ``M = A / kl_weight``, each component times ``exp(r / kl_weight)`` is again
a Gaussian,

    precision ``S_k^-1 + M``,  mean ``(S_k^-1 + M)^-1 (S_k^-1 mu_k + M c)``,
    mass ``w_k |1 + S_k M|^(-1/2) exp(-(mu_k - c)' M (1 + S_k M)^-1 (mu_k - c) / 2)``,

so the optimum of ``J(q) = E_q[r] - kl_weight KL(q || p)`` is the mixture of these, with ``J* =
kl_weight log Z``, ``Z`` the sum of the masses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffpolicy.core import AnalyticDenoiser, GaussianProcess
from diffpolicy.core.denoiser import BaseDenoiser, Denoised


@dataclass(frozen=True)
class Mixture:
    """``x0 ~ sum_k w_k N(mu_k, S_k)``: ``weights [K]``, ``means [K, N]``, ``covs [K, N, N]``."""

    weights: Tensor
    means: Tensor
    covs: Tensor

    @property
    def dim(self) -> int:
        return self.means.shape[1]

    def mean(self) -> Tensor:
        """``[N]``."""
        return self.weights @ self.means

    def cov(self) -> Tensor:
        """``[N, N]``."""
        away = self.means - self.mean()
        within = (self.weights[:, None, None] * self.covs).sum(0)
        return within + away.T @ (self.weights[:, None] * away)

    def log_prob(self, x: Tensor) -> Tensor:
        """Of ``x [B, N]``, ``[B]``."""
        _, log_joint = self._components(x, 1.0, self.covs)
        return log_joint.logsumexp(-1)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """``[count, 1, N]``."""
        k = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        z = torch.randn(count, self.dim, 1, generator=generator, dtype=self.means.dtype)
        return (self.means[k] + (torch.linalg.cholesky(self.covs)[k] @ z)[..., 0])[:, None]

    def x0_hat(self, process: GaussianProcess, x: Tensor, t: Tensor) -> Tensor:
        """``E[x0 | x_t = x]`` of plans ``x [B, 1, N]`` at levels ``t [1 or B, 1, 1]``."""
        alpha, sigma = process.alpha(t), process.sigma(t)
        scale = alpha.unsqueeze(-1)  # [B, 1, 1, 1]
        eye = torch.eye(self.dim, dtype=x.dtype)
        noisy = scale.square() * self.covs + sigma.unsqueeze(-1).square() * eye  # [B, K, N, N]
        solved, log_joint = self._components(x[:, 0], alpha[..., 0], noisy)
        posterior = self.means + scale[..., 0] * (self.covs @ solved.unsqueeze(-1))[..., 0]
        return (log_joint.softmax(-1).unsqueeze(-2) @ posterior).view_as(x)

    def denoiser(self, process: GaussianProcess) -> AnalyticDenoiser:
        return AnalyticDenoiser(process, lambda x, t, cond: self.x0_hat(process, x, t))

    def _components(self, x: Tensor, alpha: Tensor | float, covs: Tensor) -> tuple[Tensor, Tensor]:
        """``cov^-1 (x - alpha mu_k) [B, K, N]`` and ``log w_k N(x; alpha mu_k, cov_k) [B, K]``."""
        away = x[:, None] - (alpha[..., None] if isinstance(alpha, Tensor) else alpha) * self.means
        factor = torch.linalg.cholesky(covs)
        solved = torch.cholesky_solve(away.unsqueeze(-1), factor)[..., 0]
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        square = (away * solved).sum(-1) + log_det + self.dim * math.log(2 * math.pi)
        return solved, self.weights.log() - 0.5 * square


@dataclass(frozen=True)
class TiltedProblem:
    """The prior, the reward ``-(x - target)' curvature (x - target) / 2``, and the KL weight."""

    prior: Mixture
    target: Tensor  # [N]
    curvature: Tensor  # [N, N], symmetric, not negative
    kl_weight: float

    def reward(self, plan: Tensor, cond: Tensor | None = None) -> Tensor:
        """Of plans ``[B, 1, N]``, ``[B]``: the form of every reward of continuous chains."""
        away = plan[:, 0] - self.target
        return -0.5 * (away * (away @ self.curvature)).sum(-1)

    def expected_reward(self, law: Mixture) -> Tensor:
        """``E[r]`` under a mixture, exact."""
        away = law.means - self.target
        square = torch.einsum("kn,nm,km->k", away, self.curvature, away)
        return law.weights @ (-0.5 * (square + (law.covs * self.curvature).sum((1, 2))))

    def tilt(self) -> tuple[Mixture, Tensor]:
        """The optimum ``p* ~ p exp(r / kl_weight)`` and ``log Z``."""
        p, m = self.prior, self.curvature / self.kl_weight
        grown = torch.eye(p.dim, dtype=m.dtype) + p.covs @ m
        covs = torch.linalg.solve(grown, p.covs)
        means = torch.linalg.solve(grown, p.means + p.covs @ m @ self.target)
        away = p.means - self.target
        square = torch.einsum("kn,knm,km->k", away, m @ torch.linalg.inv(grown), away)
        log_mass = p.weights.log() - 0.5 * (square + torch.logdet(grown))
        return Mixture(log_mass.softmax(0), means, covs), log_mass.logsumexp(0)

    @property
    def optimum(self) -> Mixture:
        return self.tilt()[0]

    @property
    def best(self) -> Tensor:
        """``J* = kl_weight log Z``."""
        return self.kl_weight * self.tilt()[1]

    @property
    def best_kl(self) -> Tensor:
        """``KL(p* || p) = E*[r] / kl_weight - log Z``."""
        law, log_z = self.tilt()
        return self.expected_reward(law) / self.kl_weight - log_z

    @property
    def worst(self) -> Tensor:
        """``J`` of the prior, from where tuning starts: its expected reward."""
        return self.expected_reward(self.prior)

    def kl(self, law: Mixture) -> Tensor:
        """``KL(law || prior)`` by quadrature, in one or two dimensions."""
        x, cell = lattice(law)
        log_q = law.log_prob(x)
        return (log_q.exp() * (log_q - self.prior.log_prob(x))).sum() * cell

    def objective(self, law: Mixture) -> Tensor:
        """``J(law) = E[r] - kl_weight KL``."""
        return self.expected_reward(law) - self.kl_weight * self.kl(law)

    def progress(self, law: Mixture) -> float:
        """``(J - J_prior) / (J* - J_prior)``: 0 for the prior, 1 at the optimum."""
        return float((self.objective(law) - self.worst) / (self.best - self.worst))


class MixtureDenoiser(BaseDenoiser):
    """The exact denoiser of a mixture with learnable parameters: its family holds the optimum.

    Logits, means and the covariances' Cholesky factors (logarithms on the diagonal) start at
    those of ``law``, normally the prior. Whatever they are, the flow from pure noise ends in
    :attr:`law`, up to the error of the solver and what signal the process leaves at ``t = 1``.
    """

    def __init__(self, process: GaussianProcess, law: Mixture) -> None:
        super().__init__()
        self.process = process
        self.horizon, self.dim = 1, law.dim
        factor = torch.linalg.cholesky(law.covs)
        self.logits = nn.Parameter(law.weights.log())
        self.means = nn.Parameter(law.means.clone())
        self.log_diagonal = nn.Parameter(factor.diagonal(dim1=-2, dim2=-1).log())
        self.below = nn.Parameter(factor.tril(-1))

    @property
    def law(self) -> Mixture:
        factor = self.below.tril(-1) + torch.diag_embed(self.log_diagonal.exp())
        return Mixture(self.logits.softmax(0), self.means, factor @ factor.mT)

    def frozen(self) -> Mixture:
        """The law now, without a graph."""
        law = self.law
        return Mixture(*(v.detach().clone() for v in (law.weights, law.means, law.covs)))

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Denoised:
        return Denoised(self.law.x0_hat(self.process, x_t, t.to(x_t.dtype)))


def lattice(law: Mixture, reach: float = 9.0) -> tuple[Tensor, float]:
    """Points ``[P, N]`` that cover a mixture, N <= 2, and the volume of a cell.

    The trapezoidal rule converges geometrically for such densities: it is exact to rounding as long
    as a cell is half a component's standard deviation or less.
    """
    std = law.covs.diagonal(dim1=-2, dim2=-1).sqrt()
    low, high = (law.means - reach * std).amin(0), (law.means + reach * std).amax(0)
    count = {1: 2001, 2: 161}[law.dim]
    unit = torch.linspace(0, 1, count, dtype=low.dtype)
    corners = torch.cartesian_prod(*[unit] * law.dim).view(-1, law.dim)
    return low + corners * (high - low), float(((high - low) / (count - 1)).prod())


def _as64(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def one_dimensional(kl_weight: float = 0.5) -> TiltedProblem:
    """Two overlapping modes; the reward prefers the lighter one."""
    prior = Mixture(_as64([0.7, 0.3]), _as64([[-0.5], [0.5]]), _as64([[[0.12]], [[0.06]]]))
    return TiltedProblem(prior, _as64([0.9]), _as64([[1.5]]), kl_weight)


def two_dimensional(kl_weight: float = 0.5) -> TiltedProblem:
    """Three correlated modes in the plane, and a reward that is steeper one way than the other."""
    prior = Mixture(
        _as64([0.5, 0.3, 0.2]),
        _as64([[-0.7, 0.4], [0.6, 0.5], [0.1, -0.8]]),
        _as64(
            [
                [[0.06, 0.02], [0.02, 0.05]],
                [[0.04, -0.02], [-0.02, 0.08]],
                [[0.09, 0.0], [0.0, 0.04]],
            ]
        ),
    )
    return TiltedProblem(prior, _as64([0.7, -0.2]), _as64([[1.2, 0.3], [0.3, 0.8]]), kl_weight)
