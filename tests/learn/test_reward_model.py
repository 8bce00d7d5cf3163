"""Learned rewards: a known reward is found again, kept bit by bit, and turned into plans' values.

The world: a point x in the plane, x' = x + a / 5; places near the origin are good, actions are not
judged. So the step reward must not depend on actions, and the value of a plan must.
"""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from diffpolicy import DiffusionPolicy, TrainerConfig
from diffpolicy.data.preferences.records import Pair, Span
from diffpolicy.data.preferences.set import PreferenceSet
from diffpolicy.data.store import EpisodeStore
from diffpolicy.learn.material import TuningData
from diffpolicy.learn.reward.plan_chain import PlanChain
from diffpolicy.learn.values import PlanValue, PreferenceLearning, RewardModel
from diffpolicy.learn.values.learning import mean_of_next
from diffpolicy.policies.best_of_n import Selection, Selector
from reward_validation import RewardCandidate, cross_validate, interval_by_episode

EPISODES, STEPS, LENGTH = 40, 30, 10
TRAINER = {"warmup_steps": 10, "checkpoint_every": None, "progress": False, "batch_size": 64}
QUICK = TrainerConfig(steps=300, lr=2e-2, weight_decay=0.1, **TRAINER)


def closeness(obs: np.ndarray) -> np.ndarray:
    return -np.linalg.norm(obs, axis=-1)


def pairs_of(store: EpisodeStore, count: int, better, seed: int = 0) -> list[Pair]:
    """Pairs of segments by the mean of ``better [T]``; every tenth is a tie."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        spans = [
            Span(int(rng.integers(EPISODES)), int(rng.integers(STEPS - LENGTH)), LENGTH)
            for _ in range(2)
        ]
        means = [better[e * STEPS + s : e * STEPS + s + n].mean() for e, s, n in spans]
        first = int(means[1] > means[0])
        tie = number % 10 == 9
        found.append(Pair((spans[first],), (spans[1 - first],), tie=tie or spans[0] == spans[1]))
    return found


@pytest.fixture(scope="module")
def store() -> EpisodeStore:
    rng = np.random.default_rng(0)
    obs = np.empty((EPISODES, STEPS, 2), np.float32)
    action = np.repeat(rng.uniform(-1, 1, (EPISODES, STEPS // 5, 2)), 5, 1).astype(np.float32)
    x = rng.uniform(-1.5, 1.5, (EPISODES, 2))
    for step in range(STEPS):
        obs[:, step] = x
        x = np.clip(x + action[:, step] / 5, -2, 2)
    fields = {"obs": obs.reshape(-1, 2), "action": action.reshape(-1, 2)}
    fields["reward"] = closeness(fields["obs"]).astype(np.float32)
    return EpisodeStore.from_arrays(fields, np.arange(STEPS, EPISODES * STEPS + 1, STEPS))


@pytest.fixture(scope="module")
def preferences(store) -> PreferenceSet:
    return PreferenceSet(store, pairs_of(store, 400, closeness(store.read("obs"))))


@pytest.fixture(scope="module")
def model(preferences, tmp_path_factory) -> RewardModel:
    made = RewardModel.for_preferences(preferences)
    return made.learn(preferences, QUICK, tmp_path_factory.mktemp("reward") / "run")


@pytest.fixture(scope="module")
def value(model, store, tmp_path_factory) -> PlanValue:
    made = PlanValue.for_reward(
        model, n_action_steps=4, lookahead=8, width=64, depth=1, layer_norm=False, members=3
    )
    config = TrainerConfig(steps=400, lr=3e-3, **TRAINER)
    return made.learn(model, store, config, tmp_path_factory.mktemp("plans") / "run")


# -------------------------------------------------------------------- rewards of steps


def test_a_linear_reward_is_found_again(store, tmp_path):
    obs, action = store.read("obs"), store.read("action")
    true = obs @ [1.0, -0.5] + action @ [0.7, 0.3]
    seen = PreferenceSet(store, pairs_of(store, 400, true))
    unseen = PreferenceSet(store, pairs_of(store, 200, true, seed=1))
    config = TrainerConfig(steps=150, lr=5e-3, **TRAINER)
    model = RewardModel.for_preferences(seen).learn(seen, config, tmp_path / "run")
    assert model.accuracy(unseen) > 0.95
    found = model.rewards(store)
    assert np.corrcoef(found, true)[0, 1] > 0.97


def test_a_nonlinear_reward_of_places_is_found(model, store):
    unseen = PreferenceSet(store, pairs_of(store, 200, closeness(store.read("obs")), seed=1))
    assert model.accuracy(unseen) > 0.95
    assert np.corrcoef(model.rewards(store), closeness(store.read("obs")))[0, 1] > 0.9


def test_rewards_have_mean_0_and_spread_1(model, store):
    found = model.rewards(store)  # every episode was judged
    assert found.shape == (EPISODES * STEPS,)
    assert found.mean() == pytest.approx(0, abs=1e-4)
    assert found.std() == pytest.approx(1, abs=1e-4)


def test_swapped_pairs_are_wrong(model, preferences):
    turned = [Pair(p.rejected, p.chosen) for p in preferences.pairs()]
    other = PreferenceSet(preferences.store, turned)
    assert model.accuracy(other) == pytest.approx(1 - model.accuracy(preferences))
    np.testing.assert_array_equal(
        model.right(other, turned), 1 - model.right(preferences, preferences.pairs())
    )


def test_evaluate_counts_decided_pairs_and_beats_a_coin(model, preferences):
    found = model.evaluate(preferences)
    assert found["pairs"] == len(preferences.pairs()) < len(preferences)
    assert found["log_loss"] < np.log(2) / 2


def test_arrays_and_tensors_agree_and_gradients_reach_both(model):
    rng = np.random.default_rng(0)
    obs, action = (rng.uniform(-1, 1, (3, 5, 2)).astype(np.float32) for _ in range(2))
    leaves = [torch.from_numpy(v).requires_grad_() for v in (obs, action)]
    found = model.reward(*leaves)
    assert found.shape == (3, 5)
    np.testing.assert_allclose(model.reward(obs, action), found.detach().numpy(), atol=1e-6)
    gradients = torch.autograd.grad(found.sum(), leaves)
    assert all(g.abs().sum() > 0 for g in gradients)


def test_pessimism_takes_off_disagreement(model):
    near, far = np.zeros((1, 2), np.float32), np.full((1, 2), 30, np.float32)
    for obs in (near, far):
        assert model.reward(obs, near, pessimism=1) < model.reward(obs, near)
    taken = [(model.reward(o, near) - model.reward(o, near, pessimism=1))[0] for o in (near, far)]
    assert taken[1] > 3 * taken[0]
    with pytest.raises(ValueError, match="pessimism"):
        model.reward(near, near, pessimism=-1)


def test_saved_and_loaded_bit_by_bit(model, store, tmp_path):
    model.save(tmp_path / "model")
    loaded = RewardModel.from_pretrained(tmp_path / "model")
    np.testing.assert_array_equal(loaded.rewards(store), model.rewards(store))
    assert {p.suffix for p in (tmp_path / "model").iterdir()} == {".json", ".safetensors"}
    with pytest.raises(ValueError, match="plan value"):
        PlanValue.from_pretrained(tmp_path / "model")


def test_a_run_holds_the_same_model_and_resumes(preferences, store, tmp_path):
    config = TrainerConfig(steps=12, **{**TRAINER, "checkpoint_every": 6})

    def learned(resume: bool) -> RewardModel:
        made = RewardModel.for_preferences(preferences, spec={"width": 8, "members": 2})
        return made.learn(preferences, config, tmp_path / "run", resume=resume)

    once = learned(resume=False).rewards(store)
    kept = RewardModel.from_pretrained(tmp_path / "run").rewards(store)
    np.testing.assert_array_equal(kept, once)
    model = RewardModel.from_pretrained(tmp_path / "run")
    assert re.match(
        r"RewardModel\(obs \d, action \d; 2 members; \d+ parameters, on cpu", repr(model)
    )
    value = PlanValue.for_reward(model, n_action_steps=2)
    assert re.match(r"PlanValue\(obs \d x 1, 2 actions of \d; rewards of 16 steps, ", repr(value))
    (tmp_path / "run" / "checkpoints" / "last").write_text("0000006\n")  # as if killed after it
    np.testing.assert_array_equal(learned(resume=True).rewards(store), once)


def test_held_out_episodes_keep_the_best_checkpoint(preferences, tmp_path):
    config = TrainerConfig(steps=60, lr=3e-3, eval_every=20, **TRAINER)
    learning = PreferenceLearning(val_fraction=0.25, ties=True, label_smoothing=0.02)
    made = RewardModel.for_preferences(preferences, spec={"width": 8})
    made.learn(preferences, config, tmp_path / "run", learning=learning)
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert "held_out_accuracy" in rows[0]
    held_out = learning.split(preferences, config.seed)[1]
    assert held_out is not None
    assert made.last_training is not None
    assert -made.evaluate(held_out)["log_loss"] == pytest.approx(made.last_training.best_score)


def test_relabelled_store(model, store, tmp_path):
    made = model.relabel(store, tmp_path / "labelled.zarr")
    np.testing.assert_allclose(made.read("reward"), model.rewards(store), atol=1e-6)
    np.testing.assert_array_equal(made.read("obs"), store.read("obs"))
    np.testing.assert_array_equal(made.episode_ends, store.episode_ends)


# -------------------------------------------------------------------- values of plans


def test_mean_of_next_by_hand():
    fields = {"obs": np.zeros((5, 1)), "action": np.zeros((5, 1))}
    store = EpisodeStore.from_arrays(fields, [3, 5])
    values = np.array([1.0, 2, 4, 10, 20])
    np.testing.assert_allclose(
        mean_of_next(values, store, 2, 0.5), [2 / 1.5, 4 / 1.5, 4, 20 / 1.5, 20], rtol=1e-6
    )
    np.testing.assert_allclose(mean_of_next(values, store, 9, 1), [7 / 3, 3, 4, 15, 20], rtol=1e-6)


def test_a_plan_is_worth_where_it_leads(value, model, store):
    """The gradient to the plan points home, where that of the step reward does not."""
    angle = torch.arange(16) * torch.pi / 8
    obs = torch.stack([angle.cos(), angle.sin()], 1)
    plan = torch.zeros(16, 4, 2, requires_grad=True)
    found = value(plan, obs.unsqueeze(1))
    assert found.shape == (16,)
    towards = torch.autograd.grad(found.sum(), plan)[0]
    cosine = torch.cosine_similarity(towards[:, 0], -obs)
    assert cosine.mean() > 0.8
    assert towards[:, 0].norm(dim=1).mean() > towards[:, 3].norm(dim=1).mean()  # sooner tells more

    first = plan[:, 0].detach().requires_grad_()
    of_step = torch.autograd.grad(model.reward(obs, first).sum(), first)[0]
    assert torch.cosine_similarity(of_step, -obs).mean().abs() < 0.3


def test_report_tells_whether_plans_matter(value, model, store):
    found = value.report(model, store, range(EPISODES))
    assert found["explained"] > 0.9
    assert found["explained_shuffled"] < found["explained"] - 0.05


def test_plans_of_a_policy_with_longer_history(value):
    action, obs = torch.randn(3, 8, 2), torch.randn(3, 3, 2)
    torch.testing.assert_close(value(action, obs), value(action[:, 2:6], obs[:, 2:]))
    with pytest.raises(ValueError, match="4 actions from the current step"):
        value(action[:, :5], obs)


def test_value_saved_and_loaded_bit_by_bit(value, tmp_path):
    value.save(tmp_path / "value")
    loaded = PlanValue.from_pretrained(tmp_path / "value")
    action, obs = torch.randn(3, 4, 2), torch.randn(3, 1, 2)
    assert torch.equal(loaded(action, obs), value(action, obs))


def test_policies_are_tuned_and_candidates_ranked_by_it(value, store, tmp_path):
    spec = {"horizon": 4, "n_obs_steps": 1, "n_action_steps": 4}
    spec["network"] = {"type": "mlp", "width": 64, "depth": 1}
    policy = DiffusionPolicy.from_dataset(store, spec=spec)
    config = TrainerConfig(steps=100, lr=3e-3, **TRAINER)
    policy.learn(store, config, tmp_path / "cloned")
    angle = np.arange(64) * np.pi / 32
    obs = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)

    def homeward() -> float:
        first = policy.act(obs, policy.initial_state(range(64)))[0]
        return float((first * -obs).sum(1).mean())

    before = homeward()
    policy.selector = Selector(Selection(8), value.ranking(policy.normalizer))
    assert homeward() > before + 0.2
    policy.selector = None
    tuned = TrainerConfig(steps=60, lr=3e-3, ema_power=None, **TRAINER)
    policy.tune(
        TuningData(reward=value, observations=store),
        PlanChain(grad_steps=1),
        tuned,
        tmp_path / "tuned",
    )
    assert homeward() > before + 0.2


# -------------------------------------------------------------------- validation, bad input


def test_cross_validation_holds_out_whole_episodes(store):
    preferences = PreferenceSet(store, pairs_of(store, 800, store.read("obs")[:, 0]))
    small = {"steps": 40, "lr": 1e-2, "batch_size": 16, "warmup_steps": 5}
    blind = RewardCandidate("blind", {"width": 2, "members": 1}, {}, {**small, "steps": 1})
    able = RewardCandidate("able", {"width": 16, "members": 2}, {}, small)
    said: list[str] = []
    found = cross_validate(
        preferences, [blind, able], folds=2, seeds=[0], inner_folds=2, progress=said.append
    )
    assert len(said) == len(found["rows"]) == 2
    assert {row["chosen"] for row in found["rows"]} == {"able"}
    assert found["pairs"] == sum(row["pairs"] for row in found["rows"]) < len(preferences.pairs())
    low, high = found["interval"]
    assert low < found["accuracy"] < high
    assert found["accuracy"] > 0.8
    assert 0.2 < found["reward"]["accuracy"] < 0.8  # of closeness, which was not judged here


def test_interval_of_pairs_in_one_group_each():
    pairs = [Pair((Span(2 * i, 0, 1),), (Span(2 * i + 1, 0, 1),)) for i in range(50)]
    right = np.r_[np.ones(40), np.zeros(10)]
    low, high = interval_by_episode(pairs, right)
    assert 0.55 < low < 0.8 < high < 0.97
    assert interval_by_episode(pairs, np.ones(50)) == [1, 1]


def test_people_who_compared_door_demonstrations(tmp_path):
    """One fold of what scripts/door_reward_model.py measures."""
    root = Path(__file__).parents[1]
    data = root.parent / "shared" / "data" / "adroit_door_human"
    if not data.is_dir():
        pytest.skip(f"needs the door demonstrations in {data}")
    script = runpy.run_path(str(root / "scripts" / "door_reward_model.py"))
    preferences = script["door_preferences"](data, crossing=False)
    assert len(preferences.pairs()) == 876
    assert preferences.agreement(preferences.store.read("reward")) == pytest.approx(0.903, abs=1e-3)
    seen, unseen = preferences.split_by_episode(5, 0)[0]
    model = RewardModel.for_preferences(seen, spec={"width": 8})
    config = TrainerConfig(steps=60, lr=1e-2, **TRAINER)
    assert model.learn(seen, config, tmp_path / "run").accuracy(unseen) >= 0.75


def test_bad_input(model, preferences, store):
    with pytest.raises(ValueError, match="has no pairs"):
        model.accuracy(PreferenceSet(store))
    with pytest.raises(ValueError, match="agree but for the last"):
        model.reward(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="val_fraction"):
        PreferenceLearning(val_fraction=0.7)
    with pytest.raises(ValueError, match="has no setting 'widht'"):
        RewardModel.for_preferences(preferences, spec={"widht": 3})
    with pytest.raises(ValueError, match="lookahead"):
        PlanValue.for_reward(model, n_action_steps=2, lookahead=0)
