"""One value that says how a state is led down a grid."""

from __future__ import annotations

import pytest
import torch

from diffpolicy.core import (
    AnalyticDenoiser,
    DiscreteVP,
    Sampler,
    VPCosine,
    levels,
    make_solver,
    prior_start,
    sample,
    truncated_start,
)
from diffpolicy.learn.actor_critic.algorithms import ActorCritic
from diffpolicy.learn.preferences.few_step import FewStep
from diffpolicy.learn.reward.plan_chain import PlanChain
from diffpolicy.policies.rti import RTI
from diffpolicy.policies.spec import PolicySampler
from diffpolicy.policies.truncated import Truncated

NOISE = torch.randn(3, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_drawing_is_the_loop_on_the_start_s_own_grid():
    denoiser = AnalyticDenoiser(VPCosine(), lambda x, t, cond: torch.tanh(x))
    sampler = Sampler(solver="dpmpp_2m", num_steps=3, spacing="log_snr")
    for start in (
        prior_start(denoiser.process, NOISE),
        truncated_start(denoiser.process, NOISE, 0.4, NOISE),
    ):
        grid = levels(start, 3, spacing="log_snr", process=denoiser.process)
        expected = sample(denoiser, make_solver("dpmpp_2m"), start, grid)
        assert torch.equal(sampler.draw(denoiser, start), expected)
        assert torch.equal(sampler.grid(denoiser.process, start), grid)


def test_a_grid_begins_at_the_nearest_training_level():
    process = DiscreteVP.cosine(10)
    assert Sampler(num_steps=2).grid(process, 0.38).flatten().tolist() == [0.4, 0.2, 0.0]
    assert Sampler(num_steps=2).grid(process, (0.2, 0.61)).shape == (3, 1, 1, 2)
    assert len(Sampler(num_steps=2).grid(process, num_steps=5)) == 6
    with pytest.raises(ValueError, match="nearer to clean data"):
        Sampler(num_steps=1).grid(process, 0.01)


def test_deterministic_is_the_solver_s_noise_free_form():
    sampler = Sampler(solver="ddim", options={"eta": 0.7})
    assert sampler.make().stochastic
    assert not sampler.make(deterministic=True).stochastic


@pytest.mark.parametrize("kind", [Sampler, PolicySampler, FewStep, PlanChain, ActorCritic])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"solver": "ddmi"}, "unknown solver 'ddmi'"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"spacing": "even"}, "unknown spacing 'even'"),
        ({"options": {"etaa": 1.0}}, "did you mean 'eta'"),
        ({"t_min": 1.0}, r"t_min must be in \(0, 1\)"),
    ],
)
def test_whatever_samples_refuses_the_same(kind, wrong, message):
    with pytest.raises(ValueError, match=message):
        kind(**{"solver": "ddim", **wrong})


def test_settings_of_starts_are_samplers_by_keyword():
    assert RTI(0.3, solver="dpmpp_2m").make() == make_solver("dpmpp_2m")
    assert Truncated(t_start=0.4).num_steps == 2
    with pytest.raises(ValueError, match="unknown solver"):
        RTI(0.3, solver="ddmi")
