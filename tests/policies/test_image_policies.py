"""Policies that see: what is encoded how often, trained and resumed, saved and trusted."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from strangers_code import Blind, Mine

from diffpolicy import DiffusionPolicy, EpisodeStore, TrainerConfig
from diffpolicy.data.observation import to_fields
from diffpolicy.learn.cloning.denoising import DenoisingLoss
from diffpolicy.learn.methods import make_method
from diffpolicy.networks import make_network
from diffpolicy.networks.encoders import encoder_class
from diffpolicy.networks.registry import check_stored_code
from diffpolicy.policies.truncated import Truncated
from diffpolicy.training.checkpoint import read_bundle, write_bundle

NETWORK = {"type": "mlp", "width": 16, "depth": 1}
SIGHT = {"type": "images", "backbone": {"type": "cnn", "widths": [4, 4]}, "dim": 4, "points": 2}
SMALL = {"horizon": 6, "n_obs_steps": 2, "n_action_steps": 3, "network": NETWORK}
SMALL |= {"sampler": {"num_steps": 4}}


def store_of(seed=0, rows=60, side=10):
    rng = np.random.default_rng(seed)
    arrays = {
        "obs.camera": rng.integers(0, 256, (rows, side, side, 3), dtype=np.uint8),
        "obs.joints": rng.normal(size=(rows, 2)).astype(np.float32),
        "action": rng.uniform(-1, 1, (rows, 2)).astype(np.float32),
    }
    return EpisodeStore.from_arrays(arrays, [rows // 2, rows])


def policy_of(store=None, **changes):
    encoder = changes.pop("encoder", SIGHT)
    return DiffusionPolicy.from_dataset(
        store or store_of(), spec={**SMALL, "encoder": encoder, **changes}
    )


def observed(count=3, seed=1):
    rng = np.random.default_rng(seed)
    camera = rng.integers(0, 256, (count, 10, 10, 3), dtype=np.uint8)
    return {"camera": camera, "joints": rng.normal(size=(count, 2)).astype(np.float32)}


def counted(policy):
    """The rows of every call of the policy's encoder, from now on."""
    rows = []
    policy.denoiser.encoder.register_forward_hook(lambda _m, _i, out: rows.append(len(out)))
    return rows


def config(**changes):
    few = {"steps": 6, "batch_size": 8, "warmup_steps": 1, "lr": 1e-2, "progress": False}
    return TrainerConfig(**{**few, **changes})


def weights(policy):
    return {k: v.clone() for k, v in policy.denoiser.state_dict().items()}


# --- how often ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"rti": {"t_start": 0.5, "num_steps": 3}},
        {
            "heads": {"critic": {"type": "q_ensemble", "width": 8, "depth": 1}},
            "selection": {"num_candidates": 5},
        },
        {"truncated": {"t_start": 0.5, "sources": ["draft"], "num_steps": 2}},
        {"truncated": {"t_start": 0.5, "sources": ["draft", "previous"], "num_steps": 2}},
    ],
    ids=["steps", "warm", "candidates", "draft", "competing"],
)
def test_an_observation_is_encoded_once_per_decision(spec):
    policy = policy_of(**spec)
    rows, state = counted(policy), policy.initial_state([0, 1, 2])
    for _ in range(2 * 3):
        _, state = policy.act(observed(), state)
    assert rows == [3, 3]


def test_candidates_repeat_the_condition_and_no_image(monkeypatch):
    critic = {"critic": {"type": "q_ensemble", "width": 8, "depth": 1}}
    policy = policy_of(heads=critic, selection={"num_candidates": 5})
    seen, make_plans = [], policy.make_plans

    def watched(state, **how):
        seen.append(state.history)
        return make_plans(state, **how)

    monkeypatch.setattr(policy, "make_plans", watched)
    _, state = policy.act(observed(), policy.initial_state([0, 1, 2]))
    assert [h["camera"].size for h in seen] == [0]
    assert [len(h["joints"]) for h in seen] == [15]
    assert state.history["camera"].shape == (3, 2, 10, 10, 3)  # the memory keeps what it saw


def test_a_loss_of_several_draws_is_their_mean_and_encodes_once():
    policy = policy_of()
    batch = {k: torch.from_numpy(v[:, None].repeat(2, 1)) for k, v in observed(5).items()}
    batch = {**to_fields(batch), "action": torch.rand(5, 6, 2)}
    rows = counted(policy)
    several = DenoisingLoss(policy.denoiser, draws=3)(batch, torch.Generator().manual_seed(0)).loss
    assert rows == [5]
    often = {k: v.repeat_interleave(3, 0) for k, v in batch.items()}
    single = DenoisingLoss(policy.denoiser)(often, torch.Generator().manual_seed(0)).loss
    assert torch.allclose(several, single.view(5, 3).mean(1), atol=1e-6)


def test_who_ignores_the_image_acts_as_the_policy_of_the_state():
    store = store_of()
    state_only = EpisodeStore.from_arrays(
        {k: store.read(k) for k in ("obs.joints", "action")}, [30, 60]
    )
    blind = policy_of(store, encoder={"type": "strangers_code:Blind"})
    seeing = DiffusionPolicy.from_dataset(state_only, spec=SMALL)
    assert isinstance(blind.denoiser.encoder, Blind)
    blind.denoiser.load_state_dict(seeing.denoiser.state_dict())
    states = [p.initial_state([4, 5, 6]) for p in (blind, seeing)]
    for step in range(5):
        obs = observed(seed=step)
        actions, states[0] = blind.act(obs, states[0])
        others, states[1] = seeing.act({"joints": obs["joints"]}, states[1])
        assert np.array_equal(actions, others)


# --- training -------------------------------------------------------------------------------------


def test_a_run_with_random_crops_goes_on_bit_for_bit(tmp_path):
    encoder = {**SIGHT, "crop": 0.8, "jitter": 0.1}
    whole, cut, again = (policy_of(encoder=encoder) for _ in range(3))
    steady = {"lr_schedule": "constant"}
    whole.learn(store_of(), config(**steady), tmp_path / "whole")
    cut.learn(store_of(), config(**steady, steps=3), tmp_path / "cut")
    torch.manual_seed(123)  # another process has another global state
    again.learn(store_of(), config(**steady), tmp_path / "cut", resume=True)
    first, second = weights(whole), weights(again)
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_the_encoder_learns_at_a_rate_of_its_own(tmp_path):
    found = {}
    for scale in (0.0, 0.1, 1.0):
        policy = policy_of()
        before = weights(policy)
        policy.learn(store_of(), config(encoder_lr_scale=scale, steps=1), tmp_path / str(scale))
        moved = {k: (v - before[k]).norm().item() for k, v in weights(policy).items()}
        found[scale] = [sum(v for k, v in moved.items() if ("encoder" in k) == e) for e in (0, 1)]
    assert found[0.0][1] == 0
    assert found[0.1][0] == found[1.0][0] > 0
    assert found[0.1][1] == pytest.approx(0.1 * found[1.0][1], rel=0.02)
    again = config(encoder_lr_scale=0.5, steps=1)
    with pytest.raises(ValueError, match="encoder_lr_scale"):
        policy_of().learn(store_of(), again, tmp_path / "1.0", resume=True)
    with pytest.raises(ValueError, match="no weight of an encoder"):
        policy_of(encoder={"type": "strangers_code:Blind"}).learn(
            store_of(), config(encoder_lr_scale=0.1), tmp_path / "none"
        )


def test_two_tasks_and_one_policy(tmp_path):
    """The action is that of the task's number, wherever the robot is."""
    rng = np.random.default_rng(0)
    task = np.repeat([0, 1], 40)[:, None]
    arrays = {
        "obs.joints": rng.normal(size=(80, 2)).astype(np.float32),
        "obs.task": task,
        "action": np.where(task == 1, [[0.8, -0.4]], [[-0.8, 0.4]]).astype(np.float32),
    }
    store = EpisodeStore.from_arrays(arrays, [40, 80])
    policy = DiffusionPolicy.from_dataset(store, spec={**SMALL, "prediction": "x0"})
    assert policy.spec.encoder == {"type": "state", "tasks": {"count": 2}}
    assert policy.spec.observations["task"].role == "task"
    assert policy.normalizer.modes["obs.task"] == "identity"
    few = config(steps=150, batch_size=32, ema_power=None)
    policy.learn(store, few, tmp_path / "run", val_fraction=0)
    policy = DiffusionPolicy.from_pretrained(tmp_path / "run")
    joints = rng.normal(size=(6, 2)).astype(np.float32)
    ids = np.array([0, 1, 1, 0, 1, 0])[:, None]
    action, _ = policy.predict({"joints": joints, "task": ids}, deterministic=True)
    assert np.abs(action - np.where(ids == 1, [[0.8, -0.4]], [[-0.8, 0.4]])).max() < 0.2
    anchored = policy.with_anchors(
        store, truncated=Truncated(num_steps=1, rank="prior"), count=2, top_m=1
    )  # the anchor of the task, as the learned encoding of its number tells
    action, _ = anchored.predict({"joints": joints, "task": ids}, deterministic=True)
    assert np.abs(action - np.where(ids == 1, [[0.8, -0.4]], [[-0.8, 0.4]])).max() < 0.1
    with pytest.raises(ValueError, match=r"'task' must be in 0 \.\. 1"):
        policy.predict({"joints": joints, "task": ids + 1})
    told = DiffusionPolicy.from_dataset(
        store, spec={**SMALL, "encoder": {"tasks": {"count": 9, "dim": 3}}}
    )
    assert told.denoiser.encoder.cond_dim == 2 * 2 + 3


def test_anchors_of_what_is_seen_are_offered_encoded_once_and_kept(tmp_path):
    """The most probable anchors of a picture: the side that is bright says which way to go."""
    rng = np.random.default_rng(0)
    bright = np.tile(np.repeat([0, 1], 8), 50)[:, None]
    arrays = {
        "obs.camera": rng.integers(0, 40, (800, 10, 10, 3), dtype=np.uint8)
        + 200 * ((np.arange(10) < 5) == bright)[:, None, :, None].astype(np.uint8),
        "obs.joints": rng.normal(size=(800, 2)).astype(np.float32),
        "action": np.where(bright == 1, [[0.8, -0.4]], [[-0.8, 0.4]]).astype(np.float32),
    }
    store = EpisodeStore.from_arrays(arrays, np.arange(8, 801, 8))
    truncated = Truncated(t_start=0.01, num_steps=1, rank="prior")
    policy = policy_of(store).with_anchors(store, truncated=truncated, count=2, top_m=1)
    assert policy.anchors.error < 1e-3  # of held-out pictures too
    obs = {"camera": arrays["obs.camera"][[0, 8]], "joints": arrays["obs.joints"][[0, 8]]}
    rows = counted(policy)
    action, _ = policy.predict(obs, deterministic=True)
    assert np.sign(action).tolist() == [[-1, 1], [1, -1]]
    assert rows == [2]
    policy.save(tmp_path / "policy")
    again = DiffusionPolicy.load(tmp_path / "policy")
    assert np.array_equal(again.predict(obs, deterministic=True)[0], action)
    how = {"spec": {**SMALL, "encoder": SIGHT, "truncated": {"rank": "prior"}}}
    with pytest.raises(ValueError, match=r"top_m=1 .*not trained yet.*diffpolicy anchors"):
        DiffusionPolicy.from_dataset(store, **how, anchors={"count": 2, "top_m": 1})
    with pytest.raises(ValueError, match=r"relative_to=.*one vector.*camera.*policy.actions"):
        policy.with_anchors(store, count=2, relative_to=[0, 1])


# --- code of one's own ----------------------------------------------------------------------------

BRIGHT = {"type": "strangers_code:Bright", "width": 3, "colour": "red"}


def test_an_encoder_and_a_network_of_ones_own_are_saved_by_name(tmp_path):
    policy = policy_of(encoder=BRIGHT, network={"type": "strangers_code:Plain"})
    assert policy.denoiser.encoder.more == {"colour": "red"}
    policy.learn(store_of(), config(), tmp_path / "run")
    policy.save(tmp_path / "saved")
    said = json.loads((tmp_path / "saved/config.json").read_text())
    assert said["encoder"] == BRIGHT
    assert said["network"] == {"type": "strangers_code:Plain"}
    again = DiffusionPolicy.load(tmp_path / "saved")
    assert np.array_equal(again.predict(observed())[0], policy.predict(observed())[0])


def test_a_method_of_ones_own():
    assert make_method({"type": "strangers_code:Mine", "margin": 2.0}) == Mine(margin=2.0)
    with pytest.raises(ValueError, match=r"margni.*did you mean 'strangers_code:Mine\.margin'"):
        make_method({"type": "strangers_code:Mine", "margni": 2.0})
    with pytest.raises(ValueError, match=r"unknown method.*'cloing'.*did you mean 'cloning'"):
        make_method({"type": "cloing"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.at_all:Mine", "needs the module 'nowhere.at_all'.*PYTHONPATH"),
        ("strangers_code:Brigth", "no class 'Brigth'; did you mean 'Bright'"),
        ("strangers_code:Nothing", "subclass of diffpolicy.networks.encoders.Encoder"),
        ("imagse", "did you mean 'images'"),
        ("imagse", "package:Class"),
    ],
)
def test_what_is_no_encoder_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        encoder_class(name)
    with pytest.raises(ValueError, match=message):
        policy_of(encoder={"type": name})


def test_a_network_must_be_one():
    with pytest.raises(ValueError, match=r"subclass of diffpolicy\.networks\.base\.Network"):
        make_network({"type": "strangers_code:Bright"})


def test_a_file_runs_code_only_where_it_was_imported_or_is_trusted(tmp_path, monkeypatch):
    (tmp_path / "another.py").write_text("from strangers_code import Bright")
    policy_of(encoder=BRIGHT).save(tmp_path / "saved")
    files = read_bundle(tmp_path / "saved")
    files["config.json"]["encoder"]["type"] = "another:Bright"
    write_bundle(tmp_path / "downloaded", files)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"downloaded names 'another:Bright'.*trust_env=another"):
        DiffusionPolicy.load(tmp_path / "downloaded")
    assert "another" not in sys.modules
    monkeypatch.setenv("DIFFPOLICY_TRUST_ENVS", "others, another")
    DiffusionPolicy.load(tmp_path / "downloaded")
    monkeypatch.delenv("DIFFPOLICY_TRUST_ENVS")
    DiffusionPolicy.load(tmp_path / "downloaded")  # imported already
    del sys.modules["another"]
    check_stored_code({"a": [{"type": "images"}, {"id": "x:y"}], "type": None}, "a file")
    with pytest.raises(ValueError, match=r"a file names 'another\.deep:Net'"):
        check_stored_code({"heads": [{"base": {"type": "another.deep:Net"}}]}, "a file")
