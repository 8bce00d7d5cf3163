"""Truncated plans: guesses, their ranking, and what a policy does with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from policies_exact_gaussian import DIM, HORIZON, gaussian_planner

from diffpolicy.core import truncated_start
from diffpolicy.policies.anchors import Anchors
from diffpolicy.policies.choose_level import ddim_contraction
from diffpolicy.policies.diffusion import DiffusionPlanner
from diffpolicy.policies.rti import RTI
from diffpolicy.policies.truncated import Truncated


def constant_anchors(*values: float, error: float = 0.1) -> Anchors:
    """Plans that stay at the given values."""
    plans = torch.tensor(values).view(-1, 1, 1).expand(-1, HORIZON, DIM).contiguous()
    frequency = torch.arange(1.0, len(values) + 1)
    return Anchors(plans, frequency / frequency.sum(), error, torch.full((HORIZON,), error))


def planner(*values: float, **settings: Any) -> DiffusionPlanner:
    """The exact Gaussian policy (std 0.05) started from constant anchors."""
    chosen = Truncated(**{"t_start": 0.1, **settings})
    return gaussian_planner(0.05, anchors=constant_anchors(*values), truncated=chosen)


def at(value: float, rows: int = 1) -> np.ndarray:
    return np.full((rows, DIM), value, np.float32)


def test_every_guess_is_solved_from_its_level_and_the_best_is_executed() -> None:
    policy = planner(-0.5, 0.0, 0.5, num_steps=2)
    state = policy.observe(at(0.45), policy.initial_state([3]))
    found = policy.propose(state)
    process = policy.denoiser.process
    noise = policy.draw_noise(state, 4, False)[:3, 0]
    start = truncated_start(process, policy.anchors.plans, 0.1, noise)
    grid = policy.loop("guesses").levels
    kept = ddim_contraction(process, grid, torch.tensor(0.05)) / process.alpha(grid[0, 0, 0, 0])
    expected = 0.45 + kept * (start.x - process.alpha(torch.tensor(0.1)) * 0.45)
    torch.testing.assert_close(found.plans[0], expected.float(), rtol=1e-4, atol=1e-5)
    assert found.scores.argmax(1).tolist() == [2]  # the anchor near the observation
    assert found.nfe == policy.nfe == 3  # two steps and one to rank
    actions, after = policy.act(at(0.45), policy.initial_state([3]))
    np.testing.assert_array_equal(after.plan[0], found.best()[0].numpy())
    assert after.nfe.tolist() == [3]
    assert np.abs(actions - 0.45).max() < 0.2


def test_rank_by_prior_takes_the_most_frequent_anchor() -> None:
    policy = planner(-0.5, 0.0, 0.5, rank="prior")
    found = policy.propose(policy.observe(at(0.0, 2), policy.initial_state([0, 1])))
    assert found.scores.argmax(1).tolist() == [2, 2]
    assert policy.nfe == 2


def test_the_last_plan_competes_where_a_row_has_one() -> None:
    policy = planner(-0.9, 0.9, sources=("anchors", "previous"))
    _, state = policy.act(at(0.0, 2), policy.initial_state([0, 1]))
    state = policy.forget(state, np.array([True, False]))
    plan = state.plan.copy()
    plan[1] = 0.0  # the last plan fits the observation, the anchors do not
    state = policy.observe(at(0.0, 2), replace(state, plan=plan))
    found = policy.propose(state)
    assert found.plans.shape == (2, 3, HORIZON, DIM)
    assert torch.isneginf(found.scores[0, 2])
    assert found.scores[1].argmax().item() == 2


def test_a_draft_is_the_clean_estimate_from_pure_noise() -> None:
    policy = planner(-0.9, sources=("anchors", "draft"))
    found = policy.propose(policy.observe(at(0.2), policy.initial_state([0])))
    assert found.plans.shape[1] == 2
    assert found.nfe == policy.nfe == 4  # draft, two steps, rank
    assert found.scores.argmax(1).item() == 1
    alone = gaussian_planner(0.05, truncated=Truncated(t_start=0.1, sources=("draft",)))
    _, state = alone.act(at(0.2), alone.initial_state([0]))
    assert np.abs(state.plan - 0.2).max() < 0.3


def test_continuity_keeps_the_last_mode() -> None:
    switching, staying = (
        planner(-0.1, 0.1, continuity=weight, t_start=0.02) for weight in (0.0, 1e3)
    )
    for policy, expected in ((switching, 1), (staying, 0)):
        state = policy.observe(at(0.1), policy.initial_state([0]))
        last = np.full_like(state.plan, -0.1)
        found = policy.propose(replace(state, plan=last, warm=np.array([True])))
        assert found.scores.argmax(1).item() == expected


def executed_modes(policy: DiffusionPlanner, seeds: range, **options: Any) -> np.ndarray:
    """Shares of the candidates whose plans a batch of first decisions executed."""
    state = policy.observe(at(0.0, len(seeds)), policy.initial_state(seeds))
    found = policy.propose(state, **options)
    plan = policy.replan(state, np.arange(len(seeds)), **options).plan
    distance = np.abs(found.plans.numpy() - plan[:, None]).max((2, 3))
    assert (distance.min(1) == 0).all()
    return np.bincount(distance.argmin(1), minlength=found.plans.shape[1]) / len(seeds)


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    return 0.5 * float(np.abs(p - q).sum())


def test_one_of_eight_modes_is_executed_or_each_with_its_probability() -> None:
    modes, seeds = np.linspace(-0.7, 0.7, 8).tolist(), range(2000)
    law = np.arange(1.0, 9.0) / 36
    best = executed_modes(planner(*modes, rank="prior"), seeds)
    assert total_variation(best, law) == pytest.approx(1 - 8 / 36)
    drawing = planner(*modes, rank="prior", choose="draw")
    drawn = executed_modes(drawing, seeds)
    assert total_variation(drawn, law) < 0.05
    np.testing.assert_array_equal(drawn, executed_modes(drawing, seeds))
    assert total_variation(drawn, executed_modes(drawing, range(2000, 4000))) > 0
    assert executed_modes(drawing, seeds, deterministic=True)[7] == 1


def test_confidences_are_drawn_by_their_probability() -> None:
    anchors = constant_anchors(-0.5, 0.0, 0.5)
    own = {"type": "anchored", "base": {"type": "mlp", "width": 8, "depth": 1}}
    chosen = Truncated(t_start=0.1, rank="confidence", choose="draw")
    spec = replace(gaussian_planner(0.05).spec, network=own, truncated=chosen)
    denoiser = spec.make_denoiser()
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(1))
    policy = DiffusionPlanner(spec, denoiser, gaussian_planner().normalizer, anchors)
    state = policy.observe(at(0.0, 4000), policy.initial_state(range(4000)))
    # Scores depend on the plans' noise too, so each row has a law of its own; shares add up.
    law = policy.propose(state).scores.exp()
    assert ((law > 0) & (law < 1)).all()  # probabilities, not logits
    law = (law / law.sum(1, keepdim=True)).mean(0).numpy()
    assert total_variation(law, np.eye(3)[law.argmax()]) > 0.02
    assert total_variation(executed_modes(policy, range(4000)), law) < 0.03


def test_a_draw_belongs_to_its_row() -> None:
    policy = planner(-0.5, 0.0, 0.5, rank="prior", choose="draw")
    order = np.array([2, 0, 1])
    one, two = policy.initial_state([4, 5, 6]), policy.initial_state([6, 4, 5])
    for _ in range(4):
        a, one = policy.act(at(0.0, 3), one)
        b, two = policy.act(at(0.0, 3), two)
        np.testing.assert_allclose(a[order], b, atol=1e-6)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    policy = planner(-0.5, 0.0, 0.5, sources=("anchors", "previous", "draft"))
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(4, 3, DIM)).astype(np.float32)
    order = np.array([2, 0, 1])
    one, two = policy.initial_state([4, 5, 6]), policy.initial_state([6, 4, 5])
    for row in obs:
        a, one = policy.act(row, one)
        b, two = policy.act(row[order], two)
        np.testing.assert_allclose(a[order], b, atol=1e-6)


def test_default_level_covers_the_quantisation_error() -> None:
    base = gaussian_planner(0.05)
    spec = replace(base.spec, truncated=Truncated())
    policy = DiffusionPlanner(
        spec, base.denoiser, base.normalizer, constant_anchors(0.0, error=0.3)
    )
    t = float(policy.loop("guesses").levels[0])
    process = base.denoiser.process
    ratio = process.sigma(torch.tensor(t)) / process.alpha(torch.tensor(t))
    assert 0.3 <= float(ratio) < 0.33


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"t_start": 0.0}, "t_start must be in"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"sources": ("memory",)}, "unknown source 'memory'"),
        ({"sources": ("previous",)}, "cannot begin an episode"),
        ({"rank": "best"}, "unknown rank"),
        ({"choose": "first"}, "unknown choose"),
        ({"choose": "draw"}, "needs probabilities"),
        ({"rank": "prior", "sources": ("anchors", "draft")}, "knows anchors only"),
        ({"solver": "ddpm"}, "deterministic solver"),
        ({"rank": "confidence", "sources": ("anchors", "draft")}, "not trained at t = 1"),
    ],
)
def test_unusable_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Truncated(**settings)


def test_policies_without_what_they_need_are_refused() -> None:
    with pytest.raises(ValueError, match="start from anchors"):
        gaussian_planner(truncated=Truncated())
    with pytest.raises(ValueError, match="needs a network of type 'anchored'"):
        planner(0.0, rank="confidence")
    with pytest.raises(ValueError, match="two ways to start"):
        gaussian_planner(truncated=Truncated(), rti=RTI(0.2), anchors=constant_anchors(0.0))
    plain = gaussian_planner()
    state = plain.initial_state([0])
    with pytest.raises(ValueError, match="samples one plan"):
        plain.propose(state)
    short = Anchors(torch.zeros(2, 3, DIM), torch.ones(2) / 2, 0.1, torch.zeros(3))
    with pytest.raises(ValueError, match=r"the anchors must be \[M, "):
        gaussian_planner(truncated=Truncated(), anchors=short)
