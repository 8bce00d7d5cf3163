"""The level chooser on policies whose contraction is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from policies_exact_gaussian import DIM, HORIZON, gaussian_planner
from policies_exact_mixture import World

from diffpolicy.core.sampler import Sampler
from diffpolicy.data.store import EpisodeStore
from diffpolicy.policies.anchors import Anchors
from diffpolicy.policies.choose_level import choose_level, ddim_contraction
from diffpolicy.policies.recorded import (
    Demonstrations,
    demonstrations,
    observation_step,
    replay,
)
from diffpolicy.policies.rti import RTI
from diffpolicy.policies.truncated import Truncated


def walk(std: float, *, jumps: bool, episodes: int = 12, length: int = 30) -> Demonstrations:
    """Demonstrations of the exact policy: action = observation + noise of ``std``."""
    rng = np.random.default_rng(0)
    obs = np.cumsum(0.02 * rng.normal(size=(episodes, length, DIM)), 1)
    if jumps:  # the second dimension flips between two values, as a gripper does
        obs[..., 1] = np.where(np.arange(length) // 10 % 2, 0.8, -0.8)
    action = obs + std * rng.normal(size=obs.shape)
    valid = np.ones(obs.shape[:2], bool)
    return Demonstrations(obs.astype(np.float32), action.astype(np.float32), valid)


def test_measured_contraction_is_the_closed_form() -> None:
    std = 0.1
    planner = gaussian_planner(std, sampler=Sampler(num_steps=50))
    report = choose_level(
        planner, walk(std, jumps=False), RTI(1.0, num_steps=3), candidates=(0.1, 0.3, 0.6)
    )
    for level in report.levels:
        rti = RTI(level.t, num_steps=3)
        grid = rti.grid(planner.denoiser.process)
        exact = float(ddim_contraction(planner.denoiser.process, grid, torch.tensor(std)))
        assert level.measured == pytest.approx(exact, rel=1e-3)
        assert level.predicted == pytest.approx(exact, rel=0.25)  # the std is estimated
    assert report.shift_error == pytest.approx(0.1, rel=0.5)


def test_a_dimension_that_jumps_asks_for_a_higher_level() -> None:
    planner = gaussian_planner(0.1, sampler=Sampler(num_steps=10))
    rti = RTI(1.0, num_steps=3)
    calm, jumping = (
        choose_level(planner, walk(0.1, jumps=jumps), rti, candidates=(0.05, 0.1, 0.2, 0.4))
        for jumps in (False, True)
    )
    low = jumping.levels[0]
    assert low.actions[1] > 2 * low.actions[0]  # the jump is what the lowest level misses
    assert max(low.changes) > max(calm.levels[0].changes)
    assert np.max(jumping.t_start) >= 0.1


def test_a_dimension_that_never_moves_does_not_count() -> None:
    planner = gaussian_planner(0.1, sampler=Sampler(num_steps=10))
    demos = walk(0.1, jumps=False)
    demos.action[..., 1] = 0.0
    report = choose_level(planner, demos, RTI(1.0, num_steps=3), candidates=(0.1, 0.4))
    assert all(level.actions[1] == level.changes[1] == 0 for level in report.levels)


def test_dimensions_choose_their_own_level_where_that_is_no_worse() -> None:
    planner = gaussian_planner(0.1, sampler=Sampler(num_steps=10))
    report = choose_level(
        planner, walk(0.1, jumps=True), RTI(1.0, num_steps=3), candidates=(0.05, 0.1, 0.2, 0.4)
    )
    if isinstance(report.t_start, tuple):
        assert len(report.t_start) == DIM
    else:
        assert report.t_start in (0.05, 0.1, 0.2, 0.4)
    assert "level" in report.table()
    assert report.to_json()["levels"][0]["t"] == 0.05


def test_truncated_plans_choose_a_level_too() -> None:
    far = Anchors(torch.full((1, HORIZON, DIM), 0.5), torch.ones(1), 0.1, torch.zeros(HORIZON))
    planner = gaussian_planner(
        0.1, anchors=far, truncated=Truncated(), sampler=Sampler(num_steps=10)
    )
    settings = Truncated(num_steps=3, rank="prior")
    report = choose_level(planner, walk(0.1, jumps=False), settings, candidates=(0.05, 0.3))
    assert report.t_start == 0.3  # from 0.05 an anchor that is 0.5 away cannot be left
    assert report.levels[0].measured is None
    assert report.shift_error is None


def test_other_solvers_have_no_closed_form() -> None:
    planner = gaussian_planner(0.1, sampler=Sampler(num_steps=10))
    settings = RTI(1.0, num_steps=2, solver="dpmpp_2m")
    report = choose_level(planner, walk(0.1, jumps=False), settings, candidates=(0.1, 0.4))
    assert [level.predicted for level in report.levels] == [None, None]
    assert "(          -)" in report.table()


COMMIT = World(modes=(-0.7, 0.7), step=0.02, gain=0.5)  # to switch costs much, to follow little
FOLLOW = World(modes=(-0.05, 0.05), step=0.15, gain=1.0)  # the other way round


@pytest.mark.parametrize(("world", "num_steps"), [(COMMIT, 1), (FOLLOW, 1)])
def test_the_level_chosen_is_among_the_best_in_closed_loop(world: World, num_steps: int) -> None:
    """0.5 has the least score of neighbouring changes in the first world, and the highest cost."""
    planner, candidates = world.planner(), (0.05, 0.2, 0.4, 0.5, 1.0)
    cost = {
        t: world.cost(planner.with_spec(replace(planner.spec, rti=RTI(t, num_steps=num_steps))), 30)
        for t in candidates
    }
    demos = world.demonstrations(20, 40, seed=0)
    report = choose_level(planner, demos, RTI(1.0, num_steps=num_steps), candidates=candidates)
    assert isinstance(report.t_start, float)
    assert cost[report.t_start] < 1.3 * min(cost.values()) + 1e-3
    assert max(cost.values()) > 2 * cost[report.t_start]
    if world is COMMIT:  # which mode was drawn first is nobody's merit
        assert all(max(level.actions) < 0.3 for level in report.levels if level.t < 0.4)


def test_short_demonstrations_have_no_long_changes() -> None:
    planner = gaussian_planner(0.1, sampler=Sampler(num_steps=5))
    demos = walk(0.1, jumps=False, length=6)
    demos.valid[:, 4:] = False
    report = choose_level(planner, demos, RTI(1.0, num_steps=2), candidates=(0.1, 0.4))
    assert all(np.isfinite(level.regret) for level in report.levels)


def test_replay_shows_recorded_observations() -> None:
    planner = gaussian_planner(0.01, sampler=Sampler(num_steps=10))
    demos = walk(0.0, jumps=False, episodes=3, length=5)
    actions = replay(planner, demos.obs, range(3))
    np.testing.assert_allclose(actions, demos.obs, atol=0.06)


def store(path: Path) -> EpisodeStore:
    rng = np.random.default_rng(0)
    obs = np.cumsum(rng.choice([-1.0, 1.0], size=(300, 3)), 0).astype(np.float32)
    obs[:, 2] = 5.0
    obs[100:, :2] += 1000.0  # between episodes: no step
    arrays = {"obs": obs, "action": obs[:, :2].copy()}
    return EpisodeStore.from_arrays(arrays, np.array([100, 180, 300]), path=path)


def test_observation_step_knows_episodes_and_constants(tmp_path: Path) -> None:
    usual = observation_step(store(tmp_path / "s.zarr"))
    assert usual[:2] == pytest.approx((1.05, 1.05), abs=0.06)
    assert usual[2] > 1e30


def test_demonstrations_are_segments_of_episodes(tmp_path: Path) -> None:
    opened = store(tmp_path / "s.zarr")
    demos = demonstrations(opened, 3, length=90)
    assert demos.obs.shape == (3, 90, 3)
    assert sorted(demos.valid.sum(1).tolist()) == [80, 90, 90]
    assert (np.abs(np.diff(demos.obs[..., 0], axis=1)) <= 1).all()  # never across an end
    with pytest.raises(ValueError, match="at least 2 episodes"):
        demonstrations(opened, 1)


def test_choices_that_cannot_be_made_are_refused() -> None:
    planner, demos = gaussian_planner(0.1), walk(0.1, jumps=False, episodes=2, length=4)
    with pytest.raises(ValueError, match="at least 2 replicates"):
        choose_level(planner, demos, RTI(0.5), replicates=1)
    with pytest.raises(ValueError, match="a choice already"):
        choose_level(planner, demos, RTI(0.5, levels=(0.2, 0.0)))
