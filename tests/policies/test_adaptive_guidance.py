"""Guidance whose unconditional branch is dropped from a level on that was found beforehand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffpolicy.core import AnalyticDenoiser, VPCosine, levels, make_solver, prior_start, sample
from diffpolicy.core.sampler import Teleport
from diffpolicy.guidance import ClassifierFreeGuidance
from diffpolicy.policies.adaptive_guidance import switching_level
from diffpolicy.policies.spec import PolicySampler
from diffpolicy.runtime.compile import compile_planner

OBS = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
GUIDED = {"cond_dropout": 0.1, "sampler": PolicySampler(num_steps=8, guidance_scale=2.0)}


def counted(t_min, scale=2.0, gap=1.0):
    """Plans, and the rows that the network was asked for at each evaluation."""
    rows = []

    def x0_hat(x, t, cond):
        rows.append(len(x))
        return 0.3 * x + gap * t.square() * cond[:, None]  # the branches come to agree

    process = VPCosine()
    start = prior_start(process, torch.randn(4, 2, 1, generator=torch.Generator().manual_seed(0)))
    guided = ClassifierFreeGuidance(AnalyticDenoiser(process, x0_hat), scale, t_min=t_min)
    out = sample(guided, make_solver("ddim"), start, levels(start, 4), cond=torch.ones(4, 1))
    return out, rows


def test_levels_below_the_switch_ask_one_branch():
    whole, both = counted(0.0)
    assert both == [8] * 4
    _, half = counted(0.5)
    assert half == [8, 8, 4, 4]
    alone, one = counted(1.0)
    assert one == [4] * 4
    torch.testing.assert_close(alone, counted(0.0, scale=1.0)[0])
    same, _ = counted(1e-9)  # below every level that is evaluated
    assert torch.equal(same, whole)


def test_a_single_level_is_guided_as_on_the_grid():
    guided = ClassifierFreeGuidance(
        AnalyticDenoiser(VPCosine(), lambda x, t, cond: cond[:, None] * torch.ones_like(x)),
        3.0,
        t_min=0.5,
    )
    t = torch.tensor([0.2, 0.8]).view(2, 1, 1)
    out = guided(torch.zeros(2, 1, 1), t, torch.ones(2, 1)).x0_hat
    assert out.flatten().tolist() == [1.0, 3.0]


def test_equal_branches_halve_the_cost_and_a_threshold_of_one_keeps_both(make_planner):
    planner = make_planner(**GUIDED)
    state = planner.observe(OBS, planner.initial_state(range(5)))
    kept = switching_level(planner, state, threshold=1.0)
    assert (kept.t_min, kept.branches, kept.branches_before) == (0.0, 16, 16)
    last = kept.agreement[-1]
    between = switching_level(planner, state, threshold=last)
    first = max(i for i, value in enumerate(kept.agreement) if value < last - 1e-6) + 1
    assert 0 < first < 8
    assert between.branches == 8 + first
    assert between.levels[first] < between.t_min < between.levels[first - 1]

    def deaf(x, t, cond=None, **how):
        return own(x, t, None if cond is None else 0 * cond, **how)

    own, network = planner.denoiser.network.forward, planner.denoiser.network
    network.forward = deaf
    equal = switching_level(planner, state, threshold=1.0)
    assert (equal.t_min, equal.branches) == (1.0, 8)


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
def test_a_switch_on_the_way_is_compiled(make_planner, backend):
    pytest.importorskip("onnxruntime")
    planner = make_planner(**GUIDED)
    early = make_planner(**{**GUIDED, "sampler": replace(planner.spec.sampler, guidance_t_min=0.4)})
    fast = compile_planner(early, backend=backend, batch_size=5)
    acts = [p.act(OBS, p.initial_state(range(5)))[0] for p in (planner, early, fast)]
    assert np.abs(acts[1] - acts[2]).max() < 1e-4
    assert not np.allclose(acts[0], acts[1])


def test_plans_are_followed_from_where_the_policy_begins(make_planner):
    planner = make_planner(**GUIDED)
    rows = ((0.2,) * planner.action_dim,) * planner.horizon
    own = replace(planner.spec.sampler, teleport=Teleport(0.8, rows, rows), start_seed=3)
    planner, seen = make_planner(**{**GUIDED, "sampler": own}), []
    hook = planner.denoiser.network.register_forward_pre_hook(lambda _, told: seen.append(told[0]))
    report = switching_level(planner, planner.observe(OBS, planner.initial_state(range(5))))
    hook.remove()
    loop, guess = planner.loop(), torch.zeros(5, planner.horizon, planner.action_dim)
    torch.testing.assert_close(seen[0][:5], loop.begin(guess, guess[:0]).x)
    assert report.levels[0] == 0.8


def test_what_is_not_guided_is_refused(make_planner):
    planner = make_planner()
    with pytest.raises(ValueError, match="guidance_scale other than 1"):
        switching_level(planner, planner.observe(OBS, planner.initial_state(range(5))))
