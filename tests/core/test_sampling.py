"""The loop: cut grids, row independence, gradients, noise, records, finer levels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffpolicy.core import (
    EDM,
    Denoiser,
    DiscreteVP,
    FlowMatching,
    Ramp,
    Start,
    VPCosine,
    levels,
    make_solver,
    prepare,
    prior_start,
    ramp_start,
    sample,
    truncated_start,
)


class TinyNetwork(nn.Module):
    """A smooth network that takes levels of every kind, with its own time embedding."""

    t_kinds = frozenset({"row", "position", "dim"})

    def __init__(self, dim: int = 2, cond_dim: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape):
            values = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return nn.Parameter(0.5 * values)

        self.w_x, self.w_c, self.w_t = weight(dim, dim), weight(cond_dim, dim), weight(dim)

    def embed_time(self, t):
        return (t / 1000).cos() * self.w_t

    def forward(self, x, t, cond=None, *, time_emb=None):
        emb = self.embed_time(t) if time_emb is None else time_emb
        shift = 0 if cond is None else (cond @ self.w_c).unsqueeze(1)
        return torch.tanh(x @ self.w_x + emb + shift)


@pytest.fixture
def denoiser():
    return Denoiser(TinyNetwork(), VPCosine(), "v")


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "heun", "euler"])
@pytest.mark.parametrize("cut", [1, 4])
def test_cut_grid_equals_whole_grid_bit_for_bit(denoiser, name, cut):
    solver, cond = make_solver(name), noise(5, 3)
    start = prior_start(denoiser.process, noise(5, 4, 2))
    grid = levels(start, 6)
    per_step = 2 if name == "heun" else 1
    loop_noise = noise(prepare(denoiser, solver, grid, start.x).nfe, 5, 4, 2)
    whole = sample(denoiser, solver, start, grid, cond=cond, noise=loop_noise)
    first = sample(
        denoiser, solver, start, grid[: cut + 1], cond=cond, noise=loop_noise[: cut * per_step]
    )
    second = sample(
        denoiser,
        solver,
        Start(first, grid[cut]),
        grid[cut:],
        cond=cond,
        noise=loop_noise[cut * per_step :],
    )
    assert torch.equal(second, whole)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp_3m", "unipc", "deis", "heun"])
def test_rows_are_independent(denoiser, name):
    solver, cond = make_solver(name), noise(6, 3)
    start = prior_start(denoiser.process, noise(6, 4, 2))
    grid = levels(start, 5)
    nfe = prepare(denoiser, solver, grid, start.x).nfe
    loop_noise = noise(nfe, 6, 4, 2)
    whole = sample(denoiser, solver, start, grid, cond=cond, noise=loop_noise)
    rows = torch.tensor([4, 1])
    part = sample(
        denoiser,
        solver,
        Start(start.x[rows], start.t),
        grid,
        cond=cond[rows],
        noise=loop_noise[:, rows],
    )
    torch.testing.assert_close(part, whole[rows], rtol=0, atol=1e-13)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize(("name", "k"), [("ddim", 2), ("ddpm", 3), ("unipc", 4)])
def test_grad_steps_equals_finite_differences(denoiser, name, k, checkpoint):
    """With the first steps frozen.

    The gradient is that of the function of the parameters in the last k steps.
    """
    solver, cond = make_solver(name), noise(2, 3)
    start = prior_start(denoiser.process, noise(2, 3, 2))
    grid = levels(start, 4)
    loop_noise = noise(4, 2, 3, 2)
    weight = denoiser.network.w_x
    direction = noise(2, 2, seed=5)

    def run(**options):
        return sample(denoiser, solver, start, grid, cond=cond, noise=loop_noise, **options)

    out = run(grad_steps=k, checkpoint=checkpoint).square().sum()
    (grad,) = torch.autograd.grad(out, weight)

    frozen = weight.detach().clone()

    def moved(eps):
        """Move the parameter for the last k evaluations only, inside the loop."""
        calls = {"n": 0}
        original = denoiser.network.forward

        def forward(*args, **kwargs):
            weight.data = frozen + (eps * direction if calls["n"] >= 4 - k else 0)
            calls["n"] += 1
            return original(*args, **kwargs)

        denoiser.network.forward = forward
        try:
            return run().square().sum().item()
        finally:
            denoiser.network.forward = original
            weight.data = frozen

    step = 1e-6
    with torch.no_grad():
        numeric = (moved(step) - moved(-step)) / (2 * step)
    assert (grad * direction).sum().item() == pytest.approx(numeric, rel=1e-6)


def test_grad_steps_zero_builds_no_graph_and_none_follows_the_caller(denoiser):
    solver = make_solver("ddim")
    start = prior_start(denoiser.process, noise(2, 3, 2))
    grid = levels(start, 3)
    assert sample(denoiser, solver, start, grid, grad_steps=0).grad_fn is None
    assert sample(denoiser, solver, start, grid).grad_fn is not None
    with torch.no_grad():
        assert sample(denoiser, solver, start, grid, grad_steps=3).grad_fn is None


def test_record_returns_the_law_of_every_transition(denoiser):
    solver = make_solver("ddpm")
    start = prior_start(denoiser.process, noise(2, 3, 2))
    loop_noise = noise(4, 2, 3, 2)
    trajectory = sample(denoiser, solver, start, levels(start, 4), noise=loop_noise, record=True)
    x = start.x
    for i, step in enumerate(trajectory.transitions):
        assert torch.equal(step.x, x)
        torch.testing.assert_close(step.x_next, step.mean + step.std * loop_noise[i])
        torch.testing.assert_close(step.denoised.x0_hat, denoiser(step.x, step.t).x0_hat)
        x = step.x_next
    assert torch.equal(x, trajectory.x0)


def test_generator_makes_stochastic_sampling_reproducible(denoiser):
    solver = make_solver("dpmpp_2m_sde")
    start = prior_start(denoiser.process, noise(2, 3, 2))
    a, b, c = (
        sample(
            denoiser, solver, start, levels(start, 4), generator=torch.Generator().manual_seed(seed)
        )
        for seed in (1, 1, 2)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "dpmpp_3m", "unipc", "deis"])
def test_finer_levels_equal_separate_rows(denoiser, name):
    """Levels per position, solved at once, equal every (separate) position with its own."""
    solver = make_solver(name)
    x0, z = noise(2, 4, 2), noise(2, 4, 2, seed=1)
    rising = torch.linspace(0.2, 1.0, 4, dtype=torch.float64).view(1, 4, 1)
    start = truncated_start(denoiser.process, x0, rising, z)
    whole = sample(denoiser, solver, start, levels(start, 5))
    for h in range(4):
        single = truncated_start(
            denoiser.process, x0[:, h : h + 1], float(start.t[0, h, 0]), z[:, h : h + 1]
        )
        part = sample(denoiser, solver, single, levels(single, 5))
        torch.testing.assert_close(whole[:, h : h + 1], part, rtol=0, atol=1e-12)


def test_clean_positions_stay(denoiser):
    x0 = noise(2, 4, 2)
    t = torch.tensor([0.0, 0.0, 0.5, 1.0], dtype=torch.float64).view(1, 4, 1)
    start = truncated_start(denoiser.process, x0, t, noise(2, 4, 2, seed=1))
    for name in ("ddim", "ddpm", "dpmpp_2m", "dpmpp_3m", "unipc", "deis", "heun"):
        out = sample(denoiser, make_solver(name), start, levels(start, 3))
        assert torch.equal(out[:, :2], x0[:, :2]), name
        assert out.isfinite().all(), name


def test_prepared_grid_equals_levels(denoiser):
    solver = make_solver("unipc")
    start = prior_start(denoiser.process, noise(3, 4, 2))
    grid = levels(start, 6, spacing="log_snr", process=denoiser.process)
    ready = prepare(denoiser, solver, grid, start.x)
    assert ready.nfe == 6
    assert torch.equal(
        sample(denoiser, solver, start, ready), sample(denoiser, solver, start, grid)
    )


@pytest.mark.parametrize("prediction", ["eps", "v", "x0", "edm", "velocity"])
@pytest.mark.parametrize(
    "process", [VPCosine(), DiscreteVP.cosine(100), EDM(), FlowMatching()], ids=lambda p: p.type
)
def test_every_prediction_recovers_x0_from_its_own_target(process, prediction):
    network = TinyNetwork()
    try:
        denoiser = Denoiser(network, process, prediction)
    except ValueError:
        assert (prediction == "velocity") != (process.type == "flow")
        return
    x0, z = noise(5, 4, 2), noise(5, 4, 2, seed=1)
    t = torch.tensor([0.05, 0.3, 0.6, 0.9, 0.99], dtype=torch.float64).view(5, 1, 1)
    x_t = process.add_noise(x0, t, z)
    target = denoiser.target(x0, z, t)
    network.forward = lambda *args, **kwargs: target
    torch.testing.assert_close(denoiser(x_t, t).x0_hat, x0, rtol=0, atol=1e-9)


def test_start_and_grid_must_agree(denoiser):
    start = truncated_start(denoiser.process, noise(2, 3, 2), 0.4, noise(2, 3, 2))
    other = prior_start(denoiser.process, noise(2, 3, 2))
    with pytest.raises(ValueError, match=r"levels\[0\] differs from start.t"):
        sample(denoiser, make_solver("ddim"), start, levels(other, 4))


def test_refused_at_construction():
    row_only = TinyNetwork()
    row_only.t_kinds = frozenset({"row"})
    denoiser = Denoiser(row_only, VPCosine(), "v")
    start = ramp_start(denoiser.process, noise(2, 4, 2), Ramp(4, 1, 1), noise(2, 4, 2))
    with pytest.raises(ValueError, match="not per position"):
        prepare(denoiser, make_solver("ddim"), levels(start, 2), start.x)
    with pytest.raises(ValueError, match="unknown prediction 'noise'"):
        Denoiser(row_only, VPCosine(), "noise")
    with pytest.raises(ValueError, match="alpha = 0"):
        Denoiser(row_only, FlowMatching(), "eps")
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        levels(start, 0)
    with pytest.raises(ValueError, match="unknown spacing"):
        levels(start, 2, spacing="cosine")
