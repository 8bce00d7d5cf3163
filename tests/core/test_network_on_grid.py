"""Precomputed time embeddings and modulations change nothing but the time it takes."""

from __future__ import annotations

import pytest
import torch

from diffpolicy.core import Denoiser, VPCosine, levels, make_solver, prior_start, sample
from diffpolicy.core.denoiser import _NetworkOnGrid
from diffpolicy.guidance import ClassifierFreeGuidance
from diffpolicy.networks import make_network

SHAPE = {"horizon": 8, "dim": 2, "cond_dim": 5}
NETWORKS = [
    {"type": "mlp", "width": 32, "depth": 2},
    {"type": "unet1d", "down_dims": [16, 32]},
    {"type": "transformer", "width": 32, "depth": 2, "heads": 2},
]


@pytest.fixture(params=NETWORKS, ids=lambda n: n["type"])
def denoiser(request):
    torch.manual_seed(0)
    network = make_network({**request.param, **SHAPE}).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Denoiser(network, VPCosine(), "v")


@pytest.mark.parametrize("guided", [False, True])
def test_grid_equals_plain_calls(denoiser, guided, monkeypatch):
    cond = torch.randn(3, 5, dtype=torch.float64)
    start = prior_start(denoiser.process, torch.randn(3, 8, 2, dtype=torch.float64))
    grid, solver = levels(start, 4), make_solver("ddim")
    wrapped = ClassifierFreeGuidance(denoiser, 2.0) if guided else denoiser
    fast = sample(wrapped, solver, start, grid, cond=cond)
    monkeypatch.setattr(_NetworkOnGrid, "MAX_ROWS", 0)
    torch.testing.assert_close(
        sample(wrapped, solver, start, grid, cond=cond), fast, rtol=0, atol=1e-12
    )
    x = start.x
    for t, row in zip(grid, solver.rows(denoiser.process, grid), strict=False):
        x = row.a * x + row.b[0] * wrapped(x, t, cond).x0_hat
    torch.testing.assert_close(x, fast, rtol=0, atol=1e-12)


def test_gradients_flow_through_the_modulations(denoiser):
    start = prior_start(denoiser.process, torch.randn(3, 8, 2, dtype=torch.float64))
    out = sample(
        denoiser,
        make_solver("ddim"),
        start,
        levels(start, 3),
        cond=torch.randn(3, 5, dtype=torch.float64),
        grad_steps=1,
    )
    out.square().sum().backward()
    assert all(p.grad is not None for p in denoiser.parameters())
