"""Observations by name, from an environment to a policy that is trained, saved, served, exported.

The environment is Gymnasium-Robotics' own Fetch, whose observation is a ``Dict`` of three vectors.
"""

from __future__ import annotations

import json
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

from diffpolicy import DiffusionPolicy, EpisodeStore, TrainerConfig, cli
from diffpolicy.data import Pair, PreferenceSet, Span
from diffpolicy.data.observation import each, of_space, side_by_side, stack, take, to_fields
from diffpolicy.learn.cloning.denoising import DenoisingLoss
from diffpolicy.learn.learning import Learning
from diffpolicy.learn.material import TuningData
from diffpolicy.networks.encoders import ENCODERS, Encoder
from diffpolicy.policies.spec import PolicySpec
from diffpolicy.runtime.clock import VirtualClock
from diffpolicy.runtime.executor import RealTimeExecutor
from diffpolicy.runtime.planner import Timing
from diffpolicy.runtime.schedule import ActionLimits

FETCH = "gymnasium_robotics:FetchReach-v4"
NAMES = ["achieved_goal", "desired_goal", "observation"]
SMALL = {"horizon": 6, "n_obs_steps": 2, "n_action_steps": 3}
NETWORK = {"type": "mlp", "width": 16, "depth": 1}


def config(**changes):
    few = {"steps": 8, "batch_size": 16, "warmup_steps": 2, "lr": 1e-2, "progress": False}
    return TrainerConfig(**{**few, **changes})


def made_up(seed=0, episodes=6, length=12):
    """A store of two vectors by name and what actor-critics need; and the same as one vector."""
    rng = np.random.default_rng(seed)
    rows = episodes * length
    over = np.arange(1, rows + 1) % length == 0
    arrays = {
        "obs.joints": rng.normal(size=(rows, 3)),
        "obs.goal": rng.uniform(-2, 5, (rows, 2)).astype(np.float32),
        "action": rng.uniform(-1, 1, (rows, 2)).astype(np.float32),
        "reward": rng.normal(size=rows).astype(np.float32),
        "terminated": over,
    }
    flat = {k: v for k, v in arrays.items() if not k.startswith("obs.")}
    joined = np.concatenate([arrays["obs.goal"], arrays["obs.joints"]], 1).astype(np.float32)
    ends = np.arange(1, episodes + 1) * length
    return (
        EpisodeStore.from_arrays(arrays, ends),
        EpisodeStore.from_arrays({"obs": joined, **flat}, ends),
    )


@pytest.fixture(scope="module")
def fetch(tmp_path_factory):
    """Two episodes of random actions, recorded as they are."""
    pytest.importorskip("gymnasium_robotics", reason="needs the robotics extra")
    env = gym.make(FETCH, max_episode_steps=12)
    env.action_space.seed(0)
    path = tmp_path_factory.mktemp("fetch") / "fetch.zarr"
    fields = to_fields(of_space(env.observation_space))
    with EpisodeStore.create(path, {**fields, "action": (4,)}) as store:
        for seed in range(2):
            obs, over, seen, actions = env.reset(seed=seed)[0], False, [], []
            while not over:
                seen.append(obs)
                actions.append(env.action_space.sample())
                obs, _, ended, cut, _ = env.step(actions[-1])
                over = ended or cut
            store.append({**to_fields(stack(seen)), "action": np.stack(actions)})
    env.close()
    return path


@pytest.fixture(scope="module")
def trained(fetch, tmp_path_factory):
    """`diffpolicy train` on them: a run with its evaluation."""
    run = tmp_path_factory.mktemp("runs") / "fetch"
    code = cli.main(
        [
            *("train", f"env.id={FETCH}", "env.max_episode_steps=12", "env.score=return"),
            *("env.name=fetch", "data=store", f"data.path={fetch}", f"run_dir={run}"),
            "data.normalize={obs: minmax, obs.observation: gaussian, action: minmax}",
            *(f"policy.{name}={value}" for name, value in SMALL.items()),
            *("network.width=16", "network.depth=1", "sampler.num_steps=2", "device=cpu"),
            *("trainer.steps=6", "trainer.batch_size=8", "trainer.warmup_steps=1"),
            *("trainer.progress=false", "evaluation.num_workers=0"),
            *("evaluation.episodes=2", "evaluation.val_episodes=0"),
        ]
    )
    assert code == 0
    return run


@pytest.fixture
def env():
    env = gym.make(FETCH, max_episode_steps=12)
    yield env
    env.close()


def test_train_by_the_command_keeps_every_name_and_its_statistics(trained):
    policy = DiffusionPolicy.from_pretrained(trained)
    assert sorted(policy.spec.observations) == NAMES
    assert policy.spec.observations["desired_goal"].role == "goal"
    assert policy.spec.obs_dim == 16
    modes = policy.normalizer.modes
    assert modes == {
        "obs.achieved_goal": "minmax",
        "obs.desired_goal": "minmax",
        "obs.observation": "gaussian",
        "action": "minmax",
    }
    scores = json.loads((trained / "eval.json").read_text())["episodes"]
    assert len(scores) == 2


def test_predict_takes_one_observation_and_batches(trained, env):
    policy = DiffusionPolicy.from_pretrained(trained)
    obs, _ = env.reset(seed=3)
    action, state = policy.predict(obs, deterministic=True)
    assert action.shape == (4,)
    actions, states = policy.predict(stack([obs, obs]), deterministic=True)
    assert np.allclose(actions, action, atol=1e-5)
    assert len(states) == 2
    assert np.array_equal(take(states.history["observation"], 0), state.history["observation"][0])
    with pytest.raises(ValueError, match="desired_goal"):
        policy.predict({k: v for k, v in obs.items() if k != "desired_goal"})
    with pytest.raises(ValueError, match="by name"):
        policy.predict(np.zeros(16, np.float32))
    with pytest.raises(ValueError, match=r"'obs\.desired_goal' of environment 0 is nan"):
        policy.predict({**obs, "desired_goal": np.full(3, np.nan)})


def test_stable_baselines3_evaluates_it(trained, env):
    evaluation = pytest.importorskip("stable_baselines3.common.evaluation")
    monitor = pytest.importorskip("stable_baselines3.common.monitor")
    policy = DiffusionPolicy.from_pretrained(trained)
    reward, _ = evaluation.evaluate_policy(policy, monitor.Monitor(env), n_eval_episodes=2)
    assert -12 <= reward <= 0


def test_saved_and_loaded_it_acts_the_same(trained, env, tmp_path):
    policy = DiffusionPolicy.from_pretrained(trained)
    again = DiffusionPolicy.load(policy.save(tmp_path / "saved"))
    obs = stack([env.reset(seed=seed)[0] for seed in range(2)])
    assert np.array_equal(policy.predict(obs)[0], again.predict(obs)[0])
    assert again.spec == policy.spec


def test_served_it_answers_maps_of_arrays(trained, env):
    pytest.importorskip("websockets")
    from diffpolicy.runtime.client import PolicyClient
    from diffpolicy.runtime.serve import serving

    policy = DiffusionPolicy.from_pretrained(trained)
    obs, _ = env.reset(seed=3)
    with serving(policy) as server, PolicyClient(server.host, server.port) as client:
        client.reset(seed=0)
        assert np.allclose(client.act(obs), policy.predict(obs)[0], atol=1e-5)


def test_exported_it_plans_the_same(trained, env, tmp_path):
    pytest.importorskip("onnxruntime")
    from diffpolicy.runtime.export import export_policy
    from diffpolicy.runtime.exported import load_exported

    policy = DiffusionPolicy.from_pretrained(trained)
    export_policy(policy, tmp_path / "exported", deterministic=True)
    exported = load_exported(tmp_path / "exported")
    state = policy.observe(stack([env.reset(seed=3)[0]]), policy.initial_state([0]))
    noise = policy.draw_noise(state, exported.draws("cold"), True).numpy()
    plan = exported.plan(state.history, noise=noise)
    planned = policy.replan(state, [0], deterministic=True)
    assert np.allclose(plan.plan, planned.plan, atol=1e-4)
    with pytest.raises(ValueError, match="must hold"):
        exported.plan({"observation": state.history["observation"]})


def test_by_name_is_the_same_as_one_vector():
    """Loss, gradients and actions, bit for bit, with the same weights and statistics."""
    named, flat = (
        DiffusionPolicy.from_dataset(store, spec={**SMALL, "network": NETWORK})
        for store in made_up()
    )
    named.denoiser.load_state_dict(flat.denoiser.state_dict())
    rng = np.random.default_rng(1)
    obs = {"goal": rng.normal(size=(4, 2)), "joints": rng.normal(size=(4, 3))}
    joined = np.concatenate([obs["goal"], obs["joints"]], 1)
    states = [p.initial_state(range(4)) for p in (named, flat)]
    for _ in range(5):
        actions, states[0] = named.act(obs, states[0])
        others, states[1] = flat.act(joined, states[1])
        assert np.array_equal(actions, others)

    history = {name: torch.randn(8, 2, array.shape[1]) for name, array in obs.items()}
    action = torch.rand(8, 6, 2)
    found = []
    for policy, batch in (
        (named, to_fields(history)),
        (flat, {"obs": side_by_side(history)}),
    ):
        loss = DenoisingLoss(policy.denoiser)(
            {**batch, "action": action}, torch.Generator().manual_seed(0)
        ).loss
        gradients = torch.autograd.grad(loss.mean(), list(policy.denoiser.parameters()))
        found.append([loss.detach(), *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"layout": "trajectory"}, "layout"),
        ({"rti": {"t_start": 0.3, "innovation": 3.0}}, "innovation"),
    ],
)
def test_what_takes_one_vector_is_refused(spec, said):
    with pytest.raises(ValueError, match=rf"{said}.*needs one vector.*goal, joints"):
        DiffusionPolicy.from_dataset(made_up()[0], spec={**SMALL, **spec, "network": NETWORK})


class Toy(Encoder):
    """A layer over the newest vectors: an encoder with weights, as a stranger writes one."""

    def __init__(self, fields, n_obs_steps, width=4):
        super().__init__()
        self.layer = nn.Linear(sum(field.shape[0] for field in fields.values()), width)
        self.cond_dim = width

    def forward(self, obs):
        return self.layer(side_by_side(each(lambda one: one[:, -1], obs)))


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(ENCODERS, "toy", Toy)


@pytest.mark.usefixtures("toy")
def test_an_encoder_of_a_stranger_is_trained_saved_and_loaded(fetch, tmp_path):
    code = cli.main(
        [
            *("train", f"env.id={FETCH}", "env.name=fetch", "evaluation=none", "data=store"),
            *(f"data.path={fetch}", f"run_dir={tmp_path / 'run'}", "device=cpu"),
            "policy.encoder={type: toy, width: 5}",
            *(f"policy.{name}={value}" for name, value in SMALL.items()),
            *("network.width=16", "network.depth=1", "trainer.steps=6", "trainer.batch_size=8"),
            *("trainer.warmup_steps=1", "trainer.progress=false", "seed=0"),
        ]
    )
    assert code == 0
    policy = DiffusionPolicy.from_pretrained(tmp_path / "run")
    assert policy.spec.encoder == {"type": "toy", "width": 5}
    assert policy.denoiser.network.cond_dim == 5
    fresh = DiffusionPolicy.from_dataset(fetch, spec=policy.spec.to_config())
    weight = policy.denoiser.state_dict()["encoder.layer.weight"]
    assert not torch.equal(weight, fresh.denoiser.state_dict()["encoder.layer.weight"])
    again = DiffusionPolicy.load(policy.save(tmp_path / "saved"))
    assert torch.equal(weight, again.denoiser.state_dict()["encoder.layer.weight"])


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("encoder", [{"type": "state"}, {"type": "toy"}])
def test_actor_and_critic_learn_from_the_encoded_condition(encoder, tmp_path):
    store, _ = made_up()
    spec = {**SMALL, "network": NETWORK, "encoder": encoder, "heads": {}}
    heads = {"critic": {"type": "q_ensemble", "width": 8, "depth": 1}}
    policy = DiffusionPolicy.from_dataset(store, spec={**spec, "heads": heads})
    before = {k: v.clone() for k, v in policy.denoiser.state_dict().items()}
    learning = Learning.from_config({"actor_critic": {"actor": "one_step", "critic": "td"}})
    policy.learn(store, config(), tmp_path / "run", learning=learning)
    changed = {k for k, v in policy.denoiser.state_dict().items() if not torch.equal(v, before[k])}
    assert ("encoder.layer.weight" in changed) == (encoder["type"] == "toy")


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("encoder", [{"type": "state"}, {"type": "toy"}])
def test_preferences_leave_the_encoder_as_it_is(encoder, tmp_path):
    store, _ = made_up()
    policy = DiffusionPolicy.from_dataset(
        store, spec={**SMALL, "network": NETWORK, "encoder": encoder}
    )
    before = {k: v.clone() for k, v in policy.denoiser.state_dict().items()}
    pairs = [Pair((Span(i, 0, 6),), (Span(i + 1, 3, 6),)) for i in range(4)]
    data = TuningData.of(PreferenceSet(store, pairs), store)
    method = {"type": "dpo", "anchor_weight": 0.5}
    policy.prefer(data, method, config(batch_size=2), tmp_path / "run")
    changed = {k for k, v in policy.denoiser.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert not any(name.startswith("encoder.") for name in changed)


def test_rewards_are_given_observations_by_name(tmp_path):
    store, _ = made_up()
    policy = DiffusionPolicy.from_dataset(store, spec={**SMALL, "network": NETWORK})
    seen = []

    def reward(action, obs):
        seen.append(sorted(obs))
        return -(action - obs["goal"][:, -1:]).square().sum((1, 2))

    data = TuningData.of(reward=reward, observations=store)
    method = {"type": "plan_chain", "grad_steps": 1, "num_steps": 2}
    policy.tune(data, method, config(steps=2), tmp_path / "run")
    assert ["goal", "joints"] in seen


def test_warm_starts_compiled_loops_and_deadlines():
    store, _ = made_up(length=24)
    policy = DiffusionPolicy.from_dataset(store, spec={**SMALL, "network": NETWORK})
    warm, _ = policy.choose_rti(store, episodes=4, num_steps=2, n_action_steps=2)
    compiled = warm.compile(backend="eager")
    obs = {"goal": np.zeros(2), "joints": np.ones(3)}
    states = [None, None]
    for _ in range(4):
        action, states[0] = warm.predict(obs, states[0])
        other, states[1] = compiled.predict(obs, states[1])
        assert np.allclose(action, other, atol=1e-5)
    limits = ActionLimits([0, 0], low=-2, high=2)
    executor = RealTimeExecutor(warm, Timing(10), limits, clock=VirtualClock())
    executor.warm_up(obs)
    assert executor.tick(obs).action.shape == (2,)


class Looking(Encoder):
    """Brightness of a camera's newest image beside a vector."""

    def __init__(self, fields, n_obs_steps):
        super().__init__()
        assert fields["camera"].role == "image"
        self.layer, self.cond_dim = nn.Linear(3 + fields["joints"].shape[0], 4), 4

    def forward(self, obs):
        bright = obs["camera"][:, -1].float().mean((1, 2)) / 255
        return self.layer(torch.cat([bright, obs["joints"][:, -1]], 1))


def test_an_encoder_may_take_images(monkeypatch, tmp_path):
    monkeypatch.setitem(ENCODERS, "looking", Looking)
    rng = np.random.default_rng(0)
    arrays = {
        "obs.camera": rng.integers(0, 255, (40, 8, 8, 3), dtype=np.uint8),
        "obs.joints": rng.normal(size=(40, 2)),
        "action": rng.uniform(-1, 1, (40, 2)),
    }
    store = EpisodeStore.from_arrays(arrays, [20, 40])
    with pytest.raises(ValueError, match="'state' takes vectors, 'camera'"):
        DiffusionPolicy.from_dataset(store, spec={**SMALL, "encoder": {"type": "state"}})
    spec = {**SMALL, "network": NETWORK, "encoder": {"type": "looking"}}
    policy = DiffusionPolicy.from_dataset(store, spec=spec)
    policy.learn(store, config(steps=2), tmp_path / "run")
    policy = DiffusionPolicy.from_pretrained(tmp_path / "run")
    obs = {name: arrays[f"obs.{name}"][0] for name in ("camera", "joints")}
    action, state = policy.predict(obs)
    assert action.shape == (2,)
    assert state.history["camera"].dtype == np.uint8
    assert np.allclose(policy.compile(backend="eager").predict(obs)[0], action, atol=1e-5)


def test_unknown_encoders_and_settings_are_refused():
    with pytest.raises(ValueError, match="encoder type"):
        PolicySpec(3, 2, encoder={"type": "stat"})
    with pytest.raises(ValueError, match="width"):
        PolicySpec(3, 2, encoder={"type": "state", "width": 3}).make_denoiser()
    spec = DiffusionPolicy.from_dataset(made_up()[0], spec=SMALL).spec
    with pytest.raises(ValueError, match="obs_dim must be 5"):
        replace(spec, obs_dim=4)


def test_streaming_reads_observations_by_name_and_by_an_encoder_of_ones_own(monkeypatch):
    """Every tick encodes: warm ones as the first."""
    from diffpolicy import DiffusionPolicy, EpisodeStore
    from diffpolicy.policies.streaming import Streaming

    rng = np.random.default_rng(0)
    fields = {"obs.a": rng.uniform(-1, 1, (60, 2)), "obs.b": rng.uniform(-1, 1, (60, 1))}
    fields["action"] = rng.uniform(-1, 1, (60, 2))
    rows = {name: values.astype(np.float32) for name, values in fields.items()}
    store = EpisodeStore.from_arrays(rows, [20, 40, 60])
    network = {"type": "mlp", "width": 16, "depth": 1, "t_kind": "position"}
    spec = {"horizon": 12, "n_action_steps": 4, "level_law": "position", "network": network}
    policy = DiffusionPolicy.from_dataset(store, spec=spec)
    seen = []
    encode = policy.denoiser.encoder.forward
    monkeypatch.setattr(
        policy.denoiser.encoder, "forward", lambda obs: seen.append(1) or encode(obs)
    )
    streaming = policy.streaming(Streaming(steps_per_chunk=2))
    state = streaming.initial_state([0, 1])
    for _ in range(9):  # three plans
        obs = {"a": np.zeros((2, 2), np.float32), "b": np.zeros((2, 1), np.float32)}
        action, state = streaming.act(obs, state)
    assert np.isfinite(action).all()
    assert len(seen) >= 3
