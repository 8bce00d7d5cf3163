"""Agents from files: their actions by torch's own layers, and sets that are made with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from diffpolicy_envs.agents import RECIPES, read_agent

pytest.importorskip("mujoco", reason="needs the mujoco extra")
pytestmark = pytest.mark.mujoco
AGENT = "diffpolicy_envs:diffpolicy/Agent-v0"


def dapg(path: Path, obs_dim: int, action_dim: int) -> Path:
    draws = np.random.default_rng(0)
    sizes = [obs_dim, 8, 8, action_dim]
    arrays = {f"W{i}": draws.normal(size=(sizes[i + 1], sizes[i])) for i in range(3)}
    arrays |= {f"b{i}": draws.normal(size=sizes[i + 1]) for i in range(3)}
    for name, size in (("in", obs_dim), ("out", action_dim)):
        arrays |= {
            f"{name}_shift": draws.normal(size=size),
            f"{name}_scale": draws.uniform(1, 2, size),
        }
    np.savez(path, **arrays)
    return path


def sac(path: Path, obs_dim: int, action_dim: int) -> Path:
    draws = np.random.default_rng(0)
    sizes = {"latent_pi.0": (8, obs_dim), "latent_pi.2": (8, 8), "mu": (action_dim, 8)}
    arrays = {f"{k}.weight": draws.normal(size=v) for k, v in sizes.items()}
    arrays |= {f"{k}.bias": draws.normal(size=v[0]) for k, v in sizes.items()}
    np.savez(path, **arrays)
    return path


def by_torch(path: Path, names: list[str], act: Any, x: torch.Tensor) -> torch.Tensor:
    arrays = {k: torch.tensor(v) for k, v in np.load(path).items()}
    for i, (weight, bias) in enumerate(n.split() for n in names):
        x = torch.nn.functional.linear(x, arrays[weight], arrays[bias])
        x = act(x) if i + 1 < len(names) else x
    return x


def test_dapgs_and_sacs_actions_are_torchs(tmp_path: Path) -> None:
    obs = np.random.default_rng(1).normal(size=5)
    x = torch.tensor(obs)
    file = dapg(tmp_path / "dapg.npz", 5, 3)
    known = {k: torch.tensor(v) for k, v in np.load(file).items()}
    names = [f"W{i} b{i}" for i in range(3)]
    inside = (x - known["in_shift"]) / (known["in_scale"] + 1e-8)
    expected = by_torch(file, names, torch.tanh, inside) * known["out_scale"] + known["out_shift"]
    np.testing.assert_allclose(read_agent(file)(obs), expected.numpy(), rtol=1e-6)
    file = sac(tmp_path / "sac.npz", 5, 3)
    names = [f"{n}.weight {n}.bias" for n in ("latent_pi.0", "latent_pi.2", "mu")]
    expected = torch.tanh(by_torch(file, names, torch.relu, x))
    np.testing.assert_allclose(read_agent(file)(obs), expected.numpy(), rtol=1e-6)


def test_an_episode_is_the_environments_own(tmp_path: Path) -> None:
    file = sac(tmp_path / "hopper.npz", 11, 3)
    env = gym.make(AGENT, env_id="Hopper-v5", agent=str(file), max_episode_steps=7)
    plain = gym.make("Hopper-v5")
    first, _ = env.reset(seed=3)
    assert (first == plain.reset(seed=3)[0]).all()
    ended = []
    while not ended or not any(ended[-1]):
        action = env.get_wrapper_attr("expert_action")(np.random.default_rng(0))
        assert np.abs(action).max() <= 1
        ours, theirs = env.step(action), plain.step(action)
        assert (ours[0] == theirs[0]).all()
        assert ours[1] == theirs[1]
        ended.append(ours[2:4])
    assert len(ended) <= 7
    assert "is_success" not in ours[4]
    env.close()
    plain.close()


def test_a_set_is_made_by_the_one_maker(tmp_path: Path) -> None:
    from diffpolicy.rollout.record.making import make_set

    agent = {"agent": str(sac(tmp_path / "hopper.npz", 11, 3))}
    path = tmp_path / "hopper.zarr"
    store = make_set("mujoco/hopper", path, episodes=2, workers=0, kwargs=agent, progress=False)
    assert store.num_episodes == 2
    assert store.fields["action"].shape == (3,)
    assert (tmp_path / "hopper.datasheet.md").is_file()


def test_without_an_agent_it_is_said_where_one_is_named(tmp_path: Path) -> None:
    assert {name.split("/")[0] for name in RECIPES} == {"adroit", "mujoco"}
    wrong = tmp_path / "wrong.npz"
    np.savez(wrong, a=np.zeros(2))
    for agent, message in (
        (None, r"kwargs=\{agent: FILE.npz\}.*got None"),
        (str(tmp_path / "none.npz"), "none.npz"),
        (str(wrong), r"no agent of DAPG, SAC or TQC: it has \['a'\]"),
        (str(sac(tmp_path / "two.npz", 11, 2)), r"vectors \(\(11,\), \(2,\)\), but Hopper-v5"),
    ):
        with pytest.raises(ValueError, match=message):
            gym.make(AGENT, env_id="Hopper-v5", agent=agent)
