"""Real-time settings from the command line: choosing levels, anchors, latency, runtimes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from diffpolicy import RTI, DiffusionPolicy, Gripper, Truncated, cli
from diffpolicy.data.store import EpisodeStore
from diffpolicy.runtime.export import export_policy

ENV = "diffpolicy_envs:diffpolicy/PointMazeUMaze-v0"


def run(*arguments: str) -> int:
    return cli.main(arguments)


def result_of(output: str) -> dict:
    return json.loads(output.strip().splitlines()[-1].removeprefix("RESULT "))


def small_policy(store: EpisodeStore, **spec) -> DiffusionPolicy:
    values = {
        "horizon": 8,
        "n_action_steps": 2,
        "network": {"type": "mlp", "width": 16, "depth": 1},
        "process": {"type": "ddpm_cosine"},
        "env_id": ENV,
    }
    return DiffusionPolicy.from_dataset(store, spec={**values, **spec})


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run directory of an untrained policy, with its demonstrations."""
    folder = tmp_path_factory.mktemp("realtime")
    rng = np.random.default_rng(0)
    obs = np.cumsum(rng.normal(size=(240, 6)), 0).astype(np.float32)
    arrays = {"obs": obs, "action": rng.uniform(-1, 1, (240, 2)).astype(np.float32)}
    ends = np.arange(1, 9) * 30
    store = EpisodeStore.from_arrays(arrays, ends, path=folder / "demos.zarr")
    small_policy(store).save(folder / "run" / "policy")
    config = {"env": {"id": ENV, "name": "maze"}, "data": {"path": str(folder / "demos.zarr")}}
    (folder / "run" / "config.yaml").write_text(json.dumps(config))
    return folder


def test_rti_chooses_a_level_and_writes_a_policy(trained, tmp_path, capsys):
    output = tmp_path / "rti"
    command = [
        "rti",
        str(trained / "run"),
        str(output),
        "episodes=4",
        "num_steps=2",
        "innovation=3",
    ]
    assert run(*command) == 0
    printed = capsys.readouterr().out
    assert "contraction" in printed
    policy = DiffusionPolicy.from_pretrained(output)
    assert policy.spec.rti is not None
    assert policy.spec.rti.t_start == result_of(printed)["t_start"]
    assert (policy.spec.rti.num_steps, policy.spec.rti.innovation) == (2, 3)
    assert policy.n_action_steps == 1
    levels = json.loads((output / "levels.json").read_text())["levels"]
    assert [level["t"] for level in levels] == sorted(level["t"] for level in levels)
    assert run(*command) == 1
    assert "exists" in capsys.readouterr().err


def test_anchors_write_a_truncated_policy(trained, tmp_path, capsys):
    output = tmp_path / "truncated"
    command = ["anchors", str(trained / "run"), str(output), "count=6", "top_m=3", "num_steps=1"]
    assert run(*command) == 0
    found = result_of(capsys.readouterr().out)
    assert found["anchors"] == 6
    assert found["nfe"] == 2
    policy = DiffusionPolicy.from_pretrained(output)
    actions, scores = policy.plans(np.zeros((5, 2, 6), np.float32))
    assert actions.shape == (5, 3, 8, 2)
    assert scores.shape == (5, 3)


def test_anchors_choose_their_level_on_request(trained, tmp_path, capsys):
    output = tmp_path / "truncated"
    command = ["anchors", str(trained / "run"), str(output), "count=4", "rank=prior"]
    assert run(*command, "t_start=chosen", "episodes=3") == 0
    printed = capsys.readouterr().out
    assert "regret" in printed
    policy = DiffusionPolicy.from_pretrained(output)
    assert policy.spec.truncated is not None
    assert policy.spec.truncated.t_start == result_of(printed)["t_start"]


def test_autotune_writes_a_policy_that_is_served_as_any_other(trained, tmp_path, capsys):
    """Its sampler is stored, exported, and kept by warm starts; another solver replaces it."""
    run_folder = shutil.copytree(trained / "run", tmp_path / "run")
    small = ["episodes=4", "pairs=8", "teacher_steps=20", "start_noise=4"]
    assert run("autotune", str(run_folder), "nfe=2", *small) == 0
    printed = capsys.readouterr().out
    assert "deterministic" in printed
    output = tmp_path / "run_nfe2"
    report = json.loads((output / "autotune.json").read_text())
    assert result_of(printed)["ratio"] == pytest.approx(report["ratio"], abs=1e-3)
    policy = DiffusionPolicy.from_pretrained(output)
    assert policy.nfe == 2
    assert policy.spec.sampler.start_seed == report["start_noise"]["seed"]
    assert run("autotune", str(run_folder), "nfe=2", *small) == 1
    assert "exists" in capsys.readouterr().err
    warm = policy.with_settings(rti=RTI(t_start=0.3, num_steps=1))
    contract = export_policy(warm, tmp_path / "exported").contract
    assert contract["loops"]["cold"]["draws"] == 0  # the start noise is in the file
    other = DiffusionPolicy.from_pretrained(output, sampler={"solver": "unipc", "num_steps": 3})
    assert other.spec.sampler.levels is other.spec.sampler.teleport is None
    assert other.nfe == 3


def test_data_must_be_known(trained, tmp_path, capsys):
    policy = DiffusionPolicy.from_pretrained(trained / "run")
    policy.save(tmp_path / "alone")
    for command in ("rti", "anchors", "autotune"):
        assert run(command, str(tmp_path / "alone"), str(tmp_path / "out")) == 1
        assert "give data=STORE" in capsys.readouterr().err


@pytest.mark.mujoco
@pytest.mark.parametrize(
    ("extra", "nfe"),
    [
        (["rti.t_start=0.3", "rti.num_steps=2", "n_action_steps=1"], None),
        (["latency_ms=120", "replan=always", "hold_ticks=3", "safe_action=[0,0]"], 10),
        (["latency_ms_per_nfe=15", "arrival=start"], 10),
        (["chunking.schedule=exp", "latency_ms=100"], 10),
        (["ensemble=0.01"], 10),
    ],
    ids=["rti", "latency", "per_nfe", "chunking", "ensemble"],
)
def test_eval_replays_policies_in_real_time(trained, tmp_path, capsys, extra, nfe):
    pytest.importorskip("gymnasium_robotics", reason="needs the robotics extra")
    common = ["evaluation.episodes=2", "evaluation.num_workers=0", "env.max_episode_steps=12"]
    where = [f"checkpoint={trained}/run", f"output={tmp_path}"]
    assert run("eval", *where, *common, *extra) == 0
    found = result_of(capsys.readouterr().out)
    assert found["episodes"] == 2
    if nfe is None:
        assert 2 < found["nfe"] < 10  # one cold plan of 10, the others of 2
    else:
        assert found["nfe"] == nfe
    settings = json.loads((tmp_path / "eval.json").read_text())["settings"]
    assert ("latency" in settings) == any(e.startswith("latency") for e in extra)


@pytest.mark.mujoco
def test_eval_on_another_runtime(trained, tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="needs the onnx extra")
    pytest.importorskip("gymnasium_robotics", reason="needs the robotics extra")
    common = ["evaluation.episodes=2", "evaluation.num_workers=0", "env.max_episode_steps=6"]
    scores = []
    for backend in ("eager", "onnxruntime"):
        where = [f"checkpoint={trained}/run", f"output={tmp_path}/{backend}"]
        assert run("eval", *where, *common, f"backend={backend}") == 0
        scores.append(result_of(capsys.readouterr().out)["return"])
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


def test_unusable_combinations_are_explained(trained, capsys):
    where = f"checkpoint={trained}/run"
    cases = {
        ("streaming.steps_per_chunk=2",): "level_law",
        ("streaming.steps_per_chunk=2", "chunking.mode=soft"): "exclude each other",
        ("latency_ms=10", "arrival=late"): "arrival",
        ("chunking.mode=soft", "backend=onnxruntime"): "backend=eager",
        ("rti.num_steps=2",): "t_start",
        ("truncated.num_steps=2",): "start from anchors",
    }
    for extra, message in cases.items():
        assert run("eval", where, *extra) == 1
        assert message in capsys.readouterr().err


def test_settings_survive_saving(trained, tmp_path):
    store = EpisodeStore.open(trained / "demos.zarr")
    policy = small_policy(store, grippers=[{"dim": 1, "mode": "scale", "factor": 4.0}])
    policy = policy.with_settings(rti=RTI((0.2), tail="extrapolate"))
    policy.save(tmp_path / "a")
    again = DiffusionPolicy.load(tmp_path / "a")
    assert again.spec == policy.spec
    assert again.spec.grippers == (Gripper(1, "scale", 4.0),)
    obs = np.zeros((2, 6), np.float32)
    mine, state = policy.predict(obs)
    theirs, other = again.predict(obs)
    np.testing.assert_array_equal(mine, theirs)
    mine, _ = policy.predict(obs, state)
    theirs, _ = again.predict(obs, other)
    np.testing.assert_array_equal(mine, theirs)
    truncated = policy.with_anchors(store, truncated=Truncated(rank="prior"), count=4)
    truncated.save(tmp_path / "b")
    loaded = DiffusionPolicy.load(tmp_path / "b")
    np.testing.assert_array_equal(loaded.predict(obs)[0], truncated.predict(obs)[0])


def test_weights_cannot_be_changed_by_settings(trained):
    policy = DiffusionPolicy.from_pretrained(trained / "run")
    for changes in (
        {"horizon": 4},
        {"level_law": "position"},
        {"grippers": (Gripper(0, "scale"),)},
    ):
        with pytest.raises(ValueError, match="belongs to the weights"):
            policy.with_settings(**changes)
    assert policy.with_settings(grippers=(Gripper(0, "clip"),)).spec.grippers


def test_switches_are_true_or_false(trained, tmp_path, capsys):
    command = ["export", str(trained / "run"), str(tmp_path / "out")]
    assert run(*command, "overwrite=no") == 1
    assert "overwrite must be true or false" in capsys.readouterr().err


def test_anchored_and_streaming_policies_learn_and_act(trained, tmp_path):
    from diffpolicy import TrainerConfig

    store = EpisodeStore.open(trained / "demos.zarr")
    quick = TrainerConfig(steps=3, batch_size=16, warmup_steps=1, progress=False)
    anchored = DiffusionPolicy.from_dataset(
        store,
        spec={
            "horizon": 8,
            "network": {"type": "anchored", "base": {"type": "mlp", "width": 16, "depth": 1}},
            "prediction": "x0",
            "truncated": {"rank": "confidence"},
            "n_action_steps": 2,
        },
        anchors={"count": 5},
    )
    anchored.learn(store, quick, tmp_path / "anchored")
    actions, scores = anchored.plans(np.zeros((1, 2, 6), np.float32))
    assert actions.shape[:2] == scores.shape == (1, 5)
    with pytest.raises(ValueError, match="belongs to the weights"):
        anchored.choose_truncated(store, episodes=2)  # trained up to its own level only
    rolling = small_policy(
        store,
        network={"type": "mlp", "width": 16, "depth": 1, "t_kind": "position"},
        level_law="position",
    )
    rolling.learn(store, quick, tmp_path / "rolling")
    planner = DiffusionPolicy.from_pretrained(tmp_path / "rolling").streaming()
    state = planner.initial_state([0])
    for _ in range(5):
        action, state = planner.act(np.zeros((1, 6), np.float32), state)
    assert np.isfinite(action).all()
    other = DiffusionPolicy.from_pretrained(tmp_path / "rolling", n_action_steps=3)
    with pytest.raises(ValueError, match="trained to stream chunks of 2"):
        other.streaming()
