"""Convergence orders, one-step exactness, Gaussian moments.

And equality between processes and solvers.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffpolicy.core import (
    DDIM,
    DEIS,
    EDM,
    AnalyticDenoiser,
    DiscreteVP,
    DPMSolverPP,
    FlowMatching,
    Heun,
    Start,
    UniPC,
    VPCosine,
    VPLinear,
    levels,
    make_solver,
    prior_start,
    sample,
)

LAMBDA_RANGE = (-4.2, 2.5)


def solve(mixture, process, solver, num_steps, x):
    """From ``lambda = -4.2`` (in flow-invariant coordinates ``x / alpha``) to 2.5."""
    ends = process.t_from_log_snr(2 * torch.tensor(LAMBDA_RANGE, dtype=torch.float64))
    start = Start(x * process.alpha(ends[0]), ends[0].view(1, 1, 1))
    grid = levels(start, num_steps, end=float(ends[1]), spacing="log_snr", process=process)
    return sample(mixture.denoiser(process), solver, start, grid) / process.alpha(ends[1])


_REFERENCE: list[torch.Tensor] = []


def reference(mixture, process, x):
    """The fine solution that every order is measured against, computed once."""
    if not _REFERENCE:
        _REFERENCE.append(solve(mixture, process, UniPC(order=3, lower_order_final=False), 1024, x))
    return _REFERENCE[0]


@pytest.fixture
def starts():
    generator = torch.Generator().manual_seed(0)
    return math.exp(4.2) * torch.randn(64, 1, 2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (DDIM(), 1),
        (make_solver("euler"), 1),
        (Heun(), 2),
        (DPMSolverPP(order=1), 1),
        (DPMSolverPP(order=2), 2),
        (DPMSolverPP(order=2, midpoint=False), 2),
        (DPMSolverPP(order=3, lower_order_final=False), 3),
        (DPMSolverPP(order=3, damped=True, lower_order_final=False), 2),
        (DEIS(order=1), 1),
        (DEIS(order=2), 2),
        (DEIS(order=3), 3),
        (UniPC(order=1, corrector=False), 1),
        (UniPC(order=1), 2),
        (UniPC(order=2, corrector=False, lower_order_final=False), 2),
        (UniPC(order=2, lower_order_final=False), 3),
        (UniPC(order=3, corrector=False, lower_order_final=False), 3),
    ],
    ids=lambda v: (
        str(v).replace("lower_order_final=", "final=") if not isinstance(v, int) else str(v)
    ),
)
def test_convergence_order(mixture, starts, solver, order):
    process = VPLinear()
    exact = reference(mixture, process, starts)
    counts = (32, 64, 128, 256)
    errors = [
        (solve(mixture, process, solver, n, starts) - exact).abs().mean().item() for n in counts
    ]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.3, (slope, errors)


def test_processes_agree_on_the_same_problem(mixture, starts):
    """The ODE depends on lambda only: VP, EDM and flow paths give the same sample."""
    reference = solve(mixture, VPCosine(), DPMSolverPP(order=2), 16, starts)
    for process in (VPLinear(), EDM(), FlowMatching(), DiscreteVP.cosine(100)):
        torch.testing.assert_close(
            solve(mixture, process, DPMSolverPP(order=2), 16, starts), reference, rtol=0, atol=1e-9
        )


ALL_SOLVERS = [
    make_solver(n)
    for n in (
        "ddpm",
        "ddim",
        "heun",
        "dpmpp_2m",
        "dpmpp_2m_sde",
        "dpmpp_3m",
        "deis",
        "ipndm",
        "unipc",
    )
]


ALL_PROCESSES = [VPCosine(), VPLinear(), DiscreteVP.cosine(100), EDM(), FlowMatching()]
PAIRS = [
    pytest.param(solver, process, id=f"{solver.name}-{solver.stochastic}-{process.type}")
    for solver in ALL_SOLVERS
    for process in ALL_PROCESSES
    if not (solver.name == "deis" and process.type == "flow")  # refused, see below
]


@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize(("solver", "process"), PAIRS)
def test_point_mass_is_exact_in_any_number_of_steps(solver, process, num_steps):
    target = torch.tensor([0.3, -0.9], dtype=torch.float64)
    denoise = AnalyticDenoiser(process, lambda x, t, cond: target.expand_as(x))
    start = prior_start(process, torch.randn(4, 3, 2, dtype=torch.float64))
    out = sample(denoise, solver, start, levels(start, num_steps))
    torch.testing.assert_close(out, target.expand_as(out), rtol=0, atol=2e-8)


def test_gaussian_ode_map_is_exact(gaussian):
    """``x_b = a_b m + sqrt(a_b^2 s^2 + s_b^2) / sqrt(a_a^2 s^2 + s_a^2) (x_a - a_a m)``."""
    mean, std, process = 0.5, 0.3, VPCosine()
    start = prior_start(process, torch.randn(256, 1, 1, dtype=torch.float64))
    out = sample(
        gaussian(mean, std).denoiser(process),
        UniPC(order=3),
        start,
        levels(start, 200, spacing="log_snr", process=process, t_min=1e-4),
    )
    alpha, sigma = process.alpha(start.t), process.sigma(start.t)
    exact = mean + std / (alpha**2 * std**2 + sigma**2).sqrt() * (start.x - alpha * mean)
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_is_the_textbook_posterior(variance):
    """``mean = c0 x0_hat + c1 x`` and both variances (Ho et al. 2020, eqs. 6 and 7), respaced."""
    process = DiscreteVP.cosine(100)
    start = prior_start(process, torch.zeros(1, 1, 1, dtype=torch.float64))
    grid = levels(start, 10, process=process)
    for t, s, row in zip(
        grid[:-1], grid[1:], DDIM(eta=1.0, variance=variance).rows(process, grid), strict=True
    ):
        bar_t, bar_s = process.alpha(t).item() ** 2, process.alpha(s).item() ** 2
        beta = 1 - bar_t / bar_s
        assert row.b[0].item() == pytest.approx(math.sqrt(bar_s) * beta / (1 - bar_t), rel=1e-9)
        assert row.a.item() == pytest.approx(
            math.sqrt(1 - beta) * (1 - bar_s) / (1 - bar_t), rel=1e-9, abs=1e-12
        )
        var = beta * (1 - bar_s) / (1 - bar_t) if variance == "small" else beta * (s.item() > 0)
        assert row.g.item() ** 2 == pytest.approx(var, rel=1e-9, abs=1e-15)


def test_sde_weak_order_on_gaussian_variance(gaussian):
    """Error of the variance of SDE-DPM-Solver++ falls with order 1 and 2."""
    std, process = 0.5, VPLinear()
    ends = process.t_from_log_snr(2 * torch.tensor(LAMBDA_RANGE, dtype=torch.float64))
    truth = process.alpha(ends) ** 2 * std**2 + process.sigma(ends) ** 2

    def error(order: int, num_steps: int) -> float:
        start = Start(torch.zeros(1, 1, 1, dtype=torch.float64), ends[0].view(1, 1, 1))
        grid = levels(start, num_steps, end=float(ends[1]), spacing="log_snr", process=process)
        rows = DPMSolverPP(order=order, eta=1.0, midpoint=False).rows(process, grid)
        # State (x, m_prev): second moments of a linear recursion.
        cov = torch.zeros(2, 2, dtype=torch.float64)
        cov[0, 0] = truth[0]
        for row in rows:
            alpha, sigma = process.alpha(row.t).item(), process.sigma(row.t).item()
            k = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
            b = [v.item() for v in row.b] + [0.0] * (2 - len(row.b))
            step = torch.tensor([[row.a.item() + b[0] * k, b[1]], [k, 0.0]], dtype=torch.float64)
            cov = step @ cov @ step.T
            cov[0, 0] += row.g.item() ** 2
        return abs(cov[0, 0].item() - truth[1].item())

    for order in (1, 2):
        counts = (32, 64, 128)
        slope = -np.polyfit(np.log(counts), np.log([error(order, n) for n in counts]), 1)[0]
        assert slope == pytest.approx(order, abs=0.25)


def test_equivalences():
    process = VPCosine()
    start = prior_start(process, torch.zeros(1, 1, 1, dtype=torch.float64))
    grid = levels(start, 7)

    def table(solver):
        return [[v.flatten() for v in (row.a, *row.b)] for row in solver.rows(process, grid)]

    for left, right in [
        (DDIM(), DPMSolverPP(order=1)),
        (DDIM(), UniPC(order=1, corrector=False)),
        (
            DPMSolverPP(order=3, lower_order_final=False),
            UniPC(order=3, corrector=False, lower_order_final=False),
        ),
    ]:
        for a, b in zip(table(left), table(right), strict=True):
            for x, y in zip(a, b, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-9)


def test_sampling_recovers_mixture_moments(mixture):
    generator = torch.Generator().manual_seed(1)
    process = VPCosine()
    start = prior_start(
        process, torch.randn(20_000, 1, 2, generator=generator, dtype=torch.float64)
    )
    out = sample(
        mixture.denoiser(process),
        UniPC(),
        start,
        levels(start, 40, spacing="log_snr", process=process),
    )
    data = mixture.draw(200_000, generator)
    torch.testing.assert_close(out[:, 0].mean(0), data.mean(0), rtol=0, atol=0.02)
    torch.testing.assert_close(torch.cov(out[:, 0].T), torch.cov(data.T), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ddmi", {}, "unknown solver 'ddmi'; expected one of"),
        ("ddim", {"eat": 1}, "eat"),
        ("ddim", {"eta": 2.0}, r"eta must be in \[0, 1\]"),
        ("unipc", {"order": 4}, "unknown order 4; expected one of 1, 2, 3"),
        ("dpmpp_3m", {"eta": 1.0}, "orders 1 and 2"),
        ("deis", {"mode": "ab"}, "unknown mode"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_solver(name, **options)


def test_deis_refuses_vanishing_alpha():
    process = FlowMatching()
    start = prior_start(process, torch.zeros(1, 1, 1))
    with pytest.raises(ValueError, match="alpha = 0 at the start"):
        DEIS().rows(process, levels(start, 4))
