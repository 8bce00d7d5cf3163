"""Every method in float64, whose gradients tests differentiate numerically."""

from __future__ import annotations

import pytest
import torch

from diffpolicy.core import LogLinear, MaskedDenoiser
from diffpolicy.learn import make_method
from diffpolicy.learn.cloning.masked import MaskedDenoisingLoss
from diffpolicy.learn.material import SequenceMaterial
from diffpolicy.networks import make_network

METHODS = {
    "pathwise": {"type": "pathwise", "num_steps": 3},
    "policy_gradient": {"type": "policy_gradient", "num_steps": 3},
    "kept": {"type": "policy_gradient", "num_steps": 3, "epochs": 2},
    "weighted": {"type": "weighted", "num_steps": 3, "buffer": 16, "refresh": 16},
    "vidd": {
        "type": "weighted",
        "target": "soft_value",
        "num_steps": 3,
        "buffer": 16,
        "refresh": 16,
    },
    "stepwise": {"type": "stepwise", "num_steps": 3, "buffer": 16, "refresh": 16},
    "sequence_dpo": {"type": "sequence_dpo", "num_steps": 3, "buffer": 16, "refresh": 16},
    "sequence_pso": {"type": "sequence_pso", "num_steps": 3},
}


class Weighed(torch.nn.Module):
    """A reward with weights of its own, which takes nothing but its own type."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 1, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).sum((1, 2))


def double_denoiser(*, time_free: bool) -> MaskedDenoiser:
    torch.manual_seed(0)
    sizes = {"horizon": 4, "dim": 4, "cond_dim": 2, "width": 16, "depth": 1}
    network = make_network({"type": "mlp", **sizes})
    return MaskedDenoiser(network, LogLinear(), vocab_size=3, time_free=time_free).double()


@pytest.mark.parametrize("time_free", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_reward_tuning(name: str, time_free: bool) -> None:
    denoiser = double_denoiser(time_free=time_free)
    objective = make_method(METHODS[name]).objective(
        denoiser, SequenceMaterial(Weighed(), batch_size=16)
    )
    batch = {"index": torch.arange(16), "cond": torch.randn(16, 2)}
    optimizer = torch.optim.SGD(denoiser.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        out = objective(batch, torch.Generator().manual_seed(step))
        out.loss.mean().backward()
        optimizer.step()
        if hasattr(objective, "after_step"):
            objective.after_step()
    assert bool(out.loss.isfinite().all())
    gradients = [p.grad for p in denoiser.parameters() if p.grad is not None]
    assert gradients
    assert all(g.dtype == torch.float64 for g in gradients)


def test_sequence_training() -> None:
    loss = MaskedDenoisingLoss(double_denoiser(time_free=False), cond_dropout=0.5)
    batch = {"tokens": torch.randint(3, (8, 4)), "cond": torch.randn(8, 2)}
    assert bool(loss(batch, torch.Generator().manual_seed(0)).loss.isfinite().all())
