"""Presets of the Adroit hand and the Franka kitchen: sizes, step limits, who says success."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from diffpolicy.rollout.env_spec import EnvSpec, inspect_env
from diffpolicy.rollout.pool.values import as_success

pytest.importorskip("gymnasium_robotics", reason="needs the robotics extra")
pytestmark = pytest.mark.mujoco
PRESETS = Path(__file__).parents[2] / "configs/env"


@pytest.mark.parametrize(
    ("name", "obs_dim", "action_dim", "limit"),
    [
        ("adroit_door", 39, 28, 200),
        ("adroit_hammer", 46, 26, 200),
        ("adroit_pen", 45, 24, 100),
        ("adroit_relocate", 39, 30, 200),
        ("kitchen_slider", 60, 9, 280),
        ("kitchen_burner", 60, 9, 280),
    ],
)
def test_a_preset_is_as_d4rls(name: str, obs_dim: int, action_dim: int, limit: int) -> None:
    preset = OmegaConf.load(PRESETS / f"{name}.yaml")
    assert (preset.name, preset.score) == (name, "return")
    spec = EnvSpec(preset.id, dict(preset.kwargs), preset.max_episode_steps)
    env = spec.make()
    info = inspect_env(spec, env)
    assert (info.obs_dim, info.action_dim, info.max_episode_steps) == (obs_dim, action_dim, limit)
    env.reset(seed=0)
    *_, said = env.step(np.zeros(action_dim, np.float32))
    assert as_success(said) is False
    env.close()
