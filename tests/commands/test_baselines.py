"""``algorithm=bc_mlp``, ``bc_gmm``, ``act``: an experiment with another learner, nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from diffpolicy import DiffusionPolicy, PolicySpec
from diffpolicy.cli import main
from diffpolicy.config_compose import compose, experiment_values
from diffpolicy.policies.direct import direct_class

SMALL = {
    "bc_mlp": ["network.width=32"],
    "bc_gmm": ["network.width=32", "network.components=2"],
    "act": ["network.width=16", "network.depth=1", "network.heads=2", "network.latent=2"],
}
HERE = Path(__file__).parents[1] / "helpers"


@pytest.mark.parametrize("name", SMALL)
def test_trained_evaluated_and_loaded_again(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(HERE))
    arguments = [
        *("env.id=cli_fake_env:cli_fake/Point-v0", "env.name=point", "run_dir=run"),
        *("policy.horizon=4", "policy.n_obs_steps=1", "policy.n_action_steps=2"),
        *(
            "data.collect.episodes=10",
            "trainer.steps=60",
            "trainer.lr=1e-2",
            "trainer.batch_size=64",
        ),
        *("evaluation.val_episodes=0", "evaluation.episodes=5", "evaluation.num_workers=1"),
        *("trainer.progress=false", "device=cpu", "threads=1", f"algorithm={name}", *SMALL[name]),
    ]
    assert main(["train", *arguments]) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1].removeprefix("RESULT "))
    assert (result["nfe"], result["errors"]) == (1, 0)
    policy = DiffusionPolicy.from_pretrained("run")
    assert policy.spec.network["type"] == name
    obs = np.array([[0.9, -0.9]], np.float32)
    action, _ = policy.predict(obs, deterministic=True)
    assert action[0, 0] < 0 < action[0, 1]  # towards the origin, as the expert goes
    policy.save("again")
    same, _ = DiffusionPolicy.load("again").predict(obs, deterministic=True)
    assert np.array_equal(action, same)
    how = [
        "env.id=cli_fake_env:cli_fake/Point-v0",
        "evaluation.episodes=3",
        "evaluation.num_workers=1",
        "device=cpu",
        "threads=1",
    ]
    assert main(["eval", "checkpoint=run", "ensemble=0.01", *how]) == 0
    assert main(["eval", "checkpoint=run", "sampler.num_steps=4", *how]) != 0
    assert "answers in one call" in capsys.readouterr().err


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("experiment", ["fetch_push", "pusht_image", "pusht_state"])
def test_an_experiment_keeps_all_but_the_learner(experiment, name):
    plain = compose("train", [f"experiment={experiment}"])
    other = compose("train", [f"experiment={experiment}", f"algorithm={name}"])
    for section in ("env", "data", "trainer", "evaluation"):
        assert other[section] == plain[section]
    for entry in ("horizon", "n_obs_steps", "n_action_steps", "encoder", "clip"):
        assert other["policy"][entry] == plain["policy"][entry]
    assert other["network"]["type"] == name
    assert other["run_dir"] == f"runs/{experiment_values(experiment)['name']}_{name}"
    own = {k: v for k, v in other["policy"].items() if k not in ("anchors", "type", "encoder")}
    drawn = {part: other[part] for part in ("network", "process", "sampler")}
    assert direct_class(PolicySpec.from_config({"obs_dim": 3, "action_dim": 2, **own, **drawn}))
