"""Levels of a trained agent: resuming bit for bit, checkpoints by measured return, replay."""

import json

import numpy as np
import pytest

from diffpolicy.rollout.env_spec import EnvSpec
from generators.collecting import measure
from generators.mujoco import Checkpoint, LevelRun, generate_level
from generators.rollouts import read_rollouts
from generators.training import Agent, Training, make_model

pytest.importorskip("stable_baselines3", reason="needs the sb3 extra")
h5py = pytest.importorskip("h5py", reason="needs the hdf5 extra")

CORRIDOR = EnvSpec("generate_fake_envs:GenerateCorridor-v0")
OPTIONS = {
    "learning_starts": 25,
    "batch_size": 8,
    "buffer_size": 500,
    "learning_rate": 0.01,
    "policy_kwargs": {"net_arch": [8, 8]},
}
TRAINING = Training(CORRIDOR, seed=1, segment_steps=40, eval_episodes=2, options=OPTIONS)


def tensors(folder, index):
    from safetensors.numpy import load_file

    return load_file(folder / f"state-{index:06d}.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training") / "t"
    agent = Agent(TRAINING, folder)
    for _ in range(4):
        agent.advance(progress=False)
    return folder


def test_going_on_is_the_uninterrupted_run_bit_for_bit(trained, tmp_path):
    for _ in range(4):  # a new process each time, as far as the agent can tell
        np.random.seed(7)  # noqa: NPY002 - what ran before does not matter
        agent = Agent(TRAINING, tmp_path / "t")
        agent.advance(progress=False)
    assert [c["train_steps"] for c in agent.checkpoints] == [0, 40, 80, 120]
    assert agent.checkpoints == Agent(TRAINING, trained).checkpoints
    assert same(tensors(trained, 3), tensors(tmp_path / "t", 3))
    assert same(agent.replay(3), Agent(TRAINING, trained).replay(3))
    state = tensors(trained, 3)
    assert state["actor.optimizer.0.step"] == 95  # of Adam, from the 26th environment step on
    assert "critic.optimizer.0.exp_avg_sq" in state
    assert not (trained / "state-000002.safetensors").exists()


def test_a_segment_that_was_cut_short_is_forgotten(trained, tmp_path, monkeypatch):
    agent = Agent(TRAINING, tmp_path / "t")
    agent.advance(progress=False)
    monkeypatch.setattr(Agent, "_save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        agent.advance(progress=False)  # its replay is on disk, its state is not
    monkeypatch.undo()
    for _ in range(3):
        agent = Agent(TRAINING, tmp_path / "t")
        agent.advance(progress=False)
    assert same(tensors(trained, 3), tensors(tmp_path / "t", 3))


def test_replay_is_what_was_done_in_the_environments_units(trained):
    replay = Agent(TRAINING, trained).replay(2)
    assert len(replay["rewards"]) == 80
    actions = replay["actions"][:, 0]
    assert actions.min() >= -2
    assert 3 < actions.max() <= 4
    before, after = replay["observations"][:, 0], replay["next_observations"][:, 0]
    np.testing.assert_allclose(after, before + 0.2 * actions, atol=1e-5)
    np.testing.assert_allclose(replay["rewards"], -np.abs(after), atol=1e-5)
    assert np.array_equal(replay["terminals"], np.abs(after) > 3)
    ends = replay["terminals"] | replay["timeouts"]
    assert ends[[39, 79]].all()  # of the segments
    assert not (replay["terminals"] & replay["timeouts"]).any()
    follows = ~ends[:-1]
    np.testing.assert_allclose(after[:-1][follows], before[1:][follows])


def test_levels_say_what_was_measured(trained, tmp_path):
    checkpoints = Agent(TRAINING, trained).checkpoints
    later = max(checkpoints[1:], key=lambda c: c["return_mean"])
    target = later["return_mean"] - 1e-6
    first = next(c for c in checkpoints if c["return_mean"] > target)
    for level in ("random", "medium", "medium-replay", "expert"):
        run = LevelRun(level, TRAINING, Checkpoint(120, target), steps=70, folder=trained)
        path = generate_level(run, tmp_path / f"{level}.hdf5", progress=False)
        arrays, attrs = read_rollouts(path)
        expected = {"random": checkpoints[0], "expert": checkpoints[3]}.get(level, first)
        assert attrs["checkpoint"] == expected
        assert attrs["train_steps"] == expected["train_steps"]
        assert attrs["level"] == level
        assert attrs["steps"] == len(arrays["rewards"])
        assert attrs["env_id"] == CORRIDOR.id
        ends = np.flatnonzero(arrays["terminals"] | arrays["timeouts"])
        returns = [r.sum() for r in np.split(arrays["rewards"], ends[:-1] + 1)]
        assert attrs["return_mean"] == pytest.approx(np.mean(returns), rel=1e-5)
        assert attrs["return_std"] == pytest.approx(np.std(returns), rel=1e-4)
        assert attrs["episodes"] == len(returns)
        assert "not comparable" in attrs["note"]
        if level != "medium-replay":
            assert 70 <= len(arrays["rewards"]) < 100
    assert len(Agent(TRAINING, trained).checkpoints) == 4  # shared, not trained again


def test_collecting_goes_on_and_does_not_depend_on_where_it_stopped(trained, tmp_path, monkeypatch):
    from generators import collecting

    def make(name):
        run = LevelRun("expert", TRAINING, Checkpoint(80), steps=150, folder=trained)
        return generate_level(run, tmp_path / name, progress=False)

    whole, _ = read_rollouts(make("whole.hdf5"))
    once, calls = collecting.record, []

    def killed(*args):
        calls.append(args[2])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return once(*args)

    monkeypatch.setattr(collecting, "record", killed)
    with pytest.raises(KeyboardInterrupt):
        make("cut.hdf5")
    cut, _ = read_rollouts(make("cut.hdf5"))
    assert calls[:4] == [10_000, 10_001, 10_002, 10_002]  # demonstrations of seed 1
    assert same(whole, cut)
    assert not (tmp_path / "cut.hdf5.partial").exists()


def test_an_agents_file_instead_of_a_training(trained, tmp_path):
    run = LevelRun(
        "expert",
        TRAINING,
        Checkpoint(),
        steps=40,
        std_scale=0.0,
        agent=trained / "actor-000003.npz",
    )
    path = generate_level(run, tmp_path / "agent.hdf5", progress=False)
    arrays, attrs = read_rollouts(path)
    assert attrs["agent"] == "actor-000003.npz"
    assert attrs["std_scale"] == 0
    actor = Agent(TRAINING, trained).actor(3)
    acted = actor.act(arrays["observations"][0], np.random.default_rng(0), std_scale=0)
    np.testing.assert_array_equal(arrays["actions"][0], acted)
    with h5py.File(path) as file:
        assert json.loads(file.attrs["versions"])["gymnasium"]
        assert "training" not in file.attrs
    assert not (tmp_path / "agent.hdf5.training").exists()


def test_measured_is_what_the_checkpoint_says(trained):
    agent = Agent(TRAINING, trained)
    found = measure(CORRIDOR, agent.actor(2), 200_000, 2, std_scale=1.0)
    assert np.mean(found) == pytest.approx(agent.checkpoints[2]["return_mean"])
    assert np.std(found) == pytest.approx(agent.checkpoints[2]["return_std"])


def test_bad_input_is_explained(trained, tmp_path):
    with pytest.raises(ValueError, match="medium-expert is the medium file and the expert's"):
        LevelRun("medium-expert", TRAINING, Checkpoint())
    with pytest.raises(ValueError, match="level must be one of"):
        LevelRun("good", TRAINING, Checkpoint())
    with pytest.raises(ValueError, match="medium is named by a measured return: give target_re"):
        LevelRun("medium", TRAINING, Checkpoint())
    with pytest.raises(ValueError, match="level=random comes from a training"):
        LevelRun("random", TRAINING, Checkpoint(), agent="x.npz")
    with pytest.raises(ValueError, match="algorithm must be one of"):
        Training(CORRIDOR, algorithm="ppo")
    with pytest.raises(ValueError, match=r"options cannot hold \['seed'\]"):
        Training(CORRIDOR, options={"seed": 3})
    with pytest.raises(ValueError, match=r"options .*bach_size.* are refused"):
        make_model(Training(CORRIDOR, options={"bach_size": 3}))
    small = Training(CORRIDOR, segment_steps=50, options={"buffer_size": 20})
    with pytest.raises(ValueError, match="buffer_size 20 is below segment_steps 50"):
        make_model(small)
    run = LevelRun("medium", TRAINING, Checkpoint(120, 1e6), folder=trained)
    with pytest.raises(ValueError, match=r"no checkpoint within 120 steps.*the best measured"):
        generate_level(run, tmp_path / "x.hdf5", progress=False)
    other = Training(CORRIDOR, seed=2, segment_steps=40, eval_episodes=2, options=OPTIONS)
    with pytest.raises(ValueError, match="was begun with another seed"):
        Agent(other, trained)


def test_a_missing_package_names_the_pip_command(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sb3_contrib", None)
    with pytest.raises(ImportError, match=r'pip install "diffpolicy\[tqc\]"'):
        make_model(Training(CORRIDOR, algorithm="tqc", options=OPTIONS))
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(ImportError, match=r'pip install "diffpolicy\[sb3\]"'):
        make_model(TRAINING)
