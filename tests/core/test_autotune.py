"""Bespoke solvers contain those with a name; the search beats them on an exact mixture."""

from __future__ import annotations

import math

import pytest
import torch

from diffpolicy.core import (
    AnalyticDenoiser,
    DiscreteVP,
    FlowMatching,
    PriorSampler,
    Sampler,
    Teleport,
    VPCosine,
    VPLinear,
    levels,
    make_solver,
    prior_start,
    sample,
)
from diffpolicy.core.autotune import Space, distances, named_samplers, search
from diffpolicy.core.bespoke import Bespoke, bespoke_weights

F64 = torch.float64


def starts(process, count, seed, dim=2):
    generator = torch.Generator().manual_seed(seed)
    return prior_start(process, torch.randn(count, 1, dim, generator=generator, dtype=F64))


@pytest.mark.parametrize("process", [VPCosine(), DiscreteVP.cosine(100), FlowMatching()])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ddim", {}),
        ("dpmpp_2m", {}),
        ("dpmpp_2m", {"midpoint": False}),
        ("dpmpp_3m", {}),
        ("unipc", {}),
        ("unipc", {"order": 3, "variant": "bh1"}),
        ("deis", {}),
        ("ipndm", {"order": 4}),
    ],
)
def test_solvers_with_a_name_are_bespoke_weights(mixture, process, name, options):
    """DDIM, DPM-Solver++, UniPC with its corrector, DEIS and iPNDM, on every kind of grid."""
    if name in ("deis", "ipndm") and process.type == "flow":
        return  # refused there, where alpha is 0
    solver, start = make_solver(name, **options), starts(process, 16, 0)
    denoiser = mixture.denoiser(process)
    for spacing in ("t", "log_snr", "karras"):
        for count in (1, 2, 6):
            grid = levels(start, count, spacing=spacing, process=process)
            same = Bespoke(bespoke_weights(solver, process, grid))
            expected = sample(denoiser, solver, start, grid)
            torch.testing.assert_close(
                sample(denoiser, same, start, grid), expected, rtol=0, atol=1e-9
            )


def test_the_second_order_s_weight_is_the_one_documented():
    process = VPLinear()
    grid = Sampler(num_steps=3, spacing="log_snr").grid(process)
    half = 0.5 * process.log_snr(grid.flatten())
    found = bespoke_weights(make_solver("dpmpp_2m"), process, grid)
    assert found[0] == found[2] == ()  # the last step is of order one
    assert found[1][0] == pytest.approx(-float((half[2] - half[1]) / (2 * (half[1] - half[0]))))


def test_a_teleport_is_exact_for_gaussian_data():
    """``x_b = a_b m + sqrt(a_b^2 C + s_b^2) / sqrt(a_a^2 C + s_a^2) (x_a - a_a m)``, for nothing.

    To a level near 0 it is the whole sampling.
    """
    process = DiscreteVP.cosine(10)  # whose alpha is not quite 0 at t = 1
    mean = torch.tensor([[0.3, -0.5], [0.1, 0.7]], dtype=F64)
    variance = torch.tensor([[0.04, 0.3], [0.0, 1.2]], dtype=F64)

    def x0_hat(x, t, cond):
        alpha, sigma = process.alpha(t), process.sigma(t)
        total = alpha.square() * variance + sigma.square()
        return (sigma.square() * mean + alpha * variance * x) / total

    denoiser = AnalyticDenoiser(process, x0_hat)
    noise = torch.randn(8, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    alpha, sigma = (f(torch.ones(1, 1, 1, dtype=F64)) for f in (process.alpha, process.sigma))
    scale = (variance / (alpha.square() * variance + sigma.square())).sqrt()
    exact = mean + scale * (sigma * noise - alpha * mean)
    for t_start, solver, count, atol in ((1e-6, "ddim", 1, 1e-5), (0.6, "unipc", 200, 1e-4)):
        teleport = Teleport(t_start, *(tuple(map(tuple, v.tolist())) for v in (mean, variance)))
        sampler = PriorSampler(
            solver=solver, num_steps=count, spacing="log_snr", t_min=1e-7, teleport=teleport
        )
        out = sampler.draw(denoiser, sampler.start(process, noise))
        torch.testing.assert_close(out, exact, rtol=0, atol=atol)


def test_points_are_samplers(mixture):
    process = VPLinear()
    start, denoiser = starts(process, 8, 0), mixture.denoiser(process)
    space = Space(process, 4)
    for sampler in (
        PriorSampler(solver="unipc", num_steps=4, spacing="log_snr"),
        PriorSampler(solver="dpmpp_2m", num_steps=4, spacing="karras"),
    ):
        same = space.sampler(space.point(sampler))
        assert same is not None
        torch.testing.assert_close(
            same.draw(denoiser, start), sampler.draw(denoiser, start), rtol=0, atol=1e-9
        )
    point = space.point(PriorSampler(num_steps=4))
    point[0], point[1] = point[1].clone(), point[0].clone()
    assert space.sampler(point) is None  # levels that rise


@pytest.mark.parametrize("nfe", [1, 3])
def test_the_search_halves_the_distance_on_an_exact_mixture(mixture, nfe):
    """On other noise than it was searched with; with a teleport even where there is one step."""
    process = VPLinear()
    denoiser = mixture.denoiser(process)
    teacher = PriorSampler(solver="unipc", num_steps=100, spacing="log_snr")
    searched, other = (starts(process, 128, seed).x for seed in (1, 2))

    def plans(sampler, noise=searched):
        return sampler.draw(denoiser, sampler.start(process, noise))

    target, judged = plans(teacher), plans(teacher, other)
    named = named_samplers(nfe)
    named.sort(key=lambda sampler: distances(plans(sampler), target).mean().item())

    def away(sampler):
        return distances(plans(sampler, other), judged).mean().item()

    moments = tuple(tuple(map(tuple, v.tolist())) for v in (target.mean(0), target.var(0)))
    least = min(map(away, named))
    plain, teleported = (
        away(search(plans, target, Space(process, nfe, given), named[:1]))
        for given in (None, moments)
    )
    assert plain <= (1 if nfe == 1 else 0.5) * least + 1e-12  # one step leaves nothing to search
    assert teleported <= 0.7 * least


def test_named_samplers_take_the_evaluations_asked_for():
    for nfe in (1, 2, 5):
        found = named_samplers(nfe)
        assert all(s.make().nfe(s.num_steps) == nfe and not s.make().stochastic for s in found)
    assert "heun" in {sampler.solver for sampler in named_samplers(5)}
    assert "heun" not in {sampler.solver for sampler in named_samplers(4)}


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="step 0 of a bespoke solver has 0 earlier estimates"):
        Bespoke([[0.5], []])
    with pytest.raises(ValueError, match=r"weights is a list of numbers for each step"):
        Bespoke([0.5])
    with pytest.raises(ValueError, match="must not be below 0"):
        Teleport(0.5, ((0.0,),), ((-1.0,),))
    with pytest.raises(ValueError, match="mean and variance must both be"):
        Teleport(0.5, ((0.0,),), ((1.0, 1.0),))
    with pytest.raises(ValueError, match="one of 1 steps, its grid has 3"):
        Bespoke([[]]).rows(VPCosine(), Sampler(num_steps=3).grid(VPCosine()))
    with pytest.raises(ValueError, match="not a deterministic solver of one evaluation"):
        bespoke_weights(make_solver("ddpm"), VPCosine(), Sampler(num_steps=3).grid(VPCosine()))


def test_levels_by_hand_say_the_steps():
    process = VPCosine()
    sampler = Sampler(levels=(0.6, 0.1, 0.0))
    assert sampler.num_steps == 3
    assert sampler.grid(process).flatten().tolist() == [1.0, 0.6, 0.1, 0.0]
    assert len(sampler.grid(process, num_steps=1)) == 2  # another number: an even grid
    with pytest.raises(ValueError, match="strictly descending to 0"):
        Sampler(levels=(0.1, 0.6, 0.0))
    with pytest.raises(ValueError, match=r"they begin at 0\.6"):
        sampler.grid(process, 0.5)
    assert math.isclose(float(sampler.grid(process, 0.8)[0]), 0.8)
