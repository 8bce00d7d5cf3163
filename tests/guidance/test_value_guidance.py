"""Guidance by a value, on Gaussian plans tilted by the exponential of a quadratic."""

from __future__ import annotations

import pytest
import torch

from diffpolicy.core import (
    EDM,
    AnalyticDenoiser,
    Denoiser,
    DiscreteVP,
    FlowMatching,
    VPCosine,
    VPLinear,
    levels,
    make_process,
    make_solver,
    prepare,
    prior_start,
    sample,
)
from diffpolicy.guidance import Layout, PinCond, Pinned, ValueGuidance, head_value
from diffpolicy.networks import make_network
from diffpolicy.networks.heads import TrajectoryValue

KNOWN = Layout("trajectory", obs_dim=2, action_dim=1, horizon=4, n_obs_steps=1).known
LINEAR = torch.linspace(-0.6, 0.8, 12, dtype=torch.float64)
QUADRATIC = 0.3 * torch.eye(12, dtype=torch.float64) + 0.05  # of J(x0) = c x0 - x0 Q x0 / 2


def tilted_value(law, process, c=LINEAR, q=QUADRATIC):
    """``log E[exp(J(x0)) | x_t]`` of entries ``[B, N]``, but for a constant."""

    def value(x, t):
        m, P = law.posterior(process, x, t)
        rest = c - m @ q
        inner = torch.linalg.solve(torch.eye(len(q), dtype=q.dtype) + P @ q, P)
        return m @ c - 0.5 * ((m @ q) * m).sum(-1) + 0.5 * ((rest @ inner.T) * rest).sum(-1)

    return value


def tilted(law, c=LINEAR, q=QUADRATIC):
    """``p(x0) exp(J(x0))``, a Gaussian again."""
    precision = torch.linalg.inv(law.cov)
    cov = torch.linalg.inv(precision + q)
    return type(law)(cov @ (precision @ law.mean + c), cov)


@pytest.mark.parametrize("process", [VPCosine(), VPLinear(), FlowMatching(), EDM()], ids=repr)
def test_the_guided_denoiser_is_that_of_the_tilted_law(trajectories, process):
    value = tilted_value(trajectories, process)
    guided = ValueGuidance(
        trajectories.denoiser(process), lambda x, t, cond: value(x.flatten(1), t), 1.0
    )
    exact = tilted(trajectories).denoiser(process)
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    for at in (0.05, 0.3, 0.7, 0.95, 1.0):
        t = torch.full((1, 1, 1), at, dtype=torch.float64)
        with torch.no_grad():
            got = guided(x, t).x0_hat
        torch.testing.assert_close(got, exact(x, t).x0_hat, rtol=0, atol=1e-2 if at == 1 else 1e-7)
        assert not got.requires_grad


def test_samples_have_the_closed_form_mean_and_covariance(trajectories):
    process = FlowMatching()
    value = tilted_value(trajectories, process)
    guided = ValueGuidance(
        trajectories.denoiser(process), lambda x, t, cond: value(x.flatten(1), t), 1.0
    )
    noise = torch.cat([torch.zeros(1, 12), torch.eye(12)]).double().view(-1, 4, 3)
    start = prior_start(process, noise)
    with torch.no_grad():
        out = sample(guided, make_solver("heun"), start, levels(start, 150)).flatten(1)
    A, law = (out[1:] - out[0]).T, tilted(trajectories)
    torch.testing.assert_close(out[0], law.mean, rtol=0, atol=2e-3)
    torch.testing.assert_close(A @ A.T, law.cov, rtol=0, atol=2e-3)
    assert (law.mean - trajectories.mean).abs().max() > 0.2  # guidance had something to do


def test_guidance_of_the_unknown_given_the_known(trajectories):
    """Pinned(ValueGuidance(...)): the conditional law, tilted; known entries do not move."""
    process, mask = FlowMatching(), KNOWN.flatten()
    values = torch.zeros(1, 4, 3, dtype=torch.float64)
    values[0, 0, :2] = torch.tensor([0.7, -0.4])
    given = trajectories.given(mask, values.flatten())
    c, q = LINEAR[~mask], QUADRATIC[~mask][:, ~mask]
    value = tilted_value(given, process, c, q)
    seen = []

    def of_plan(x, t, cond):
        seen.append(x.detach()[:, 0, :2])
        known_part = 7.0 * x[:, 0, :2].sum(-1)  # a slope at known entries must do nothing
        return value(x.flatten(1)[:, ~mask], t) + known_part

    inner = ValueGuidance(trajectories.denoiser(process, KNOWN), of_plan, 1.0)
    pinned = Pinned(inner, KNOWN)
    noise = torch.cat([torch.zeros(1, 12), torch.eye(12)]).double().view(-1, 4, 3)
    start = prior_start(process, noise)
    with torch.no_grad():
        cond = PinCond(None, values.expand_as(noise))
        out = sample(pinned, make_solver("heun"), start, levels(start, 60), cond=cond).flatten(1)
    law = tilted(given, c, q)
    A = (out[1:] - out[0]).T[~mask][:, ~mask]
    torch.testing.assert_close(out[0, ~mask], law.mean, rtol=0, atol=4e-3)
    torch.testing.assert_close(A @ A.T, law.cov, rtol=0, atol=4e-3)
    assert (out[:, mask] == values.flatten()[mask]).all()
    assert all((x == values[0, 0, :2]).all() for x in seen)


def test_grid_and_single_levels_agree_and_the_condition_is_the_denoisers():
    torch.manual_seed(0)
    process = VPCosine()
    network = make_network({"type": "mlp", "horizon": 4, "dim": 3, "cond_dim": 2, "width": 16})
    value = TrajectoryValue(4, 3, 2, base={"type": "mlp", "width": 16})
    guided = ValueGuidance(Denoiser(network, process, "x0"), head_value(value, process), 0.5)
    x, cond = torch.randn(5, 4, 3), torch.randn(5, 2)
    start = prior_start(process, x)
    grid = levels(start, 4)
    with torch.no_grad():
        prepared = prepare(guided, make_solver("ddim"), grid, x)
        films = prepared.denoise.modulations(x, cond)
        for row, t in enumerate(grid[:-1]):
            expected = guided(x, t, cond).x0_hat
            for extra in ((), (films[row],)):
                got = prepared.denoise(row, x, cond, *extra).x0_hat
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert not any(p.grad is not None for p in value.parameters())


def test_scale_zero_is_the_denoiser_and_clip_clips():
    process = VPLinear()
    denoiser = AnalyticDenoiser(process, lambda x, t, cond: torch.tanh(x))
    x, t = torch.randn(2, 4, 3), torch.full((1, 1, 1), 0.5)

    def steep(x, t, cond):
        return 100 * x.sum((1, 2))

    assert torch.equal(ValueGuidance(denoiser, steep, 0.0)(x, t).x0_hat, torch.tanh(x))
    clipped = ValueGuidance(denoiser, steep, 1.0, clip=True)(x, t).x0_hat
    assert torch.equal(clipped, torch.ones_like(x))


@pytest.mark.parametrize("process", [FlowMatching(), DiscreteVP.cosine(1000)], ids=["flow", "dvp"])
def test_levels_at_the_end_have_a_finite_shift(process):
    """``alpha`` is 0 or tiny there: the value is asked a little before, at a trained level."""
    asked = []

    def value(x, t, cond):
        asked.append(t.item())
        return (process.alpha(t) * x).sum((1, 2))

    guided = ValueGuidance(AnalyticDenoiser(process, lambda x, t, cond: 0 * x), value, 1.0)
    shift = guided(torch.randn(2, 4, 3), torch.ones(1, 1, 1)).x0_hat
    torch.testing.assert_close(shift, torch.ones_like(shift), rtol=0, atol=0.01)
    assert 0.99 < asked[0] < 1
    assert guided.t_max == process.snap(torch.tensor(guided.t_max, dtype=torch.float64))
    vp = AnalyticDenoiser(VPCosine(), lambda x, t, cond: x)
    assert ValueGuidance(vp, value, 1.0).t_max == 1


def test_guidance_can_be_trained_through():
    """Gradients enabled: d x0_hat / d (parameter of the value), by finite differences."""
    process = VPCosine()
    x, t = torch.randn(1, 2, 1, dtype=torch.float64), torch.full((1, 1, 1), 0.5).double()

    def total(weight):
        denoiser = AnalyticDenoiser(process, lambda x, t, cond: torch.tanh(x))
        value = lambda x, t, cond: (weight * x).sin().sum((1, 2))  # noqa: E731
        return ValueGuidance(denoiser, value, 0.7)(x, t).x0_hat.sum()

    weight = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(total(weight), weight)
    numeric = (total(weight.detach() + 1e-6) - total(weight.detach() - 1e-6)) / 2e-6
    assert got.item() == pytest.approx(numeric.item(), rel=1e-6)


@pytest.mark.parametrize("name", ["vp_cosine", "edm", "flow"])
def test_a_head_sees_clean_plans_as_they_are(name):
    """At t = 0 the adapter is ``score``, in every process."""
    process = make_process(name)
    zero = float(process.network_time(torch.zeros((), dtype=torch.float64)))
    head = TrajectoryValue(4, 3, base={"type": "mlp", "width": 16}, clean_time=zero)
    plan = torch.randn(5, 4, 3)
    value = head_value(head, process)(plan, torch.zeros(1, 1, 1), None)
    torch.testing.assert_close(value, head.score(None, plan), rtol=0, atol=1e-5)
    far = head_value(lambda x, t, cond: x.std(), process)
    t = torch.ones(1, 1, 1)
    scale = process.sigma(t).item()
    assert far(scale * plan, t, None) < 3  # the network's input keeps its size


def test_inference_mode_is_refused():
    denoiser = AnalyticDenoiser(VPCosine(), lambda x, t, cond: x)
    guided = ValueGuidance(denoiser, lambda x, t, cond: x.sum((1, 2)), 1.0)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"under torch\.no_grad"):
        guided(torch.zeros(1, 4, 3), torch.full((1, 1, 1), 0.5))
