"""The exact problem that estimators of reward gradients are tested on, against quadrature."""

from __future__ import annotations

import pytest
import torch
from tuning_tilted_mixture import (
    Mixture,
    MixtureDenoiser,
    TiltedProblem,
    lattice,
    one_dimensional,
    two_dimensional,
)

from diffpolicy.core import make_process

PROBLEMS = {"line": one_dimensional, "plane": two_dimensional}


@pytest.fixture(params=PROBLEMS)
def problem(request: pytest.FixtureRequest) -> TiltedProblem:
    return PROBLEMS[request.param]()


def test_the_tilted_law_is_the_normalised_product(problem):
    x, cell = lattice(problem.prior)
    tilted = (problem.prior.log_prob(x) + problem.reward(x[:, None]) / problem.kl_weight).exp()
    law, log_z = problem.tilt()
    total = tilted.sum() * cell
    torch.testing.assert_close(log_z, total.log(), rtol=0, atol=1e-10)
    torch.testing.assert_close(law.log_prob(x).exp(), tilted / total, rtol=0, atol=1e-10)
    density = law.log_prob(x).exp()
    mean = (density[:, None] * x).sum(0) * cell
    torch.testing.assert_close(law.mean(), mean, rtol=0, atol=1e-10)
    spread = (density[:, None, None] * (x - mean)[:, :, None] * (x - mean)[:, None]).sum(0) * cell
    torch.testing.assert_close(law.cov(), spread, rtol=0, atol=1e-10)


def test_reward_divergence_and_optimum_agree_with_quadrature(problem):
    law = problem.optimum
    x, cell = lattice(law)
    reward = (law.log_prob(x).exp() * problem.reward(x[:, None])).sum() * cell
    torch.testing.assert_close(problem.expected_reward(law), reward, rtol=0, atol=1e-10)
    torch.testing.assert_close(problem.best_kl, problem.kl(law), rtol=0, atol=1e-9)
    torch.testing.assert_close(problem.best, problem.objective(law), rtol=0, atol=1e-9)
    assert problem.progress(law) == pytest.approx(1, abs=1e-8)
    assert problem.progress(problem.prior) == pytest.approx(0, abs=1e-8)


def test_no_other_law_is_better(problem):
    best, law = problem.best, problem.optimum
    for factor in (0.9, 1.1):
        assert problem.objective(Mixture(law.weights, factor * law.means, law.covs)) < best
        assert problem.objective(Mixture(law.weights, law.means, factor * law.covs)) < best
        weights = torch.softmax(factor * law.weights.log(), 0)
        assert problem.objective(Mixture(weights, law.means, law.covs)) < best


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_large_weight_of_the_divergence_returns_the_prior(name):
    problem = PROBLEMS[name](kl_weight=1e6)
    for got, wanted in zip(
        vars(problem.optimum).values(), vars(problem.prior).values(), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_the_denoiser_is_the_posterior_mean(problem):
    """``x0_hat = (x + sigma^2 score) / alpha``, with the score of the noisy mixture (Tweedie)."""
    process, prior = make_process("vp_cosine"), problem.prior
    t = torch.tensor([0.2, 0.7, 1.0], dtype=torch.float64).view(-1, 1, 1)
    alpha, sigma = process.alpha(t), process.sigma(t)
    x = prior.draw(3, torch.Generator().manual_seed(0)).requires_grad_()
    scores = []
    for row, (a, s) in enumerate(zip(alpha.flatten(), sigma.flatten(), strict=True)):
        eye = torch.eye(prior.dim, dtype=torch.float64)
        noisy = Mixture(prior.weights, a * prior.means, a**2 * prior.covs + s**2 * eye)
        scores.append(torch.autograd.grad(noisy.log_prob(x[row]).sum(), x)[0][row])
    wanted = (x + sigma**2 * torch.stack(scores)) / alpha
    torch.testing.assert_close(prior.denoiser(process)(x, t).x0_hat, wanted)
    tunable = MixtureDenoiser(process, prior)
    torch.testing.assert_close(tunable(x, t).x0_hat, wanted)
    for got, given in zip(vars(tunable.frozen()).values(), vars(prior).values(), strict=True):
        torch.testing.assert_close(got, given)


def test_draws_follow_the_law(problem):
    x = problem.prior.draw(20_000, torch.Generator().manual_seed(1))[:, 0]
    torch.testing.assert_close(x.mean(0), problem.prior.mean(), rtol=0, atol=0.02)
    torch.testing.assert_close(
        x.T.cov().view_as(problem.prior.cov()), problem.prior.cov(), rtol=0, atol=0.02
    )
