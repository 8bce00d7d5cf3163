"""A tiny objective and source."""

from __future__ import annotations

import pytest
import torch
from training_runs import Regression, Table


@pytest.fixture
def make_objective():
    def make(seed: int = 0, **options) -> Regression:
        torch.manual_seed(seed)
        return Regression(**options)

    return make


@pytest.fixture
def table() -> Table:
    return Table()
