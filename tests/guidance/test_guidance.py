"""Guidance wrappers against closed forms."""

from __future__ import annotations

import pytest
import torch

from diffpolicy.core import (
    AnalyticDenoiser,
    Denoiser,
    FlowMatching,
    VPCosine,
    VPLinear,
    levels,
    make_solver,
    prepare,
    prior_start,
    sample,
)
from diffpolicy.guidance import ClassifierFreeGuidance, Guidance
from diffpolicy.guidance.pinned import PinCond, Pinned, PrefixCond, PrefixGuidance, prefix_gain
from diffpolicy.guidance.value import ValueGuidance
from diffpolicy.networks import make_network


def conditional_gaussian(process, mean_of, std_of):
    """``x0 ~ N(mean_of(cond), std_of(cond)^2)``."""

    def x0_hat(x, t, cond):
        mean, std = mean_of(cond)[:, None], std_of(cond)[:, None]
        alpha, sigma = process.alpha(t), process.sigma(t)
        return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)

    return AnalyticDenoiser(process, x0_hat)


def test_classifier_free_guidance_known_mean():
    """p = N(0, 1), p_c = N(1, 1), w: the guided estimate is that of N(w, 1)."""
    process = VPCosine()
    denoiser = conditional_gaussian(process, lambda c: c, lambda c: torch.ones_like(c))
    start = prior_start(process, torch.randn(64, 1, 1, dtype=torch.float64))
    cond = torch.ones(64, 1, dtype=torch.float64)
    grid = levels(start, 100, spacing="log_snr", process=process)
    solver = make_solver("dpmpp_2m")
    guided = sample(ClassifierFreeGuidance(denoiser, 3.0), solver, start, grid, cond=cond)
    target = sample(denoiser, solver, start, grid, cond=3 * cond)
    torch.testing.assert_close(guided, target, rtol=0, atol=1e-9)


def test_scale_one_is_the_conditional_model_and_one_branch():
    process = VPLinear()
    sizes = []

    def x0_hat(x, t, cond):
        sizes.append(len(x))
        return cond[:, None] * torch.ones_like(x)

    denoiser = AnalyticDenoiser(process, x0_hat)
    start = prior_start(process, torch.randn(4, 2, 1))
    cond = torch.rand(4, 1)
    out = sample(
        ClassifierFreeGuidance(denoiser, 1.0),
        make_solver("ddim"),
        start,
        levels(start, 3),
        cond=cond,
    )
    torch.testing.assert_close(out, cond[:, None].expand_as(out))
    assert set(sizes) == {4}


def test_guidance_moves_the_estimate():
    process = VPLinear()
    denoiser = AnalyticDenoiser(process, lambda x, t, cond: torch.zeros_like(x))
    guided = Guidance(denoiser, lambda x0, t, cond: torch.ones_like(x0), scale=0.5)
    start = prior_start(process, torch.randn(4, 2, 1))
    out = sample(guided, make_solver("ddim"), start, levels(start, 3))
    torch.testing.assert_close(out, torch.full_like(out, 0.5))


def correlated_gaussian(process, horizon, rho=0.9):
    """``x0 ~ N(0, R)`` with correlation ``rho^|i - j|``, and its gain at a level: x0_hat = G x."""
    lag = torch.arange(horizon)[:, None] - torch.arange(horizon)
    cov = (rho ** lag.abs()).double()

    def gain(t):
        alpha, sigma = process.alpha(t).item(), process.sigma(t).item()
        noisy = alpha**2 * cov + sigma**2 * torch.eye(horizon, dtype=torch.float64)
        return alpha * cov @ torch.linalg.inv(noisy)

    return AnalyticDenoiser(process, lambda x, t, cond: gain(t) @ x), gain


def prefix_of(weight, value=0.5, rows=2):
    weight = torch.tensor(weight, dtype=torch.float64)[None, :, None].expand(rows, -1, -1)
    return PrefixCond(None, torch.full((*weight.shape[:2], 1), value, dtype=torch.float64), weight)


@pytest.mark.parametrize("process", [VPCosine(), FlowMatching()], ids=["vp", "flow"])
def test_jacobian_guidance_is_the_vector_jacobian_product(process):
    denoiser, gain = correlated_gaussian(process, 5)
    given = prefix_of([1.0, 0.6, 0.2, 0.0, 0.0])
    guided = PrefixGuidance(denoiser, "jacobian", max_weight=5.0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 1, dtype=torch.float64, generator=generator)
    for value in (0.9, 0.4, 0.05):
        t = torch.full((1, 1, 1), value, dtype=torch.float64)
        alpha, sigma, G = process.alpha(t), process.sigma(t), gain(t)
        error = given.weight * (given.prefix - G @ x)
        k = sigma * min(5.0, ((alpha**2 + sigma**2) / (alpha * sigma)).item())
        expected = G @ x + k * (G.T @ error)
        expected[:, 0] = 0.5
        torch.testing.assert_close(guided(x, t, given).x0_hat, expected, rtol=0, atol=1e-12)
        identity = G @ x + k * error  # what the published code computes
        assert not torch.allclose(expected[:, 1:], identity[:, 1:], atol=1e-3)


def test_gain_of_the_papers_flow():
    """``v' = v + w g`` with w of eq. 2; the clean estimate is ``x + (1 - tau) v``."""
    tau = torch.linspace(0.02, 0.98, 9, dtype=torch.float64)
    r2 = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
    expected = (1 - tau) * ((1 - tau) / (tau * r2)).clamp(max=5)
    torch.testing.assert_close(prefix_gain(FlowMatching(), 1 - tau, 5.0), expected)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert prefix_gain(FlowMatching(), ends, 5.0).tolist() == [0.0, 5.0]
    assert prefix_gain(VPCosine(), ends, 1e9)[1].item() == pytest.approx(100)  # 1 / alpha


@pytest.mark.parametrize("mode", ["soft", "jacobian"])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp_2m", "unipc", "heun"])
def test_prefix_is_frozen_exactly_and_the_rest_follows(mode, name):
    process = VPCosine()
    denoiser, _ = correlated_gaussian(process, 8, rho=0.98)
    given = prefix_of([1.0, 1.0, 0.5, 0.2, 0.0, 0.0, 0.0, 0.0], value=2.0, rows=64)
    start = prior_start(process, torch.randn(64, 8, 1, dtype=torch.float64))
    grid = levels(start, 12)
    with torch.no_grad():
        out = sample(PrefixGuidance(denoiser, mode), make_solver(name), start, grid, cond=given)
    assert torch.equal(out[:, :2], given.prefix[:, :2])
    means = out.mean((0, 2))
    assert (means[2:5] > 0.7).all()  # unguided: 0; given the prefix: 2 rho^k
    assert out[:, -1].std() > 0.05  # free positions are still samples


@pytest.mark.parametrize("mode", ["soft", "jacobian"])
def test_nothing_to_follow_is_no_guidance(mode):
    """Weight 0: bit for bit the denoiser alone, whatever the prefix holds."""
    torch.manual_seed(0)
    network = make_network({"type": "mlp", "horizon": 6, "dim": 2, "cond_dim": 3, "width": 16})
    denoiser = Denoiser(network, VPCosine(), "x0")
    start, cond = prior_start(denoiser.process, torch.randn(4, 6, 2)), torch.randn(4, 3)
    weight = torch.zeros(4, 6, 1)
    given = PrefixCond(cond, torch.full((4, 6, 2), torch.nan), weight)
    solver = make_solver("ddim")
    with torch.no_grad():
        plain = sample(denoiser, solver, start, levels(start, 5), cond=cond)
        guided = PrefixGuidance(denoiser, mode)
        grid = prepare(guided, solver, levels(start, 5), start.x)
        out = sample(guided, solver, start, grid, cond=given)
        assert torch.equal(out, plain)
        films = grid.denoise.modulations(start.x, given)  # the precomputed product passes through
        assert len(films) == 5
        weight = torch.zeros(4, 6, 1)
        weight[1, :3] = 1
        prefix = torch.rand(4, 6, 2)
        out = sample(guided, solver, start, grid, cond=PrefixCond(cond, prefix, weight))
    assert torch.equal(out[[0, 2, 3]], plain[[0, 2, 3]])  # rows are independent
    assert torch.equal(out[1, :3], prefix[1, :3])
    assert not torch.equal(out[1, 3:], plain[1, 3:])


def test_jacobian_guidance_can_be_trained_through():
    process = VPCosine()
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    denoiser = AnalyticDenoiser(process, lambda x, t, cond: torch.tanh(scale * x))
    x = torch.randn(1, 3, 1, dtype=torch.float64)
    t = torch.full((1, 1, 1), 0.5, dtype=torch.float64)
    given = prefix_of([0.5, 0.5, 0.0], rows=1)

    def loss(value):
        run = AnalyticDenoiser(process, lambda x, t, cond: torch.tanh(value * x))
        return PrefixGuidance(run, "jacobian")(x, t, given).x0_hat.sum()

    total = PrefixGuidance(denoiser, "jacobian")(x, t, given).x0_hat.sum()
    (got,) = torch.autograd.grad(total, scale)
    numeric = (loss(0.5 + 1e-6) - loss(0.5 - 1e-6)) / 2e-6
    assert got.item() == pytest.approx(numeric.item(), rel=1e-6)


def test_prefix_guidance_errors():
    denoiser, _ = correlated_gaussian(VPCosine(), 3)
    with pytest.raises(ValueError, match="unknown mode 'hard'"):
        PrefixGuidance(denoiser, "hard")
    with pytest.raises(ValueError, match="max_weight must be positive"):
        PrefixGuidance(denoiser, max_weight=0)
    x, t = torch.zeros(2, 3, 1, dtype=torch.float64), torch.full((1, 1, 1), 0.5).double()
    with pytest.raises(ValueError, match="needs cond=PrefixCond"):
        PrefixGuidance(denoiser)(x, t, torch.zeros(2, 3))
    with torch.inference_mode(), pytest.raises(ValueError, match=r"under torch\.no_grad"):
        PrefixGuidance(denoiser, "jacobian")(x, t, prefix_of([1.0, 0.0, 0.0]))


def test_errors():
    denoiser = AnalyticDenoiser(VPCosine(), lambda x, t, cond: x)
    with pytest.raises(ValueError, match="needs cond"):
        ClassifierFreeGuidance(denoiser, 2.0)(torch.zeros(1, 1, 1), torch.ones(1, 1, 1))


def wrapped(name, denoiser, dtype):
    """Each wrapper around ``denoiser`` [4, 2], given values of ``dtype``; with its condition."""
    values = torch.ones(3, 4, 2, dtype=dtype)
    known = torch.zeros(1, 4, 2, dtype=torch.bool)
    known[:, 0] = True
    cond = torch.ones(3, 2)
    slope = -torch.ones(4, 2, dtype=dtype)
    weight = torch.linspace(1, 0, 4, dtype=dtype).view(1, 4, 1)
    return {
        "direction": lambda: (Guidance(denoiser, lambda x, t, c: -t * x * slope), cond),
        "value": lambda: (
            ValueGuidance(denoiser, lambda x, t, c: ((1 - t) * x * slope).sum((1, 2)), 0.1),
            cond,
        ),
        "classifier_free": lambda: (
            ClassifierFreeGuidance(denoiser, 2.0, null_cond=torch.zeros(2, dtype=dtype)),
            cond,
        ),
        "pinned": lambda: (Pinned(denoiser, known), PinCond(cond, values)),
        "soft": lambda: (PrefixGuidance(denoiser), PrefixCond(cond, values, weight)),
        "jacobian": lambda: (
            PrefixGuidance(denoiser, "jacobian"),
            PrefixCond(cond, values, weight),
        ),
    }[name]()


WRAPPERS = ["direction", "value", "classifier_free", "pinned", "soft", "jacobian"]


@pytest.mark.parametrize("name", WRAPPERS)
def test_levels_and_given_values_take_the_type_of_the_plan(name):
    """Levels are float64 on the host; a float32 network must not meet them, nor numpy's float64."""
    network = {"type": "mlp", "horizon": 4, "dim": 2, "cond_dim": 2, "width": 16, "depth": 1}
    torch.manual_seed(0)
    denoiser = Denoiser(make_network(network), VPCosine(), "v")
    start = prior_start(denoiser.process, torch.randn(3, 4, 2))
    given = torch.float32 if name in ("direction", "value") else torch.float64  # a user's own
    wrapper, cond = wrapped(name, denoiser, given)
    with torch.no_grad():
        out = sample(wrapper, make_solver("ddim"), start, levels(start, 3), cond=cond)
        once = wrapper(start.x, start.t, cond).x0_hat
    assert out.dtype == once.dtype == torch.float32
    assert bool(out.isfinite().all())


def test_a_direction_of_double_precision_is_taken():
    network = {"type": "mlp", "horizon": 4, "dim": 2, "width": 16, "depth": 1}
    denoiser = Denoiser(make_network(network), VPCosine(), "v")
    guided = Guidance(denoiser, lambda x, t, cond: -x.double())
    start = prior_start(denoiser.process, torch.randn(3, 4, 2))
    with torch.no_grad():
        out = sample(guided, make_solver("ddim"), start, levels(start, 3))
    assert out.dtype == torch.float32
