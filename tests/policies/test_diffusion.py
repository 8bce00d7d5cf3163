"""Policies as values: rows, chunks, randomness, resets, bad input."""

from __future__ import annotations

import copy
from dataclasses import fields

import numpy as np
import pytest
import torch

from diffpolicy.core.sampler import Sampler
from diffpolicy.data.normalize import Normalizer
from diffpolicy.policies.diffusion import DiffusionPlanner
from diffpolicy.policies.rows import row_generator, row_noise
from diffpolicy.policies.spec import PolicySampler, PolicySpec


def observations(steps, count, seed=0):
    return np.random.default_rng(seed).standard_normal((steps, count, 3)).astype(np.float32)


def rollout(planner, obs, seeds, **options):
    state, actions = planner.initial_state(seeds), []
    for row in obs:
        action, state = planner.act(row, state, **options)
        actions.append(action)
    return np.stack(actions), state


def test_chunks_are_executed_and_counted(make_planner):
    planner = make_planner(sampler=Sampler(solver="heun", num_steps=3))
    actions, state = rollout(planner, observations(7, 4), range(4))
    assert actions.shape == (7, 4, 2)
    assert state.plans.tolist() == [3] * 4  # planned at steps 0, 3, 6
    assert state.nfe.tolist() == [3 * 5] * 4  # 2 x 3 - 1 evaluations each
    assert planner.nfe == 5
    assert np.abs(actions).max() <= 0.5


def test_plan_is_a_function_of_the_last_observations_only(make_planner):
    planner = make_planner(clip=False, action_low=None, action_high=None)
    obs = observations(4, 2)
    changed = obs.copy()
    changed[1] += 1.0  # falls out of the history (To = 2) of the plan at step 3
    first, second = (rollout(planner, o, [5, 6], deterministic=True)[0] for o in (obs, changed))
    assert np.array_equal(first[3], second[3])
    changed[2] += 1.0
    assert not np.array_equal(first[3], rollout(planner, changed, [5, 6], deterministic=True)[0][3])


@pytest.mark.parametrize(
    "sampler", [Sampler(num_steps=4), Sampler(solver="ddpm", num_steps=4)], ids=["ode", "sde"]
)
def test_permuting_environments_permutes_actions(make_planner, sampler):
    planner = make_planner(sampler=sampler)
    obs, seeds, order = observations(7, 5), np.array([3, 1, 4, 15, 9]), np.array([2, 0, 4, 1, 3])
    straight, _ = rollout(planner, obs, seeds)
    permuted, _ = rollout(planner, obs[:, order], seeds[order])
    np.testing.assert_allclose(permuted, straight[:, order], rtol=0, atol=1e-6)


def test_rows_do_not_depend_on_their_neighbours(make_planner):
    planner = make_planner()
    obs = observations(7, 5)
    whole, _ = rollout(planner, obs, range(5))
    alone, _ = rollout(planner, obs[:, 2:3], [2])
    np.testing.assert_allclose(alone, whole[:, 2:3], rtol=0, atol=1e-6)


def test_same_seed_same_actions_other_seed_other_actions(make_planner):
    planner = make_planner()
    obs = np.repeat(observations(4, 1), 3, axis=1)
    actions, _ = rollout(planner, obs, [7, 7, 8])
    np.testing.assert_allclose(actions[:, 0], actions[:, 1], rtol=0, atol=1e-6)
    assert not np.allclose(actions[:, 0], actions[:, 2])
    again, _ = rollout(planner, obs, [7, 7, 8])
    assert np.array_equal(actions, again)


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmpp_2m_sde"])
def test_deterministic_ignores_the_streams(make_planner, solver):
    planner = make_planner(sampler=Sampler(solver=solver, num_steps=4))
    obs = np.repeat(observations(4, 1), 2, axis=1)
    actions, _ = rollout(planner, obs, [1, 2], deterministic=True)
    np.testing.assert_allclose(actions[:, 0], actions[:, 1], rtol=0, atol=1e-6)


def test_act_changes_nothing(make_planner):
    planner = make_planner()
    state = planner.initial_state([0, 1])
    before = copy.deepcopy(state)
    keys, weights = set(vars(planner)), copy.deepcopy(planner.denoiser.state_dict())
    planner.act(observations(1, 2)[0], state)
    for f in fields(state):
        assert np.array_equal(getattr(state, f.name), getattr(before, f.name)), f.name
    assert set(vars(planner)) == keys
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights.values(), planner.denoiser.state_dict().values(), strict=True)
    )


def test_forget_resets_single_rows_and_never_leaks(make_planner):
    planner = make_planner()
    obs = observations(5, 3)
    _, state = rollout(planner, obs[:4], [1, 2, 3])
    state = planner.forget(state, np.array([False, True, False]), [22])
    mixed, after = planner.act(obs[4], state)
    fresh, _ = planner.act(obs[4, 1:2], planner.initial_state([22]))
    np.testing.assert_allclose(mixed[1:2], fresh, rtol=0, atol=1e-6)
    assert after.plans.tolist() == [2, 3, 2]  # row 1 planned again, totals are kept
    kept = planner.forget(state, np.array([True, False, False]))
    assert kept.seed.tolist() == [1, 22, 3]
    assert kept.counter[0] == state.counter[0]  # the stream goes on
    assert not kept.warm[0]


def test_predict_has_the_shape_of_stable_baselines3(make_planner):
    planner = make_planner()
    action, state = planner.predict(np.zeros(3))
    assert action.shape == (2,)
    actions, state = planner.predict(np.zeros((2, 3)))
    assert actions.shape == (2, 2)
    _, state = planner.predict(np.zeros((2, 3)), state, np.array([True, False]))
    assert state.plans.tolist() == [2, 1]
    assert state.cursor.tolist() == [2, 3]


def test_take_and_put_are_inverse(make_planner):
    _, state = rollout(make_planner(), observations(3, 4), range(4))
    rows = np.array([3, 1])
    again = state.put(rows, state.take(rows))
    assert all(
        np.array_equal(getattr(again, f.name), getattr(state, f.name)) for f in fields(state)
    )


def test_row_noise_is_standard_normal_and_counter_based():
    draws = row_noise(np.arange(2000), np.zeros(2000, np.int64), (10,))
    assert abs(draws.mean()) < 0.03
    assert abs(draws.std() - 1) < 0.02
    one = row_noise(np.array([7]), np.array([3]), (4,))
    assert np.array_equal(one, row_noise(np.array([1, 7]), np.array([3, 3]), (4,))[1:])
    assert not np.array_equal(one, row_noise(np.array([7]), np.array([4]), (4,)))


@pytest.mark.parametrize(
    ("obs", "message"),
    [
        (np.zeros((2, 4)), r"must be \[2, 3\]"),
        (np.zeros((1, 3)), r"must be \[2, 3\]"),
        (np.array([[0, 0, 0], [0, np.nan, 0]]), "environment 1 is nan at index 1"),
    ],
)
def test_bad_observations(make_planner, obs, message):
    planner = make_planner()
    with pytest.raises(ValueError, match=message):
        planner.act(obs, planner.initial_state([0, 1]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_action_steps": 8}, r"n_action_steps=8 is too large.*has 7 actions"),
        ({"n_obs_steps": 0}, "n_obs_steps must be at least 1, got 0"),
        ({"network": {"type": "cnn"}}, "cnn"),
        ({"process": {"type": "vp_cos"}}, "unknown noise process"),
        (
            {"action_low": (0.0,)},
            r"action_low \(one for each of action_dim\) must be \[2\], got \[1\]",
        ),
    ],
)
def test_bad_specs(make_planner, changes, message):
    with pytest.raises(ValueError, match=message):
        make_planner(**changes)


def test_clipping_needs_a_unit_range(make_planner):
    planner = make_planner()
    statistics = {
        name: {
            k: [v] * dim
            for k, v in {
                "min": -1.0,
                "max": 1.0,
                "mean": 0.0,
                "std": 0.5,
                "q01": -1.0,
                "q99": 1.0,
            }.items()
        }
        | {"count": 10}
        for name, dim in (("obs", 3), ("action", 2))
    }
    gaussian = Normalizer.fit(statistics, {"obs": "minmax", "action": "gaussian"})
    with pytest.raises(ValueError, match="clip=True"):
        DiffusionPlanner(planner.spec, planner.denoiser, gaussian)


def test_spec_config_round_trip():
    spec = PolicySpec(
        3,
        2,
        sampler=Sampler(solver="unipc", num_steps=5, options={"order": 3}),
        action_low=(0.0, 1.0),
    )
    assert PolicySpec.from_config(spec.to_config()) == spec
    with pytest.raises(ValueError, match="horizn"):
        PolicySpec.from_config({"obs_dim": 3, "action_dim": 2, "horizn": 3})


def test_guidance_scale_is_used_and_needs_condition_dropout(make_planner):
    obs = observations(1, 2)[0]
    free = {"clip": False, "action_low": None, "action_high": None, "cond_dropout": 0.1}
    plain, guided = (
        make_planner(sampler=PolicySampler(num_steps=4, guidance_scale=scale), **free)
        for scale in (1.0, 3.0)
    )
    actions = [p.act(obs, p.initial_state([1, 2]))[0] for p in (plain, guided)]
    assert not np.allclose(*actions)
    with pytest.raises(ValueError, match="cond_dropout > 0"):
        make_planner(sampler=PolicySampler(guidance_scale=3.0))


def test_dict_observations_are_refused(make_planner):
    with pytest.raises(ValueError, match="must be one array"):
        make_planner().predict({"observation": np.zeros(3)})


def test_rows_of_noise_are_those_of_generators_of_their_own() -> None:
    seeds, counters = np.array([-3, 0, 5, 2**62]), np.array([0, 1, 9, 2**40])
    for shape in ((3,), (11, 16, 7)):  # an odd number leaves something over
        rows = zip(seeds.tolist(), counters.tolist(), range(4), strict=True)
        wanted = [row_generator(*r).standard_normal(shape, dtype=np.float32) for r in rows]
        got = row_noise(seeds, counters, shape, np.arange(4))
        np.testing.assert_array_equal(got, np.stack(wanted))
    assert (row_noise(np.array([-1]), counters[:1], (9,)) != got[0].reshape(-1)[:9]).any()
