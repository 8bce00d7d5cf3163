from __future__ import annotations

import pytest
import torch

from diffpolicy.networks import make_network

SMALL_NETWORKS = {
    "mlp": {"type": "mlp", "width": 32, "depth": 2},
    "mlp-position": {"type": "mlp", "width": 32, "depth": 2, "t_kind": "position"},
    "mlp-dim": {"type": "mlp", "width": 32, "depth": 2, "t_kind": "dim"},
    "unet1d": {"type": "unet1d", "down_dims": [16, 32, 64], "diffusion_step_embed_dim": 32},
    "unet1d-shift": {
        "type": "unet1d",
        "down_dims": [16, 32],
        "diffusion_step_embed_dim": 16,
        "cond_predict_scale": False,
        "kernel_size": 3,
    },
    "modalities": {
        "type": "modalities",
        "sizes": [2, 1],
        "base": {"type": "mlp", "width": 16, "depth": 1},
        "width": 8,
    },
    "transformer": {"type": "transformer", "width": 32, "depth": 2, "heads": 2},
    "flow_map": {"type": "flow_map", "base": {"type": "mlp", "width": 16, "depth": 1}},
    "sequence_cnn": {"type": "sequence_cnn", "width": 16, "dilations": [1, 4], "stacks": 2},
}


@pytest.fixture(params=list(SMALL_NETWORKS))
def small_config(request):
    return {**SMALL_NETWORKS[request.param], "horizon": 8, "dim": 3, "cond_dim": 5}


@pytest.fixture
def small_network(small_config):
    """A network whose layers that start at zero are random too: every path carries signal."""
    torch.manual_seed(0)
    network = make_network(small_config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


@pytest.fixture
def two_modes():
    """Fits a network that answers in one call to plans that are all 0.8 or all -0.8."""

    def fit(network, steps=200, lr=5e-3, seed=0):
        generator = torch.Generator().manual_seed(seed)
        optimiser = torch.optim.Adam(network.parameters(), lr)
        cond, valid = torch.zeros(16, network.cond_dim), torch.ones(16, network.horizon).bool()
        sign = torch.tensor([0.8, -0.8]).repeat(8).view(-1, 1, 1)
        plan = sign.expand(-1, network.horizon, network.dim)
        for _ in range(steps):
            optimiser.zero_grad()
            network.errors(cond, plan, valid, generator)[0].mean().backward()
            optimiser.step()
        return network.eval(), plan

    return fit
