"""Known entries of plans, on joint Gaussians whose conditional laws are known."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from diffpolicy.core import (
    AnalyticDenoiser,
    Denoiser,
    FlowMatching,
    VPCosine,
    levels,
    make_solver,
    prepare,
    prior_start,
    sample,
    truncated_start,
)
from diffpolicy.guidance import ClassifierFreeGuidance, Layout, PinCond, Pinned, ValueGuidance
from diffpolicy.networks import make_network

LAYOUT = Layout("trajectory", obs_dim=2, action_dim=1, horizon=4, n_obs_steps=1)
GOAL = Layout("trajectory", obs_dim=2, action_dim=1, horizon=4, n_obs_steps=1, goal=((0, 0),))


def affine(run, count):
    """The map ``x -> A x + b`` that ``run: [B, 4, 3] -> [B, 4, 3]`` is: ``(A, b)``."""
    inputs = torch.cat([torch.zeros(1, count), torch.eye(count)]).double()
    out = run(inputs.view(-1, 4, 3)).flatten(1)
    return (out[1:] - out[0]).T, out[0]


def solve(denoiser, start, cond=None, num_steps=200):
    return sample(denoiser, make_solver("heun"), start, levels(start, num_steps), cond=cond)


def test_joint_samples_have_the_known_covariance(trajectories):
    """The sampler's map of noise is affine here, so its law is computed, not estimated."""
    process = FlowMatching()
    denoiser = trajectories.denoiser(process)
    A, b = affine(lambda z: solve(denoiser, prior_start(process, z)), 12)
    torch.testing.assert_close(A @ A.T, trajectories.cov, rtol=0, atol=2e-4)
    torch.testing.assert_close(b, trajectories.mean, rtol=0, atol=2e-4)


@pytest.mark.parametrize("layout", [LAYOUT, GOAL], ids=["history", "goal"])
def test_pinning_samples_the_conditional_law(trajectories, layout):
    process, known = FlowMatching(), layout.known
    history = torch.tensor([[[0.7, -0.4]]], dtype=torch.float64)
    goal = torch.tensor([[1.1]], dtype=torch.float64) if layout.goal else None
    values = layout.values(history, goal)
    pinned = Pinned(trajectories.denoiser(process, known), known)

    def run(z):
        given = PinCond(None, values.expand_as(z))
        return solve(pinned, prior_start(process, z), given, num_steps=60)

    A, b = affine(run, 12)
    mask = known.flatten()
    law = trajectories.given(mask, values.flatten())
    free = A[~mask][:, ~mask]
    torch.testing.assert_close(b[~mask], law.mean, rtol=0, atol=3e-3)
    torch.testing.assert_close(free @ free.T, law.cov, rtol=0, atol=3e-3)
    assert torch.equal(b[mask], values.flatten()[mask])  # exactly, whatever the noise
    assert (A[mask] == 0).all()
    assert A[~mask][:, mask].abs().max() < 1e-9  # and the noise there reaches nothing


@pytest.mark.parametrize("known", [None, LAYOUT.known], ids=["joint", "pinned"])
def test_an_exact_draft_leaves_the_distribution_as_it_is(trajectories, known):
    """Trajectory Diffuser: noised to t_start and solved back, draws of p are draws of p."""
    process, values = VPCosine(), torch.zeros(1, 4, 3, dtype=torch.float64)
    values[0, 0, :2] = torch.tensor([0.7, -0.4])
    denoiser, law, free = trajectories.denoiser(process, known), trajectories, slice(None)
    if known is not None:
        free = ~known.flatten()
        denoiser = Pinned(denoiser, known)
        law = trajectories.given(known.flatten(), values.flatten())
    for t_start in (0.2, 0.5):

        def run(x, t_start=t_start):
            start = truncated_start(process, x, t_start, torch.zeros_like(x))
            scaled = start._replace(x=x)  # the map from x_t, not from the draft
            cond = None if known is None else PinCond(None, values.expand_as(x))
            return solve(denoiser, scaled, cond, num_steps=40)

        A, b = affine(run, 12)
        A = A[free][:, free]
        t = torch.tensor(t_start, dtype=torch.float64)
        alpha, sigma = process.alpha(t), process.sigma(t)
        noisy = alpha**2 * law.cov + sigma**2 * torch.eye(len(law.cov), dtype=torch.float64)
        torch.testing.assert_close(A @ noisy @ A.T, law.cov, rtol=0, atol=1e-3)
        mean = A @ (alpha * law.mean) + b[free]
        torch.testing.assert_close(mean, law.mean, rtol=0, atol=1e-3)


def test_drafts_drawn_and_noised_keep_their_moments(trajectories):
    process, generator = VPCosine(), torch.Generator().manual_seed(0)
    root = torch.linalg.cholesky(trajectories.cov)
    z = torch.randn(2, 20_000, 12, dtype=torch.float64, generator=generator)
    drafts = (trajectories.mean + z[0] @ root.T).view(-1, 4, 3)
    start = truncated_start(process, drafts, 0.4, z[1].view(-1, 4, 3))
    out = solve(trajectories.denoiser(process), start, num_steps=10).flatten(1)
    torch.testing.assert_close(out.mean(0), trajectories.mean, rtol=0, atol=0.04)
    torch.testing.assert_close(out.T.cov(), trajectories.cov, rtol=0, atol=0.06)
    assert (out - drafts.flatten(1)).std() > 0.1  # other plans, the same law


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp_2m", "unipc", "heun"])
def test_known_entries_end_at_their_values_with_every_solver(name):
    process = VPCosine()
    seen = []

    def x0_hat(x, t, cond):
        seen.append(x[:, 0, :2])
        return torch.tanh(x)

    pinned = Pinned(AnalyticDenoiser(process, x0_hat), LAYOUT.known)
    values = torch.randn(3, 4, 3, dtype=torch.float64)
    start = prior_start(process, torch.randn(3, 4, 3, dtype=torch.float64))
    out = sample(pinned, make_solver(name), start, levels(start, 6), cond=PinCond(None, values))
    assert torch.equal(out[:, 0, :2], values[:, 0, :2])
    assert all(torch.equal(x, values[:, 0, :2]) for x in seen)  # clean in every input
    assert not torch.allclose(out[:, 1:], values[:, 1:])


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_wrappers_compose_and_precomputed_modulations_pass_through(scale):
    """Pinned(ValueGuidance(ClassifierFreeGuidance(Denoiser))) on a grid, against by hand."""
    torch.manual_seed(0)
    process = VPCosine()
    network = make_network({"type": "mlp", "horizon": 4, "dim": 3, "cond_dim": 1, "width": 16})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    denoiser = Denoiser(network, process, "x0")
    guided = ClassifierFreeGuidance(denoiser, scale)
    value = ValueGuidance(guided, lambda x, t, cond: (cond * x.square().mean(1)).sum(-1), 0.3)
    pinned = Pinned(value, LAYOUT.known)
    values, cond = torch.randn(5, 4, 3), torch.rand(5, 1)
    start = prior_start(process, torch.randn(5, 4, 3))
    solver, grid = make_solver("ddim"), levels(start, 4)
    with torch.no_grad():
        prepared = prepare(pinned, solver, grid, start.x)
        films = prepared.denoise.modulations(start.x, PinCond(cond, values))
        assert len(films) == 4
        assert len(films[0]) == (5 if scale == 1 else 10)
        out = sample(pinned, solver, start, prepared, cond=PinCond(cond, values))
        x = start.x
        for t, s in pairwise(grid):
            seen = torch.where(LAYOUT.known, values, x)
            on, off = (denoiser(seen, t, c).x0_hat for c in (cond, torch.zeros_like(cond)))
            alpha, sigma = process.alpha(t), process.sigma(t)
            slope = 2 / 4 * cond[:, None] * seen
            x0_hat = off + scale * (on - off) + (0.3 * sigma**2 / alpha).float() * slope
            x0_hat = torch.where(LAYOUT.known, values, x0_hat)
            noise = (x - alpha * x0_hat) / sigma
            x = (process.alpha(s) * x0_hat + process.sigma(s) * noise).float()
    torch.testing.assert_close(out, x, rtol=0, atol=1e-4)


def test_unconditional_network():
    network = make_network({"type": "mlp", "horizon": 4, "dim": 3, "width": 16})
    pinned = Pinned(Denoiser(network, VPCosine(), "x0"), LAYOUT.known)
    values = torch.randn(2, 4, 3)
    start = prior_start(pinned.process, torch.randn(2, 4, 3))
    given = PinCond(None, values)
    with torch.no_grad():
        out = sample(pinned, make_solver("ddim"), start, levels(start, 3), cond=given)
    assert torch.equal(out[:, 0, :2], values[:, 0, :2])
    assert "known" not in pinned.state_dict()


def test_errors():
    denoiser = AnalyticDenoiser(VPCosine(), lambda x, t, cond: x)
    for known in (torch.ones(1, 4, 3), torch.ones(4, 3, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"known must be a bool tensor \[1, H, D\]"):
            Pinned(denoiser, known)
    pinned = Pinned(denoiser, LAYOUT.known)
    x, t = torch.zeros(2, 4, 3), torch.full((1, 1, 1), 0.5)
    with pytest.raises(ValueError, match=r"needs cond=PinCond.*got NoneType"):
        pinned(x, t)
    with pytest.raises(ValueError, match=r"needs cond=PinCond.*got Tensor"):
        pinned.on_grid(t[None])(0, x, x)
