"""Both ends of the clock, and grids that spend every evaluation."""

from __future__ import annotations

import pytest
import torch

from diffpolicy.core import (
    EDM,
    AnalyticDenoiser,
    Denoiser,
    DiscreteVP,
    FlowMatching,
    Start,
    VPCosine,
    VPLinear,
    levels,
    make_process,
    make_solver,
    prior_start,
    sample,
)
from diffpolicy.core.denoiser import PREDICTIONS
from diffpolicy.learn.cloning.denoising import denoising_error
from diffpolicy.networks import make_network

PROCESSES = [
    VPCosine(),
    VPLinear(),
    DiscreteVP.cosine(100),
    DiscreteVP.linear(100),
    EDM(),
    FlowMatching(),
]
NETWORK = {"type": "mlp", "horizon": 3, "dim": 2, "width": 16, "depth": 1}
OF_STEPS = {"type": "flow_map", "horizon": 3, "dim": 2, "base": {"type": "mlp", "width": 16}}


def refused(process, prediction):
    if prediction in ("velocity", "mean_velocity"):
        return process.type != "flow"
    return process.type == "flow" and prediction in ("eps", "edm")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.type)
def test_no_pair_of_prediction_and_process_is_singular(process, prediction, dtype):
    """The loss at both ends is finite, with its gradient, and the target has no jump there."""
    network = make_network(OF_STEPS if prediction == "mean_velocity" else NETWORK)
    if refused(process, prediction):
        with pytest.raises(ValueError, match="prediction"):
            Denoiser(network, process, prediction)
        return
    denoiser = Denoiser(network, process, prediction).to(dtype)
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(6, 3, 2, generator=generator, dtype=dtype) for _ in range(2))
    t = torch.tensor([0, 6e-8, 1e-3, 0.5, 1 - 6e-8, 1], dtype=dtype).view(-1, 1, 1)
    loss = denoising_error(denoiser, x0, t, noise)
    loss.sum().backward()
    assert bool(loss.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in denoiser.parameters())
    same = [v[:1].expand_as(v).double() for v in (x0, noise)]
    target = denoiser.target(*same, t.double())
    torch.testing.assert_close(target[0], target[1], rtol=0, atol=1e-2)
    torch.testing.assert_close(target[-1], target[-2], rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    "process",
    [
        {"type": "ddpm_linear", "num_steps": 100, "beta_start": 1e-4, "beta_end": 0.02},
        {"type": "vp_linear", "beta_max": 1.0},
        {"type": "vp_cosine", "alpha_min": 0.5},
        {"type": "edm", "sigma_max": 1.0},
    ],
    ids=lambda c: c["type"],
)
def test_a_process_that_never_becomes_noise_is_said(process):
    with pytest.warns(UserWarning, match="biased towards 0"):
        Denoiser(make_network(NETWORK), make_process(process), "v")


def mixture(process, std=0.05):
    """The exact denoiser of an even mixture of three narrow modes."""
    modes = torch.tensor([-0.7, 0.1, 0.8], dtype=torch.float64)

    def x0_hat(x, t, cond):
        alpha, sigma = process.alpha(t), process.sigma(t)
        variance = (alpha * std) ** 2 + sigma**2
        away = x[..., None] - (alpha * modes)
        share = (-(away**2) / (2 * variance)[..., None]).softmax(-1)
        means = modes + (alpha * std**2 / variance)[..., None] * away
        return (share * means).sum(-1)

    return AnalyticDenoiser(process, x0_hat)


@pytest.mark.parametrize("spacing", ["log_snr", "karras"])
@pytest.mark.parametrize("process", [VPCosine(), EDM(), FlowMatching()], ids=lambda p: p.type)
def test_the_second_of_two_evaluations_is_not_wasted(process, spacing):
    denoise = mixture(process)
    noise = torch.randn(2000, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = prior_start(process, noise)

    def drawn(num_steps, **options):
        grid = levels(start, num_steps, spacing=spacing, process=process, **options)
        return sample(denoise, make_solver("ddim"), start, grid)

    exact = drawn(200)
    one, two, published = (
        float((x - exact).square().mean().sqrt())
        for x in (drawn(1), drawn(2), drawn(2, t_min=1e-3))
    )
    assert published > 0.99 * one  # nothing was left to do there
    assert two < 0.98 * one


def test_ratio_grids_are_karras_and_stop_at_the_first_training_level():
    process = EDM()
    start = prior_start(process, torch.zeros(1, 1, 1))
    grid = levels(start, 18, spacing="karras", process=process, t_min=1e-3).flatten()
    i = torch.arange(18, dtype=torch.float64)
    sigma = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(process.sigma(grid[:-1]), sigma, rtol=1e-9, atol=0)
    assert float(grid[-1]) == 0
    discrete = levels(start, 5, spacing="karras", process=DiscreteVP.cosine(100)).flatten()
    assert float(discrete[-2]) == pytest.approx(0.01)


def test_more_steps_than_training_levels_are_refused_with_their_number():
    process = make_process("ddpm_cosine")
    start = prior_start(process, torch.zeros(1, 1, 1))
    assert len(levels(start, 100, process=process)) == 101
    with pytest.raises(
        ValueError, match=r"repeats a training level, .* 100. Take at most 100 steps"
    ):
        levels(start, 150, process=process)
    low = torch.full((1, 1, 1), 0.05, dtype=torch.float64)
    with pytest.raises(ValueError, match="Take at most 5 steps"):
        levels(Start(low, low), 6, process=process)
    levels(Start(low, low), 5, process=process)
    rising = torch.tensor([0.0, 0.05, 1.0], dtype=torch.float64).view(1, 3, 1)
    levels(Start(rising, rising), 5, process=process)  # what is clean already may rest
    levels(start, 150)  # a continuous process has a level for every step
