"""Policies under costs: whatever plans start from, one setting keeps them from what it costs."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest

from diffpolicy.core.sampler import Sampler
from diffpolicy.guidance.costs import Cost
from diffpolicy.policies.best_of_n import Selection
from diffpolicy.policies.chunking import Chunking, RealTimeChunking
from diffpolicy.policies.direct import ONE_CALL
from diffpolicy.policies.guided import Costs, plan_costs
from diffpolicy.policies.rti import RTI
from diffpolicy.policies.streaming import StreamingPlanner
from diffpolicy.policies.truncated import Truncated
from diffpolicy.runtime.compile import compile_planner
from diffpolicy.runtime.export import export_policy

OBS = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
HIGH = {"type": "limits", "dims": [0], "high": [-0.3]}  # normalised as it is: data are in [-1, 1]
FROM_HERE = {"gain": 0.1, "start": [0, 1]}


def states_of(policy, steps=8, obs=OBS):
    """The memory at every new plan of an episode of a standing robot."""
    state, seen = policy.initial_state(range(len(obs))), []
    for _ in range(steps):
        before = state.plans
        _, state = policy.act(obs, state)
        seen += [state] if (state.plans > before).all() else []
    assert len(seen) > 1
    return seen


WAYS = {
    "cold": {},
    "rti": {"rti": RTI(0.4, num_steps=2)},
    "guesses": {"truncated": Truncated(t_start=0.5, sources=("draft", "previous"))},
    "trajectory": {"layout": "trajectory", "n_obs_steps": 1},
}


@pytest.mark.parametrize("way", WAYS)
def test_plans_keep_the_limit_whatever_they_start_from(make_planner, way):
    dim = 3 if way == "trajectory" else 0  # the first action
    costs = Costs(({**HIGH, "dims": [dim]},), project=2)
    for state in states_of(make_planner(guidance=costs, **WAYS[way])):
        ahead = state.plan[:, state.history.shape[1] - 1 :, dim]
        assert ahead.max() <= -0.3 + 1e-5
    free = [s.plan[:, 1:, dim].max() for s in states_of(make_planner(**WAYS[way]))]
    assert max(free) > 0


def test_what_wraps_the_loops_keeps_the_limit_too(make_planner):
    costs = Costs((HIGH,), project=2)
    chunked = RealTimeChunking(make_planner(guidance=costs), Chunking("zeros"))
    for state in states_of(chunked):
        assert state.plan[:, 2:, 0].max() <= -0.3 + 1e-5
    spec = {"n_obs_steps": 1, "n_action_steps": 4, "level_law": "position"}
    spec["network"] = {"type": "mlp", "width": 16, "depth": 1, "t_kind": "position"}
    plain = make_planner(guidance=costs, **spec)
    streamed = StreamingPlanner(plain.spec, plain.denoiser, plain.normalizer)
    for state in states_of(streamed, 12):
        assert state.plan[:, :4, 0].max() <= -0.3 + 1e-5


def test_costs_see_metres_and_know_where_the_robot_is(make_planner):
    """Positions are the raw observation plus the sum of unnormalised actions."""
    wall = {"type": "limits", "dims": [0, 1], "low": [-9, -9], "high": [0.5, 9], **FROM_HERE}
    policy = make_planner(guidance=Costs((wall,), scale=0.0))
    state = states_of(policy)[0]
    moves = policy.to_actions(state.plan)  # within bounds; costs see them before
    raw = policy.normalizer.unnormalize("action", state.plan)[:, 1:]
    position = state.history[:, -1, 0, None] + 0.1 * raw[..., 0].cumsum(1)
    expected = 0.5 * np.square(np.maximum(position - 0.5, 0)).sum(1)
    np.testing.assert_allclose(plan_costs(policy, state.history, state.plan), expected, rtol=1e-5)
    assert np.abs(moves).max() <= 0.5


def test_guidance_that_does_nothing_changes_no_bit(make_planner):
    plain = states_of(make_planner())
    idle = states_of(make_planner(guidance=Costs((HIGH,), scale=0.0)))
    assert all(np.array_equal(a.plan, b.plan) for a, b in zip(plain, idle, strict=True))


def test_an_observation_is_encoded_once_for_all_guided_candidates(make_planner):
    choose = Selection(6, verifier="cost")
    policy = make_planner(guidance=Costs((HIGH,), scale=0.3), selection=choose)
    calls, encoder = [], policy.denoiser.encoder
    encoder.register_forward_hook(lambda module, given, out: calls.append(len(out)))
    state = policy.observe(OBS, policy.initial_state(range(5)))
    chosen = policy.replan(state, range(5))
    assert calls == [5]
    alone = make_planner(guidance=Costs((HIGH,), scale=0.3)).replan(state, range(5))
    costs = [plan_costs(policy, state.history, one.plan) for one in (chosen, alone)]
    assert (costs[0] <= costs[1]).all()
    assert (costs[0] < costs[1]).any()


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
@pytest.mark.parametrize("start", [None, Truncated(t_start=0.5)], ids=["noise", "anchors"])
def test_costs_in_closed_form_are_compiled(make_planner, backend, start):
    pytest.importorskip("onnxruntime")
    ball = {"type": "obstacle", "dims": [0, 1], "center": [0.4, 0.3], "radius": 0.6, "margin": 0.1}
    rough = {"type": "smoothness", "kind": "tv", "weight": 0.2}
    costs = Costs((HIGH, {**ball, **FROM_HERE, "push": "lateral"}, rough), project=1)
    policy = make_planner(guidance=costs, truncated=start)
    fast = compile_planner(policy, backend=backend, batch_size=5)
    pairs = zip(states_of(policy), states_of(fast), strict=True)
    assert all(np.abs(a.plan - b.plan).max() < 1e-4 for a, b in pairs)


def test_costs_in_closed_form_are_exported(make_planner, tmp_path):
    pytest.importorskip("onnx")
    wall = {"type": "limits", "dims": [0], "high": [0.3], "gain": 0.1, "start": [0]}
    policy = make_planner(guidance=Costs((HIGH, wall), project=1), rti=RTI(0.4, num_steps=2))
    assert export_policy(policy, tmp_path / "file").max_error < 1e-4


class Effort(Cost):
    """A user's own cost, differentiated automatically."""

    def forward(self, plan, obs):
        return plan[..., 1].square().sum(1)


@pytest.fixture
def effort():
    module = types.ModuleType("my_costs")
    module.Effort = Effort
    sys.modules["my_costs"] = module
    yield {"type": "my_costs:Effort"}
    del sys.modules["my_costs"]


@pytest.mark.parametrize("mode", ["estimate", "network"])
def test_a_cost_of_the_user_s_own(make_planner, effort, mode):
    costs = Costs(({**effort, "step": "polyak"},), mode=mode, project=3)
    policy = make_planner(guidance=costs)
    sizes = [np.square(s.plan[..., 1]).sum() for s in states_of(policy)]
    plain = [np.square(s.plan[..., 1]).sum() for s in states_of(make_planner())]
    assert max(sizes) < 0.2 * min(plain)
    with pytest.raises(ValueError, match="backend='eager' alone"):
        compile_planner(policy, backend="eager")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"costs": [{"type": "limitz"}]}, "did you mean 'limits'"),
        ({"costs": [{"type": "limits", "dims": [0], "hihg": [1]}]}, "did you mean 'high'"),
        ({"costs": []}, "guidance needs costs"),
        ({"costs": [HIGH], "window": (0.5, 0.2)}, "window is"),
        ({"costs": [HIGH], "mode": "netwrok"}, "did you mean 'network'"),
        ({"costs": [{**HIGH, "dims": [7]}]}, "does not fit plans of 2 entries"),
        ({"costs": [{**HIGH, "gain": 1.0, "start": [9]}]}, "does not fit"),
    ],
)
def test_unusable_costs_are_refused_at_construction(make_planner, changes, message):
    with pytest.raises(ValueError, match=message):
        make_planner(guidance=Costs(**{**changes, "costs": tuple(changes["costs"])}))


def test_settings_survive_a_file(make_planner):
    spec = make_planner(guidance=Costs((HIGH,), project=2)).spec
    assert type(spec).from_config(spec.to_config()) == spec
    with pytest.raises(ValueError, match=r"needs guidance\.costs"):
        make_planner(selection=Selection(4, verifier="cost"))


def test_a_plan_of_the_wrong_kind_of_network_is_refused(make_planner):
    once = {**ONE_CALL, "network": {"type": "bc_mlp"}, "sampler": Sampler(num_steps=1)}
    with pytest.raises(ValueError, match="has no use for guidance"):
        make_planner(guidance=Costs((HIGH,)), **once)
