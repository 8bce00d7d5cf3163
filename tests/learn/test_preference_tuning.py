"""`DiffusionPolicy.prefer`: every method, on a policy that has two ways to act."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from diffpolicy import DiffusionPolicy, TrainerConfig
from diffpolicy.data.preferences.records import Pair, Span
from diffpolicy.data.preferences.set import PreferenceSet
from diffpolicy.data.store import EpisodeStore
from diffpolicy.learn.adapters import has_adapters
from diffpolicy.learn.cloning.denoising import DenoisingLoss
from diffpolicy.learn.material import PlanMaterial, TuningData
from diffpolicy.learn.methods import make_method, method_of
from diffpolicy.learn.preferences.items import batch_items
from diffpolicy.training.sources import Mixed

QUICK = {"batch_size": 32, "warmup_steps": 1, "progress": False, "ema_power": None}
DPO = {"type": "dpo", "kl_beta": 0.3}
EPISODE = 8


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Forty episodes that act near +0.5 (even ones) or near -0.5 (odd ones), whatever they see."""
    rng = np.random.default_rng(0)
    side = np.repeat(np.where(np.arange(40) % 2 == 0, 0.5, -0.5), EPISODE)[:, None]
    obs = rng.uniform(-1, 1, (40 * EPISODE, 2)).astype(np.float32)
    action = (side + 0.05 * rng.standard_normal((40 * EPISODE, 2))).astype(np.float32)
    ends = np.arange(EPISODE, 40 * EPISODE + 1, EPISODE)
    path = tmp_path_factory.mktemp("data") / "s.zarr"
    return EpisodeStore.from_arrays({"obs": obs, "action": action}, ends, path=path)


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    spec = {
        "horizon": 4,
        "n_obs_steps": 1,
        "n_action_steps": 4,
        "network": {"type": "mlp", "width": 48, "depth": 1},
        "prediction": "v",
    }
    policy = DiffusionPolicy.from_dataset(store, spec=spec)
    config = TrainerConfig(steps=300, lr=3e-3, **{**QUICK, "batch_size": 64})
    path = tmp_path_factory.mktemp("runs") / "base"
    policy.learn(store, config, path)
    return policy.save(path / "policy")


@pytest.fixture(scope="module")
def preferences(store):
    """The upper way is preferred."""
    pairs = [
        Pair((Span(even, 0, EPISODE),), (Span(even + 1, 0, EPISODE),)) for even in range(0, 40, 2)
    ]
    return PreferenceSet(store, pairs)


def share_above(policy, count=200):
    obs = np.random.default_rng(1).uniform(-1, 1, (count, 2)).astype(np.float32)
    actions = policy.predict(obs)[0]
    return float((actions[:, 0] > 0).mean())


@pytest.mark.parametrize(
    ("method", "least"),
    [
        (DPO, 0.75),
        ({**DPO, "anchor_weight": 0.5}, 0.75),
        ({**DPO, "loss": "ipo", "kl_beta": 0.1}, 0.6),
        ({**DPO, "loss": "kto"}, 0.75),
        ({**DPO, "loss": "margin", "anchor_weight": 1.0}, 0.75),
        ({"type": "pso", "kl_beta": 0.3}, 0.6),
        ({"type": "cloning", "data": "chosen"}, 0.9),
    ],
    ids=["dpo", "dpo with anchor", "ipo", "kto", "margin", "pso", "chosen"],
)
def test_what_is_preferred_becomes_likelier(method, least, trained, store, preferences, tmp_path):
    policy = DiffusionPolicy.load(trained)
    before = share_above(policy)
    assert 0.3 < before < 0.7
    data = TuningData(preferences, store)
    policy.prefer(data, method, TrainerConfig(steps=80, lr=2e-3, **QUICK), tmp_path / "run")
    assert share_above(policy) > least
    loaded = DiffusionPolicy.from_pretrained(tmp_path / "run")
    obs = np.zeros((3, 2), np.float32)
    a, b = (p.predict(obs, deterministic=True)[0] for p in (policy, loaded))
    np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("adapters", [{"type": "lora", "rank": 4}, {"type": "sara"}])
def test_adapters_are_merged_at_the_end(adapters, trained, store, preferences, tmp_path):
    policy = DiffusionPolicy.load(trained)
    config = TrainerConfig(steps=80, lr=5e-3, **QUICK)
    policy.prefer(TuningData(preferences), DPO, config, tmp_path / "run", adapters=adapters)
    assert share_above(policy) > 0.6
    assert not has_adapters(policy.denoiser)
    assert set(policy.denoiser.state_dict()) == set(
        DiffusionPolicy.load(trained).denoiser.state_dict()
    )
    loaded = DiffusionPolicy.from_pretrained(tmp_path / "run")
    obs = np.zeros((3, 2), np.float32)
    a, b = (p.predict(obs, deterministic=True)[0] for p in (policy, loaded))
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_experts_are_ranked_above_own_plans(trained, store, tmp_path):
    """DRO on the upper episodes alone: the policy moves there."""
    upper = [e for e in range(40) if e % 2 == 0]
    fields = {n: np.concatenate([store.episode(e)[n] for e in upper]) for n in ("obs", "action")}
    ends = np.arange(EPISODE, 20 * EPISODE + 1, EPISODE)
    experts = EpisodeStore.from_arrays(fields, ends, path=tmp_path / "upper.zarr")
    policy = DiffusionPolicy.load(trained)
    config = TrainerConfig(steps=80, lr=2e-3, **QUICK)
    method = {"type": "dro", "margin": 0.001}
    policy.prefer(TuningData(demonstrations=experts), method, config, tmp_path / "run")
    assert share_above(policy) > 0.75


def test_an_interrupted_run_goes_on_exactly(trained, preferences, tmp_path):
    results = []
    for name, parts in (("whole", [(8, False)]), ("parts", [(4, False), (8, True)])):
        for steps, resume in parts:
            policy = DiffusionPolicy.load(trained)
            config = TrainerConfig(steps=steps, lr=1e-3, lr_schedule="constant", **QUICK)
            data, run = TuningData(preferences), tmp_path / name
            policy.prefer(data, DPO, config, run, adapters={"type": "lora"}, resume=resume)
        results.append(policy.denoiser.state_dict())
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key


@pytest.mark.parametrize(
    ("method", "data", "message"),
    [
        (DPO, {}, "needs preferences"),
        ({"type": "dro"}, {}, "needs demonstrations"),
        ({"type": "cloning", "data": "all"}, {}, "unknown data 'all'; expected one of"),
        ({"type": "cloning", "steps": 3}, {}, "unknown key 'cloning.steps'"),
        ({"type": "ppo"}, {}, "unknown method 'ppo'; expected one of .* did you mean 'pso'"),
        ({"loss": "dpo"}, {}, "a method needs a type"),
        ({"type": "plan_chain"}, {}, r"method of 'tune', not of 'prefer': use policy\.tune"),
        (
            {"type": "sequence_dpo"},
            {},
            "tunes models of sequences, not plans",
        ),
        ({**DPO, "beta": 3}, {}, r"unknown key 'dpo\.beta'; did you mean 'dpo\.kl_beta'"),
        ({**DPO, "score": {"draw": 3}}, {}, r"key 'dpo\.score\.draw'"),
        ({**DPO, "anchor": "best", "anchor_weight": 1.0}, {}, "unknown anchor 'best'"),
        ({"type": "pso", "online": True}, {}, "needs reward"),
        ({"type": "pso", "online": "yes"}, {}, r"pso\.online must be bool"),
        ({**DPO, "online": {}}, {}, "needs reward"),
        ({**DPO, "online": True}, {}, r"dpo\.online must be OwnPlans or null"),
        ({**DPO, "online": {}}, {"reward": len}, "needs observations"),
        ({**DPO, "online": {"candidate": 2}}, {"reward": len}, r"key 'dpo\.online\.candidate'"),
    ],
)
def test_what_is_missing_is_said(method, data, message, trained):
    policy = DiffusionPolicy.load(trained)
    with pytest.raises(ValueError, match=message):
        objective_of(policy, method, TuningData(**data))


def test_online_pso_follows_a_reward(trained, store, tmp_path):
    policy = DiffusionPolicy.load(trained)
    data = TuningData(demonstrations=store, reward=lambda action, obs: action.mean((1, 2)))
    method = {"type": "pso", "online": True, "kl_beta": 0.3}
    policy.prefer(data, method, TrainerConfig(steps=80, lr=2e-3, **QUICK), tmp_path / "run")
    assert share_above(policy) > 0.65


def test_own_plans_are_compared_by_a_reward(trained, store, tmp_path):
    """DPO online: the reward is told the present step's actions in the data's own units."""
    policy = DiffusionPolicy.load(trained)
    seen = []

    def reward(action, obs):
        seen.append((action.shape, obs.shape))
        return action.mean((1, 2))

    data = TuningData(demonstrations=store, reward=reward)
    method = {**DPO, "online": {"candidates": 3, "num_steps": 4}}
    policy.prefer(data, method, TrainerConfig(steps=60, lr=2e-3, **QUICK), tmp_path / "run")
    assert share_above(policy) > 0.7
    assert set(seen) == {((96, 4, 2), (96, 1, 2))}


def objective_of(policy, method, data):
    made = method_of(method, "prefer", items="plans")
    material = PlanMaterial(policy.spec, policy.normalizer, data)
    material.check(made)
    return made.objective(policy.denoiser, material), made.source(material)


def upwards(action, obs):
    return action.mean((1, 2))


@pytest.mark.parametrize(
    "method",
    [
        {"type": "pso", "online": True, "num_steps": 3},
        {**DPO, "online": {"candidates": 2, "num_steps": 2}},
    ],
)
def test_own_plans_are_compared_by_what_is_executed_of_them(method, trained, store):
    policy = DiffusionPolicy.load(trained).with_settings(n_action_steps=2)
    data = TuningData(demonstrations=store, reward=upwards)
    objective, source = objective_of(policy, method, data)
    batch = source.gather(torch.arange(5))
    if method["type"] == "pso":
        paths, _ = objective.draw(batch, torch.Generator())
        steps = paths.items.steps
    else:
        steps = objective.draw(batch["obs"], torch.Generator())[0]["chosen_steps"][:, 0]
    assert steps.tolist() == [[True, True, False, False]] * len(steps)


def test_own_chains_are_no_anchor(trained, store):
    policy = DiffusionPolicy.load(trained)
    method = {"type": "pso", "online": True, "anchor_weight": 1.0}
    with pytest.raises(ValueError, match="needs demonstrations"):
        objective_of(policy, method, TuningData(reward=upwards, observations=store))
    data = TuningData(None, store, reward=upwards, observations=store)
    _, source = objective_of(policy, method, data)
    assert "anchor_action" in source.gather(torch.arange(3))


@pytest.mark.parametrize("how", [{"level_law": "dim"}, {"network": {"type": "anchored"}}])
def test_a_policy_of_another_training_is_refused(how, trained, preferences):
    policy = DiffusionPolicy.load(trained)
    spec = copy.copy(policy.spec)
    for name, value in how.items():
        object.__setattr__(spec, name, value)
    with pytest.raises(ValueError, match="policies of one level per plan"):
        PlanMaterial(spec, policy.normalizer, TuningData(preferences)).check(make_method(DPO))


@pytest.mark.parametrize("mask_padding", [False, True])
def test_padding_is_cloned_as_the_policy_was_trained(mask_padding, trained, store, preferences):
    policy = DiffusionPolicy.load(trained)
    data = TuningData(preferences, store, mask_padding=mask_padding)
    loss, source = objective_of(policy, {"type": "cloning", "data": "demonstrations"}, data)
    batch = source.gather(torch.arange(EPISODE))  # every step of an episode
    assert not batch["valid"].all()
    losses = [
        objective(batch, torch.Generator().manual_seed(0)).loss
        for objective in (
            loss,
            DenoisingLoss(policy.denoiser, mask_padding=mask_padding),
            DenoisingLoss(policy.denoiser, mask_padding=not mask_padding),
        )
    ]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])

    loss, source = objective_of(policy, {**DPO, "anchor_weight": 1.0}, data)
    batch = source.gather(torch.arange(64))
    scored = batch_items(policy.denoiser, batch, "anchor", masked=False).steps
    assert (scored is None) == (not mask_padding)
    if mask_padding:
        assert scored.shape == (64, 4)
        assert not scored.all()
        with_anchor = loss(batch, torch.Generator().manual_seed(0))
        assert torch.isfinite(with_anchor.loss).all()


def test_data_from_paths(store, preferences, tmp_path):
    made = PreferenceSet.create(tmp_path / "p.jsonl", store)
    made.extend(preferences.pairs())
    data = TuningData.of(made.path, store.path, observations=store.path, mask_padding=True)
    assert len(data.preferences.pairs()) == 20
    assert data.demonstrations.num_episodes == data.observations.num_episodes == 40
    assert data.mask_padding


class Numbers:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def gather(self, indices):
        assert int(indices.max()) < self.count
        return {"obs": indices, "action": indices}


def test_few_examples_fill_an_epoch_with_an_order_of_demonstrations_of_their_own():
    mixed = Mixed(Numbers(30), Numbers(7), seed=3)
    assert len(mixed) >= 65_536
    assert len(mixed) % 30 == 0
    batch = mixed.gather(torch.arange(len(mixed)))
    assert torch.bincount(batch["obs"]).unique().numel() == 1  # every example as often
    together = torch.stack([batch["obs"], batch["anchor_obs"]], 1).unique(dim=0)
    assert len(together) == 30 * 7  # every combination comes
