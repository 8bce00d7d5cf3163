"""Environments whose actions choose, from the expert to the score."""

from __future__ import annotations

import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from diffpolicy import ActionGroup, DiffusionPolicy, EnvSpec, Workers, cli, collect
from diffpolicy.data import EpisodeStore
from diffpolicy.rollout.env_spec import describe
from diffpolicy.training.identity import ResumeWarning

HERE = Path(__file__).parent
KEYS = "cli_fake_env:cli_fake/Keys-v0"


def test_a_dial_is_a_choice(tmp_path):
    spec = EnvSpec("rollout_fake_envs:rollout_fakes/Dials-v0")
    info = describe(spec)
    groups = [{"dims": [0], "choices": 3, "first": 0}, {"dims": [1], "choices": 4, "first": -1}]
    assert info.action_groups == groups
    how = {"keep": "all", "workers": Workers(num_envs=2, num_workers=1), "progress": False}
    store = collect(spec, range(3), tmp_path / "s", **how)
    assert store.read("action").tolist() == [[0.0, 2.0]] * store.num_steps
    policy = DiffusionPolicy.from_dataset(store, spec={"network": {"type": "mlp", "width": 8}})
    assert policy.plan_dim == 7
    action, _ = policy.predict(np.zeros(3, np.float32))
    assert action.dtype == np.int64
    assert gym.make(spec.id).action_space.contains(action)
    noisy = collect(spec, range(3), tmp_path / "n", noise=0.5, **how)
    assert noisy.read("action").tolist() == [[0.0, 2.0]] * noisy.num_steps  # the clean ones
    assert not np.array_equal(noisy.read("obs")[:12], store.read("obs")[:12])


def test_trained_and_evaluated_by_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(HERE))
    arguments = [
        *("env=point", "env.name=keys", "run_dir=run", "data.collect.episodes=30"),
        *("network.width=32", "network.depth=1", "trainer.steps=300", "trainer.batch_size=64"),
        *("trainer.lr=0.003", "trainer.warmup_steps=5", "trainer.progress=false"),
        *("policy.horizon=2", "policy.n_obs_steps=1", "policy.n_action_steps=1"),
        *("policy.prediction=x0", "sampler.num_steps=3"),
        *("evaluation.episodes=8", "evaluation.val_episodes=0", "evaluation.num_workers=0"),
    ]
    (tmp_path / "own/env").mkdir(parents=True)
    (tmp_path / "own/env/point.yaml").write_text(f"id: {KEYS}\nname: keys\n")
    assert cli.main(["train", "--config-dir=own", *arguments]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("RESULT "))
    assert result["success"] >= 0.75
    policy = DiffusionPolicy.from_pretrained("run")
    assert policy.spec.actions[0].choices == 3
    assert (policy.action_dim, policy.plan_dim) == (1, 3)
    env = gym.make(KEYS)
    obs, _ = env.reset(seed=0)
    action, _ = policy.predict(obs)
    assert env.action_space.contains(action)
    actions, _ = policy.predict(np.stack([obs, obs]))
    assert actions.shape == (2,)
    config = Path("run/config.yaml")  # older ones say that there are no groups, and mean null
    config.write_text(config.read_text().replace("  actions: null", "  actions: []"))
    assert "  actions: []" in config.read_text()
    with pytest.warns(ResumeWarning, match="steps=302"):
        assert cli.main(["resume", "run", "trainer.steps=302", "trust_env=true"]) == 0
    assert DiffusionPolicy.from_pretrained("run").spec.actions == policy.spec.actions
    code = cli.main(["train", "--config-dir=own", *arguments, "run_dir=other",
                     "policy.actions=[{dims: [0], choises: 3}]"])  # fmt: skip
    assert code == 1
    assert "did you mean 'policy.actions[0].choices'" in capsys.readouterr().err


def test_other_action_spaces_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a Discrete or a one-dimensional MultiDiscrete is needed"):
        describe(EnvSpec("rollout_fake_envs:rollout_fakes/Words-v0"))


def test_whole_numbers_that_do_not_choose(tmp_path):
    spec = EnvSpec("rollout_fake_envs:rollout_fakes/Odd-v0")
    groups = [{"dims": [0, 1], "whole": "int64"}]
    assert describe(spec).action_groups == groups
    rng = np.random.default_rng(0)
    rows = {"obs": rng.normal(size=(40, 1)), "action": rng.integers(0, 4, (40, 2))}
    rows = {name: array.astype(np.float32) for name, array in rows.items()}
    store = EpisodeStore.from_arrays(rows, [20, 40], attrs={"action_groups": groups})
    small = {"network": {"type": "mlp", "width": 8}}
    policy = DiffusionPolicy.from_dataset(store, spec=small)
    assert (
        policy.spec.representation is None
    )  # plans, and what is learned of them, are as they were
    action, _ = policy.predict(np.zeros(1, np.float32))
    assert gym.make(spec.id).action_space.contains(action)
    plan = torch.randn(3, 2)
    for given in (plan, plan.numpy()):
        made = policy.boundary.actions(given)
        exact = policy.normalizer.unnormalize("action", given)
        np.testing.assert_array_equal(made, exact.round())
    # One of two: the other stays as it is, and so is the type.
    part = DiffusionPolicy.from_dataset(
        store, spec={**small, "actions": [{"dims": [1], "whole": "int8"}]}
    )
    for given in (plan, plan.numpy()):
        made, exact = part.boundary.actions(given), part.normalizer.unnormalize("action", given)
        np.testing.assert_array_equal(made[:, 0], exact[:, 0])
        np.testing.assert_array_equal(made[:, 1], exact[:, 1].round())
    assert part.predict(np.zeros(1, np.float32))[0].dtype == np.float32
    # Said to be none, they are none, whatever the data say.
    free = DiffusionPolicy.from_dataset(store, spec={**small, "actions": []})
    assert free.spec.actions == ()
    assert free.predict(np.zeros(1, np.float32))[0].dtype == np.float32
    with pytest.raises(ValueError, match="did you mean 'int32'"):
        ActionGroup(dims=(0,), whole="int23")
    with pytest.raises(ValueError, match="choices are whole as it is"):
        ActionGroup(dims=(0,), choices=3, whole="int64")
