"""Own plans, compared by a value and kept as a preference file."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from diffpolicy import DiffusionPolicy, TrainerConfig
from diffpolicy.data.fields import FieldSpec
from diffpolicy.data.preferences.check import check_preferences
from diffpolicy.data.preferences.examples import PairExamples
from diffpolicy.data.preferences.set import PreferenceSet
from diffpolicy.data.store import EpisodeStore
from diffpolicy.learn.material import TuningData
from diffpolicy.learn.plan_pairs import PlanPairs, pair_plans
from diffpolicy.learn.values import PlanValue
from diffpolicy.rollout.env_spec import EnvSpec
from diffpolicy.rollout.record.steps import DenseReward

LENGTHS = (9, 3, 14)


@pytest.fixture(scope="module")
def episodes(tmp_path_factory):
    """Observations that say where they are: episode and step."""
    rows = [np.stack([np.full(n, e), np.arange(n)], 1) for e, n in enumerate(LENGTHS)]
    obs = np.concatenate(rows).astype(np.float32)
    action = np.random.default_rng(0).uniform(-2, 2, (len(obs), 1)).astype(np.float32)
    path = tmp_path_factory.mktemp("data") / "rollouts.zarr"
    return EpisodeStore.from_arrays({"obs": obs, "action": action}, np.cumsum(LENGTHS), path=path)


@pytest.fixture(scope="module")
def policy(episodes, tmp_path_factory):
    spec = {
        "horizon": 6,
        "n_obs_steps": 2,
        "n_action_steps": 3,
        "network": {"type": "mlp", "width": 16, "depth": 1},
        "sampler": {"solver": "ddim", "num_steps": 3},
    }
    made = DiffusionPolicy.from_dataset(episodes, spec=spec)
    quick = TrainerConfig(steps=200, lr=3e-3, batch_size=8, warmup_steps=1, progress=False)
    made.learn(episodes, quick, tmp_path_factory.mktemp("runs") / "base")
    return made


def highest(action, obs):
    """Worth is the first action that is executed: position To - 1 is now's."""
    assert action.shape[1:] == (6, 1)
    assert obs.shape[1:] == (2, 2)
    return action[:, 1, 0]


def paired(policy, episodes, folder, *, reward=highest, settings=None, **options):
    settings = settings or PlanPairs(every=4, candidates=5, num_steps=3)
    return pair_plans(
        policy,
        reward,
        episodes,
        store_path=folder / "plans.zarr",
        prefs_path=folder / "plans.jsonl",
        settings=settings,
        progress=False,
        **options,
    )


def test_the_best_plan_stands_against_the_worst(policy, episodes, tmp_path):
    found = paired(policy, episodes, tmp_path)
    places = [(0, 2), (0, 6), (1, 2), (2, 2), (2, 6), (2, 10)]
    assert len(found.pairs()) == len(places)
    for (episode, step), pair in zip(places, found.pairs(), strict=True):
        (better,), (worse,) = pair.chosen, pair.rejected
        assert better[1:] == worse[1:] == (1, 3)  # what is executed: Ta steps from position To - 1
        plans = [found.store.episode(span.episode) for span in (better, worse)]
        for plan in plans:
            np.testing.assert_allclose(plan["obs"][:2, 0], episode, atol=1e-5)
            np.testing.assert_allclose(plan["obs"][:2, 1], [step - 1, step], atol=1e-5)
            assert (plan["obs"][2:] == plan["obs"][1]).all()
        values = [float(plan["action"][1, 0]) for plan in plans]
        assert values[0] > values[1]
        np.testing.assert_allclose(pair.info["scores"], values, atol=1e-5)
    assert not check_preferences(tmp_path / "plans.jsonl")
    assert found.summary()["length"] == [3, 3]


def test_examples_are_the_plans(policy, episodes, tmp_path):
    found = paired(policy, episodes, tmp_path)
    spec, normal = policy.spec, policy.normalizer
    sizes = {"horizon": 6, "n_obs_steps": 2, "n_action_steps": 3, "normalizer": normal}
    batch = PairExamples(found, **sizes).gather(torch.arange(len(found)))
    executed = torch.tensor([False, True, True, True, False, False])
    for name, side in (("chosen", 0), ("rejected", 1)):
        assert (batch[f"{name}_steps"] == executed).all()
        for i in range(len(found)):
            stored = torch.from_numpy(found.store.episode(2 * i + side)["action"])
            wanted = normal.normalize("action", stored)
            torch.testing.assert_close(batch[f"{name}_action"][i, 0], wanted)
    torch.testing.assert_close(batch["chosen_obs"], batch["rejected_obs"])
    assert spec.horizon == batch["chosen_action"].shape[2]


def test_the_seed_decides_everything(policy, episodes, tmp_path):
    first = [r.info["scores"] for r in paired(policy, episodes, tmp_path, seed=1).records]
    again = [r.info["scores"] for r in paired(policy, episodes, tmp_path, seed=1).records]
    other = [r.info["scores"] for r in paired(policy, episodes, tmp_path, seed=2).records]
    assert first == again != other


def test_more_candidates_are_further_apart(policy, episodes, tmp_path):
    leads = []
    for count in (2, 32):
        settings = PlanPairs(every=1, candidates=count, num_steps=3)
        found = paired(policy, episodes, tmp_path, settings=settings)
        leads.append(np.mean([np.subtract(*r.info["scores"]) for r in found.records]))
    assert leads[1] > 1.5 * leads[0]


def test_plans_that_are_worth_the_same_make_no_pair(policy, episodes, tmp_path):
    def in_the_first_episode(action, obs):
        return torch.where(obs[:, -1, 0] < 0.5, action[:, 1, 0], 0.0)

    assert len(paired(policy, episodes, tmp_path, reward=in_the_first_episode)) == 2
    with pytest.raises(ValueError, match="worth the same"):
        paired(policy, episodes, tmp_path, reward=lambda action, obs: action.new_zeros(len(action)))


def test_such_pairs_are_replaced(policy, episodes, tmp_path):
    """By fewer ones, too."""
    for every, count in ((1, sum(LENGTHS)), (4, 6)):
        settings = PlanPairs(every=every, candidates=2, num_steps=3)
        found = paired(policy, episodes, tmp_path, settings=settings)
        assert count // 2 <= len(found) <= count
        assert not check_preferences(tmp_path / "plans.jsonl")


def test_something_else_is_left_alone(policy, episodes, tmp_path):
    fields = {"obs": FieldSpec((2,), "float32")}
    EpisodeStore.create(tmp_path / "a" / "plans.zarr", fields).close()
    with pytest.raises(FileExistsError, match="something else than plans"):
        paired(policy, episodes, tmp_path / "a")
    (tmp_path / "b").mkdir()
    for text in ("a diary\n", None):
        target = tmp_path / "b" / "plans.jsonl"
        if text is None:
            target.unlink()
            PreferenceSet.create(target, episodes)
        else:
            target.write_text(text)
        before = target.read_bytes()
        with pytest.raises(FileExistsError, match="something else than pairs of plans"):
            paired(policy, episodes, tmp_path / "b")
        assert target.read_bytes() == before
        assert not (tmp_path / "b" / "plans.zarr").exists()


def test_pairs_are_there_when_they_are_complete(policy, episodes, tmp_path, monkeypatch):
    paired(policy, episodes, tmp_path)
    extend = PreferenceSet.extend

    def killed(self, records):
        extend(self, list(records)[:2])
        if self.path is not None:
            raise KeyboardInterrupt

    monkeypatch.setattr(PreferenceSet, "extend", killed)
    with pytest.raises(KeyboardInterrupt):
        paired(policy, episodes, tmp_path, seed=5)
    assert not (tmp_path / "plans.jsonl").exists()  # nor the old ones, whose plans are gone
    monkeypatch.setattr(PreferenceSet, "extend", extend)
    assert len(paired(policy, episodes, tmp_path, seed=5)) == 6


def test_policies_that_plan_otherwise_cannot_read_them(policy, episodes, tmp_path):
    found = paired(policy, episodes, tmp_path)
    spec = {"horizon": 6, "n_obs_steps": 2, "n_action_steps": 2, "network": {"type": "mlp"}}
    other = DiffusionPolicy.from_dataset(episodes, spec=spec)
    dpo = {"type": "dpo"}
    with pytest.raises(ValueError, match=r"plans of a policy with .*'n_action_steps': 3"):
        other.prefer(TuningData(found), dpo, TrainerConfig(steps=1), tmp_path / "run")


def test_worths_are_numbers(policy, episodes, tmp_path):
    def undefined(action, obs):
        return torch.full((len(action),), float("nan"))

    with pytest.raises(ValueError, match="rewards are not finite"):
        paired(policy, episodes, tmp_path, reward=undefined)


def test_a_policy_at_another_temperature_draws_other_plans(policy, episodes, tmp_path):
    cold = policy.with_settings(temperature=0.5)
    with pytest.raises(ValueError, match=r"temperature=0\.5"):
        PlanPairs.from_config({}, cold.spec)
    with pytest.raises(ValueError, match=r"temperature=0\.5"):
        paired(cold, episodes, tmp_path)
    assert not (tmp_path / "plans.zarr").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"every": 0}, "every must be a positive integer"),
        ({"every": 2.5}, "plans.every must be int"),
        ({"candidates": "3"}, "plans.candidates must be int"),
        ({"candidates": 1}, "at least 2"),
        ({"drawn_by": "reference"}, "unknown key 'plans.drawn_by'"),
        ({"solver": "euler_maruyama"}, "euler_maruyama"),
        ({"num_steps": None}, "num_steps"),
    ],
)
def test_settings_are_checked(config, message, policy):
    with pytest.raises(ValueError, match=message):
        PlanPairs.from_config(config, policy.spec)


def test_plans_are_drawn_with_the_policys_sampler(policy):
    made = PlanPairs.from_config({"candidates": 4}, policy.spec)
    assert (made.solver, made.num_steps) == ("ddim", 3)
    assert PlanPairs.from_config({"num_steps": 2}, policy.spec).num_steps == 2


def test_episodes_without_an_observation_to_draw_for(policy, episodes, tmp_path):
    with pytest.raises(ValueError, match=r"lower plans\.every"):
        paired(policy, episodes, tmp_path, settings=PlanPairs(every=40))


@pytest.mark.parametrize(
    "method",
    [
        {"type": "dpo", "kl_beta": 1.0},
        {"type": "dpo", "loss": "kto", "kl_beta": 1.0},
        {"type": "cloning", "data": "chosen"},
    ],
    ids=["dpo", "kto", "chosen"],
)
def test_plans_become_more_worth(method, policy, episodes, tmp_path):
    found = paired(policy, episodes, tmp_path, settings=PlanPairs(every=1, candidates=8))
    tuned = copy.deepcopy(policy)
    obs = episodes.read("obs", 0, episodes.num_steps)
    before = tuned.predict(obs)[0].mean()
    config = TrainerConfig(
        steps=60, batch_size=16, lr=2e-3, warmup_steps=1, progress=False, ema_power=None
    )
    tuned.prefer(TuningData(found), method, config, tmp_path / "run")
    assert tuned.predict(obs)[0].mean() > before + 0.1


class TestDenseReward:
    def test_push_t_says_how_far_the_block_is(self):
        pusht = EnvSpec("diffpolicy_envs:diffpolicy/PushT-v0")
        env = pusht.make()
        obs = []
        for moved in (0.0, 30.0, 60.0):
            state = np.array([100.0, 100.0, 256.0 + moved, 256.0, np.pi / 4])
            obs.append(env.reset(seed=0, options={"state": state})[0])
        env.close()
        arrays = {
            "obs": np.stack(obs),
            "action": np.zeros((3, 2), np.float32),
            "reward": np.array([1.0, 0.5, 0.0], np.float32),
        }
        store = EpisodeStore.from_arrays(arrays, [3])
        found = DenseReward(pusht).rewards(store)
        np.testing.assert_allclose(found, [1.0, 0.5 - 0.15, -0.3], atol=1e-4)

    def test_a_value_learns_it_where_the_rewards_tell_nothing(self, tmp_path):
        pusht = EnvSpec("diffpolicy_envs:diffpolicy/PushT-v0")
        env, rng = pusht.make(), np.random.default_rng(0)
        states = rng.uniform([50, 50, 150, 150, 0], [450, 450, 350, 350, 6], (300, 5))
        arrays = {
            "obs": env.unwrapped.observation_from_state(states),
            "action": rng.uniform(0, 512, (300, 2)).astype(np.float32),
            "reward": np.zeros(300, np.float32),
        }
        env.close()
        store = EpisodeStore.from_arrays(arrays, np.arange(10, 301, 10))
        spec = {"horizon": 4, "n_obs_steps": 1, "n_action_steps": 1}
        policy = DiffusionPolicy.from_dataset(store, spec={**spec, "network": {"type": "mlp"}})
        value = PlanValue.for_policy(policy, lookahead=1, width=32, members=2)
        config = TrainerConfig(steps=300, batch_size=64, lr=3e-3, progress=False)
        dense = DenseReward(pusht)
        value.learn(dense, store, config, tmp_path / "value")
        assert value.report(dense, store, range(30))["explained"] > 0.8

    def test_other_environments_have_none(self):
        with pytest.raises(ValueError, match="has no method dense_reward"):
            DenseReward(EnvSpec("Pendulum-v1"))
