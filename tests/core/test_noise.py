"""Schedules: round trips, ends, exact knots, numerics near t = 0."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffpolicy.core import (
    EDM,
    DiscreteVP,
    FlowMatching,
    VPCosine,
    VPLinear,
    make_masking,
    make_process,
)

PROCESSES = [
    VPCosine(),
    VPLinear(),
    DiscreteVP.cosine(100),
    DiscreteVP.linear(1000),
    EDM(),
    FlowMatching(),
]
ids = {"ids": lambda p: f"{p.type}{len(getattr(p, 'betas', ''))}"}


@pytest.mark.parametrize("process", PROCESSES, **ids)
def test_log_snr_round_trip_and_monotone(process):
    t = torch.linspace(1e-4, 0.9999, 1000, dtype=torch.float64)
    log_snr = process.log_snr(t)
    assert (log_snr.diff() < 0).all()
    torch.testing.assert_close(process.t_from_log_snr(log_snr), t, rtol=0, atol=1e-9)


@pytest.mark.parametrize("process", PROCESSES, **ids)
def test_ends(process):
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert process.alpha(ends)[0] == 1
    assert process.sigma(ends)[0] == 0
    assert process.sigma(ends)[1] > process.alpha(ends)[1]


@pytest.mark.parametrize("process", [p for p in PROCESSES if "vp" in p.type], **ids)
def test_variance_preserving(process):
    t = torch.rand(1000, dtype=torch.float64)
    torch.testing.assert_close(
        process.alpha(t) ** 2 + process.sigma(t) ** 2, torch.ones_like(t), rtol=0, atol=1e-12
    )


def test_cosine_sigma_has_no_cancellation():
    process = VPCosine()
    t = torch.tensor([1e-6])
    torch.testing.assert_close(
        process.sigma(t).double(), process.sigma(t.double()), rtol=1e-5, atol=0
    )


def test_discrete_knots_are_exact():
    process = DiscreteVP.cosine(100)
    knots = torch.arange(1, 101, dtype=torch.float64) / 100
    bar = torch.cumprod(1 - torch.tensor(process.betas, dtype=torch.float64), 0)
    torch.testing.assert_close(process.alpha(knots) ** 2, bar, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        process.network_time(knots), torch.arange(100.0, dtype=torch.float64), rtol=0, atol=1e-9
    )
    torch.testing.assert_close(process.snap(knots + 0.004), knots)


def test_edm_is_the_published_grid():
    """Sigma on the Karras levels (Karras et al. 2022, eq. 5)."""
    process = EDM()
    i = torch.arange(18, dtype=torch.float64)
    published = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    t = process.t_from_log_snr(-2 * published.log())
    torch.testing.assert_close(process.sigma(t), published, rtol=1e-9, atol=0)


@pytest.mark.parametrize("process", PROCESSES, **ids)
def test_config_round_trip(process):
    again = make_process(process.config())
    t = torch.rand(10, dtype=torch.float64)
    assert torch.equal(again.alpha(t), process.alpha(t))
    assert torch.equal(again.sigma(t), process.sigma(t))


@pytest.mark.parametrize("process", PROCESSES, **ids)
def test_sampled_levels_are_in_range_and_reproducible(process):
    draws = [process.sample_t((512, 1, 1), torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)
    assert draws[0].shape == (512, 1, 1)
    assert (draws[0] > 0).all()
    assert (draws[0] <= 1).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 64))
def test_stratified_levels_cover_the_clock(count):
    t = VPCosine().sample_t((count, 1, 1)).flatten().sort().values
    edges = torch.arange(count + 1) / count
    assert (t > edges[:-1] - 1e-6).all()
    assert (t <= edges[1:] + 1e-6).all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("cosine", "unknown noise process 'cosine'; expected one of"),
        ({"type": "vp_cosine", "beta": 1}, "beta"),
        ({"type": "discrete_vp", "betas": [0.1, 1.5]}, r"every beta must be in \(0, 1\)"),
        ({"type": "vp_linear", "beta_min": 3, "beta_max": 2}, "beta_max must be above 3"),
    ],
)
def test_bad_config(config, message):
    with pytest.raises(ValueError, match=message):
        make_process(config)


def test_named_discrete_schedules():
    process = make_process("ddpm_cosine")
    assert len(process.betas) == 100
    assert process.betas[-1] == 0.999
    assert math.isclose(make_process({"type": "ddpm_linear", "num_steps": 1000}).betas[-1], 0.02)


def test_ddpm_linear_ends_in_noise_with_any_number_of_steps():
    """Its published betas are for 1000 steps; with 100 of them alpha would end at 0.60."""
    one = torch.ones((), dtype=torch.float64)
    published = float(DiscreteVP.linear(1000).alpha(one))
    for count in (5, 20, 50, 100, 400):
        process = make_process({"type": "ddpm_linear", "num_steps": count})
        assert len(process.betas) == count
        assert float(process.alpha(one)) < 2 * published
    given = {"type": "ddpm_linear", "num_steps": 100, "beta_start": 1e-4, "beta_end": 0.02}
    exact = torch.linspace(1e-4, 0.02, 100, dtype=torch.float64)
    assert make_process(given).betas == tuple(exact.tolist())  # what is given stays as it is


def test_no_level_of_zero_is_drawn_where_rounding_would_make_one(monkeypatch):
    most = 1 - 2**-24  # of torch.rand in float32; (1023 + most) / 1024 rounds to 1
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, most))
    for process in (VPCosine(), FlowMatching(), make_masking("masked_loglinear")):
        t = process.sample_t((1024, 1, 1), torch.Generator())
        assert 0 < float(t.min()) < 1e-7
        assert bool((t <= 1).all())
