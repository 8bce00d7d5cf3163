"""Fake tasks and heads whose laws are known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffpolicy.core.masked_denoiser import MaskedDenoiser
from diffpolicy.core.masking import LogLinear
from diffpolicy.sequences import SequenceModel, SequenceSpec
from diffpolicy.training.settings import TrainerConfig


class Constant(nn.Module):
    """The same probabilities everywhere, whatever the state; remembers how often it was asked."""

    def __init__(self, probabilities: list[float], length: int) -> None:
        super().__init__()
        self.horizon, self.dim = length, len(probabilities) + 1
        self.logits = nn.Parameter(torch.tensor([*probabilities, 1.0]).log())
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        self.calls += 1
        return self.logits.expand(len(x), self.horizon, -1)


class TableTask:
    """All 81 sequences of length 4 over three letters; the reward counts B and is linear in x."""

    name, alphabet, length, kind = "counting", "ABC", 4, "table"

    def __init__(self) -> None:
        self.tokens = np.array(list(itertools.product(range(3), repeat=4)), dtype=np.int8)

    def training_data(self):
        return self.tokens, None

    def measurements(self):
        return self.tokens, (self.tokens == 1).mean(1).astype(np.float32)

    def reward(self, x: Tensor) -> Tensor:
        return x[..., 1].mean(1)

    def valid(self, tokens) -> np.ndarray:
        return np.asarray(tokens)[:, 0] != 2


class MeasuredTask:
    """Noisy measurements of a linear activity, and nothing else."""

    name, alphabet, length, kind = "measured", "ACGT", 6, "measured"
    wild_type = "AACCGG"

    def __init__(self, count: int = 1200) -> None:
        rng = np.random.default_rng(0)
        self.tokens = rng.integers(0, 4, (count, 6), dtype=np.int8)
        self.tokens[: count // 4] = self.tokens[count // 4 : 2 * (count // 4)]  # copies
        weights = rng.standard_normal((6, 4))
        truth = weights[np.arange(6), self.tokens].sum(1)
        self.labels = (5 + truth + 0.2 * rng.standard_normal(count)).astype(np.float32)

    def training_data(self):
        return self.tokens, self.labels

    def measurements(self):
        return self.tokens, self.labels

    def reward(self, x: Tensor) -> Tensor:
        raise RuntimeError("there is none")

    def valid(self, tokens) -> np.ndarray:
        return np.ones(len(tokens), dtype=bool)


@pytest.fixture
def table_task() -> TableTask:
    return TableTask()


@pytest.fixture
def measured_task() -> MeasuredTask:
    return MeasuredTask()


@pytest.fixture
def constant():
    def make(probabilities: list[float], length: int, *, time_free: bool = True) -> SequenceModel:
        alphabet = "ABCDEFG"[: len(probabilities)]
        spec = SequenceSpec(alphabet, length, time_free=time_free)
        network = Constant(probabilities, length)
        denoiser = MaskedDenoiser(network, LogLinear(), len(alphabet), time_free=time_free)
        return SequenceModel(spec, denoiser)

    return make


@pytest.fixture
def quick():
    """Settings of a training of a second."""

    def make(steps: int = 100, **changes) -> TrainerConfig:
        return TrainerConfig(
            **{
                "steps": steps,
                "batch_size": 64,
                "lr": 5e-3,
                "warmup_steps": 5,
                "log_every": 50,
                "progress": False,
                **changes,
            }
        )

    return make


@pytest.fixture
def small() -> dict:
    """A spec of a small network."""
    return {"network": {"type": "mlp", "width": 32, "depth": 1}}
