"""Costs of plans: slopes against differences, moves against closed forms."""

from __future__ import annotations

import pytest
import torch

from diffpolicy.core import AnalyticDenoiser, VPCosine, levels, make_solver, prior_start, sample
from diffpolicy.guidance.cost_guidance import CostCond, CostGuidance
from diffpolicy.guidance.costs import Cost, Dynamics, Limits, Obstacle, Smoothness

MOVES = {"gain": 0.5, "start": (2, 0, 1)}
BALL = {"center": (0.2, -0.1, 0.4), "radius": 0.8, "margin": 0.1}
COSTS = {
    "sphere of positions": Obstacle((0, 1, 2), **BALL),
    "sphere of moves": Obstacle((2, 0, 1), **BALL, **MOVES),
    "box of moves": Obstacle(
        (0, 1, 2), center=(0.2, -0.1, 0.4), half_size=(0.6, 0.9, 0.7), margin=0.2, **MOVES
    ),
    "limits": Limits((3, 1), low=(-0.3, -0.2), high=(0.5, 0.1)),
    "limits of moves": Limits((0, 1), high=(0.5, 0.1), gain=(0.2, 0.3), start=(0, 2)),
    "smooth": Smoothness((0, 3), order=2),
    "total variation": Smoothness(kind="tv", corner=0.05),
    "dynamics": Dynamics((0, 1), (2, 3), gain=(0.3, 0.7)),
}


class Plain:
    """Plans in physical units already."""

    closed_form = True

    def raw(self, plan, obs):
        return plan

    def pulled(self, slope, plan, obs):
        return slope


def drawn(seed=0, rows=6, horizon=7):
    generator = torch.Generator().manual_seed(seed)
    plan = torch.randn(rows, horizon, 4, dtype=torch.float64, generator=generator)
    return plan, torch.randn(rows, 2, 3, dtype=torch.float64, generator=generator)


def guided(costs, denoise=lambda x, t, cond: cond[:, None] * torch.ones_like(x), **how):
    return CostGuidance(AnalyticDenoiser(VPCosine(), denoise), costs, Plain(), **how)


@pytest.mark.parametrize("name", COSTS)
def test_slopes_are_those_of_the_cost(name):
    cost, (plan, obs) = COSTS[name], drawn()
    value, slope = cost.slope(plan, obs)
    torch.testing.assert_close(cost(plan, obs), value)
    direction = torch.randn_like(plan)
    ahead, behind = (cost(plan + step * direction, obs) for step in (1e-6, -1e-6))
    torch.testing.assert_close(
        (ahead - behind) / 2e-6, (slope * direction).sum((1, 2)), rtol=1e-5, atol=1e-6
    )
    assert (value > 0).any()
    if name != "dynamics":  # which is of whole plans, the past included
        assert not slope[:, 0].any()


def test_a_sideways_push_leads_out_and_does_not_brake():
    """Positions of a straight way through the sphere leave it, orthogonal to the way."""
    cost = Obstacle((0, 1, 2), center=(1.0, 0.1, 0.0), radius=0.5, push="lateral", gain=1.0,
                    start=(0, 1, 2))  # fmt: skip
    plan = torch.zeros(1, 9, 4, dtype=torch.float64)
    plan[:, 1:, 0] = 0.25  # from 0 to 2 along the first axis
    obs = torch.zeros(1, 2, 3, dtype=torch.float64)
    here, path = cost.positions(plan, obs)
    depth, out = cost._sideways(here - cost.center, path - cost.center)
    below = torch.tensor([0.0, -1.0, 0.0], dtype=torch.float64)  # where the way passes the center
    torch.testing.assert_close(out[0, 0], below, rtol=0, atol=1e-3)
    far = (path + depth[..., None] * out - cost.center).norm(dim=-1)
    inside = (path - cost.center).norm(dim=-1) < 0.5
    assert inside.sum() >= 3
    assert ((far[inside] > 0.98 * 0.5) & (far[inside] < 0.5 + 1e-9)).all()
    assert not depth[~inside].any()
    assert not cost.slope(plan, obs)[1][..., 0].any()
    centered = Obstacle((0, 1, 2), center=(1.0, 0.0, 0.0), radius=0.5, push="lateral", gain=1.0,
                        start=(0, 1, 2))  # fmt: skip
    slope = centered.slope(plan, obs)[1]
    assert slope[..., 1:3].any()
    assert not slope[..., 0].any()


def test_one_polyak_step_mends_a_linear_violation_whatever_its_units():
    plan, obs = drawn()
    for unit in (1e-3, 1.0, 1e3):
        cost = Limits((1,), high=(0.1 * unit,))
        model = guided([cost], lambda x, t, cond, unit=unit: unit * plan)
        t = torch.full((1, 1, 1), 0.3, dtype=torch.float64)
        one = torch.zeros_like(plan)
        one[:, 4] = 1  # a single entry is too high: one linear constraint
        plan[:, 1:, 1] = torch.where(one[:, 1:, 1] > 0, 0.7, -0.5)
        out = model(plan, t, CostCond(None, obs)).x0_hat
        torch.testing.assert_close(out[:, 4, 1], torch.full_like(out[:, 4, 1], 0.1 * unit))
        rest = torch.ones_like(plan, dtype=torch.bool)
        rest[:, 4, 1] = False
        assert torch.equal(out[rest], (unit * plan)[rest])


class Quadratic(Cost):
    def forward(self, plan, obs):
        return 0.5 * 0.02 * (plan - obs[:, -1:, :1]).square().sum((1, 2))


def test_the_guided_mean_of_a_quadratic_cost_in_closed_form():
    """Through the network a gradient step is that of the tilted law, to first order of the cost."""
    process, horizon = VPCosine(), 5
    lag = torch.arange(horizon)[:, None] - torch.arange(horizon)
    cov = 0.8 ** lag.abs().double()
    t = torch.full((1, 1, 1), 0.4, dtype=torch.float64)
    alpha, sigma = process.alpha(t).item(), process.sigma(t).item()
    eye = torch.eye(horizon, dtype=torch.float64)
    gain = alpha * cov @ torch.linalg.inv(alpha**2 * cov + sigma**2 * eye)
    left = cov - alpha * gain @ cov  # Cov[x0 | x_t]
    x, obs = torch.randn(3, horizon, 1, dtype=torch.float64), torch.ones(3, 1, 1).double()
    cost = Quadratic(step="gradient")
    how = {"mode": "network", "window": (0.0, 1.0)}
    model = guided([cost], lambda x, t, cond: gain @ x, **how)
    with torch.no_grad():
        out = model(x, t, CostCond(None, obs)).x0_hat
    mean = gain @ x
    torch.testing.assert_close(out, mean - left @ (0.02 * (mean - 1)), rtol=0, atol=1e-12)
    tilted = torch.linalg.solve(eye + 0.02 * left, mean + 0.02 * left.sum(1, keepdim=True))
    assert (out - tilted).abs().max() < 0.05 * (mean - tilted).abs().max()
    # Of white data the plain slope points the same way.
    white = guided([cost], lambda x, t, cond: 0.6 * x, mode="estimate")
    black = guided([cost], lambda x, t, cond: 0.6 * x, **how)
    moves = [m(x, t, CostCond(None, obs)).x0_hat - 0.6 * x for m in (white, black)]
    ratio = moves[0] / moves[1]
    assert (ratio > 0).all()
    torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio))


def test_projected_samples_obey_and_windows_and_known_entries_are_kept():
    process, obs = VPCosine(), torch.zeros(16, 1, 3, dtype=torch.float64)
    start = prior_start(process, torch.randn(16, 6, 2, dtype=torch.float64))
    grid = levels(start, 8)
    cost = Limits((0, 1), high=(0.1, 0.2), gain=1.0, start=(0, 1))
    wild = AnalyticDenoiser(process, lambda x, t, cond: 0.9 * x)
    cond = CostCond(None, obs)
    for name in ("ddim", "dpmpp_2m", "unipc", "heun"):
        solver = make_solver(name)
        plain = sample(wild, solver, start, grid)
        kept = CostGuidance(wild, [cost], Plain(), project=60)
        out = sample(kept, solver, start, grid, cond=cond)
        assert cost(plain, obs).mean() > 1
        assert cost(out, obs).max() < 1e-6
    for idle in ({"scale": 0.0}, {"window": (0.0, 1e-6)}):
        unmoved = CostGuidance(wild, [cost], Plain(), **idle)
        assert torch.equal(sample(unmoved, solver, start, grid, cond=cond), plain)
    free = torch.ones(1, 6, 2, dtype=torch.bool)
    free[:, :2] = False
    part = CostGuidance(wild, [cost], Plain(), free=free)
    t = torch.full((1, 1, 1), 0.5, dtype=torch.float64)
    moved = part(start.x, t, cond).x0_hat - 0.9 * start.x
    assert not moved[:, :2].any()
    assert moved[:, 2:].any()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Obstacle((0,), center=(0.0,)), "either a sphere"),
        (lambda: Obstacle((0,), center=(0.0, 1.0), radius=1.0), "center must have 1"),
        (lambda: Obstacle((0,), center=(0.0,), half_size=(1.0,), push="lateral"), "spheres"),
        (lambda: Obstacle((0, 1), center=(0.0, 0.0), radius=1.0, gain=0.1), "start"),
        (lambda: Limits((0,)), "limits need low"),
        (lambda: Limits((0,), low=(0.0,), step="polyack"), "did you mean 'polyak'"),
        (lambda: Smoothness(kind="tvv"), "did you mean 'tv'"),
        (lambda: Dynamics((0,), (1, 2), gain=1.0), "one entry of action"),
        (lambda: guided([]), "at least one cost"),
        (lambda: guided([Quadratic()], mode="network", iterations=2), "iterations=1"),
        (lambda: guided([Smoothness()], project=2), "there is none"),
        (lambda: guided([Quadratic()])(*[torch.zeros(1, 2, 1)] * 3), "CostCond"),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
