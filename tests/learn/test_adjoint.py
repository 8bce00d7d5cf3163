"""The probability-flow ODE: its exact map and gradient, orders, and agreement with autograd."""

from __future__ import annotations

import math

import pytest
import torch
from finetune_tilted_mixture import MixtureDenoiser, one_dimensional
from torch import nn

from diffpolicy.core import (
    AnalyticDenoiser,
    Denoiser,
    explicit_levels,
    levels,
    make_process,
    make_solver,
    prior_start,
    sample,
    truncated_start,
)
from diffpolicy.core.denoiser import BaseDenoiser, Denoised
from diffpolicy.core.starts import Start
from diffpolicy.learn.reward.adjoint import probability_flow

PROCESSES = ("vp_cosine", "vp_linear", "edm", "flow")
B, H, D, C = 3, 2, 2, 4


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def start_of(process, *shape, dtype=torch.float64):
    start = prior_start(process, normal(*shape, dtype=dtype))
    return Start(start.x.requires_grad_(), start.t)


class GaussianDenoiser(BaseDenoiser):
    """Exact for ``N(mean + cond, std^2)``."""

    def __init__(self, process, mean=0.3, std=0.4):
        super().__init__()
        self.process = process
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.std = nn.Parameter(torch.tensor(std, dtype=torch.float64))

    def forward(self, x_t, t, cond=None):
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        mean = self.mean if cond is None else self.mean + cond[:, None]
        gain = alpha * self.std**2 / ((alpha * self.std) ** 2 + sigma**2)
        return Denoised(mean + gain * (x_t - alpha * mean))

    def transported(self, start, end, cond):
        """The flow's map, in closed form: the standardised state does not change."""
        process, mean = self.process, self.mean + cond[:, None]
        spread = lambda t: ((process.alpha(t) * self.std) ** 2 + process.sigma(t) ** 2).sqrt()  # noqa: E731
        standard = (start.x - process.alpha(start.t) * mean) / spread(start.t)
        end = torch.full_like(start.t, end)
        return process.alpha(end) * mean + spread(end) * standard


class SmoothMLP(nn.Module):
    """A network that varies slowly with the level, as trained ones do."""

    t_kinds = frozenset({"row"})

    def __init__(self, time_scale):
        super().__init__()
        self.time_scale = time_scale
        self.inward, self.outward = nn.Linear(H * D + C + 1, 16), nn.Linear(16, H * D)

    def embed_time(self, t):
        return self.time_scale * t[..., 0, :]

    def forward(self, x, t, cond=None, *, time_emb=None):
        time = (self.embed_time(t) if time_emb is None else time_emb).expand(len(x), 1)
        return self.outward(self.inward(torch.cat([x.flatten(1), time, cond], 1)).tanh()).view_as(x)


def mlp(name, dtype=torch.float64):
    torch.manual_seed(0)
    prediction = "velocity" if name == "flow" else "edm"
    network = SmoothMLP(1e-3 if name == "flow" else 1.0)
    return Denoiser(network, make_process(name), prediction).to(dtype)


def gradients(y, *inputs):
    weights = normal(*y.shape, seed=9).to(y.dtype)
    return torch.autograd.grad((weights * y + 0.5 * y**2).sum(), inputs, allow_unused=True)


def worst(got, wanted):
    """Largest error of a list of gradients, each relative to its own size."""
    return max(
        float((a - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True) if b.norm() > 0
    )


@pytest.mark.parametrize("adjoint", ["continuous", "discrete"])
@pytest.mark.parametrize("name", PROCESSES)
def test_gaussian_map_and_its_gradient_are_the_closed_form(name, adjoint):
    process = make_process(name)
    denoise, start = GaussianDenoiser(process), start_of(process, B, H, D)
    cond = (0.1 * normal(B, D, seed=1)).requires_grad_()
    inputs = (denoise.mean, denoise.std, start.x, cond)
    for end in (0.05, 0.0):
        grid = levels(start, 2, end=end, spacing="karras", process=process, t_min=1e-5)
        y = probability_flow(
            denoise, start, grid, method="dopri5", cond=cond, adjoint=adjoint, rtol=1e-6, atol=1e-7
        )
        wanted = denoise.transported(start, end, cond)
        torch.testing.assert_close(y, wanted, rtol=0, atol=1e-5)
        assert worst(gradients(y, *inputs), gradients(wanted, *inputs)) < 1e-4


@pytest.mark.parametrize(("name", "spacing"), [("vp_cosine", "karras"), ("flow", "t")])
def test_orders_of_the_map_and_of_its_gradient(name, spacing):
    process, prior = make_process(name), one_dimensional().prior
    denoise, start = MixtureDenoiser(process, prior), start_of(process, 4, 1, 1)
    inputs = (start.x, *denoise.parameters())

    def solve(num_steps, method, **tolerances):
        grid = levels(start, num_steps, end=0.1, spacing=spacing, process=process)
        y = probability_flow(denoise, start, grid, method=method, **tolerances)
        return y.detach(), gradients(y, *inputs)

    exact, exact_gradient = solve(1, "dopri5", rtol=1e-7, atol=1e-8)
    for method, order, coarse in (("euler", 1, 24), ("midpoint", 2, 16), ("rk4", 4, 8)):
        errors = []
        for num_steps in (coarse, 4 * coarse):
            y, gradient = solve(num_steps, method)
            errors.append((float((y - exact).norm()), worst(gradient, exact_gradient)))
        for first, second in zip(*errors, strict=True):
            assert math.log(first / second, 4) == pytest.approx(order, abs=0.4)


@pytest.mark.parametrize("name", PROCESSES)
def test_gradients_of_a_network_are_those_of_autograd(name):
    denoise = mlp(name)
    start, cond = start_of(denoise.process, B, H, D), normal(B, C, seed=2).requires_grad_()
    denoise.network.outward.bias.requires_grad_(False)
    inputs = (start.x, cond, *(p for p in denoise.parameters() if p.requires_grad))
    spacing = "t" if name == "flow" else "karras"
    grid = levels(start, 32, spacing=spacing, process=denoise.process)
    for method, tolerance in (("euler", None), ("rk4", 2e-4), ("dopri5", 1e-4)):
        run, rows = {}, [0, -2, -1] if method == "dopri5" else slice(None)
        for adjoint in ("none", "discrete", "continuous"):
            y = probability_flow(
                denoise, start, grid[rows], method=method, cond=cond, adjoint=adjoint, rtol=1e-6
            )
            run[adjoint] = (y.detach(), gradients(y, *inputs))
        assert torch.equal(run["none"][0], run["discrete"][0])
        assert worst(run["discrete"][1], run["none"][1]) < 1e-10
        if tolerance is not None:  # Euler's chain is not its own inverse
            assert worst(run["continuous"][1], run["none"][1]) < tolerance


def test_float32_and_dropped_inputs():
    denoise = mlp("vp_cosine", torch.float32)
    noise, cond = normal(B, H, D, dtype=torch.float32), normal(B, C, seed=2, dtype=torch.float32)
    start = prior_start(denoise.process, noise)  # neither it nor cond requires a gradient
    grid = levels(start, 24, spacing="karras", process=denoise.process)
    parameters = tuple(denoise.parameters())
    for method, adjoint in (("rk4", "discrete"), ("rk4", "continuous"), ("dopri5", "continuous")):
        run = lambda kind, method=method: probability_flow(  # noqa: E731
            denoise, start, grid, method=method, cond=cond, adjoint=kind
        )
        y, plain = run(adjoint), run("none")
        assert y.dtype == torch.float32
        assert worst(gradients(y, *parameters), gradients(plain, *parameters)) < 2e-3
    denoise.requires_grad_(False)
    assert not run("continuous").requires_grad


def test_euler_is_ddim_and_so_is_its_gradient():
    denoise = mlp("vp_cosine")
    start, cond = start_of(denoise.process, B, H, D), normal(B, C, seed=2).requires_grad_()
    inputs = (start.x, cond, *denoise.parameters())
    for spacing in ("t", "karras"):
        grid = levels(start, 12, spacing=spacing, process=denoise.process)
        wanted = sample(denoise, make_solver("ddim"), start, grid, cond=cond)
        y = probability_flow(denoise, start, grid, method="euler", cond=cond, adjoint="discrete")
        torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-9)
        assert worst(gradients(y, *inputs), gradients(wanted, *inputs)) < 1e-6


def test_a_discrete_schedule_and_the_step_to_clean_alone():
    process = make_process("ddpm_cosine")
    denoise = GaussianDenoiser(process)
    start, cond = start_of(process, B, H, D), normal(B, D, seed=1)
    wanted = denoise.transported(start, 0.0, cond)
    grid = levels(start, 100, spacing="karras", process=process)
    y = probability_flow(denoise, start, grid, method="rk4", cond=cond)
    torch.testing.assert_close(y, wanted, rtol=0, atol=2e-3)
    grid = levels(start, 1)
    y = probability_flow(denoise, start, grid, cond=cond)
    assert torch.equal(y, denoise(start.x, start.t, cond).x0_hat)
    (by_mean,) = gradients(y, denoise.mean)
    (plain,) = gradients(denoise(start.x, start.t, cond).x0_hat, denoise.mean)
    torch.testing.assert_close(by_mean, plain)


@pytest.mark.parametrize("adjoint", ["continuous", "discrete"])
@pytest.mark.parametrize("method", ["midpoint", "dopri5"])
def test_rows_at_levels_of_their_own(method, adjoint):
    denoise = mlp("vp_linear")
    plan, cond, noise = normal(B, H, D), normal(B, C, seed=2), normal(B, H, D, seed=3)
    level = torch.tensor([0.3, 0.6, 1.0], dtype=torch.float64).view(B, 1, 1)
    parameters = tuple(denoise.parameters())

    def solve(rows):
        start = truncated_start(denoise.process, plan[rows], level[rows], noise[rows])
        grid = levels(start, 12, spacing="karras", process=denoise.process)
        y = probability_flow(
            denoise, start, grid, method=method, cond=cond[rows], adjoint=adjoint, rtol=1e-6
        )
        return y.detach(), torch.autograd.grad(y.square().sum(), parameters)

    together, gradient = solve(slice(None))
    single = [solve(slice(row, row + 1)) for row in range(B)]
    torch.testing.assert_close(together, torch.cat([y for y, _ in single]), rtol=0, atol=1e-5)
    summed = [sum(parts) for parts in zip(*(g for _, g in single), strict=True)]
    assert worst(gradient, summed) < 1e-4


def test_tolerance_bounds_the_error_whatever_the_grid():
    process, prior = make_process("vp_cosine"), one_dimensional().prior
    denoise, start = MixtureDenoiser(process, prior), start_of(process, 8, 1, 1)
    calls = []
    denoise.register_forward_hook(lambda *_: calls.append(1))

    def solve(rtol, num_steps=1):
        calls.clear()
        grid = levels(start, num_steps, end=0.02, spacing="karras", process=process)
        with torch.no_grad():
            return probability_flow(denoise, start, grid, method="dopri5", rtol=rtol, atol=rtol)

    exact = solve(1e-9)
    cost = []
    for rtol in (1e-3, 1e-6):
        for num_steps in (1, 8):
            assert (solve(rtol, num_steps) - exact).abs().max() < 30 * rtol
        cost.append(len(calls))
    assert cost == sorted(set(cost))


def saved_tensors(run):
    """How many tensors the graph of ``run()`` keeps, and their elements."""
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    assert result.requires_grad
    return len(sizes), sum(sizes)


def test_memory_does_not_grow_with_steps():
    denoise = mlp("vp_cosine")
    start, cond = start_of(denoise.process, B, H, D), normal(B, C, seed=2)

    def kept(num_steps, adjoint):
        grid = levels(start, num_steps, spacing="karras", process=denoise.process)
        return saved_tensors(
            lambda: probability_flow(denoise, start, grid, cond=cond, adjoint=adjoint)
        )

    assert kept(4, "continuous") == kept(40, "continuous")
    few, many = kept(4, "discrete"), kept(40, "discrete")
    assert (many[0] - few[0], many[1] - few[1]) == (36, 36 * B * H * D)  # one state per step
    assert kept(40, "none")[0] > 20 * many[0]


def test_bfloat16_autocast_is_the_same_in_both_passes():
    """And the weights that it casts without a graph do not reach what is evaluated beside it."""
    denoise = mlp("vp_cosine", torch.float32)
    start = prior_start(denoise.process, normal(B, H, D, dtype=torch.float32))
    cond = normal(B, C, seed=2, dtype=torch.float32)
    grid = levels(start, 6, spacing="karras", process=denoise.process)
    parameters = tuple(denoise.parameters())
    weight = denoise.network.inward.weight
    run = {}
    for adjoint in ("none", "discrete"):
        with torch.autocast("cpu", torch.bfloat16):
            y = probability_flow(denoise, start, grid, cond=cond, adjoint=adjoint)
            beside = denoise(start.x, start.t, cond).x0_hat
        assert torch.autograd.grad(beside.sum(), weight)[0].any()
        run[adjoint] = y.detach(), gradients(y, *parameters)
    torch.testing.assert_close(*(run[a][0] for a in run), rtol=0, atol=0)
    assert worst(run["discrete"][1], run["none"][1]) < 0.03


def test_ascent_of_the_reward_reaches_the_tilted_optimum():
    """Reward and divergence at the end of the flow; the law's own score is dropped from both.

    Its expectation is 0, and without it the gradient vanishes draw by draw at the optimum
    (Roeder et al. 2017).
    """
    problem, process = one_dimensional(), make_process("flow")
    denoise = MixtureDenoiser(process, problem.prior)
    quantiles = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    start = prior_start(process, torch.special.ndtri(quantiles)[:, None, None])
    grid = levels(start, 10)
    optimizer = torch.optim.Adam(denoise.parameters(), 0.05, betas=(0.8, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, 2 - i / 20))
    for _ in range(40):
        x = probability_flow(denoise, start, grid, method="midpoint")
        ratio = denoise.frozen().log_prob(x[:, 0]) - problem.prior.log_prob(x[:, 0])
        optimizer.zero_grad()
        (problem.kl_weight * ratio - problem.reward(x)).mean().backward()
        optimizer.step()
        schedule.step()
    law, best = denoise.frozen(), problem.optimum
    assert problem.progress(law) > 0.99
    # Those of the prior are 0.60 and 0.84 away.
    torch.testing.assert_close(law.mean(), best.mean(), rtol=0, atol=0.03)
    reward, highest = problem.expected_reward(law), problem.expected_reward(best)
    torch.testing.assert_close(reward, highest, rtol=0, atol=0.03)
    with torch.no_grad():  # and the flow's own law is the denoiser's
        x = probability_flow(denoise, start, levels(start, 50))
    torch.testing.assert_close(x[:, 0].mean(0), law.mean(), rtol=0, atol=0.01)


BAD = {
    "method": (lambda d, s, g: probability_flow(d, s, g, method="heun"), "unknown method 'heun'"),
    "adjoint": (lambda d, s, g: probability_flow(d, s, g, adjoint="sde"), "unknown adjoint 'sde'"),
    "rtol": (lambda d, s, g: probability_flow(d, s, g, rtol=0), "must be positive"),
    "grid": (lambda d, s, g: probability_flow(d, s, 0.9 * g), "differs from start.t"),
    "short": (lambda d, s, g: probability_flow(d, s, g[:1]), "derive the grid"),
    "ascending": (lambda d, s, g: probability_flow(d, s, g[[0, 2, 1, 3]]), "must descend"),
    "clean": (lambda d, s, g: probability_flow(d, s, g[[0, 3, 3]]), "above 0 before the last"),
    "cond": (lambda d, s, g: probability_flow(d, s, g, cond=(s.x,)), "cond must be a tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    denoise = GaussianDenoiser(make_process("vp_cosine"))
    start = start_of(denoise.process, B, H, D)
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call(denoise, start, levels(start, 3))


def test_refusals():
    denoise = mlp("vp_cosine")
    rising = torch.linspace(0.2, 0.8, H, dtype=torch.float64).view(1, H, 1)
    ramp = truncated_start(denoise.process, normal(B, H, D), rising, normal(B, H, D))
    with pytest.raises(ValueError, match="per row"):
        probability_flow(denoise, ramp, levels(ramp, 3))
    start = start_of(denoise.process, B, H, D)
    grid = levels(start, 3)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"torch\.no_grad"):
        probability_flow(denoise, start, grid)
    blow_up = AnalyticDenoiser(denoise.process, lambda x, t, cond: x / 0)
    with pytest.raises(RuntimeError, match="does not meet rtol"):
        probability_flow(blow_up, start, grid, method="dopri5")
    noisy = GaussianDenoiser(denoise.process)
    noisy.dropout = nn.Dropout(0.1)
    with pytest.raises(ValueError, match=r"denoise\.eval\(\)"):
        probability_flow(noisy, start, grid)
    assert probability_flow(noisy.eval(), start, grid).requires_grad


def test_a_parameter_changed_before_backward_is_an_error():
    denoise = GaussianDenoiser(make_process("flow"))
    start = start_of(denoise.process, B, H, D)
    y = probability_flow(denoise, start, explicit_levels(start, [0.5, 0.1, 0.0]))
    with torch.no_grad():
        denoise.mean.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
