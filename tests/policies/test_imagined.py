"""Prediction with action: exact joint laws, parts at levels of their own, frames in plans."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from diffpolicy import DiffusionPolicy
from diffpolicy.core.denoiser import Denoiser
from diffpolicy.core.processes import make_process
from diffpolicy.core.sampler import Sampler
from diffpolicy.data import EpisodeStore
from diffpolicy.data.normalize import Normalizer
from diffpolicy.policies.diffusion import DiffusionPlanner
from diffpolicy.policies.imagined import Imagined, picture_of
from diffpolicy.policies.rti import RTI
from diffpolicy.policies.spec import PolicySpec
from diffpolicy.policies.truncated import Truncated
from diffpolicy.runtime.compile import compile_planner
from diffpolicy.runtime.export import export_policy
from diffpolicy.runtime.exported import load_exported

COVARIANCE = torch.tensor([[0.5, 0.3], [0.3, 0.4]])  # of (state, action)
PARTS = {"type": "modalities", "base": {"type": "mlp", "width": 8, "depth": 1}, "width": 4}
VECTORS = {"layout": "joint", "imagined": Imagined(shape=(3,)), "network": PARTS}
IMAGES = {
    "layout": "joint",
    "imagined": Imagined("image", size=4, frames=2, shape=(8, 8, 3), predict="joint"),
    "network": {**PARTS, "width": 12},
}


class JointGaussian(nn.Module):
    """``E[x0 | x_t]`` of ``(state, action) ~ N(cond, COVARIANCE)``, each at a level of its own."""

    t_kinds = frozenset({"row", "dim"})

    def __init__(self, process):
        super().__init__()
        self.process, self.unused = process, nn.Parameter(torch.zeros(1))

    def embed_time(self, t):
        return t / 1000

    def forward(self, x, t, cond=None, *, time_emb=None):
        t = (self.embed_time(t) if time_emb is None else time_emb).double()
        scale, noise = (
            f(t).expand(len(t), 1, 2)[:, 0] for f in (self.process.alpha, self.process.sigma)
        )
        mean = cond.double()
        law = COVARIANCE.double()
        seen = scale[:, :, None] * law * scale[:, None] + torch.diag_embed(noise.square())
        gain = law * scale[:, None] @ torch.linalg.inv(seen)
        out = mean + (gain @ (x[:, 0].double() - scale * mean)[..., None])[..., 0]
        return out[:, None].to(x)


def exact(solver="ddim", num_steps=100, **changes):
    process = make_process("vp_cosine")
    statistics = {
        name: {k: [v] * dim for k, v in LIMITS.items()} for name, dim in (("obs", 2), ("action", 1))
    }
    values = {"imagined": Imagined("state", shape=(1,), **changes), "horizon": 1}
    sampler = Sampler(solver=solver, num_steps=num_steps)
    sizes = {"n_obs_steps": 1, "n_action_steps": 1, "prediction": "x0", "clip": False}
    spec = PolicySpec(2, 1, layout="joint", sampler=sampler, **sizes, **values)
    normalizer = Normalizer.fit(statistics, {"obs": "identity", "action": "identity"})
    return DiffusionPlanner(spec, Denoiser(JointGaussian(process), process, "x0"), normalizer)


LIMITS = {"min": -1.0, "max": 1.0, "mean": 0.0, "std": 0.5, "q01": -1.0, "q99": 1.0}
MEAN = np.array([0.4, -0.2], np.float32)


def drawn(planner, count=3000):
    obs = np.tile(MEAN, (count, 1))
    state = planner.observe(obs, planner.initial_state(range(count)))
    return torch.from_numpy(planner.replan(state, range(count)).plan[:, 0])


@pytest.mark.parametrize("solver", ["ddpm", "unipc"])
def test_both_are_drawn_from_their_joint_law(solver):
    plans = drawn(exact(solver, predict="joint"))
    torch.testing.assert_close(plans.T.cov(), COVARIANCE, atol=0.04, rtol=0)
    torch.testing.assert_close(plans.mean(0), torch.from_numpy(MEAN), atol=0.04, rtol=0)


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpmpp_2m", "heun", "unipc", "deis"])
def test_actions_alone_are_drawn_from_their_marginal_law(solver):
    """What is imagined stays the noise that it began as, and says nothing of the action."""
    plans = drawn(exact(solver))
    assert plans[:, 1].mean().item() == pytest.approx(MEAN[1], abs=0.04)
    assert plans[:, 1].var().item() == pytest.approx(COVARIANCE[1, 1].item(), abs=0.04)
    assert plans[:, 0].std().item() == pytest.approx(1.0, abs=0.05)
    assert abs(plans.T.corrcoef()[0, 1].item()) < 0.08


def plan_of(planner, count=3):
    obs = np.linspace(-1, 1, 3 * count, dtype=np.float32).reshape(count, 3)
    state = planner.observe(obs, planner.initial_state(range(count)))
    return planner.replan(state, range(count))


def test_what_is_imagined_is_held_at_the_noise_that_it_began_as(make_planner):
    planner = make_planner(**VECTORS)
    state = plan_of(planner)
    assert state.plan.shape == (3, 8, 5)
    noise = planner.draw_noise(planner.initial_state(range(3)), 1, False)[0]
    np.testing.assert_allclose(state.plan[..., :3], noise[..., :3], rtol=1e-4)
    actions, _ = planner.execute(state)
    np.testing.assert_allclose(actions, state.plan[:, 1, -2:].clip(-0.5, 0.5), atol=1e-6)
    both = make_planner(**{**VECTORS, "imagined": Imagined(shape=(3,), predict="joint")})
    assert not np.allclose(plan_of(both).plan[..., :3], noise[..., :3])


def test_warm_plans_hold_it_too(make_planner):
    planner = make_planner(**VECTORS, rti=RTI(0.3, num_steps=2))
    state = plan_of(planner)
    for _ in range(3):
        _, state = planner.execute(state)
    again = planner.replan(state, range(3))
    assert (again.nfe - state.nfe).tolist() == [2] * 3
    noise = planner.draw_noise(state, 1, False)[0]
    np.testing.assert_allclose(again.plan[..., :3], noise[..., :3], rtol=1e-4)


@pytest.mark.parametrize("network", [
    {"type": "mlp", "width": 8, "depth": 1, "t_kind": "dim"},
    {**PARTS, "base": {"type": "unet1d", "down_dims": [8, 16]}},
    {**PARTS, "base": {"type": "transformer", "width": 8, "depth": 1, "heads": 2}},
])  # fmt: skip
def test_every_network_with_levels_by_part_will_do(make_planner, network):
    assert plan_of(make_planner(**{**VECTORS, "network": network})).plan.shape == (3, 8, 5)


def test_the_shape_comes_from_the_store_and_settings_round_trip():
    rng = np.random.default_rng(0)
    arrays = {name: rng.uniform(-1, 1, (9, size)) for name, size in (("obs", 3), ("action", 2))}
    store = EpisodeStore.from_arrays(arrays, [9])
    given = {"layout": "joint", "imagined": {"field": "obs"}, "network": PARTS, "horizon": 4}
    policy = DiffusionPolicy.from_dataset(store, spec={**given, "n_action_steps": 2})
    assert policy.spec.imagined == Imagined(shape=(3,))
    assert PolicySpec.from_config(policy.spec.to_config()) == policy.spec
    joint = policy.with_settings(imagined=Imagined(shape=(3,), predict="joint"))
    assert joint.spec.imagined.predict == "joint"
    with pytest.raises(ValueError, match="what is imagined belongs to the weights"):
        policy.with_settings(imagined=Imagined(shape=(3,), frames=2))
    with pytest.raises(ValueError, match=r"has no field \['camera'\]; it has .*imagined.field"):
        DiffusionPolicy.from_dataset(store, spec={**given, "imagined": {"field": "camera"}})


def test_frames_are_small_copies_spread_over_the_plan():
    """Four 2 x 2 blocks of one colour each are four pixels; frame i is the one of its last step."""
    imagined = Imagined("image", size=2, frames=2, shape=(4, 4, 3), predict="joint")
    rows = np.arange(6, dtype=np.uint8)[:, None, None, None] * 40
    images = np.broadcast_to(rows, (6, 4, 4, 3)).copy()
    images[:, :2, :2, 0] += 7
    store = EpisodeStore.from_arrays({"image": images, "action": np.zeros((6, 1))}, [6])
    small = imagined.rows(store, Normalizer({}, {}, {}))
    assert small.shape == (6, 2, 6)
    entries = imagined.entries(torch.from_numpy(small)[None])
    assert entries.shape == (1, 6, 4) == (1, 6, imagined.dim(6))
    plan = np.concatenate([entries[0].numpy(), np.zeros((6, 1), np.float32)], axis=1)
    for position, step in ((0, 2), (2, 2), (3, 5), (5, 5), (6, 5)):
        seen = imagined.picture(plan, position)
        assert seen.shape == (2, 2, 3)
        assert seen[0, 0].tolist() == [step * 40 + 7, step * 40, step * 40]
        assert seen[1, 1].tolist() == [step * 40] * 3
    grey = Imagined("image", size=2, grey=True, frames=1, shape=(4, 4, 3))
    assert grey.rows(store, Normalizer({}, {}, {}))[3, 1, 1] == 120


def test_pictures_are_black_before_a_plan_and_none_without_images(make_planner):
    planner = make_planner(**IMAGES, prediction="x0")
    state = plan_of(planner)
    assert picture_of(planner, state, 1).shape == (4, 4, 3)
    assert picture_of(planner, state, 1).any()
    assert not picture_of(planner, planner.initial_state(range(3)), 1).any()
    alone = make_planner(**VECTORS)
    assert picture_of(alone, plan_of(alone), 0) is None
    assert picture_of(make_planner(), None, 0) is None


def test_images_have_one_channel_or_three():
    with pytest.raises(ValueError, match=r"\[height, width, 1 or 3\]; .* \[8, 8, 4\]"):
        Imagined("image", shape=(8, 8, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"imagined": None}, "layout 'joint' and imagined belong together"),
        ({"layout": "action"}, "layout 'joint' and imagined belong together"),
        ({"imagined": Imagined(shape=(3,), frames=3)}, "frames=3 must divide horizon=8"),
        ({"imagined": Imagined(shape=(3,), frames=4)}, "3 entries cannot be spread over 2"),
        ({"truncated": Truncated(t_start=0.3)}, "start from noise, or by rti"),
        ({"rti": RTI((0.3, 0.2))}, "start from noise, or by rti"),
        ({"rti": RTI(0.3, renoise=False)}, "and rti.renoise=true"),
        ({"temperature": 0.5}, "held at pure noise must have its standard deviation"),
        ({**IMAGES, "rti": RTI(0.3)}, "a plan cannot be shifted"),
        ({**IMAGES, "network": PARTS}, "noise of 12 imagined entries does not pass"),
        ({"network": {"type": "mlp"}}, "takes levels per"),
        ({"goal": ((0, 0),)}, "holds no observation whose goal"),
    ],
)
def test_what_does_not_go_together(make_planner, changes, message):
    with pytest.raises(ValueError, match=message):
        make_planner(**{**VECTORS, **changes})


def test_compiled_loops_and_exported_ones_hold_it_too(make_planner, tmp_path):
    planner = make_planner(**VECTORS, rti=RTI(0.4, num_steps=2))
    fast = compile_planner(planner, backend="onnxruntime", batch_size=3)
    np.testing.assert_allclose(plan_of(fast).plan, plan_of(planner).plan, atol=1e-4)
    export_policy(planner, tmp_path / "e", batch_size=3)
    state, running = plan_of(planner), load_exported(tmp_path / "e")
    noise = planner.draw_noise(planner.initial_state(range(3)), 1, False).numpy()
    given = running.plan(state.history, noise=noise)
    np.testing.assert_allclose(given.plan, state.plan, atol=1e-4)
    np.testing.assert_allclose(given.actions[:, 0], planner.execute(state)[0], atol=1e-4)
