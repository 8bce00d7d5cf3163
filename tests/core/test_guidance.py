"""Guidance wrappers against closed forms."""

from __future__ import annotations

import pytest
import torch

from diffpolicy.core import (
    AnalyticDenoiser,
    ClassifierFreeGuidance,
    Guidance,
    Inpaint,
    VPCosine,
    VPLinear,
    levels,
    make_solver,
    prior_start,
    sample,
)


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


@pytest.mark.parametrize("name", ["ddim", "ddpm", "unipc", "heun"])
def test_inpainting_ends_at_the_known_values(name):
    process = VPCosine()
    denoiser = AnalyticDenoiser(process, lambda x, t, cond: torch.tanh(x))
    known = torch.zeros(1, 5, 2, dtype=torch.bool)
    known[:, 0] = True
    values = torch.full((1, 5, 2), 0.25, dtype=torch.float64)
    start = prior_start(process, torch.randn(3, 5, 2, dtype=torch.float64))
    out = sample(Inpaint(denoiser, known, values), make_solver(name), start, levels(start, 6))
    assert torch.equal(out[:, 0], values[:, 0].expand(3, 2))
    assert not torch.allclose(out[:, 1], values[:, 1].expand(3, 2))


def test_inpainted_state_follows_the_forward_process():
    """With DDIM the known entries are ``alpha value + sigma noise`` with the start's own noise.

    At every level.
    """
    process = VPCosine()
    denoiser = AnalyticDenoiser(process, lambda x, t, cond: torch.tanh(x))
    noise = torch.randn(1, 1, 1, dtype=torch.float64)
    value = torch.tensor([[[0.4]]], dtype=torch.float64)
    start = prior_start(process, noise)
    start = start._replace(x=process.add_noise(value, start.t, noise))
    wrapped = Inpaint(denoiser, torch.ones(1, 1, 1, dtype=torch.bool), value)
    trajectory = sample(wrapped, make_solver("ddim"), start, levels(start, 5), record=True)
    for step in trajectory.transitions:
        torch.testing.assert_close(
            step.x, process.add_noise(value, step.t, noise), rtol=0, atol=1e-12
        )


def test_errors():
    denoiser = AnalyticDenoiser(VPCosine(), lambda x, t, cond: x)
    with pytest.raises(ValueError, match="known must be a bool"):
        Inpaint(denoiser, torch.ones(1), torch.ones(1))
    with pytest.raises(ValueError, match="needs cond"):
        ClassifierFreeGuidance(denoiser, 2.0)(torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
