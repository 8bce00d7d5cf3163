"""A policy that sees: recorded, trained by the command, evaluated by processes and by strangers."""

from __future__ import annotations

import json
import re

import gymnasium as gym
import numpy as np
import pytest

from diffpolicy import DiffusionPolicy, cli
from diffpolicy.rollout.env_spec import EnvSpec
from diffpolicy.rollout.pool.supervisor import Workers
from diffpolicy.rollout.record.experts import collect

CAMERAS = "rollout_fake_envs:rollout_fakes/Cameras-v0"
KWARGS = {"size": 16, "length": 6}
CNN = "{type: images, dim: 4, points: 2, backbone: {type: cnn, widths: [4, 4]}}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`diffpolicy train` and its evaluation, by two processes and with a film."""
    pytest.importorskip("imageio_ffmpeg")
    folder = tmp_path_factory.mktemp("seeing")
    store, run = folder / "store.zarr", folder / "run"
    workers = Workers(num_envs=2, num_workers=0)
    collect(EnvSpec(CAMERAS, KWARGS), range(4), store, workers=workers, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFPOLICY_TRUST_ENVS", "rollout_fake_envs")
        patch.setenv("MUJOCO_GL", "disable")  # nothing here is drawn with it
        code = cli.main(
            [
                *("train", f"env.id={CAMERAS}", "env.name=cameras", "env.score=return"),
                *("env.kwargs={size: 16, length: 6}", "data=store", f"data.path={store}"),
                *(f"run_dir={run}", "device=cpu", f"policy.encoder={CNN}", "policy.horizon=4"),
                *("policy.n_obs_steps=2", "policy.n_action_steps=2", "sampler.num_steps=2"),
                *("network.width=16", "network.depth=1", "trainer.steps=4"),
                *("trainer.batch_size=4", "trainer.warmup_steps=1", "trainer.progress=false"),
                *("evaluation.val_episodes=0", "evaluation.episodes=2", "evaluation.num_envs=2"),
                *("evaluation.num_workers=2", "evaluation.video_episodes=1"),
                "evaluation.video_cameras=true",
            ]
        )
    assert code == 0
    return run


@pytest.fixture(scope="module")
def policy(run):
    return DiffusionPolicy.from_pretrained(run)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("policy.encoder.croop=0.9", "did you mean 'crop'"),
        ("policy.encoder={type: state}", "the encoder 'state' takes vectors"),
        ("policy.encoder.crop=[64,64]", r"crop must be a share, or within \[16, 16\]"),
        ("policy.encoder.tasks={dim: 4}", "whose role is task"),
        ("policy.layout=trajectory", "needs one vector as observation"),
    ],
)
def test_what_does_not_see_is_told_before_anything_is_recorded(
    setting, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    of = (f"env.id={CAMERAS}", "env.name=cameras", "env.score=return", "env.kwargs={size: 16}")
    assert cli.main(["train", *of, "run_dir=run", "device=cpu", setting]) == 1
    assert re.search(said, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def vec_env():
    """Two environments with images, as Stable-Baselines3 has them."""
    vec = pytest.importorskip("stable_baselines3.common.vec_env")
    monitor = pytest.importorskip("stable_baselines3.common.monitor")
    one = lambda: monitor.Monitor(gym.make(CAMERAS, **KWARGS))  # noqa: E731
    env = vec.DummyVecEnv([one, one])
    yield env
    env.close()


def test_it_is_trained_evaluated_and_filmed(run):
    scores = json.loads((run / "eval.json").read_text())
    assert [episode["length"] for episode in scores["episodes"]] == [6, 6]
    assert not [note for note in scores["notes"] if "video" in note]
    assert (run / "rollouts.mp4").stat().st_size > 0


def test_stable_baselines3_evaluates_it(policy, vec_env):
    evaluation = pytest.importorskip("stable_baselines3.common.evaluation")
    _, lengths = evaluation.evaluate_policy(
        policy, vec_env, n_eval_episodes=3, return_episode_rewards=True
    )
    assert lengths == [6, 6, 6]
    obs = vec_env.reset()
    together, _ = policy.predict(obs, deterministic=True)
    for row in range(2):
        alone, _ = policy.predict({k: v[row] for k, v in obs.items()}, deterministic=True)
        assert np.allclose(alone, together[row], atol=1e-5)


def test_images_with_their_channels_first_are_refused_in_a_sentence(policy, vec_env):
    vec = pytest.importorskip("stable_baselines3.common.vec_env")
    moved = vec.VecTransposeImage(vec_env)
    with pytest.raises(ValueError, match=r"'front'.*channels come first.*VecTransposeImage"):
        policy.predict(moved.reset())
