"""A tiny objective and source."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diffpolicy.learn.cloning.denoising import LossOutput


class Regression(nn.Module):
    """Noisy regression with dropout, so that every kind of randomness is in play."""

    def __init__(self, dropout: float = 0.1, noise: float = 0.1) -> None:
        super().__init__()
        self.noise = noise
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 1))

    def forward(self, batch: dict[str, Tensor], generator: torch.Generator) -> LossOutput:
        noise = self.noise * torch.randn(batch["x"].shape, generator=generator)
        error = self.net(batch["x"] + noise)[:, 0] - batch["y"]
        return LossOutput(error.square(), {"bias": error.mean().detach()})


class Table:
    """Rows of a fixed regression problem."""

    def __init__(self, count: int = 200) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(count, 3, generator=generator)
        self.y = self.x.sin().sum(1)

    def __len__(self) -> int:
        return len(self.x)

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        return {"x": self.x[indices], "y": self.y[indices]}


@pytest.fixture
def make_objective():
    def make(seed: int = 0, **options) -> Regression:
        torch.manual_seed(seed)
        return Regression(**options)

    return make


@pytest.fixture
def table() -> Table:
    return Table()
