"""Real-time iteration: closed forms of the Gaussian policy, then the bookkeeping per row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from policies_exact_gaussian import DIM, HORIZON, gaussian_planner

from diffpolicy.core import DDIM, levels, sample
from diffpolicy.core.processes import DiscreteVP
from diffpolicy.core.sampler import Sampler
from diffpolicy.core.starts import Start, shift_plan, truncated_start
from diffpolicy.policies.boundary import Gripper
from diffpolicy.policies.choose_level import ddim_contraction
from diffpolicy.policies.diffusion import DiffusionPlanner
from diffpolicy.policies.rti import RTI, LegacyRTI


def planned(planner: DiffusionPlanner, obs: np.ndarray, times: int) -> list[np.ndarray]:
    """Plans of ``times`` successive steps at one unchanged observation."""
    state, plans = planner.initial_state(range(len(obs))), []
    for _ in range(times):
        _, state = planner.act(obs, state, deterministic=True)
        plans.append(state.plan)
    return plans


@pytest.mark.parametrize("t_start", [0.1, 0.3, 0.7])
def test_contraction_and_fixed_point_have_their_closed_form(t_start: float) -> None:
    std, mean = 0.2, 0.4
    rti = RTI(t_start, num_steps=3)
    planner = gaussian_planner(std, rti=rti)
    process = planner.denoiser.process
    rate = float(ddim_contraction(process, rti.grid(process), torch.tensor(std)))
    plans = planned(planner, np.full((1, DIM), mean, np.float32), 60)
    # a' = C shift(a) + (1 - C) mean + noise part; the noise is the same every time.
    errors = [np.abs(a[0, -1] - plans[-1][0, -1]).max() for a in plans]
    assert errors[1] == pytest.approx(rate * errors[0], rel=1e-3)
    assert errors[2] == pytest.approx(rate**2 * errors[0], rel=1e-2, abs=1e-6)
    kept = rate / float(process.alpha(torch.tensor(t_start)))
    noise = float(process.sigma(torch.tensor(t_start))) * kept
    drawn = planner.draw_noise(planner.initial_state([0]), 1, True)[0, 0, -1].numpy()
    np.testing.assert_allclose(plans[-1][0, -1], mean + noise * drawn / (1 - rate), atol=1e-4)


def test_an_unchanged_observation_converges_to_the_mean_of_the_cold_answers() -> None:
    planner = gaussian_planner(0.05, rti=RTI(0.3, num_steps=3))
    obs = np.full((400, DIM), 0.3, np.float32)
    state = planner.initial_state(range(400))
    for _ in range(5):
        _, state = planner.act(obs, state)
    assert state.plan.mean() == pytest.approx(0.3, abs=5e-3)
    assert 0.01 < state.plan.std() < 0.06  # three steps lose some of the spread of 0.05


def test_a_start_at_one_is_the_cold_start_bit_for_bit() -> None:
    sampler = Sampler(num_steps=7)
    obs = np.random.default_rng(0).normal(size=(3, DIM)).astype(np.float32)
    runs = []
    for rti in (None, RTI(1.0, num_steps=7)):
        planner = gaussian_planner(sampler=sampler, rti=rti)
        state = planner.initial_state([5, 6, 7])
        for _ in range(4):
            actions, state = planner.act(obs, state)
        runs.append((actions, state.plan))
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    np.testing.assert_array_equal(runs[0][1], runs[1][1])


def test_cold_rows_take_the_full_solve_and_warm_rows_the_short_one() -> None:
    planner = gaussian_planner(rti=RTI(0.3, num_steps=2), sampler=Sampler(num_steps=10))
    obs = np.zeros((3, DIM), np.float32)
    _, state = planner.act(obs, planner.initial_state([1, 2, 3]))
    assert state.nfe.tolist() == [10, 10, 10]
    state = planner.forget(state, np.array([False, True, False]))
    _, state = planner.act(obs, state)
    assert state.nfe.tolist() == [12, 20, 12]


def test_a_reset_row_knows_nothing_of_its_last_episode() -> None:
    planner = gaussian_planner(rti=RTI(0.1, num_steps=1))
    rng = np.random.default_rng(1)
    state = planner.initial_state([1, 2])
    for _ in range(3):
        _, state = planner.act(rng.normal(size=(2, DIM)).astype(np.float32), state)
    obs = rng.normal(size=(2, DIM)).astype(np.float32)
    kept, _ = planner.act(obs, state)
    reset = planner.forget(state, np.array([True, False]), seeds=[9])
    mixed, _ = planner.act(obs, reset)
    new, _ = planner.act(obs[:1], planner.initial_state([9]))
    np.testing.assert_array_equal(mixed[0], new[0])
    np.testing.assert_array_equal(mixed[1], kept[1])


def test_permuting_rows_permutes_actions() -> None:
    planner = gaussian_planner(rti=RTI(0.4, num_steps=2, innovation=None))
    rng = np.random.default_rng(2)
    order = np.array([2, 0, 1])
    one, two = planner.initial_state([4, 5, 6]), planner.initial_state([6, 4, 5])
    for step in range(4):
        obs = rng.normal(size=(3, DIM)).astype(np.float32)
        if step == 2:
            done = np.array([True, False, False])
            one, two = planner.forget(one, done), planner.forget(two, done[order])
        a, one = planner.act(obs, one)
        b, two = planner.act(obs[order], two)
        np.testing.assert_allclose(a[order], b, atol=1e-6)


def test_the_guess_is_shifted_by_the_steps_each_row_executed() -> None:
    planner = gaussian_planner(rti=RTI(0.3), n_action_steps=3)
    plan = np.arange(HORIZON, dtype=np.float32)[None, :, None].repeat(3, 0).repeat(DIM, 2)
    state = replace(planner.initial_state([0, 1, 2]), plan=plan, cursor=np.array([0, 2, 50]))
    guess = planner.shifted(state)[..., 0]
    assert guess.tolist() == [[0, 1, 2, 3, 4, 5], [2, 3, 4, 5, 5, 5], [5] * 6]


def test_shift_plan_extrapolates() -> None:
    plan = torch.tensor([0.0, 1.0, 3.0]).view(1, 3, 1)
    assert shift_plan(plan, 2, tail="extrapolate").flatten().tolist() == [3, 5, 7]
    assert shift_plan(plan, torch.tensor([1]), tail="extrapolate").flatten().tolist() == [1, 3, 5]
    assert shift_plan(plan, 2).flatten().tolist() == [3, 3, 3]
    with pytest.raises(ValueError, match=r"shift must be in \[0, 3\], got 4"):
        shift_plan(plan, 4)


def test_a_jump_of_the_observation_makes_a_row_cold_once() -> None:
    planner = gaussian_planner(
        rti=RTI(0.2, num_steps=1, innovation=3.0),
        observation_step=(0.1, 0.1),
        sampler=Sampler(num_steps=5),
    )
    state, spent = planner.initial_state([0, 1]), []
    for row_one in (0.0, 0.2, 1.0, 1.1):
        before = state.nfe
        _, state = planner.act(np.array([[0.0, 0.0], [row_one, 0.0]], np.float32), state)
        spent.append((state.nfe - before).tolist())
    assert spent == [[5, 5], [1, 1], [1, 5], [1, 1]]


@pytest.mark.parametrize(("mode", "expected"), [("clip", 0.1), ("scale", 0.03)])
def test_grippers_execute_one_of_two_values(mode: str, expected: float) -> None:
    gripper = Gripper(dim=1, mode=mode, factor=10.0)
    planner = gaussian_planner(rti=RTI(0.2), grippers=(gripper,))
    actions = planner.to_actions(np.array([[0.5, 0.03], [0.5, -0.03]], np.float32))
    end = 1.0 if mode == "clip" else 0.1
    np.testing.assert_allclose(actions, [[0.5, end], [0.5, -end]], atol=1e-7)
    state = planner.initial_state([0])
    state = replace(state, plan=np.full((1, HORIZON, DIM), 0.03, np.float32))
    assert planner.shifted(state)[0, 0].tolist() == pytest.approx([0.03, expected])


def test_legacy_takes_one_training_step_after_each_level_of_the_list() -> None:
    planner = gaussian_planner(0.3)
    process = planner.denoiser.process
    assert isinstance(process, DiscreteVP)
    rti = RTI(0.08, levels=(0.06, 0.04, 0.02, 0.01, 0.0), renoise=False, legacy=True)
    grid = rti.grid(process)
    guess = torch.randn(1, HORIZON, DIM, generator=torch.Generator().manual_seed(0)).double()
    cond = torch.zeros(1, DIM, dtype=torch.float64)
    x = guess
    betas = torch.tensor(process.betas, dtype=torch.float64)
    bar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])
    for k in (7, 5, 3, 1, 0):  # the published list for "Can", as training indices
        t = torch.full((1, 1, 1), (k + 1) / 100, dtype=torch.float64)
        x0 = planner.denoiser(x, t, cond).x0_hat
        now, before, beta = bar[k + 1], bar[k], betas[k]
        mean = before.sqrt() * beta / (1 - now) * x0
        x = mean + (1 - beta).sqrt() * (1 - before) / (1 - now) * x
    denoiser = planner.denoiser.double()
    silent = torch.zeros(5, *guess.shape, dtype=torch.float64)
    start = Start(guess, grid[0])
    ours = sample(denoiser, LegacyRTI(), start, grid, cond=cond, noise=silent)
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)
    assert float(LegacyRTI().rows(process, grid)[-1].g) == 0.0  # no noise on the step to clean


def test_legacy_linear_schedule_shares_the_predicted_noise() -> None:
    trained = DiscreteVP.cosine(100)
    linear = DiscreteVP.linear(100, beta_start=1e-4, beta_end=0.02)
    t = torch.full((1, 1, 1), 0.03, dtype=torch.float64)
    grid = torch.stack([t, torch.zeros_like(t)])
    row = LegacyRTI(1.0, "linear").rows(trained, grid)[0]
    x, x0 = 0.7, 0.2
    alpha, sigma = float(trained.alpha(t)), float(trained.sigma(t))
    eps = (x - alpha * x0) / sigma
    alpha_l, sigma_l = float(linear.alpha(t)), float(linear.sigma(t))
    own = (x - sigma_l * eps) / alpha_l
    step = DDIM(eta=1.0).rows(linear, torch.stack([t, t - 0.01]))[0]
    expected = float(step.a) * x + float(step.b[0]) * own
    assert float(row.a) * x + float(row.b[0]) * x0 == pytest.approx(expected)


def test_levels_per_dimension_start_where_each_says() -> None:
    rti = RTI((0.2, 0.6), num_steps=2)
    planner = gaussian_planner(rti=rti)
    grid = rti.grid(planner.denoiser.process)
    assert grid.shape == (3, 1, 1, 2)
    assert grid[:, 0, 0].tolist() == [[0.2, 0.6], [0.1, 0.3], [0.0, 0.0]]
    guess = torch.ones(1, HORIZON, DIM)
    noise = torch.zeros(1, 1, HORIZON, DIM)
    with torch.no_grad():
        out = planner.loop("warm")(torch.zeros(1, 1, DIM), guess, noise)[0, 0]
    process = planner.denoiser.process
    each = [ddim_contraction(process, grid[..., d], torch.tensor(0.1)) for d in range(2)]
    torch.testing.assert_close(out.double(), torch.stack(each), rtol=1e-4, atol=1e-6)


def test_guess_at_a_level_is_on_the_marginal() -> None:
    process = DiscreteVP.cosine(100)
    start = truncated_start(process, torch.ones(1, 2, 1), 0.3, torch.ones(1, 2, 1))
    expected = float(process.alpha(torch.tensor(0.3)) + process.sigma(torch.tensor(0.3)))
    assert start.x.flatten().tolist() == pytest.approx([expected] * 2)
    assert levels(start, 3, process=process)[0].item() == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"t_start": 0.0}, "t_start must be in"),
        ({"t_start": 0.2, "num_steps": 0}, "num_steps must be at least 1"),
        ({"t_start": 0.2, "tail": "zero"}, "unknown tail"),
        ({"t_start": 0.2, "levels": (0.3, 0.0)}, "strictly descending"),
        ({"t_start": 0.2, "levels": (0.1,)}, "strictly descending to 0"),
        ({"t_start": 0.2, "legacy": True}, "renoise=False"),
        ({"t_start": 0.2, "legacy_schedule": "cosine"}, "unknown legacy_schedule"),
        ({"t_start": 0.2, "innovation": 0.0}, "innovation must be positive"),
    ],
)
def test_unusable_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RTI(**settings)


@pytest.mark.parametrize(
    ("t_start", "num_steps", "advice"),
    [(0.004, 1, "raise t_start to at least 0.01"), (0.02, 3, "Take at most 2 steps")],
)
def test_levels_finer_than_the_training_levels_are_refused(
    t_start: float, num_steps: int, advice: str
) -> None:
    with pytest.raises(ValueError, match=advice):
        gaussian_planner(rti=RTI(t_start, num_steps=num_steps))


def test_a_jump_is_planned_for_at_once() -> None:
    planner = gaussian_planner(
        rti=RTI(0.2, innovation=3.0), observation_step=(0.1, 0.1), n_action_steps=4
    )
    _, state = planner.act(np.zeros((2, DIM), np.float32), planner.initial_state([0, 1]))
    _, state = planner.act(np.array([[0.0, 0.0], [0.5, 0.0]], np.float32), state)
    assert state.plans.tolist() == [1, 2]
    assert not planner.starts_warm(planner.initial_state([0])).any()


def test_settings_that_do_not_fit_the_policy_are_refused() -> None:
    with pytest.raises(ValueError, match="observation_step"):
        gaussian_planner(rti=RTI(0.2, innovation=2.0))
    with pytest.raises(
        ValueError, match=r"rti\.t_start \(one for each of action_dim\) must be \[2\]"
    ):
        gaussian_planner(rti=RTI((0.2, 0.3, 0.4)))
    with pytest.raises(ValueError, match=r"gripper\.dim must be in \[0, 2\)"):
        gaussian_planner(grippers=(Gripper(2),))
    with pytest.raises(ValueError, match="unknown mode"):
        Gripper(0, mode="open")
    with pytest.raises(ValueError, match="discrete process"):
        LegacyRTI().rows(
            gaussian_planner(process={"type": "vp_cosine"}).spec.make_denoiser().process,
            torch.tensor([0.1, 0.0]).view(2, 1, 1, 1),
        )
