"""Policies and models that learn: what a run is, and what is left when it fails."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from diffpolicy import DiffusionPolicy, TrainerConfig
from diffpolicy.data.preferences.records import Pair, Span
from diffpolicy.data.preferences.set import PreferenceSet
from diffpolicy.data.store import EpisodeStore
from diffpolicy.data.transitions import Transitions
from diffpolicy.data.windows import Windows
from diffpolicy.learn.adapters import has_adapters
from diffpolicy.learn.learning import Learning
from diffpolicy.learn.material import TuningData
from diffpolicy.learn.values import RewardModel
from diffpolicy.sequences.model import SequenceModel
from diffpolicy.sequences.spec import SequenceSpec
from diffpolicy.training.identity import describe, differences, flatten
from diffpolicy.training.trainer import Trainer

CONFIG = TrainerConfig(steps=2, batch_size=8, lr=1e-3, progress=False)
SPEC = {
    "horizon": 4,
    "n_obs_steps": 1,
    "n_action_steps": 2,
    "network": {"type": "mlp", "width": 16, "depth": 1},
}
DPO = {"type": "dpo", "kl_beta": 0.3}
DRAFT = {"type": "plan_chain", "grad_steps": 1}


def make_store(episodes: int = 6, seed: int = 0) -> EpisodeStore:
    rng, rows = np.random.default_rng(seed), 10 * episodes
    fields = {"obs": rng.normal(size=(rows, 2)), "action": rng.uniform(-1, 1, (rows, 2))}
    return EpisodeStore.from_arrays(fields, np.arange(10, rows + 1, 10))


@pytest.fixture(scope="module")
def store() -> EpisodeStore:
    return make_store()


def make_policy(store: EpisodeStore, **options) -> DiffusionPolicy:
    return DiffusionPolicy.from_dataset(store, **{"spec": SPEC, **options})


def near(action, obs):
    return -(action - obs[:, -1:]).square().sum((1, 2))


def rewarded(store: EpisodeStore, reward=near) -> TuningData:
    return TuningData(reward=reward, observations=store)


def preferences(store: EpisodeStore, flip: int = -1) -> PreferenceSet:
    pairs = []
    for i in range(8):
        spans = Span(i % 6, 0, 6), Span((i + 1) % 6, 2, 6)
        chosen, rejected = spans[::-1] if i == flip else spans
        pairs.append(Pair((chosen,), (rejected,)))
    return PreferenceSet(store, pairs)


class TestResume:
    """A run goes on as what it was, or not at all."""

    @pytest.mark.parametrize(
        ("data", "options", "named"),
        [
            (make_store(8), {}, r"examples was 60, is 80.*normalizer\.obs"),
            (make_store(seed=1), {}, r"source\.action was"),
            (None, {"spec": {**SPEC, "prediction": "v"}}, r"policy\.prediction was 'eps', is 'v'"),
            (None, {"spec": {**SPEC, "clip": False}}, r"policy\.clip was True, is False"),
            (None, {"spec": {**SPEC, "process": "edm"}}, r"policy\.process"),
            (None, {"normalize": {"obs": "gaussian"}}, r"normalizer\.obs was 'minmax'"),
        ],
    )
    def test_cloning(self, data, options, named, store, tmp_path):
        make_policy(store).learn(store, CONFIG, tmp_path, val_fraction=0)
        other = store if data is None else data
        with pytest.raises(ValueError, match=rf"cannot go on as another run.*{named}"):
            make_policy(other, **options).learn(
                other, CONFIG, tmp_path, val_fraction=0, resume=True
            )

    def test_learning(self, store, tmp_path):
        make_policy(store).learn(store, CONFIG, tmp_path, val_fraction=0)
        with pytest.raises(ValueError, match=r"learning\.mask_padding was False, is True"):
            make_policy(store).learn(
                store,
                CONFIG,
                tmp_path,
                val_fraction=0,
                learning=Learning(mask_padding=True),
                resume=True,
            )

    def test_rewards(self, store, tmp_path):
        policy = make_policy(store)
        copy.deepcopy(policy).tune(rewarded(store), DRAFT, CONFIG, tmp_path)
        copy.deepcopy(policy).tune(rewarded(store), DRAFT, CONFIG, tmp_path, resume=True)
        other = rewarded(store, lambda a, obs: 2 * near(a, obs))
        with pytest.raises(ValueError, match=r"objective\._reward"):
            policy.tune(other, DRAFT, CONFIG, tmp_path, resume=True)
        with pytest.raises(ValueError, match=r"objective\.chain\.num_steps was 10, is 4"):
            policy.tune(rewarded(store), {**DRAFT, "num_steps": 4}, CONFIG, tmp_path, resume=True)

    def test_preferences(self, store, tmp_path):
        policy = make_policy(store)
        data = TuningData(preferences(store))
        copy.deepcopy(policy).prefer(data, DPO, CONFIG, tmp_path)
        copy.deepcopy(policy).prefer(data, DPO, CONFIG, tmp_path, resume=True)
        with pytest.raises(ValueError, match=r"method\.kl_beta was 0\.3, is 1\.0"):
            policy.prefer(data, {**DPO, "kl_beta": 1.0}, CONFIG, tmp_path, resume=True)
        flipped = TuningData(preferences(store, flip=3))  # one judgement of eight
        with pytest.raises(ValueError, match=r"source\.main\.pairs was"):
            policy.prefer(flipped, DPO, CONFIG, tmp_path, resume=True)

    def test_reward_models(self, store, tmp_path):
        model = RewardModel.for_preferences(preferences(store))
        model.learn(preferences(store), CONFIG, tmp_path)
        with pytest.raises(ValueError, match=r"source\.pairs\.pairs was"):
            model.learn(preferences(store, flip=3), CONFIG, tmp_path, resume=True)

    def test_sequences(self, tmp_path):
        tokens = torch.randint(4, (40, 5), generator=torch.Generator().manual_seed(0))
        model = SequenceModel(SequenceSpec("ACGT", 5, network=SPEC["network"]))
        model.learn(tokens, CONFIG, tmp_path)
        tokens[3, 2] = (tokens[3, 2] + 1) % 4
        with pytest.raises(ValueError, match=r"source\.tokens was"):
            model.learn(tokens, CONFIG, tmp_path, val_fraction=0, resume=True)

    def test_rows_streamed_from_the_disk_are_the_same_rows(self, store):
        sizes = {"horizon": 4, "n_obs_steps": 2, "n_action_steps": 2}
        held, streamed = (Windows(store, **sizes, in_memory=where) for where in (True, False))
        said = [flatten(describe(windows)) for windows in (held, streamed)]
        assert said[0] == said[1]
        fewer = flatten(describe(Windows(store, **sizes, episodes=[0, 1])))
        assert differences(said[0], fewer)

    def test_rewards_of_transitions_count(self, store):
        def said(reward):
            rows = {name: store.read(name) for name in ("obs", "action")}
            extra = {"reward": reward, "terminated": np.zeros(60, bool)}
            full = EpisodeStore.from_arrays({**rows, **extra}, store.episode_ends)
            return flatten(describe(Transitions(full, horizon=2)))

        other = np.ones(60, np.float32)
        other[5] = 0
        found = differences(said(np.ones(60, np.float32)), said(other))
        assert [text.split()[0] for text in found] == ["reward"]


def fail_at(monkeypatch, step: int, error: BaseException) -> None:
    """Training stops with an error after so many steps."""
    original = Trainer._train_step

    def broken(self):
        original(self)
        if self.step == step:
            raise error

    monkeypatch.setattr(Trainer, "_train_step", broken)


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(module: torch.nn.Module, before: dict[str, torch.Tensor]) -> None:
    now = module.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], value) for name, value in before.items())
    assert not any(part.training for part in module.modules())


@pytest.mark.parametrize("error", [RuntimeError("simulator gone"), KeyboardInterrupt()])
class TestFailure:
    """What fails, or is interrupted, leaves no trace in the object."""

    def test_of_policies(self, error, store, tmp_path, monkeypatch):
        policy = make_policy(store)
        before, obs = weights_of(policy.denoiser), store.read("obs", 0, 5)
        acts = policy.predict(obs, deterministic=True)[0]
        fail_at(monkeypatch, 2, error)
        data = TuningData(preferences(store))
        for number, run in enumerate(
            [
                lambda path: policy.learn(store, CONFIG, path),
                lambda path: policy.tune(rewarded(store), DRAFT, CONFIG, path),
                lambda path: policy.prefer(data, DPO, CONFIG, path, adapters={"type": "lora"}),
                lambda path: policy.prefer(TuningData(), DPO, CONFIG, path, adapters={}),
            ]
        ):
            with pytest.raises((type(error), ValueError)):
                run(tmp_path / str(number))
            assert_same(policy.denoiser, before)
            assert not has_adapters(policy.denoiser)
        assert np.array_equal(policy.predict(obs, deterministic=True)[0], acts)
        monkeypatch.undo()
        policy.prefer(data, DPO, CONFIG, tmp_path / "again", adapters={"type": "lora"})
        saved = DiffusionPolicy.load(policy.save(tmp_path / "saved"))
        assert_same(policy.denoiser, weights_of(saved.denoiser))

    def test_of_sequences_and_reward_models(self, error, store, tmp_path, monkeypatch):
        fail_at(monkeypatch, 2, error)
        tokens = torch.randint(4, (40, 5), generator=torch.Generator().manual_seed(0))
        model = SequenceModel(SequenceSpec("ACGT", 5, network=SPEC["network"]))
        before = weights_of(model.denoiser)
        with pytest.raises(type(error)):
            model.learn(tokens, CONFIG, tmp_path / "sequences")
        assert_same(model.denoiser, before)
        reward = RewardModel.for_preferences(preferences(store))
        before = weights_of(reward.network)
        with pytest.raises(type(error)):
            reward.learn(preferences(store), CONFIG, tmp_path / "reward")
        assert_same(reward.network, before)
        assert not any(p.requires_grad for p in reward.network.parameters())


def test_a_reward_without_a_gradient_is_refused(store, tmp_path):
    data = rewarded(store, lambda action, obs: near(action, obs).detach())
    with pytest.raises(ValueError, match=r"this reward has no gradient.*\.detach\(\)"):
        make_policy(store).tune(data, DRAFT, CONFIG, tmp_path)


def loaded_whole(policy, other):
    policy.denoiser.load_state_dict(other.denoiser.state_dict())


def loaded_network(policy, other):
    policy.denoiser.network.load_state_dict(other.denoiser.network.state_dict())


@torch.no_grad()
def edited(policy, other):
    for mine, theirs in zip(policy.denoiser.parameters(), other.denoiser.parameters(), strict=True):
        mine.copy_(theirs)


@pytest.mark.parametrize("change", [loaded_whole, loaded_network, edited])
@pytest.mark.parametrize("copied", [False, True])
def test_policies_act_with_the_weights_they_have(change, copied, store):
    other = make_policy(store)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in other.denoiser.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=noise))
    obs = store.read("obs", 0, 20)
    expected = DiffusionPolicy(other.spec, other.denoiser, other.normalizer).predict(obs)[0]
    policy = make_policy(store)
    policy.predict(obs)
    policy = copy.deepcopy(policy) if copied else policy
    change(policy, other)
    assert np.array_equal(policy.predict(obs)[0], expected)


def test_compiled_policies_do_not_act_with_weights_that_are_gone(store, tmp_path):
    policy, obs = make_policy(store), store.read("obs", 0, 1)
    compiled = policy.compile(backend="eager")
    compiled.predict(obs)
    loaded_whole(policy, make_policy(store, seed=1))
    with pytest.raises(ValueError, match="compile it again"):
        compiled.predict(obs)
    compiled.learn(store, CONFIG, tmp_path)  # which ends with loops of the new weights
    compiled.predict(obs)
