"""Inversion that comes back, and the order of the chain."""

from __future__ import annotations

import pytest
import torch

from diffpolicy.core import (
    Denoiser,
    FlowMatching,
    Sampler,
    Start,
    VPCosine,
    explicit_levels,
    sample,
)
from diffpolicy.core.bdia import BDIA, invert, restore
from diffpolicy.networks import make_network

F64 = torch.float64


def grid(count, end=1e-3):
    t = torch.ones(1, 1, 1, dtype=F64)
    return explicit_levels(Start(t, t), torch.linspace(1, end, count + 1).tolist()[1:])


@pytest.mark.parametrize("process", [VPCosine(), FlowMatching()])
@pytest.mark.parametrize("count", [2, 10, 40])
def test_a_sample_comes_back_through_a_network_in_float32(process, count):
    torch.manual_seed(0)
    network = make_network({"type": "mlp", "horizon": 8, "dim": 2, "cond_dim": 3, "width": 32})
    for weight in network.parameters():
        weight.data.add_(0.05 * torch.randn_like(weight))  # outputs are 0 at first
    denoiser = Denoiser(network, process, "v")
    plan, cond = torch.rand(5, 8, 2) * 2 - 1, torch.randn(5, 3)
    with torch.no_grad():
        found = invert(denoiser, plan, grid(count), cond=cond)
        back = restore(denoiser, found, grid(count), cond=cond)
        edited = restore(denoiser, found, grid(count), cond=cond + 1)
    assert (back - plan).abs().max() <= 1e-5
    assert (edited - plan).abs().max() > 1e-3


def test_a_gamma_below_one_comes_back_too(mixture):
    denoiser, levels = mixture.denoiser(VPCosine()), grid(10)
    plan = mixture.draw(16, torch.Generator().manual_seed(0))[:, None]
    back = restore(denoiser, invert(denoiser, plan, levels, gamma=0.8), levels, gamma=0.8)
    torch.testing.assert_close(back, plan, rtol=0, atol=1e-9)


def test_it_is_of_order_two_and_gaussian_noise_is_found(gaussian):
    """The exact map of ``N(m, s^2)`` from noise to data, and back."""
    mean, std, process = 0.5, 0.3, VPCosine()
    denoiser = gaussian(mean, std).denoiser(process)
    noise = torch.randn(64, 1, 1, dtype=F64, generator=torch.Generator().manual_seed(0))
    errors = []
    for count in (32, 64):
        levels = grid(count, end=0.02)
        alpha, sigma = (f(levels[[0, -1]]).flatten() for f in (process.alpha, process.sigma))
        total = (alpha.square() * std**2 + sigma.square()).sqrt()
        x = sigma[0] * noise
        exact = alpha[1] * mean + total[1] / total[0] * (x - alpha[0] * mean)
        out = sample(denoiser, BDIA(), Start(x, levels[0]), levels)
        errors.append(float((out - exact).abs().mean()))
        found = invert(denoiser, exact, levels).noise
        assert (found - x).abs().mean() < 0.1 * x.abs().mean()
    assert errors[0] / errors[1] > 3


def test_what_cannot_be_inverted_is_refused(mixture):
    denoiser = mixture.denoiser(VPCosine())
    for levels in (Sampler(num_steps=5).grid(VPCosine()), grid(1)):
        with pytest.raises(ValueError, match="at least two steps, down to a level above 0"):
            invert(denoiser, torch.zeros(1, 1, 2, dtype=F64), levels)
    with pytest.raises(ValueError, match="gamma must be positive"):
        BDIA(0.0)
