"""Plans that hold observations: pins, goals, inverse dynamics, drafts, guidance, warm starts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffpolicy.core.sampler import Sampler
from diffpolicy.policies.best_of_n import Selection
from diffpolicy.policies.planners import Returns
from diffpolicy.policies.rti import RTI
from diffpolicy.policies.spec import PolicySampler, PolicySpec
from diffpolicy.policies.streaming import StreamingPlanner
from diffpolicy.policies.truncated import Truncated
from diffpolicy.runtime.compile import compile_planner
from diffpolicy.runtime.export import export_policy

OBS = np.random.default_rng(1).uniform(-1, 1, (6, 3)).astype(np.float32)
INVERSE = {"inverse": {"type": "inverse", "width": 8, "depth": 1}}
VALUE = {"value": {"type": "value", "base": {"type": "mlp", "width": 8, "depth": 1}}}
DRAFT = {"draft": {"type": "draft", "width": 8}}


def planned(planner, obs=OBS, **options):
    state = planner.observe(obs, planner.initial_state(range(len(obs))))
    return planner.replan(state, range(len(obs)), **options)


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpmpp_2m", "heun"])
@pytest.mark.parametrize("layout", ["trajectory", "state"])
def test_plans_begin_at_the_observations(make_planner, layout, solver):
    planner = make_planner(
        layout=layout, heads=INVERSE, sampler=Sampler(solver=solver, num_steps=3)
    )
    state = planned(planner)
    normal = planner.normalizer.normalize("obs", torch.from_numpy(state.history)).numpy()
    assert state.plan.shape == (6, 8, 5)  # O + A, whatever was sampled
    np.testing.assert_array_equal(state.plan[:, :2, :3], normal)
    actions, _ = planner.execute(state)
    np.testing.assert_allclose(actions, state.plan[:, 1, -2:].clip(-0.5, 0.5), atol=1e-6)


def test_actions_between_states_are_the_inverse_head_s(make_planner):
    planner = make_planner(layout="state", heads=INVERSE)
    plan = torch.from_numpy(planned(planner).plan)
    with torch.no_grad():
        expected = planner.heads["inverse"](plan[:, :-1, :3], plan[:, 1:, :3])
    torch.testing.assert_close(plan[:, :-1, 3:], expected)
    torch.testing.assert_close(plan[:, -1, 3:], plan[:, -2, 3:])


def test_goals_are_normalised_as_the_entry_they_are_pinned_to(make_planner):
    planner = make_planner(layout="trajectory", goal=((0, 2),))
    scale = planner.normalizer.normalize("obs", torch.eye(3))
    plan = planned(planner).plan
    np.testing.assert_allclose(plan[:, -1, 0], OBS[:, 2] * scale[0, 0].item(), atol=1e-6)


def test_warm_plans_are_the_solved_shifted_ones(make_planner):
    planner = make_planner(layout="trajectory", rti=RTI(0.3, num_steps=2))
    state = planned(planner)
    for _ in range(3):
        _, state = planner.execute(state)
    again = planner.replan(planner.observe(OBS, state), range(6))
    assert (again.nfe - state.nfe).tolist() == [2] * 6
    guess = planner.shifted(state)
    np.testing.assert_array_equal(guess[:, 0], state.plan[:, 3])
    assert guess.shape == (6, 8, 5)


def test_an_autoregressive_draft_is_refined_in_a_few_steps(make_planner):
    truncated = Truncated(t_start=0.2, num_steps=2, sources=("autoregressive",))
    for layout in ("trajectory", "state"):
        planner = make_planner(layout=layout, heads={**INVERSE, **DRAFT}, truncated=truncated)
        assert planner.nfe == 2  # nothing is spent on ranking a single guess
        state = planned(planner)
        history = torch.from_numpy(state.history)
        with torch.no_grad():
            draft = planner.heads["draft"].rollout(
                planner.normalizer.normalize("obs", history), None
            )
        almost = planner.with_spec(
            PolicySpec.from_config(
                {
                    **planner.spec.to_config(),
                    "truncated": {"t_start": 0.001, "num_steps": 1, "sources": ["autoregressive"]},
                }
            )
        )
        close = planned(almost).plan[..., :3]
        np.testing.assert_allclose(close, draft.clamp(-1, 1).numpy(), atol=0.1)


def test_guidance_by_a_value_changes_plans_and_raises_it(make_planner):
    heads = {**VALUE}
    plain = make_planner(layout="trajectory", heads=heads, clip=False, sampler=Sampler(num_steps=8))
    guided = make_planner(
        layout="trajectory", heads=heads, clip=False, sampler=Sampler(num_steps=8), value_scale=0.5
    )
    history = planned(plain).history
    better = guided.score(history, planned(guided).plan) > plain.score(history, planned(plain).plan)
    assert better.mean() >= 0.8


def test_returns_are_a_condition_and_guidance_extrapolates(make_planner):
    shared = {
        "layout": "state",
        "heads": INVERSE,
        "cond_dropout": 0.25,
        "clip": False,
    }
    plans = {
        (target, scale): planned(
            make_planner(
                **shared,
                returns=Returns(target=target, low=0.0, high=1.0),
                sampler=PolicySampler(num_steps=4, guidance_scale=scale),
            )
        ).plan
        for target in (0.2, 1.0)
        for scale in (1.0, 2.0)
    }
    assert np.abs(plans[0.2, 1.0] - plans[1.0, 1.0]).max() > 1e-3
    assert np.abs(plans[1.0, 1.0] - plans[1.0, 2.0]).max() > 1e-3


def test_temperature_is_part_of_the_loop(make_planner):
    """So that whatever runs the loop, compiled or exported, samples the same."""
    noise = torch.randn(1, 2, 8, 2)
    history, guess = torch.zeros(2, 2, 3), torch.zeros(2, 8, 2)
    cool, plain = (make_planner(temperature=t).loop("cold") for t in (0.5, 1.0))
    with torch.no_grad():
        torch.testing.assert_close(cool(history, guess, noise), plain(history, guess, 0.5 * noise))


def test_cold_sampling_has_no_spread(make_planner):
    planner = make_planner(
        layout="trajectory", temperature=0.0, sampler=Sampler(solver="ddpm", num_steps=4)
    )
    same = np.repeat(OBS[:1], 4, 0)
    plan = planned(planner, same).plan
    np.testing.assert_allclose(plan, plan[:1].repeat(4, 0), atol=1e-6)


def test_a_value_chooses_among_plans(make_planner):
    one = make_planner(layout="state", heads={**INVERSE, **VALUE})
    best = make_planner(layout="state", heads={**INVERSE, **VALUE}, selection=Selection(8))
    history = planned(one).history
    assert (best.score(history, planned(best).plan) >= one.score(history, planned(one).plan)).all()


def test_specs_survive_json():
    spec = PolicySpec(
        4,
        2,
        layout="state",
        goal=((0, 2), (1, 3)),
        returns=Returns(low=0.0, high=2.0),
        heads={"inverse": {"type": "inverse"}, "value": {"type": "value"}},
        selection=Selection(3, "softmax"),
        cond_dropout=0.2,
        temperature=0.5,
    )
    assert PolicySpec.from_config(spec.to_config()) == spec


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "states"}, "unknown layout 'states'"),
        ({"layout": "state"}, "actions between states come from a head inverse"),
        ({"returns": Returns()}, "need layout 'trajectory' or 'state'"),
        ({"goal": ((0, 1),)}, "holds no observation whose goal"),
        ({"layout": "trajectory", "value_scale": 1.0}, "the gradient of a head value"),
        ({"layout": "trajectory", "level_law": "position"}, "neither grippers nor levels"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"layout": "trajectory", "cond_dropout": 0.2}, "set returns, or cond_dropout=0"),
        (
            {"layout": "trajectory", "heads": {"draft": {"type": "draft", "returns": True}}},
            "exactly if the policy is",
        ),
        (
            {"layout": "trajectory", "heads": {"value": {"type": "value", "cond_dim": 2}}},
            "judges plans alone",
        ),
        (
            {
                "heads": {"critic": {"type": "q_ensemble"}},
                "selection": Selection(4),
                "rti": RTI(0.3, renoise=False),
            },
            "all warm candidates are the same plan",
        ),
        ({"heads": INVERSE}, "need layout 'trajectory' or 'state'"),
        ({"layout": "trajectory", "truncated": Truncated(t_start=0.2)}, "anchors are plans of act"),
        (
            {
                "layout": "trajectory",
                "heads": INVERSE,
                "truncated": Truncated(t_start=0.2, sources=("autoregressive",)),
            },
            "the source 'autoregressive' is a head draft",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(make_planner, changes, message):
    with pytest.raises(ValueError, match=message):
        make_planner(**changes)


def test_streaming_rolls_actions_only(make_planner):
    planner = make_planner(layout="trajectory")
    with pytest.raises(ValueError, match="rolls one plan of actions"):
        StreamingPlanner(planner.spec, planner.denoiser, planner.normalizer)


def test_compiled_loops_of_planners_are_the_same(make_planner):
    for backend in ("onnxruntime", "openvino"):
        planner = make_planner(layout="trajectory", rti=RTI(0.4, num_steps=2))
        fast = compile_planner(planner, backend=backend, batch_size=6)
        for _ in range(2):
            np.testing.assert_allclose(planned(fast).plan, planned(planner).plan, atol=1e-4)
    guided = make_planner(layout="trajectory", heads=VALUE, value_scale=0.1)
    with pytest.raises(ValueError, match="differentiates its network"):
        compile_planner(guided)


def test_planners_are_not_exported(make_planner, tmp_path):
    with pytest.raises(ValueError, match="one plan given observations"):
        export_policy(make_planner(layout="trajectory"), tmp_path / "file")
