"""Actors of Stable-Baselines3 as arrays: the same actions, and nothing unpickled."""

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from generators.agents import Actor, actor_weights, load_actor

LOW, HIGH = np.float32([-2.0, 0.0]), np.float32([2.0, 1.0])
EXPERTS = Path(__file__).parents[3] / "shared" / "data" / "expert_policies"


def weights(obs_dim=3, width=4, actions=2, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "latent_pi.0": (width, obs_dim),
        "latent_pi.2": (width, width),
        "mu": (actions, width),
        "log_std": (actions, width),
    }
    found = {}
    for name, shape in shapes.items():
        found[f"{name}.weight"] = rng.standard_normal(shape).astype(np.float32)
        found[f"{name}.bias"] = rng.standard_normal(shape[0]).astype(np.float32)
    return found


def test_one_action_by_hand():
    small = {
        "latent_pi.0.weight": np.float32([[1.0], [-1.0]]),
        "latent_pi.0.bias": np.float32([0.0, 0.5]),
        "mu.weight": np.float32([[2.0, 1.0]]),
        "mu.bias": np.float32([0.1]),
        "log_std.weight": np.float32([[0.0, 0.0]]),
        "log_std.bias": np.float32([5.0]),  # clipped to 2
    }
    actor = Actor(small, np.float32([-1.0]), np.float32([3.0]))
    x = np.array([0.25])  # h = [0.25, 0.25], mean = 0.85
    still = actor.act(x, np.random.default_rng(0), std_scale=0)
    assert still == pytest.approx(-1 + 2 * (np.tanh(0.85) + 1), abs=1e-6)
    eps = np.random.default_rng(0).standard_normal(1)[0]
    moved = actor.act(x, np.random.default_rng(0), std_scale=0.1)
    assert moved == pytest.approx(-1 + 2 * (np.tanh(0.85 + 0.1 * np.exp(2) * eps) + 1), abs=1e-5)


def test_the_same_actions_as_stable_baselines3_and_its_zip_is_read(tmp_path):
    sb3 = pytest.importorskip("stable_baselines3", reason="needs the sb3 extra")
    model = sb3.SAC(
        "MlpPolicy", "Pendulum-v1", buffer_size=10, policy_kwargs={"net_arch": [8, 5]}, device="cpu"
    )
    model.save(tmp_path / "agent.zip")
    actor = load_actor(tmp_path / "agent.zip", np.float32([-2.0]), np.float32([2.0]))
    assert actor.obs_dim == 3
    rng = np.random.default_rng(0)
    for x in rng.standard_normal((5, 3)).astype(np.float32):
        expected, _ = model.predict(x, deterministic=True)
        np.testing.assert_allclose(actor.act(x, rng, std_scale=0), expected, atol=1e-5)
    actor.save(tmp_path / "actor.npz")
    again = load_actor(tmp_path / "actor.npz", np.float32([-2.0]), np.float32([2.0]))
    assert all(np.array_equal(again.weights[k], v) for k, v in actor.weights.items())


def test_the_noise_of_an_action_is_the_policys():
    actor = Actor(weights(), LOW, HIGH)
    rng, x = np.random.default_rng(0), np.float32([0.1, -0.2, 0.3])
    draws = np.array([actor.act(x, rng) for _ in range(4000)])
    latent = np.arctanh(np.clip(2 * (draws - LOW) / (HIGH - LOW) - 1, -0.999999, 0.999999))
    h = x
    for layer in ("latent_pi.0", "latent_pi.2"):
        h = np.maximum(actor.weights[f"{layer}.weight"] @ h + actor.weights[f"{layer}.bias"], 0)
    mean = actor.weights["mu.weight"] @ h + actor.weights["mu.bias"]
    log_std = actor.weights["log_std.weight"] @ h + actor.weights["log_std.bias"]
    std = np.exp(np.clip(log_std, -20, 2))
    # Quantiles, because tanh has flat ends.
    low, middle, high = np.quantile(latent, [0.16, 0.5, 0.84], axis=0)
    np.testing.assert_allclose(middle, mean, atol=0.1 * std.max())
    np.testing.assert_allclose((high - low) / 2, std, rtol=0.12)


def test_bad_agents_are_explained(tmp_path):
    np.savez(tmp_path / "other.npz", W0=np.zeros(3))
    with pytest.raises(ValueError, match=r"other\.npz: no actor of SAC or TQC.*W0"):
        load_actor(tmp_path / "other.npz", LOW, HIGH)
    np.savez(tmp_path / "three.npz", **weights(actions=3))
    with pytest.raises(ValueError, match="the actor has 3 actions, the environment 2"):
        load_actor(tmp_path / "three.npz", LOW, HIGH)
    np.savez(tmp_path / "sde.npz", **{**weights(), "log_std": np.zeros((4, 2))})
    with pytest.raises(ValueError, match="state-dependent noise"):
        load_actor(tmp_path / "sde.npz", LOW, HIGH)
    crooked = {**weights(), "latent_pi.2.weight": np.zeros((4, 9), np.float32)}
    with pytest.raises(ValueError, match=r"latent_pi\.2\.weight has shape \(4, 9\)"):
        Actor(crooked, LOW, HIGH)
    with pytest.raises(FileNotFoundError, match="no agent at"):
        load_actor(tmp_path / "absent.zip", LOW, HIGH)
    (tmp_path / "agent.pt").touch()
    with pytest.raises(ValueError, match=r"expected an \.npz of an actor's arrays or an SB3 \.zip"):
        load_actor(tmp_path / "agent.pt", LOW, HIGH)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("unpickled"),))


def test_objects_in_a_zip_are_not_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("evil.zip", "w") as archive:
        archive.writestr("policy.pth", pickle.dumps(Evil(), protocol=2))
    with pytest.raises(ValueError, match=r"policy\.pth of evil\.zip holds more than tensors"):
        load_actor("evil.zip", LOW, HIGH)
    with zipfile.ZipFile("empty.zip", "w"):
        pass
    with pytest.raises(ValueError, match=r"empty\.zip is no agent.*policy\.pth"):
        load_actor("empty.zip", LOW, HIGH)
    assert not Path("unpickled").exists()


def test_prefixes_are_taken_off():
    found = actor_weights({"actor.mu.bias": np.zeros(2), "critic.qf0.0.bias": np.zeros(3)})
    assert list(found) == ["mu.bias"]


@pytest.mark.mujoco
def test_the_shared_cheetah_runs():
    pytest.importorskip("mujoco", exc_type=ImportError)
    if not EXPERTS.is_dir():
        pytest.skip(f"needs {EXPERTS.name} in the shared data")
    from diffpolicy.rollout.env_spec import EnvSpec
    from generators.collecting import measure

    bound = np.ones(6, np.float32)
    actor = load_actor(EXPERTS / "tqc_HalfCheetah.npz", -bound, bound)
    spec = EnvSpec("HalfCheetah-v5", max_episode_steps=200)
    (value,) = measure(spec, actor, 200_000, 1, std_scale=0)
    assert value > 1500  # about 12,000 in 1,000 steps
