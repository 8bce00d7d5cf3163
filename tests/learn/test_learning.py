"""Learning in under a minute, through the facade: a bimodal policy, and what saving must keep."""

from __future__ import annotations

import numpy as np
import pytest

from diffpolicy import DiffusionPolicy, EpisodeStore, TrainerConfig


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Demonstrators turn left or right by ``0.5 + 0.4 obs``, half of them each way."""
    rng = np.random.default_rng(0)
    episodes, length = 200, 10
    level = np.repeat(rng.uniform(-1, 1, episodes), length)[:, None].astype(np.float32)
    side = np.repeat(rng.choice([-1.0, 1.0], episodes), length)[:, None].astype(np.float32)
    action = side * (0.5 + 0.4 * level)
    store = EpisodeStore.from_arrays(
        {"obs": level, "action": action}, np.arange(1, episodes + 1) * length
    )
    network = {"type": "mlp", "width": 64, "depth": 2}
    spec = {
        "horizon": 4,
        "n_obs_steps": 1,
        "n_action_steps": 2,
        "network": network,
        "prediction": "v",
    }
    policy = DiffusionPolicy.from_dataset(store, spec=spec)
    folder = tmp_path_factory.mktemp("learning")
    config = TrainerConfig(steps=700, batch_size=128, lr=4e-3, warmup_steps=50, progress=False)
    return policy.learn(store, config, folder / "run"), folder


def test_both_modes_are_learnt_and_never_averaged(learned):
    policy, _ = learned
    obs = np.repeat(np.array([[-0.5], [0.0], [0.8]], np.float32), 100, axis=0)
    actions, state = policy.act(obs, policy.initial_state(range(300)))
    size = 0.5 + 0.4 * obs
    error = np.abs(np.abs(actions) - size)
    assert np.quantile(error, 0.9) < 0.08
    for group in np.split(np.sign(actions[:, 0]), 3):
        assert 0.3 < (group > 0).mean() < 0.7
    second, _ = policy.act(obs, state)
    assert (np.sign(second) == np.sign(actions)).mean() > 0.97  # a plan commits to its mode


def test_saved_loaded_and_checkpointed_policies_are_the_same(learned):
    policy, folder = learned
    obs = np.linspace(-1, 1, 7, dtype=np.float32)[:, None]
    actions, _ = policy.predict(obs)
    policy.save(folder / "saved")
    for path in ("saved", "run"):
        again = DiffusionPolicy.from_pretrained(folder / path)
        assert np.array_equal(again.predict(obs)[0], actions), path
    few = DiffusionPolicy.from_pretrained(
        folder / "saved", sampler={"solver": "unipc", "num_steps": 3}
    )
    assert few.nfe == 3
    assert few.spec.n_action_steps == 2


def test_bad_input_to_the_facade(learned, tmp_path):
    _, folder = learned
    with pytest.raises(ValueError, match="no policy in"):
        DiffusionPolicy.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="unknown solver 'ddmi'"):
        DiffusionPolicy.from_pretrained(folder / "run", sampler={"solver": "ddmi"})
    rows = {"state": np.zeros((4, 2), np.float32), "action": np.zeros((4, 1), np.float32)}
    with pytest.raises(ValueError, match="has no field 'obs'"):
        DiffusionPolicy.from_dataset(EpisodeStore.from_arrays(rows, [4]))
    store = EpisodeStore.create(tmp_path / "s.zarr", {"obs": (2,), "action": (1,)})
    store.append({"obs": np.zeros((4, 2)), "action": np.zeros((4, 1))})
    with pytest.raises(ValueError, match="statistics"):
        DiffusionPolicy.from_dataset(store)
    store.close()
