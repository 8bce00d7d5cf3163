"""What users get wrong at the command line, and what is theirs there: one line, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from diffpolicy import RTI, DiffusionPolicy, EnvSpec, EpisodeStore, Workers, cli, evaluate
from diffpolicy.commands.options import parse
from diffpolicy.config import load_train
from diffpolicy.config_compose import compose, read_yaml
from diffpolicy.rollout.env_spec import EnvSpecError, stored_env_id
from diffpolicy.settings import ConfigError

HERE = Path(__file__).parent
EXPERIMENT = """\
# @package _global_
# The point of these tests.
defaults:
  - override /env: point
  - override /data: collect
name: mine
data: {collect: {episodes: 6, noise: 0.1}}
network: {width: 16, depth: 1}
trainer: {steps: 6, batch_size: 8, warmup_steps: 1, log_every: 3, progress: false}
evaluation: {episodes: 2, val_episodes: 2, num_workers: 0}
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A user's own configurations and environment."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "env").mkdir()
    (folder / "experiment").mkdir()
    (folder / "env/point.yaml").write_text("id: cli_fake_env:cli_fake/Point-v0\nname: point\n")
    (folder / "experiment/mine.yaml").write_text(EXPERIMENT)
    return folder


@pytest.fixture
def main(own, tmp_path, monkeypatch, capsys):
    """Runs a command in an empty directory; returns its status, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(HERE))
    before = dict(os.environ)

    def run(*arguments):
        status = cli.main(arguments)
        return (status, *capsys.readouterr())

    yield run
    assert {k: v for k, v in os.environ.items() if k.startswith("DIFF")} == {
        k: v for k, v in before.items() if k.startswith("DIFF")
    }


@pytest.fixture(scope="module")
def trained(own, tmp_path_factory):
    """A run of the user's own experiment; seed 3 was asked for."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(HERE))
        assert cli.main(["train", f"--config-dir={own}", "experiment=mine", "seed=3"]) == 0
    return folder / "runs/mine_seed3"


def test_own_configurations_are_choices_beside_ours(main, own, trained):
    assert (trained / "eval.json").is_file()
    status, out, _ = main("train", "--config-dir", str(own), "--help")
    assert status == 0
    assert "The point of these tests." in out
    status, _, err = main("train", "--config-dir", str(own / "nowhere"), "experiment=mine")
    assert status == 1
    assert "no directory of configurations" in err
    (own / "experiment/demo.yaml").write_text("name: demo\n")
    try:
        _, _, err = main("train", "--config-dir", str(own), "experiment=demo")
    finally:
        (own / "experiment/demo.yaml").unlink()
    assert "the name of a choice that is ours" in err


def test_a_stored_environment_is_run_only_when_the_user_names_it(main, trained):
    few = ["evaluation.episodes=2", "evaluation.num_workers=0"]
    status, _, err = main("eval", str(trained), *few, "output=out")
    assert status == 1
    assert "imports 'cli_fake_env'" in err
    assert "trust_env=cli_fake_env" in err
    assert not Path("out").exists()
    named = "env.id=cli_fake_env:cli_fake/Point-v0"
    for n, confirmed in enumerate(("trust_env=cli_fake_env", "--trust-env=true", named)):
        status, out, err = main("eval", str(trained), *few, f"output=out{n}", confirmed)
        assert status == 0, err
        assert json.loads(out.splitlines()[-1].removeprefix("RESULT "))["episodes"] == 2
    assert main("resume", str(trained))[0] == 1
    assert main("resume", str(trained), "trust_env=cli_fake_env")[0] == 0


def test_which_stored_environments_are_known(tmp_path, monkeypatch):
    known = ["Hopper-v5", "diffpolicy_envs:diffpolicy/PushT-v0", "gymnasium_robotics:FetchReach-v3"]
    assert [stored_env_id(i, "here") for i in known] == known
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for unknown in ("evil:Foo-v0", "this:Foo-v0", "gymnasium:evil:Foo-v0", "GymV26Environment-v0"):
        with pytest.raises(EnvSpecError, match="code that you did not choose"):
            stored_env_id(unknown, "a checkpoint")
    assert "evil" not in sys.modules
    monkeypatch.setenv("DIFFPOLICY_TRUST_ENVS", "other, evil")
    assert stored_env_id("evil:Foo-v0", "here") == "evil:Foo-v0"


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("train", ["trainer.stepss=1"], "did you mean 'trainer.steps'"),
        ("train", ["trainr.steps=1"], "did you mean 'trainer'"),
        ("train", ["steps=1"], "did you mean 'trainer.steps'"),
        ("train", ["experiment=demoo"], "did you mean 'demo'"),
        ("train", ["algorithm=bcc"], "did you mean 'bc'"),
        ("train", ["algoritm=bc"], "did you mean 'algorithm'"),
        ("train", ["network.widht=9"], "did you mean 'network.width'"),
        ("train", ["demo"], "did you mean experiment=demo"),
        ("eval", ["runs/x", "evaluation.episode=1"], "did you mean 'evaluation.episodes'"),
        ("eval", ["runs/x", "samplr.solver=ddim"], "did you mean 'sampler'"),
        ("tune", ["trainer.stepss=1"], "did you mean 'trainer.steps'"),
        ("data", ["chek", "x"], "did you mean 'check'"),
        ("data", ["prefs", "colect"], "did you mean 'collect'"),
        ("rti", ["a", "b", "num_step=1"], "did you mean 'num_steps'"),
    ],
)
def test_the_nearest_name_is_said(main, command, arguments, message):
    status, _, err = main(command, *arguments)
    assert status == 1
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_unknown_commands(main):
    status, _, err = main("evla")
    assert status == 2
    assert "did you mean 'eval'" in err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["device=gpu"], "did you mean 'cuda'"),
        (["device=cuda:99"], "device=cuda:99, but torch sees"),
        (["threads=0"], "threads must be at least 1"),
        (["env.kwargs={says: false}"], "reports no success"),
        (["env.score=sucess"], "did you mean 'success'"),
        (["env.id=cli_fake_env:cli_fake/Pont-v0"], "Point-v0"),
        (["run_dir=file/run"], "is a file"),
        (["learning.discont=1"], "did you mean 'discount'"),
    ],
)
def test_what_will_fail_is_found_before_anything_is_collected(main, own, settings, message):
    Path("file").write_text("")
    status, _, err = main("train", f"--config-dir={own}", "experiment=mine", *settings)
    assert status == 1
    assert message in err
    assert "Traceback" not in err
    assert sorted(p.name for p in Path().iterdir()) == ["file"]


def test_an_algorithm_of_rewards_on_data_without_them(main, own):
    rows = np.zeros((6, 2), np.float32)
    EpisodeStore.from_arrays({"obs": rows, "action": rows}, [3, 6], path="plain.zarr")
    data = ["data=store", "data.path=plain.zarr", "algorithm=edp"]
    status, _, err = main("train", f"--config-dir={own}", "experiment=mine", *data)
    assert status == 1
    assert "Actor-critics learn from" in err
    assert not Path("runs").exists()


def test_missing_packages_are_found_first(main, own, monkeypatch):
    import diffpolicy.commands.preflight as preflight

    monkeypatch.setattr(preflight, "installed", lambda module: False)
    for setting, package in (
        ("evaluation.video_episodes=1", "media"),
        ("trainer.tensorboard=true", "tensorboard"),
    ):
        status, _, err = main("train", f"--config-dir={own}", "experiment=mine", setting)
        assert status == 1
        assert f'pip install "diffpolicy[{package}]"' in err
        assert not list(Path().iterdir())


def test_a_mistyped_path_of_data_records_nothing(main, own):
    Path("data/points.zarr").mkdir(parents=True)
    asked = ["train", f"--config-dir={own}", "experiment=mine", "data.path=data/pionts.zarr"]
    status, _, err = main(*asked)
    assert status == 1
    assert "did you mean 'points.zarr'" in err
    assert "data.collect.episodes=6" in err
    assert not Path("data/pionts.zarr").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFPOLICY_CONFIG_DIR", str(own))
        assert load_train([*asked[2:], "data.collect.episodes=6"]).data.path == "data/pionts.zarr"


def test_the_command_line_stands_above_an_experiment():
    plain = compose("train", ["experiment=pusht_40"])
    none = compose("train", ["experiment=pusht_40", "evaluation=none"])
    assert (none["evaluation"]["episodes"], none["evaluation"]["val_episodes"]) == (0, 0)
    assert {k: v for k, v in none.items() if k != "evaluation"} == {
        k: v for k, v in plain.items() if k != "evaluation"
    }
    said = compose("train", ["experiment=pusht_40", "evaluation=none", "evaluation.episodes=7"])
    assert said["evaluation"]["episodes"] == 7
    cloned = compose("train", ["experiment=pusht_40", "algorithm=bc", "policy.horizon=4"])
    assert cloned["policy"]["n_action_steps"] == 1  # of algorithm, not of the experiment
    assert cloned["policy"]["horizon"] == 4
    assert cloned["sampler"]["solver"] == "ddpm"
    assert cloned["data"]["max_episodes"] == 40


def test_a_yaml_bomb_is_refused(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    bombs = {
        "aliases": "\n".join(lines),
        "itself": "a: &a [*a]",
        "deep": "a: " + "[" * 400,
        "list": "- 1",
        "broken": "a: [1",
    }
    for name, text in bombs.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError, match=name):
            read_yaml(path)
    path.write_text("a: &one {b: 1}\nc: *one\n")
    assert read_yaml(path) == {"a": {"b": 1}, "c": {"b": 1}}


def test_errors_of_any_kind_are_one_line(main, monkeypatch):
    from diffpolicy.commands import doctor

    for error, line in (
        (RuntimeError("first\nsecond"), "diffpolicy doctor: RuntimeError: first (--traceback"),
        (PermissionError(13, "Permission denied", "there"), "Permission denied: 'there'"),
        (ModuleNotFoundError("No module named 'sb3_contrib'"), "No module named 'sb3_contrib'"),
    ):
        monkeypatch.setattr(doctor, "run", lambda _a, error=error: (_ for _ in ()).throw(error))
        status, _, err = main("doctor")
        assert status == 1
        assert line in err
        assert len(err.strip().splitlines()) == 1
    with pytest.raises(ModuleNotFoundError):
        main("doctor", "--traceback")


def test_signals_unwind_what_runs(main, monkeypatch):
    from diffpolicy.commands import doctor

    cleaned = []
    # A process that was started in the background ignores Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def run(_arguments, number):
        try:
            signal.raise_signal(number)
        finally:
            cleaned.append(number)

    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        monkeypatch.setattr(doctor, "run", lambda a, number=number: run(a, number))
        assert main("doctor")[0] == status
        assert cleaned[-1] == number
    signal.signal(signal.SIGINT, before)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_reader_that_has_gone_is_no_error(monkeypatch, capfd):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.main(["--help"]) == 141
    assert capfd.readouterr().err == ""


def test_environments_of_this_process_are_evaluated_in_it(tmp_path, trained, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    from cli_fake_env import Point
    from gymnasium.wrappers import TimeLimit

    policy = DiffusionPolicy.from_pretrained(trained)
    if "notebook/Point-v0" not in gym.registry:
        gym.register("notebook/Point-v0", entry_point=Point, max_episode_steps=5)
    results = [
        evaluate(policy, env, [300_000, 300_001], progress=False)
        for env in (
            lambda: TimeLimit(Point(), 5),
            "notebook/Point-v0",
            EnvSpec("notebook/Point-v0"),
        )
    ]
    returns = [[e.episode_return for e in result.episodes] for result in results]
    assert returns[0] == returns[1] == returns[2]
    with pytest.raises(EnvSpecError, match=r"Workers\(num_workers=0\)"):
        evaluate(policy, "notebook/Point-v0", [300_000], workers=Workers(num_workers=1))


def test_eval_of_a_d4rl_run_says_score_and_data(main, trained, own, tmp_path):
    """The run's store says which data set it is; without the store the configuration does."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    values = read_yaml(run / "config.yaml")
    values["data"] |= {"d4rl": "hopper-medium-v2", "path": "gone.zarr"}
    (run / "config.yaml").write_text(json.dumps(values))
    few = ["evaluation.episodes=2", "evaluation.num_workers=0", "trust_env=true"]
    status, out, err = main("eval", str(run), *few)
    assert status == 0, err
    result = json.loads(out.splitlines()[-1].removeprefix("RESULT "))
    assert {"normalized_score", "normalized_score_95", "references"} <= set(result)
    assert result["dataset"] == "hopper-medium-v2"
    assert result["comparable"] is False  # another environment was rolled out
    assert (run / "eval/score.json").is_file()


def test_lists_on_the_command_line_need_no_quotes():
    defaults = {"obs": None, "kwargs": {}, "t": None}
    given = ["obs=[infos/qpos,b]", "kwargs={says: false, x: 1e-3}", 't=["a", 2]']
    assert parse(given, [], defaults) == {
        "obs": ["infos/qpos", "b"],
        "kwargs": {"says": False, "x": 1e-3},
        "t": ["a", 2],
    }


def test_policies_say_what_they_are_and_begin_with_a_path(trained):
    store = trained.parent.parent / "data/point.zarr"
    spec = {"network": {"type": "mlp", "width": 16, "depth": 1}}
    policy = DiffusionPolicy.from_dataset(store, spec=spec)
    opened = DiffusionPolicy.from_dataset(EpisodeStore.open(store), spec=spec)
    for a, b in zip(
        policy.denoiser.state_dict().values(), opened.denoiser.state_dict().values(), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert repr(policy).startswith("DiffusionPolicy(obs 2 x 2, action 2, horizon 16")
    assert "mlp, vp_cosine, eps" in repr(policy)
    assert repr(policy).endswith(" parameters, on cpu)")
    assert "ddim in 10 steps" in repr(policy)
    assert "rti t_start=0.3" in repr(policy.with_settings(rti=RTI(t_start=0.3)))
