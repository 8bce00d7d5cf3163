"""Networks of steps: exact steps of Gaussian laws, derivatives, and plans in one evaluation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from two_modes import TWO_MODES_SPEC, near_a_mode, two_modes_store

from diffpolicy import DiffusionPolicy, TrainerConfig
from diffpolicy.core import make_process, make_solver, prior_start, truncated_start
from diffpolicy.core.denoiser import Denoiser
from diffpolicy.core.sampler import Sampler
from diffpolicy.guidance.cfg import ClassifierFreeGuidance
from diffpolicy.learn.cloning.flow_map import FlowMapLoss
from diffpolicy.learn.cloning.meanflow import MeanFlow
from diffpolicy.learn.cloning.shortcut import Shortcut
from diffpolicy.learn.learning import Learning
from diffpolicy.learn.material import TuningData
from diffpolicy.networks import make_network
from diffpolicy.policies.rti import RTI
from diffpolicy.policies.spec import PolicySpec
from diffpolicy.policies.truncated import Truncated
from diffpolicy.runtime.export import export_policy

MEAN, STD = 0.3, 0.4
FLOW = make_process("flow")
NETWORKS = {
    "mlp": {"type": "mlp", "width": 16, "depth": 2},
    "unet1d": {"type": "unet1d", "down_dims": [8, 16], "diffusion_step_embed_dim": 16},
    "transformer": {"type": "transformer", "width": 16, "depth": 1, "heads": 2},
}


def variance(t):
    return (1 - t) ** 2 * STD**2 + t**2


def moved(x, t, s):
    """Where the path of Gaussian data through ``x`` at ``t`` is at ``s``."""
    keep = (variance(s) / variance(t)).sqrt()
    return (1 - s) * MEAN + keep * (x - (1 - t) * MEAN)


def velocity(x, t):
    slope = (t - (1 - t) * STD**2) / variance(t)  # of half the logarithm of the variance
    return -MEAN + slope * (x - (1 - t) * MEAN)


class ExactSteps(nn.Module):
    """A network of steps of Gaussian data, which reads both levels off its embedding."""

    t_kinds, takes_steps = frozenset({"row"}), True
    horizon, dim = 3, 2

    def __init__(self, error=0.0):
        super().__init__()
        self.error = nn.Parameter(torch.tensor(error, dtype=torch.float64))

    def embed_time(self, t, s=None):
        return torch.cat([t, t if s is None else s], dim=-1) / 1000

    def forward(self, x, time, cond=None, *, time_emb=None):
        emb = self.embed_time(time) if time_emb is None else time_emb
        t, s = emb[..., :1], emb[..., 1:]
        step = (t - s) > 1e-9
        length = torch.where(step, t - s, 1.0)
        mean = torch.where(step, (x - moved(x, t, s)) / length, velocity(x, t))
        return mean + self.error


EXACT = Denoiser(ExactSteps(), FLOW, "mean_velocity")


@pytest.mark.parametrize("settings", [MeanFlow(), Shortcut()], ids=["meanflow", "shortcut"])
def test_exact_steps_are_their_own_target(settings):
    generator = torch.Generator().manual_seed(0)
    t, s = (level.double() for level in settings.draw_steps(500, generator))
    assert bool(((s >= 0) & (s < t) & (t <= 1)).all())
    x = torch.randn(500, 3, 2, dtype=torch.float64)
    with torch.no_grad():
        target = settings.target(EXACT, x, t, s, velocity(x, t), None)
        own = EXACT.raw(x, t, None, s)
        # Halves of the shortest step of a shortcut model take the velocity for their mean.
        exact = (t - s).flatten() > (0.02 if isinstance(settings, Shortcut) else 0)
        torch.testing.assert_close(target[exact], own[exact], atol=1e-10, rtol=0)


@pytest.mark.parametrize("settings", [MeanFlow(power=0), Shortcut()], ids=["meanflow", "shortcut"])
def test_no_gradient_moves_exact_steps(settings):
    def slope(error):
        denoiser = Denoiser(ExactSteps(error), FLOW, "mean_velocity")
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(20_000, 3, 2, generator=generator, dtype=torch.float64)
        out = FlowMapLoss(denoiser, settings)({"action": MEAN + STD * noise}, generator)
        out.loss.mean().backward()
        assert set(out.metrics) == {"step_error", "velocity_error"}
        return abs(denoiser.network.error.grad.item())

    assert slope(0.0) < 0.02
    assert slope(0.1) > 0.1


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_plans_of_exact_steps_are_exact_in_any_number(num_steps):
    noise = torch.randn(8, 3, 2, dtype=torch.float64)
    end, sampler = MEAN + STD * noise, Sampler(num_steps=num_steps)
    drawn = sampler.draw(EXACT, prior_start(FLOW, noise))
    torch.testing.assert_close(drawn, end, atol=1e-12, rtol=0)
    warm = truncated_start(FLOW, end, 0.3, noise)
    ends = moved(warm.x, warm.t, torch.zeros_like(warm.t))
    torch.testing.assert_close(sampler.draw(EXACT, warm), ends, atol=1e-12, rtol=0)


def test_a_row_says_where_its_step_ends():
    grid = Sampler(num_steps=2).grid(FLOW)
    ends = {"ddim": [0.5, 0], "ddpm": [None, None], "dpmpp_2m": [None, None]}
    for name, wanted in ends.items():
        rows = make_solver(name).rows(FLOW, grid)
        assert [None if row.s is None else float(row.s) for row in rows] == wanted
    renoise = make_solver("ddim", eta=1.0, variance="renoise")
    assert [float(row.s) for row in renoise.rows(FLOW, grid)] == [0, 0]


def denoiser_of(name, dtype=torch.float64):
    """A denoiser of steps around a small network, its weights away from their zeros."""
    config = {"type": "flow_map", "base": NETWORKS[name], "horizon": 8, "dim": 2, "cond_dim": 3}
    torch.manual_seed(0)
    denoiser = Denoiser(make_network(config), FLOW, "mean_velocity").to(dtype)
    for weight in denoiser.parameters():
        weight.data.add_(0.1 * torch.randn_like(weight))
    return denoiser


@pytest.mark.parametrize("name", NETWORKS)
def test_the_derivative_along_the_path_is_the_networks(name):
    denoiser = denoiser_of(name)
    x, v, cond = torch.randn(5, 8, 2), torch.randn(5, 8, 2), torch.randn(5, 3)
    x, v, cond = x.double(), v.double(), cond.double()
    t, s = (torch.full((5, 1, 1), level, dtype=torch.float64) for level in (0.8, 0.3))
    with torch.no_grad():
        target = MeanFlow().target(denoiser, x, t, s, v, cond)
        after, before = (denoiser.raw(x + h * v, t + h, cond, s) for h in (1e-5, -1e-5))
    slope = (v - target) / (t - s)
    torch.testing.assert_close(slope, (after - before) / 2e-5, atol=1e-7, rtol=1e-6)
    assert slope.abs().max() > 1e-3


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_a_grid_makes_the_steps_that_a_network_is_told_of(name, guided):
    denoiser = denoiser_of(name)
    cond, noise = torch.randn(3, 3).double(), torch.randn(3, 8, 2).double()

    def step(x, t, s):
        told = denoiser.raw(x, t, cond, s)
        free = denoiser.raw(x, t, torch.zeros_like(cond), s)
        return x - (t - s) * (free + 2 * (told - free) if guided else told)

    one, half, zero = (torch.full((1, 1, 1), v, dtype=torch.float64) for v in (1.0, 0.5, 0.0))
    seen = ClassifierFreeGuidance(denoiser, 2.0) if guided else denoiser
    with torch.no_grad():
        drawn = Sampler(num_steps=2).draw(seen, prior_start(FLOW, noise), cond=cond)
        by_hand = step(step(noise, one, half), half, zero)
    torch.testing.assert_close(drawn, by_hand, atol=1e-12, rtol=0)


def test_a_network_of_steps_begins_without_them():
    config = {"type": "flow_map", "base": NETWORKS["mlp"], "horizon": 8, "dim": 2}
    network = make_network(config)
    assert make_network(network.config()).config() == network.config()
    t, x = torch.full((2, 1, 1), 700.0), torch.randn(2, 8, 2)
    stepless, step = network(x, t), network(x, t, time_emb=network.embed_time(t, t - 300))
    assert torch.equal(stepless, step)
    for base in ({"type": "act"}, {"type": "anchored", "base": NETWORKS["mlp"]}, None):
        with pytest.raises(ValueError, match="around one that takes a level per plan"):
            make_network({**config, "base": base})


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return two_modes_store(tmp_path_factory.mktemp("modes"))


def steps_policy(store, **spec):
    values = {"process": "flow", "prediction": "mean_velocity", "clip": False, **spec}
    return DiffusionPolicy.from_dataset(store, spec={**TWO_MODES_SPEC, **values})


@pytest.mark.parametrize("name", ["meanflow", "shortcut"])
def test_one_evaluation_finds_both_modes_from_scratch(name, store, tmp_path):
    pytest.importorskip("onnxruntime")
    policy = steps_policy(store)
    config = TrainerConfig(steps=500, batch_size=128, lr=3e-3, progress=False)
    learning = Learning(objective={"type": name})
    policy = policy.learn(store, config, tmp_path / "run", learning=learning)
    found = [near_a_mode(policy, store, k) for k in (1, 2, 4)]
    assert min(found) > 0.7, found
    signs = np.sign(policy.predict(store.read("obs", 0, 400))[0])
    assert 0.3 < (signs > 0).mean() < 0.7
    # Like any other policy: stored, warm-started, truncated, compiled and exported.
    loaded = DiffusionPolicy.from_pretrained(tmp_path / "run")
    loaded = loaded.with_settings(sampler=replace(loaded.spec.sampler, num_steps=1))
    warm = loaded.with_settings(rti=RTI(t_start=0.5, num_steps=1))
    obs, state = store.read("obs", 0, 400), None
    for _ in range(2):
        action, state = warm.predict(obs, state)
    assert set(state.nfe) == {2}
    assert (np.abs(np.abs(action) - 0.6) < 0.2).mean() > 0.7
    few = Truncated(t_start=0.5, num_steps=1)
    anchored = loaded.with_anchors(store, truncated=few, count=2)
    assert np.isfinite(anchored.predict(obs[:4])[0]).all()
    compiled = warm.compile(backend="onnxruntime")
    a, b = (one.predict(obs[:1])[0] for one in (warm, compiled))
    np.testing.assert_allclose(a, b, atol=1e-4)
    export_policy(warm, tmp_path / "exported")


def test_what_does_not_go_with_steps_is_refused(store, tmp_path):
    flow = {"obs_dim": 1, "action_dim": 1, "prediction": "mean_velocity", "process": "flow"}
    for wrong in ({}, {"clip": False, "process": "vp_cosine"}, {"level_law": "position"}):
        with pytest.raises(ValueError, match="needs process='flow', clip=False"):
            PolicySpec.from_config({**flow, **wrong})
    with pytest.raises(ValueError, match="a network of type 'flow_map'"):
        Denoiser(make_network({**NETWORKS["mlp"], "horizon": 2, "dim": 1}), FLOW, "mean_velocity")
    config = TrainerConfig(steps=1, progress=False)
    for policy, learning in (
        (steps_policy(store), Learning()),
        (steps_policy(store, prediction="velocity"), Learning(objective={"type": "shortcut"})),
    ):
        with pytest.raises(ValueError, match="algorithm=meanflow"):
            policy.learn(store, config, tmp_path / "run", learning=learning)
    with pytest.raises(ValueError, match=r"'learning.objective.halving'; did you mean"):
        Learning(objective={"type": "shortcut", "halving": 3})
    with pytest.raises(ValueError, match="share must be in"):
        MeanFlow(share=0.0)
    data = TuningData(demonstrations=store)
    with pytest.raises(ValueError, match="one evaluation without a student"):
        steps_policy(store).distill(data, {"type": "rectified"}, config, tmp_path / "student")
