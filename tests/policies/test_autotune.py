"""A sampler searched for a policy from recorded observations alone, and what is kept of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from policies_exact_mixture import World

from diffpolicy.core import PriorSampler
from diffpolicy.policies.autotune import AutotuneReport, Measured, autotune
from diffpolicy.policies.best_of_n import Selection
from diffpolicy.policies.changes import merged_config
from diffpolicy.policies.recorded import Demonstrations
from diffpolicy.policies.spec import PolicySampler, PolicySpec

WORLD = World(modes=(-0.5, 0.2, 0.6), step=0.05, gain=0.3, noise=0.05)
DEMOS = WORLD.demonstrations(episodes=20, length=20, seed=0)


@pytest.fixture(scope="module")
def tuned():
    return autotune(WORLD.planner(), DEMOS, 3, pairs=32, start_noise=8)


def test_it_comes_nearer_to_the_teacher_than_any_solver_with_a_name(tuned):
    sampler, report = tuned
    assert sampler.make().nfe(sampler.num_steps) == 3
    assert report.kept is report.searched
    assert report.ratio < 0.7  # on held-out observations and noise
    assert report.named[0].held_out == min(one.held_out for one in report.named)
    assert "kept: the searched sampler" in report.table()


def test_it_is_plain_values_that_policies_are_saved_with(tuned):
    spec = replace(WORLD.planner().spec, sampler=tuned[0])
    again = PolicySpec.from_config(_through_json(spec.to_config()))
    assert again == spec
    assert _through_json(tuned[1].to_json())["ratio"] == pytest.approx(tuned[1].ratio)


def _through_json(values):
    import json

    return json.loads(json.dumps(values))


def test_a_named_solver_that_is_nearer_is_kept():
    weights = {"weights": [[]] * 4}
    own = Measured(PriorSampler(solver="bespoke", num_steps=4, options=weights), 0.1, 0.3)
    named = Measured(PriorSampler(solver="unipc", num_steps=4), 0.2, 0.2)
    report = AutotuneReport(4, PriorSampler(), (named,), own, 8, 0.5)
    assert report.kept is named
    assert report.ratio == 1
    assert "the search found none that is nearer" in report.table()


def test_calibrated_start_noise_makes_a_policy_deterministic(tuned):
    sampler, report = tuned
    noise = report.start_noise
    assert noise.least <= noise.mean
    assert sampler.start_seed == noise.seed < noise.pool
    assert "deterministic" in report.table()
    fixed = WORLD.planner(sampler=sampler)
    free = WORLD.planner(sampler=replace(sampler, start_seed=None))
    assert fixed.loop().draws == 0
    obs = DEMOS.obs[:4, 0]
    one, other = (p.act(obs, p.initial_state(range(n, n + 4)))[0] for p in [fixed] for n in (0, 9))
    np.testing.assert_array_equal(one, other)
    one, other = (p.act(obs, p.initial_state(range(n, n + 4)))[0] for p in [free] for n in (0, 9))
    assert np.abs(one - other).max() > 0.1
    # It is the first draw of that stream.
    own = free.initial_state([sampler.start_seed] * 4)
    np.testing.assert_allclose(
        free.act(obs, own)[0], fixed.act(obs, fixed.initial_state(range(4)))[0], atol=1e-6
    )


def test_what_it_cannot_tune_is_said():
    with pytest.raises(ValueError, match="must not add noise"):
        autotune(WORLD.planner(), DEMOS, 2, teacher=PriorSampler(solver="ddpm"))
    with pytest.raises(ValueError, match="nfe must be at least 1"):
        autotune(WORLD.planner(), DEMOS, 0)
    with pytest.raises(ValueError, match="all candidates are the same plan"):
        PolicySpec(
            2,
            1,
            sampler=PolicySampler(start_seed=3),
            heads={"critic": {"type": "q_ensemble"}},
            selection=Selection(num_candidates=4),
        )


def test_what_its_search_ran_with_is_kept(make_planner):
    planner = make_planner(
        cond_dropout=0.1, sampler=PolicySampler(guidance_scale=2.0, guidance_t_min=0.4)
    )
    rng = np.random.default_rng(0)
    obs, action = (rng.uniform(-0.5, 0.5, (4, 6, n)).astype(np.float32) for n in (3, 2))
    demos = Demonstrations(obs, action, np.ones((4, 6), bool))
    sampler, _ = autotune(planner, demos, 1, pairs=4)
    assert (sampler.num_steps, sampler.guidance_scale, sampler.guidance_t_min) == (1, 2.0, 0.4)
    with pytest.raises(ValueError, match="its 4 steps alone"):
        autotune(make_planner(trained_steps=4), demos, 1)


def test_levels_and_another_number_of_steps_are_not_both_right():
    assert PolicySampler(levels=(0.5, 0.0)).num_steps == 2
    with pytest.raises(ValueError, match="levels say the steps, 2, and num_steps=7"):
        replace(PolicySampler(levels=(0.5, 0.0)), num_steps=7)


def test_another_number_of_steps_drops_the_levels():
    stored = {"sampler": {"solver": "bespoke", "levels": [0.5, 0.0], "num_steps": 2, "options": {}}}
    stored["sampler"]["options"] = {"weights": [[], [-0.5]]}
    plain = merged_config(stored, {"sampler": {"num_steps": 4}})["sampler"]
    assert plain == {"num_steps": 4, "options": {}}  # its weights are for two steps
    other = merged_config(stored, {"sampler": {"solver": "unipc"}})["sampler"]
    assert "levels" not in other
    same = merged_config(stored, {"sampler": {"num_steps": 2, "start_seed": 1}})["sampler"]
    assert same["levels"] == [0.5, 0.0]
