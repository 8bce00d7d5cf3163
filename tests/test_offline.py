"""Offline learning in seconds, through the facade: actor-critics and planners share all of it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffpolicy import DiffusionPolicy, EpisodeStore, TrainerConfig
from diffpolicy.config import load_train
from diffpolicy.learn.actor_critic.algorithms import ActorCritic
from diffpolicy.learn.learning import Learning, check_learning
from diffpolicy.policies.best_of_n import Selection
from diffpolicy.policies.rti import RTI
from diffpolicy.policies.spec import PolicySpec
from diffpolicy.policies.truncated import Truncated

NETWORK = {"type": "mlp", "width": 64, "depth": 2}
CRITIC = {"type": "q_ensemble", "width": 32, "depth": 2}


def bandit_store():
    """One step, actions near -0.6 or 0.6; the reward is the action times the side observed."""
    rng = np.random.default_rng(0)
    side = rng.choice([-1.0, 1.0], 1500)
    action = 0.6 * rng.choice([-1.0, 1.0], 1500) + 0.05 * rng.standard_normal(1500)
    arrays = {
        "obs": side[:, None].astype(np.float32),
        "action": action[:, None].astype(np.float32),
        "reward": (side * action).astype(np.float32),
        "terminated": np.ones(1500, bool),
    }
    return EpisodeStore.from_arrays(arrays, np.arange(1, 1501))


def walker_store():
    """A point on a line that the action moves; half of the episodes go up, half down."""
    rng = np.random.default_rng(1)
    obs, action, reward, ends = [], [], [], []
    for episode in range(120):
        x, sign = rng.uniform(-0.3, 0.3), 1 if episode % 2 else -1
        for _ in range(20):
            a = sign * 0.5 + 0.1 * rng.standard_normal()
            obs.append([x])
            action.append([a])
            x += 0.1 * a
            reward.append(x)
        ends.append(len(obs))
    arrays = {
        "obs": np.array(obs, np.float32),
        "action": np.array(action, np.float32),
        "reward": np.array(reward, np.float32),
    }
    return EpisodeStore.from_arrays(arrays, ends)


def quick(steps, **options):
    return TrainerConfig(
        steps=steps,
        batch_size=64,
        lr=3e-3,
        warmup_steps=20,
        progress=False,
        grad_clip=None,
        ema_max=0.99,
        **options,
    )


@pytest.mark.parametrize(
    ("settings", "heads"),
    [
        ({"actor": "chain", "critic": "td", "num_steps": 4}, {"critic": CRITIC}),
        ({"actor": "one_step", "critic": "td", "num_steps": 4}, {"critic": CRITIC}),
        (
            {"actor": "bc", "critic": "iql"},
            {"critic": CRITIC, "state_value": {"type": "state_value", "width": 32}},
        ),
    ],
    ids=["diffusion_ql", "edp", "idql"],
)
def test_actor_critics_take_the_rewarded_mode(tmp_path, settings, heads):
    spec = {
        "horizon": 1,
        "n_obs_steps": 1,
        "n_action_steps": 1,
        "network": NETWORK,
        "prediction": "v",
        "sampler": {"solver": "ddpm", "num_steps": 5},
        "heads": heads,
        "selection": {"num_candidates": 8},
    }
    policy = DiffusionPolicy.from_dataset(bandit_store(), spec=spec)
    learning = Learning.from_config({"actor_critic": settings})
    policy.learn(bandit_store(), quick(400), tmp_path / "run", val_fraction=0, learning=learning)
    obs = np.repeat(np.array([[-1.0], [1.0]], np.float32), 50, 0)
    actions, _ = policy.act(obs, policy.initial_state(range(100)))
    assert ((obs * actions)[:, 0] > 0.1).mean() > 0.97  # the two modes are at -0.6 and 0.6
    again = DiffusionPolicy.from_pretrained(tmp_path / "run")
    assert again.spec == policy.spec
    np.testing.assert_array_equal(again.act(obs, again.initial_state(range(100)))[0], actions)
    more = DiffusionPolicy.from_pretrained(
        tmp_path / "run", selection={"num_candidates": 2, "rank": "softmax"}
    )
    assert more.spec.selection == Selection(2, "softmax")


@pytest.fixture(scope="module")
def planner(tmp_path_factory):
    """A planner of states conditioned on returns, with every head."""
    spec = {
        "layout": "state",
        "horizon": 8,
        "n_obs_steps": 1,
        "n_action_steps": 2,
        "network": NETWORK,
        "prediction": "x0",
        "cond_dropout": 0.2,
        "returns": {"target": 1.0, "discount": 0.9},
        "heads": {
            "inverse": {"type": "inverse", "width": 32},
            "draft": {"type": "draft", "width": 32},
            "value": {"type": "value", "base": {"type": "mlp", "width": 32, "depth": 1}},
        },
        "sampler": {"num_steps": 6, "guidance_scale": 1.2},
    }
    store = walker_store()
    made = DiffusionPolicy.from_dataset(store, spec=spec)
    folder = tmp_path_factory.mktemp("planner")
    return made.learn(store, quick(400), folder / "run"), folder


def test_plans_go_where_the_return_asks(planner):
    policy, _ = planner
    obs = np.zeros((40, 1), np.float32)
    low = policy.with_settings(
        returns=type(policy.spec.returns)(**{**vars(policy.spec.returns), "target": 0.0})
    )
    up, down = (p.act(obs, p.initial_state(range(40)))[0] for p in (policy, low))
    assert (up > 0.2).mean() > 0.9
    assert (down < -0.2).mean() > 0.9


def test_one_set_of_weights_serves_every_way_of_planning(planner):
    policy, _ = planner
    obs = np.zeros((40, 1), np.float32)
    drafted = Truncated(t_start=0.2, num_steps=2, sources=("autoregressive",))
    ways = {
        "warm": policy.with_settings(rti=RTI(0.3, num_steps=2)),
        "drafted": policy.with_settings(truncated=drafted),
        "chosen": policy.with_settings(selection=Selection(4)),
    }
    for name, way in ways.items():
        state = way.initial_state(range(40))
        for _ in range(5):
            actions, state = way.act(obs, state)
        assert (actions > 0.1).mean() > 0.8, name


def test_planners_are_saved_with_their_heads(planner):
    policy, folder = planner
    policy.save(folder / "saved")
    obs = np.full((3, 1), 0.1, np.float32)
    for path in ("saved", "run"):
        again = DiffusionPolicy.load(folder / path) if path == "saved" else None
        again = again or DiffusionPolicy.from_pretrained(folder / path)
        np.testing.assert_array_equal(again.predict(obs)[0], policy.predict(obs)[0])
    config = json.loads((folder / "saved" / "config.json").read_text())
    assert config["returns"]["low"] < config["returns"]["high"]


def test_training_of_all_heads_resumes_exactly(tmp_path):
    store = walker_store()
    spec = {
        "layout": "trajectory",
        "horizon": 8,
        "n_obs_steps": 1,
        "n_action_steps": 2,
        "network": {"type": "mlp", "width": 16, "depth": 1},
        "heads": {"value": {"type": "value", "base": {"type": "mlp", "width": 8, "depth": 1}}},
    }
    ends = []
    for name, stops in (("whole", [20]), ("parts", [12, 20])):
        for steps in stops:
            policy = DiffusionPolicy.from_dataset(store, spec=spec)
            config = quick(steps, lr_schedule="constant", checkpoint_every=4)
            config = replace(config, warmup_steps=4)  # whatever the steps
            policy.learn(store, config, tmp_path / name, resume=steps != stops[0])
        ends.append({**policy.denoiser.state_dict(), **policy.heads.state_dict()})
    for key, value in ends[0].items():
        assert torch.equal(value, ends[1][key]), key


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"discount": 1.5}, "discount must be in"),
        ({"reward_scale": "range"}, "return_range"),
        ({"actor": "bc"}, "has no setting 'actor'"),
        ({"actor_critic": {"actor": "both"}}, "unknown actor"),
    ],
)
def test_unusable_learning_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Learning.from_config(settings)


def test_heads_and_learning_must_agree(tmp_path):
    spec = {
        "horizon": 1,
        "n_obs_steps": 1,
        "n_action_steps": 1,
        "network": NETWORK,
        "heads": {"critic": CRITIC},
    }
    policy = DiffusionPolicy.from_dataset(bandit_store(), spec=spec)
    with pytest.raises(ValueError, match=r"learning\.actor_critic trains the heads"):
        policy.learn(bandit_store(), quick(2), tmp_path / "run", val_fraction=0)


@pytest.mark.parametrize(
    ("spec", "learning", "message"),
    [
        ({"layout": "trajectory"}, {"actor_critic": {}}, "actor-critics learn plans with"),
        ({"cond_dropout": 0.1}, {"actor_critic": {}}, "actor-critics learn plans with"),
    ],
)
def test_settings_without_effect_are_refused(spec, learning, message):
    full = PolicySpec(2, 1, horizon=4, n_obs_steps=1, n_action_steps=1, **spec)
    with pytest.raises(ValueError, match=message):
        check_learning(full, Learning.from_config(learning))


def test_entries_called_constant_must_be(tmp_path):
    spec = {"layout": "trajectory", "horizon": 4, "n_obs_steps": 1, "n_action_steps": 1}
    policy = DiffusionPolicy.from_dataset(walker_store(), spec={**spec, "constant": (0,)})
    with pytest.raises(ValueError, match="names entry 0, which changes in an episode"):
        policy.learn(walker_store(), quick(2), tmp_path / "run")


def test_the_command_line_reaches_every_setting():
    overrides = [
        "experiment=d4rl_hopper_medium",
        "algorithm=diffusion_ql",
        "learning.actor_critic.eta=0.5",
        "learning.discount=0.9",
        "policy.selection.rank=softmax",
        "policy.heads.critic.layer_norm=false",
    ]
    config = load_train(overrides)
    assert Learning.from_config(config.learning).actor_critic == ActorCritic(eta=0.5)
    assert config.learning["discount"] == 0.9
    assert config.policy["selection"]["rank"] == "softmax"
    with pytest.raises(ValueError, match="no setting 'etta'"):
        Learning.from_config(load_train([*overrides, "learning.actor_critic.etta=1"]).learning)


def test_all_plans_of_a_state_planner_are_actions(planner):
    policy, _ = planner
    drafted = policy.with_settings(
        truncated=Truncated(t_start=0.2, num_steps=2, sources=("autoregressive",))
    )
    history = np.zeros((3, 1, 1), np.float32)
    actions, scores = drafted.plans(history)
    assert actions.shape == (3, 1, 8, 1)
    assert scores.shape == (3, 1)
    state = drafted.observe(history[:, 0], drafted.initial_state(range(3)))
    expected, _ = drafted.execute(drafted.replan(state, range(3)))
    np.testing.assert_allclose(actions[:, 0, 0], expected, atol=1e-6)


def test_what_belongs_to_the_weights_stays(planner):
    policy, folder = planner
    with pytest.raises(ValueError, match="conditioned on returns belongs to the weights"):
        policy.with_settings(returns=None)
    target = DiffusionPolicy.from_pretrained(folder / "run", returns={"target": 0.5})
    assert target.spec.returns.target == 0.5
    with pytest.raises(ValueError, match="horizon belongs to the weights"):
        DiffusionPolicy.from_pretrained(folder / "run", horizon=4)
