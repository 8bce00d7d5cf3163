"""Real-time chunking: weights, exact prefixes, seams, rows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from diffpolicy.core import Denoiser, VPCosine
from diffpolicy.core.sampler import Sampler
from diffpolicy.data.normalize import Normalizer
from diffpolicy.policies.chunking import (
    Chunking,
    PrefixCondition,
    RealTimeChunking,
    chunk_weights,
    frozen_steps,
    seam_jump,
)
from diffpolicy.policies.diffusion import DiffusionPlanner
from diffpolicy.policies.ensemble import TemporalEnsemble
from diffpolicy.policies.rti import RTI
from diffpolicy.policies.spec import PolicySpec
from diffpolicy.policies.streaming import StreamingPlanner
from diffpolicy.policies.truncated import Truncated
from diffpolicy.settings import from_values

MODES = ("soft", "jacobian")


class TwoModes(nn.Module):
    """The exact clean estimate for plans that are -0.8 or 0.8 throughout, each entry +- 0.1."""

    t_kinds = frozenset({"row"})
    mean, std = 0.8, 0.1

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))  # tells device and dtype
        self.process = VPCosine()

    def embed_time(self, t):
        return t

    def forward(self, x, t, cond=None, *, time_emb=None):
        t = t / 1000
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        variance = alpha**2 * self.std**2 + sigma**2
        side = torch.tanh((alpha * self.mean / variance * x).sum((1, 2), keepdim=True))
        mode = self.mean * side  # the posterior mean of the two modes
        return mode + alpha * self.std**2 / variance * (x - alpha * mode)


def two_mode_planner(**changes):
    values = {"horizon": 12, "n_obs_steps": 2, "n_action_steps": 5, "clip": False}
    spec = PolicySpec(1, 1, **{**values, "sampler": Sampler(num_steps=10), **changes})
    row = {"count": 9, "min": [-1.0], "max": [1.0], "mean": [0.0], "std": [1.0]}
    row |= {"q01": [-1.0], "q99": [1.0]}
    normalizer = Normalizer.fit(
        {"obs": row, "action": row}, {"obs": "identity", "action": "minmax"}
    )
    return DiffusionPlanner(spec, Denoiser(TwoModes(), VPCosine(), "x0"), normalizer)


def warm_state(policy, seeds, obs=None, *, executed=3, delay=2):
    """A state whose rows have executed a part of their first plan."""
    obs = np.zeros((len(seeds), policy.obs_dim), np.float32) if obs is None else obs
    state = policy.initial_state(seeds)
    for _ in range(executed):
        _, state = policy.act(obs, state)
    state = policy.observe(obs, state)
    delay = np.broadcast_to(np.asarray(delay), (len(seeds),)).copy()
    return dataclasses.replace(state, delay=delay)


# Weights


def test_schedules():
    """To = 2, H = 10, d = 2, three positions shifted out: steps -1 | 0 1 | 2 .. 5 | 6 7 8."""
    weights = {
        name: chunk_weights(np.array([2]), np.array([7]), 2, 10, Chunking(name))[0]
        for name in ("linear", "exp", "ones", "zeros")
    }
    c = np.array([4, 3, 2, 1]) / 5  # (e - i) / (e - d + 1) with e = 6
    for name, middle in {
        "linear": c,
        "exp": c * (np.exp(c) - 1) / (np.e - 1),
        "ones": np.ones(4),
        "zeros": np.zeros(4),
    }.items():
        expected = [1.0, 1.0, 1.0, *middle, 0.0, 0.0, 0.0]
        np.testing.assert_allclose(weights[name], expected, rtol=1e-6, err_msg=name)


def test_overlap_ends_the_guidance_but_not_the_frozen_part():
    settings = Chunking("linear", overlap=3)
    delay, valid = np.array([1, 5]), np.array([8, 8])
    weights = chunk_weights(delay, valid, 1, 10, settings)
    np.testing.assert_allclose(weights[0], [1, 2 / 3, 1 / 3, *[0] * 7], rtol=1e-6)
    np.testing.assert_allclose(weights[1], [1] * 5 + [0] * 5, rtol=1e-6)


def test_a_prefix_is_never_padded():
    """Beyond the last plan's end the weight is 0, however long the delay."""
    delay, valid = np.array([0, 3, 9, 9, 9]), np.array([6, 6, 6, 1, 0])
    for schedule in ("linear", "exp", "ones", "zeros"):
        weights = chunk_weights(delay, valid, 2, 8, Chunking(schedule))
        for row, left in enumerate(valid):
            assert not weights[row, left:].any()
        assert weights[2, :6].tolist() == [1.0] * 6
    assert frozen_steps(delay, valid, 2).tolist() == [0, 3, 5, 0, 0]  # d <= H - s, row by row


def test_nothing_follows_without_delay_under_a_hard_prefix():
    weights = chunk_weights(np.array([0, 1]), np.array([6, 6]), 3, 8, Chunking("zeros"))
    assert weights.tolist() == [[0] * 8, [1] * 3 + [0] * 5]  # past positions follow with the rest


def test_seam_jump_measures_the_same_step():
    old, new = np.zeros((2, 5, 2)), np.zeros((2, 5, 2))
    old[0, 3], new[0, 1] = (1.0, 0.0), (4.0, 4.0)
    old[1, 4], new[1, 4] = (0.0, 2.0), (0.0, 2.5)  # beyond the old end: its last action is held
    assert seam_jump(old, new, np.array([2, 3]), np.array([1, 4])).tolist() == [5.0, 0.5]


# Plans


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpmpp_2m", "heun"])
def test_the_prefix_is_what_is_executed_meanwhile(make_planner, mode, solver):
    """The first actions of the new plan are those that the robot consumes from the old one."""
    planner = make_planner(horizon=10, sampler=Sampler(solver=solver, num_steps=4))
    policy = RealTimeChunking(planner, Chunking(mode=mode))
    obs = np.random.default_rng(0).standard_normal((3, 3)).astype(np.float32)
    state = warm_state(policy, range(3), obs, delay=[0, 2, 4])
    new = policy.replan(state, range(3))
    for _ in range(4):  # the old plan goes on while the new one is computed
        expected, state = policy.execute(state)
        got, new = policy.execute(new)
        step = int(new.cursor[0]) - 2
        frozen = new.delay > step
        np.testing.assert_allclose(got[frozen], expected[frozen], rtol=0, atol=1e-6)
    assert (new.plan[1, 1:3] == state.plan[1, 4:6]).all()  # exactly, in normalised units


@pytest.mark.parametrize("schedule", ["linear", "exp"])
@pytest.mark.parametrize("mode", MODES)
def test_the_seam_is_smaller_than_without_chunking(mode, schedule):
    """Two modes that disagree: a plain new plan takes the other one half of the time."""
    planner = two_mode_planner()
    seeds, delay = range(200), 2
    state = warm_state(planner, seeds, delay=delay)
    plain = planner.replan(state, seeds)
    position = np.full(200, planner.n_obs_steps - 1 + delay)
    shift = planner.executed(state)
    without = seam_jump(state.plan, plain.plan, shift, position)
    assert 0.4 < (without > 1).mean() < 0.7

    policy = RealTimeChunking(planner, Chunking(schedule, mode=mode))
    state = warm_state(policy, seeds, delay=delay)
    new = policy.replan(state, seeds)
    jumps = new.memory["seam"]
    np.testing.assert_allclose(jumps, seam_jump(state.plan, new.plan, shift, position))
    assert jumps.mean() < 0.2 * without.mean()
    same_mode = np.sign(new.plan[:, -3:].mean((1, 2))) == np.sign(state.plan.mean((1, 2)))
    if mode == "soft":  # bounded in every row: the plan moves to the other mode step by step
        assert jumps.max() < 0.6
        steps = np.abs(np.diff(new.plan[:, 1:, 0], axis=1)).max()
        assert steps < 0.8  # the modes are 1.6 apart
        assert same_mode.mean() > (plain.plan.mean((1, 2)) * state.plan.mean((1, 2)) > 0).mean()
    else:  # nearly every row stays in its mode to the end
        assert (jumps > 0.6).mean() < 0.03
        assert same_mode.mean() > 0.97


def test_no_guidance_is_the_plain_plan_bit_for_bit(make_planner):
    for rti in (None, RTI(t_start=0.4, num_steps=2)):
        planner = make_planner(horizon=10, rti=rti)
        policy = RealTimeChunking(planner, Chunking("zeros"))
        state = warm_state(policy, range(3), delay=0)
        assert np.array_equal(
            policy.replan(state, range(3)).plan, planner.replan(state, range(3)).plan
        )


def test_nothing_of_the_old_plans_end_is_invented(make_planner, monkeypatch):
    """What lies beyond it may be nan: it takes no part."""
    planner = make_planner(horizon=10, clip=False)
    policy = RealTimeChunking(planner, Chunking("ones"))
    state = warm_state(policy, [0, 1], executed=3, delay=[2, 9])
    expected = policy.replan(state, [0, 1]).plan
    tell = PrefixCondition.forward

    def poisoned(self, history, prefix, weight):
        assert not weight[:, 7:].any()  # ten positions, three executed
        prefix = prefix.clone()
        prefix[:, 7:] = torch.nan
        return tell(self, history, prefix, weight)

    monkeypatch.setattr(PrefixCondition, "forward", poisoned)
    assert np.array_equal(policy.replan(state, [0, 1]).plan, expected)


@pytest.mark.parametrize("mode", MODES)
def test_rows_are_independent(make_planner, mode):
    policy = RealTimeChunking(make_planner(horizon=10), Chunking(mode=mode))
    obs = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    seeds, order = np.array([5, 6, 7, 8]), np.array([2, 0, 3, 1])
    delay = np.array([0, 1, 2, 3])
    state = warm_state(policy, seeds, obs, delay=delay)
    whole = policy.replan(state, range(4)).plan
    permuted = warm_state(policy, seeds[order], obs[order], delay=delay[order])
    np.testing.assert_allclose(policy.replan(permuted, range(4)).plan, whole[order], atol=1e-5)
    some = policy.replan(state, [1, 3])
    np.testing.assert_allclose(some.plan[[1, 3]], whole[[1, 3]], rtol=0, atol=1e-5)
    assert np.array_equal(some.plan[[0, 2]], state.plan[[0, 2]])
    again = policy.replan(state, range(4)).plan
    assert np.array_equal(again, whole)


def test_cold_rows_are_the_planners_and_leave_no_trace(make_planner):
    planner = make_planner(horizon=10)
    policy = RealTimeChunking(planner)
    obs = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    state = policy.forget(warm_state(policy, [0, 1], obs), np.array([True, False]), seeds=[0])
    state = policy.observe(obs, state)
    new = policy.replan(state, [0, 1])
    fresh = planner.observe(obs, planner.initial_state([0, 1]))
    np.testing.assert_allclose(new.plan[0], planner.replan(fresh, [0, 1]).plan[0], atol=1e-6)
    assert new.memory["seams"].tolist() == [0, 1]
    assert new.memory["seam"][0] == 0


def test_report(make_planner):
    policy = RealTimeChunking(make_planner(horizon=10), Chunking("zeros"))
    assert policy.max_delay == 10 - 1 - 3
    state = warm_state(policy, [0, 1], executed=3, delay=[2, 7])  # six actions are left
    state = policy.replan(state, [0, 1])
    assert state.memory["short"].tolist() == [0, 1]
    assert state.memory["seams"].tolist() == [1, 1]
    first = state.memory["seam"]
    assert (state.memory["seam_max"] == first).all()
    state = policy.replan(policy.observe(np.ones((2, 3), np.float32), state), [0])
    assert state.memory["seams"].tolist() == [2, 1]
    assert state.memory["seam_max"][0] == max(first[0], state.memory["seam"][0])
    state = policy.forget(state, np.array([True, False]))
    assert state.memory["seams"].tolist() == [0, 1]


def test_with_rti_plans_take_the_warm_evaluations(make_planner):
    """And a row whose observation jumped is sampled anew, still along the running plan."""
    rti = RTI(t_start=0.4, num_steps=2, innovation=2.0)
    planner = make_planner(horizon=10, rti=rti, observation_step=(0.1, 0.1, 0.1))
    policy = RealTimeChunking(planner)
    state = warm_state(policy, [0, 1], executed=3)
    jumped = np.zeros((2, 3), np.float32)
    jumped[1] = 1.0
    state = policy.observe(jumped, dataclasses.replace(state, cursor=state.cursor))
    new = policy.replan(state, [0, 1])
    assert (new.nfe - state.nfe).tolist() == [2, 4]
    assert not new.memory["jumped"].any()
    np.testing.assert_allclose(new.plan[:, :3], state.plan[:, 3:6], rtol=0, atol=1e-6)


def test_an_asynchronous_loop_executes_without_gaps(make_planner):
    """Every plan comes `delay` steps late; what is executed is one continued sequence."""
    policy, delay = RealTimeChunking(make_planner(horizon=10)), 2
    obs, state = np.zeros((1, 3), np.float32), None
    state = warm_state(policy, [0], executed=0, delay=delay)
    state, pending, adopted = policy.replan(state, [0]), None, 0
    for _ in range(20):
        state = policy.observe(obs, state)
        if pending is None and policy.needs_plan(state).all():
            pending, wait = policy.replan(state, [0]), delay
        if pending is not None and wait == 0:
            # The step before the seam is in both plans.
            before = state.plan[0, state.cursor[0] - 1]
            state = dataclasses.replace(pending, cursor=pending.cursor + delay)
            assert np.array_equal(state.plan[0, state.cursor[0] - 1], before)
            pending, adopted = None, adopted + 1
        wait = 0 if pending is None else wait - 1
        _, state = policy.execute(state)
    assert adopted == 5  # planned at steps 3, 6, ...: there two steps later
    assert state.memory["short"].tolist() == [0]


def test_inside_an_ensemble(make_planner):
    policy = TemporalEnsemble(RealTimeChunking(make_planner(horizon=10)))
    state = policy.initial_state([0, 1])
    for _ in range(4):
        actions, state = policy.act(np.zeros((2, 3), np.float32), state)
    assert np.isfinite(actions).all()
    assert state.memory["seams"].tolist() == [3, 3]


def test_errors(make_planner):
    with pytest.raises(ValueError, match="unknown schedule 'cosine'"):
        Chunking("cosine")
    with pytest.raises(ValueError, match="overlap must be at least 0"):
        Chunking(overlap=-1)
    with pytest.raises(ValueError, match="unknown mode 'hard'"):
        Chunking(mode="hard")
    with pytest.raises(ValueError, match="max_weight must be positive"):
        Chunking(max_weight=0.0)
    with pytest.raises(ValueError, match="unknown key 'horizon'"):
        from_values(Chunking, {"horizon": 3})
    with pytest.raises(ValueError, match="delay must be at least 0"):
        chunk_weights(np.array([-1]), np.array([3]), 2, 8, Chunking())
    network = {"type": "mlp", "width": 8, "t_kind": "position"}
    plain = make_planner(horizon=10, network=network, level_law="position")
    streaming = StreamingPlanner(plain.spec, plain.denoiser, plain.normalizer)
    with pytest.raises(ValueError, match="StreamingPlanner makes its plans in a way of its own"):
        RealTimeChunking(streaming)
    settings = Truncated(sources=("draft",), rank="denoising", t_start=0.5)
    with pytest.raises(ValueError, match="truncated settings makes its plans"):
        RealTimeChunking(make_planner(truncated=settings))
