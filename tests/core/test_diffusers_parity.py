"""The same network, noise and levels through ``diffusers``: equal to 1e-5."""

from __future__ import annotations

import pytest
import torch

from diffpolicy.core import AnalyticDenoiser, DiscreteVP, levels, make_solver, prior_start, sample

diffusers = pytest.importorskip("diffusers", reason="needs the dev extra")
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # diffusers on numpy 2
T, N = 100, 10
BETAS = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": T}


def eps_network(x, step):
    """A smooth function of state and step index."""
    return torch.tanh(0.7 * x + 0.3 * torch.sin(step / 17.0)) + 0.1 * x


@pytest.fixture
def denoiser():
    process = DiscreteVP.cosine(T)

    def x0_hat(x, t, cond):
        return (x - process.sigma(t) * eps_network(x, process.network_time(t))) / process.alpha(t)

    return AnalyticDenoiser(process, x0_hat)


def theirs(scheduler, x, generator=None):
    scheduler.set_timesteps(N)
    for step in scheduler.timesteps:
        options = {} if generator is None else {"generator": generator}
        x = scheduler.step(eps_network(x, step.double()), step, x, **options).prev_sample
    return x


def ours(denoiser, solver, x, generator=None):
    start = prior_start(denoiser.process, x)
    start = start._replace(x=x)  # their start is N(0, 1), unscaled by sigma(1)
    noise = (
        None
        if generator is None
        else torch.stack(
            [torch.randn(x.shape, generator=generator, dtype=x.dtype) for _ in range(N)]
        )
    )
    return sample(denoiser, solver, start, levels(start, N, process=denoiser.process), noise=noise)


@pytest.mark.parametrize(
    ("scheduler", "options", "solver"),
    [
        (
            "DDPMScheduler",
            {"clip_sample": False, "timestep_spacing": "trailing"},
            make_solver("ddpm"),
        ),
        (
            "DDIMScheduler",
            {"clip_sample": False, "timestep_spacing": "trailing"},
            make_solver("ddim"),
        ),
        (
            "DPMSolverMultistepScheduler",
            {"timestep_spacing": "trailing", "solver_order": 2},
            make_solver("dpmpp_2m"),
        ),
        (
            "DPMSolverMultistepScheduler",
            {"timestep_spacing": "trailing", "solver_order": 2, "solver_type": "heun"},
            make_solver("dpmpp_2m", midpoint=False),
        ),
        (
            "DPMSolverMultistepScheduler",
            {"timestep_spacing": "trailing", "solver_order": 3},
            make_solver("dpmpp_3m", damped=True),
        ),
        (
            "UniPCMultistepScheduler",
            {"timestep_spacing": "trailing", "solver_order": 2},
            make_solver("unipc"),
        ),
        (
            "UniPCMultistepScheduler",
            {"timestep_spacing": "trailing", "solver_order": 3},
            make_solver("unipc", order=3),
        ),
    ],
    ids=["ddpm", "ddim", "2m", "2m-heun", "3m", "unipc2", "unipc3"],
)
def test_agrees_with_diffusers(denoiser, scheduler, options, solver):
    x = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    extra = {"final_sigmas_type": "zero"} if "Multistep" in scheduler else {}
    reference = getattr(diffusers, scheduler)(**BETAS, **options, **extra)
    seeds = (
        [torch.Generator().manual_seed(7) for _ in range(2)]
        if scheduler == "DDPMScheduler"
        else [None, None]
    )
    left, right = theirs(reference, x, seeds[0]), ours(denoiser, solver, x, seeds[1])
    torch.testing.assert_close(right, left, rtol=1e-5, atol=1e-5)
