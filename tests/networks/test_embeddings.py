from __future__ import annotations

import math

import torch

from diffpolicy.networks import sinusoidal


def test_formula_of_diffusion_policy():
    dim, t = 8, 37.0
    frequencies = [math.exp(-math.log(10000) * i / (dim // 2 - 1)) for i in range(dim // 2)]
    expected = [math.sin(t * f) for f in frequencies] + [math.cos(t * f) for f in frequencies]
    assert frequencies[-1] == math.exp(-math.log(10000))
    actual = sinusoidal(torch.tensor(t, dtype=torch.float64), dim)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


def test_shape_and_precision():
    t = torch.arange(100).view(5, 20, 1)
    assert sinusoidal(t, 16).shape == (5, 20, 1, 16)
    assert sinusoidal(t, 16).dtype == torch.float32
    assert sinusoidal(t.to(torch.bfloat16), 16).dtype == torch.float32


def test_neighbouring_levels_stay_apart():
    embedded = sinusoidal(torch.arange(1000.0), 32)
    distance = torch.cdist(embedded, embedded) + torch.eye(1000)
    assert distance.min() > 0.5
