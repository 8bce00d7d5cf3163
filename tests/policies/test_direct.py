"""Policies whose sampling is one network call: as policies, and what they are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffpolicy.core.sampler import Sampler
from diffpolicy.data.normalize import Normalizer
from diffpolicy.data.observation import ObsField
from diffpolicy.learn.learning import Learning, objective
from diffpolicy.learn.material import TuningData, tuned
from diffpolicy.policies.chunking import RealTimeChunking
from diffpolicy.policies.diffusion import DiffusionPlanner
from diffpolicy.policies.direct import ONE_CALL, OneCall
from diffpolicy.policies.ensemble import TemporalEnsemble
from diffpolicy.policies.rti import RTI
from diffpolicy.policies.spec import PolicySpec
from diffpolicy.runtime.compile import compile_planner
from diffpolicy.runtime.export import export_policy
from diffpolicy.runtime.exported import load_exported
from diffpolicy.training.settings import TrainerConfig

NETWORKS = {
    "bc_mlp": {"type": "bc_mlp", "width": 16},
    "bc_gmm": {"type": "bc_gmm", "width": 16, "components": 3},
    "act": {"type": "act", "width": 16, "depth": 1, "heads": 2},
}


@pytest.fixture
def make_direct(make_planner):
    """``make_direct(name, **spec entries)``."""

    def make(name="bc_mlp", **changes):
        once = {**ONE_CALL, "sampler": Sampler(**ONE_CALL["sampler"])}
        return make_planner(**{**once, "network": NETWORKS[name], **changes})

    return make


def observations(rows, seed=0):
    return np.random.default_rng(seed).uniform(-2, 2, (rows, 3)).astype(np.float32)


@pytest.mark.parametrize("name", NETWORKS)
def test_it_acts_in_chunks_of_one_call(name, make_direct):
    policy = make_direct(name)
    assert "in one call" in repr(policy)
    state = policy.initial_state([3, 4])
    for step in range(6):
        actions, state = policy.act(observations(2, step), state)
        assert actions.shape == (2, 2)
        assert np.abs(actions).max() <= 0.5  # bounded as those of any policy
    assert state.plans.tolist() == state.nfe.tolist() == [2, 2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_draws_are_each_rows_own(temperature, make_direct):
    """Permuting environments permutes actions; a seed says a draw; deterministic draws nothing."""
    policy = make_direct("bc_gmm", temperature=temperature)
    obs, seeds, order = observations(8), np.arange(8), np.array([3, 1, 7, 0, 2, 6, 4, 5])
    actions, _ = policy.act(obs, policy.initial_state(seeds))
    again, _ = policy.act(obs[order], policy.initial_state(seeds[order]))
    np.testing.assert_allclose(again, actions[order], atol=1e-6)
    other, _ = policy.act(obs, policy.initial_state(seeds + 100))
    assert np.abs(other - actions).max() > 1e-3
    same = np.repeat(obs[:1], 8, 0)
    fixed, _ = policy.act(same, policy.initial_state(seeds), deterministic=True)
    np.testing.assert_allclose(fixed, fixed[:1].repeat(8, 0), atol=1e-6)
    with torch.no_grad():
        cond = policy.encoded(np.repeat(same[:, None], 2, 1))
        log_weights, means, _ = policy.denoiser.network.mixture(cond)
    now = means[0, log_weights[0].argmax(), 1].clamp(-1, 1)  # the current step of the heaviest
    np.testing.assert_allclose(fixed[0], policy.to_actions(now[None].numpy())[0], atol=1e-6)


@pytest.mark.parametrize("m", [0.0, 0.01, 0.5])
def test_temporal_ensemble_is_acts(m, make_direct):
    """Zhao et al. 2023, section IV-B: w_i = exp(-m i), i = 0 the oldest prediction for a step."""
    policy = make_direct("act", action_low=(-9.0, -9.0), action_high=(9.0, 9.0))
    ensemble = TemporalEnsemble(policy, m)
    plain = policy.with_spec(policy.spec)
    state, inner = ensemble.initial_state([0]), plain.initial_state([0])
    made = []
    for step in range(10):
        obs = observations(1, step)
        inner = plain.replan(plain.observe(obs, inner), [0])
        made.append(inner.plan[0])
        action, state = ensemble.act(obs, state)
        begun = range(max(0, step - 6), step + 1)  # a plan of 8 says 7 steps from its own
        weights = np.exp(-m * np.arange(len(begun)))
        each = np.stack([made[at][step - at + 1] for at in begun])
        expected = (weights[:, None] * each).sum(0) / weights.sum()
        np.testing.assert_allclose(action[0], plain.to_actions(expected[None])[0], atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_compiled_and_exported(name, make_direct, tmp_path):
    policy = make_direct(name, **({"temperature": 0.0} if name == "bc_gmm" else {}))
    obs = observations(2)
    expected, _ = policy.act(obs, policy.initial_state([0, 1]))
    compiled = compile_planner(policy, backend="onnxruntime", batch_size=2, threads=1)
    actions, _ = compiled.act(obs, compiled.initial_state([0, 1]))
    np.testing.assert_allclose(actions, expected, atol=1e-4)
    quiet, _ = policy.act(obs, policy.initial_state([0, 1]), deterministic=True)
    still, _ = compiled.act(obs, compiled.initial_state([0, 1]), deterministic=True)
    np.testing.assert_allclose(still, quiet, atol=1e-4)  # not the compiled draw
    assert export_policy(policy, tmp_path / "e", batch_size=2).max_error < 1e-4
    assert load_exported(tmp_path / "e").contract["loops"]["cold"]["nfe"] == 1


def test_a_spread_cannot_be_exported(make_direct, tmp_path):
    with pytest.raises(ValueError, match="ONNX cannot draw from a Gaussian of a bc_gmm"):
        export_policy(make_direct("bc_gmm"), tmp_path / "e")
    export_policy(make_direct("bc_gmm"), tmp_path / "e", deterministic=True)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prediction": "eps"}, "needs prediction='x0', process='flow' and sampler ddim in 1 step"),
        ({"process": {"type": "vp_cosine"}}, "algorithm=bc_mlp, bc_gmm and act say so"),
        ({"sampler": Sampler(num_steps=4)}, "ddim in 4 steps"),
        ({"rti": RTI(t_start=0.5)}, "has no use for rti"),
        ({"cond_dropout": 0.1}, "has no use for cond_dropout"),
        ({"level_law": "position"}, "has no use for level_law='position'"),
        ({"layout": "trajectory"}, "has no use for layout='trajectory'"),
        ({"temperature": 0.5}, "has no use for temperature=0.5"),
        ({"heads": {"critic": {"type": "q_ensemble"}}}, "has no use for heads"),
    ],
)
def test_what_needs_noise_levels_is_refused(changes, says, make_direct):
    with pytest.raises(ValueError, match=says):
        make_direct(**changes)


def test_what_else_needs_them(make_direct, tmp_path):
    policy = make_direct()
    data = TuningData.of(reward=lambda action, obs: action.sum((1, 2)))
    method = {"type": "plan_chain", "grad_steps": 1}
    with pytest.raises(ValueError, match="tune by PlanChain works on the noise levels"):
        tuned(policy, "tune", method, data, TrainerConfig(steps=1), tmp_path / "run")
    with pytest.raises(ValueError, match="real-time chunking works on the noise levels"):
        RealTimeChunking(policy)
    with pytest.raises(ValueError, match=r"learning\.draws=4 is of the noise of denoisers"):
        objective(policy, Learning(draws=4))
    one = OneCall(policy.denoiser, 1.0, likeliest=False)
    x, cond = torch.randn(2, 8, 2), torch.randn(2, 6)
    plan = one(x, torch.ones(1, 1, 1), cond).x0_hat
    torch.testing.assert_close(plan, policy.denoiser(x, torch.ones(1, 1, 1), cond).x0_hat)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_camera_and_a_vector_by_name(name):
    """The encoder's weights are learned by the network's own loss; it acts on dicts."""
    torch.manual_seed(0)
    fields = {
        "camera": ObsField((32, 32, 3), "uint8", "image"),
        "joints": ObsField((2,)),
    }
    values = {**ONE_CALL, "network": NETWORKS[name], "horizon": 4, "n_action_steps": 2}
    spec = PolicySpec.from_config({"obs_dim": 2, "action_dim": 2, "observations": fields, **values})
    span = {"min": -1.0, "q01": -1.0, "max": 1.0, "q99": 1.0, "mean": 0.0, "std": 0.5}
    statistics = {name: {k: [v] * 2 for k, v in span.items()} for name in ("obs.joints", "action")}
    normalizer = Normalizer.fit(statistics, dict.fromkeys(statistics, "minmax"))
    policy = DiffusionPlanner(spec, spec.make_denoiser(), normalizer)
    camera = torch.randint(256, (5, 2, 32, 32, 3), dtype=torch.uint8)
    batch = {"obs.camera": camera, "obs.joints": torch.randn(5, 2, 2)}
    batch |= {"action": torch.rand(5, 4, 2), "valid": torch.ones(5, 4).bool()}
    loss = objective(policy, Learning(mask_padding=True))
    loss(batch, torch.Generator().manual_seed(0)).loss.mean().backward()
    assert all(weight.grad is not None for weight in policy.denoiser.encoder.parameters())
    seen = {"camera": camera[:, 0].numpy(), "joints": batch["obs.joints"][:, 0].numpy()}
    actions, _ = policy.predict(seen)
    assert actions.shape == (5, 2)
