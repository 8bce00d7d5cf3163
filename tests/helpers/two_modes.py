"""Actions near -0.6 or 0.6, whatever is observed: what one step of a plain policy averages."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from diffpolicy.data.store import EpisodeStore

TWO_MODES_SPEC = {
    "horizon": 2,
    "n_obs_steps": 1,
    "n_action_steps": 1,
    "network": {"type": "mlp", "width": 64, "depth": 1},
}


def two_modes_store(folder):
    """Two hundred episodes of ten steps."""
    rng = np.random.default_rng(0)
    obs = rng.uniform(-1, 1, (2000, 1)).astype(np.float32)
    side = np.repeat(rng.choice([-0.6, 0.6], 200), 10)[:, None]
    action = (side + 0.05 * rng.standard_normal((2000, 1))).astype(np.float32)
    ends = np.arange(10, 2001, 10)
    return EpisodeStore.from_arrays({"obs": obs, "action": action}, ends, path=folder / "s.zarr")


def near_a_mode(policy, store, steps):
    """The share of actions within 0.2 of a mode, drawn in so many steps."""
    policy = policy.with_settings(sampler=replace(policy.spec.sampler, num_steps=steps))
    actions = policy.predict(store.read("obs", 0, 400))[0]
    return (np.abs(np.abs(actions) - 0.6) < 0.2).mean()
