"""`diffpolicy train`, `tune` and `prefer` of sequence models, on a task that is known exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from diffpolicy import cli
from diffpolicy.commands import tune_sequences
from diffpolicy.config_compose import read_yaml
from diffpolicy.sequences.model import SequenceModel
from diffpolicy.training.identity import ResumeWarning
from diffpolicy_envs.sequences.env import SequenceDesignEnv
from diffpolicy_envs.sequences.multilinear import TableTask

TASK = [
    "task=custom",
    "task.id=DiffpolicyTinyTable-v0",
    "task.name=tiny",
    "network=mlp",
    "network.width=32",
    "network.depth=1",
    "threads=1",
]
QUICK = ["trainer.progress=false", "trainer.batch_size=32", "trainer.warmup_steps=1"]


def tiny_table() -> SequenceDesignEnv:
    table = np.random.default_rng(0).random((4, 4, 4)).astype(np.float32)
    return SequenceDesignEnv(TableTask("tiny", "ACGT", table, pretrain_fraction=0.5))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "DiffpolicyTinyTable-v0" not in gym.registry:
        gym.register("DiffpolicyTinyTable-v0", entry_point=tiny_table)
    run = tmp_path_factory.mktemp("runs") / "tiny"
    steps = ["trainer.steps=60", "draws=64", f"run_dir={run}"]
    assert cli.main(["train", *TASK, *QUICK, *steps]) == 0
    return run


def result_of(text: str) -> dict[str, object]:
    line = text.strip().splitlines()[-1]
    assert line.startswith("RESULT ")
    return dict(json.loads(line.removeprefix("RESULT ")))


def tuned(pretrained: Path, run: Path, *extra: str) -> int:
    steps = ["trainer.steps=4", "trainer.eval_every=2", "eval_draws=16"]
    training = [] if "method=none" in extra else [*QUICK, *steps]
    where = [f"pretrained={pretrained}", f"run_dir={run}", "threads=1", "draws=64"]
    return cli.main(["tune", *training, *where, *extra])


def test_pretraining_leaves_a_model_and_a_report(pretrained):
    model = SequenceModel.from_pretrained(pretrained)
    assert model.spec.alphabet == "ACGT"
    assert repr(model).startswith("SequenceModel(3 of 'ACGT', mlp, masked_loglinear; ")
    report = json.loads((pretrained / "report.json").read_text())
    assert report["metrics"]["valid"] == 1.0


@pytest.mark.parametrize(
    "method", ["drakes", "drakes_soft", "policy_gradient", "wdce", "vidd", "sdpo"]
)
def test_every_method_runs_from_the_command_line(method, pretrained, tmp_path, capsys):
    buffer = ["method.buffer=64", "method.refresh=32"]
    extra = buffer if method in ("wdce", "vidd", "sdpo") else []
    extra += ["method.num_steps=6", "method.relaxation.relaxed_steps=2"] * (method == "drakes_soft")
    assert tuned(pretrained, tmp_path / "run", f"method={method}", *extra) == 0
    result = result_of(capsys.readouterr().out)
    assert np.isfinite(result["progress"])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["cost"]["updates"] == 4
    assert report["exact"]["kl"] >= 0
    before = SequenceModel.from_pretrained(pretrained).denoiser.state_dict()
    model = SequenceModel.from_pretrained(tmp_path / "run")
    after = model.denoiser.state_dict()
    assert any(not torch.equal(before[k], after[k]) for k in before)
    assert model.spec.base["scale"] == pytest.approx(10)  # 1 / kl_weight, the default
    assert model.draw(2).shape == (2, 3)  # its task is opened again


@pytest.mark.parametrize("guidance", ["reward", "best_of_n", "smc", "tds", "svdd", "rollover"])
def test_every_guidance_runs_and_raises_the_reward(guidance, pretrained, tmp_path, capsys):
    extra = ["method=none", f"guidance={guidance}", "draws=256"]
    assert tuned(pretrained, tmp_path / "run", *extra) == 0
    result = result_of(capsys.readouterr().out)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert result["reward"] > report["before"]["reward"]["median"]
    if guidance == "reward":  # its law is known
        assert 0 < result["progress"] < 1
        assert report["after"]["kl_kind"] == "exact"
    else:
        assert result["kl"] is None
    assert result["reward_calls"] > 0


def test_rollouts_can_be_reused(pretrained, tmp_path):
    assert tuned(pretrained, tmp_path, "method=policy_gradient", "method.epochs=2") == 0


def test_figures_are_exact_of_the_sampler_that_is_known_alone(pretrained, tmp_path):
    assert tuned(pretrained, tmp_path, "method=drakes", "num_steps=1") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["exact"] is None
    assert report["after"]["kl_kind"] == "path"


def test_a_black_box_refuses_what_needs_gradients(pretrained, tmp_path, monkeypatch, capsys):
    known = tune_sequences.open_configured

    def black_box(config: object) -> object:
        task = known(config)
        task.kind = "black_box"
        return task

    monkeypatch.setattr(tune_sequences, "open_configured", black_box)
    for arguments, message in (
        (["method=drakes"], "without gradient"),
        (["method=none", "guidance=smc"], "guidance.estimate=hard"),
        (["method=vidd"], "method.value=mode"),
        (["method=policy_gradient", "base=reward_guidance"], "set base=none"),
    ):
        assert tuned(pretrained, tmp_path / "run", *arguments) == 1
        assert message in capsys.readouterr().err
    hard = ["method=none", "guidance=smc", "guidance.estimate=hard"]
    assert tuned(pretrained, tmp_path / "run", *hard) == 0
    assert tuned(pretrained, tmp_path / "tuned", "method=policy_gradient") == 0
    assert SequenceModel.from_pretrained(tmp_path / "tuned").spec.base is None


def test_classes_and_classifier_free_guidance(tmp_path, pretrained, capsys):
    run = tmp_path / "classes"
    classes = ["label_quantiles=[0.75]", "cond_dropout=0.2", "trainer.steps=400", "trainer.lr=1e-2"]
    assert cli.main(["train", *TASK, *QUICK, *classes, "draws=64", f"run_dir={run}"]) == 0
    extra = ["method=none", "guidance=cfg", "guidance.scale=3", "draws=256"]
    assert tuned(run, tmp_path / "guided", *extra) == 0
    report = json.loads((tmp_path / "guided" / "report.json").read_text())
    assert report["after"]["reward"]["mean"] > report["before"]["reward"]["mean"]
    assert tuned(run, tmp_path / "tuned", "method=drakes") == 0
    buffer = ["method.buffer=64", "method.refresh=32"]
    assert tuned(run, tmp_path / "weighted", "method=wdce", *buffer) == 0


def test_interrupted_tuning_resumes_to_the_same_weights(pretrained, tmp_path, monkeypatch, capsys):
    from diffpolicy.training.trainer import Trainer

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert tuned(pretrained, whole, "method=wdce", "method.buffer=64", "method.refresh=32") == 0
    step = Trainer._train_step

    def stop_after_two(self: Trainer) -> None:
        step(self)
        self._stop.asked = self.step == 2

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_train_step", stop_after_two)
        extra = ("method=wdce", "method.buffer=64", "method.refresh=32")
        assert tuned(pretrained, cut, *extra) == 130
    assert "diffpolicy resume" in capsys.readouterr().out
    assert cli.main(["resume", str(cut)]) == 0
    a, b = (SequenceModel.from_pretrained(run).denoiser.state_dict() for run in (whole, cut))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_runs_of_sequences_go_on_for_longer(pretrained, tmp_path):
    base, run = tmp_path / "base", tmp_path / "tuned"
    shutil.copytree(pretrained, base)
    with pytest.warns(ResumeWarning, match="steps=62"):
        assert cli.main(["resume", str(base), "trainer.steps=62"]) == 0
    assert tuned(base, run, "method=drakes") == 0
    with pytest.warns(ResumeWarning, match="steps=6"):
        assert cli.main(["resume", str(run), "trainer.steps=6"]) == 0
    for folder, steps in ((base, 62), (run, 6)):
        assert read_yaml(folder / "config.yaml")["trainer"]["steps"] == steps
        assert (folder / "checkpoints" / "last").read_text() == f"{steps:07d}\n"
    assert json.loads((run / "report.json").read_text())["settings"]["trainer"]["steps"] == 6


def test_runs_compare_in_one_table(pretrained, tmp_path, capsys):
    for seed in (0, 1):
        assert tuned(pretrained, tmp_path / f"{seed}", "method=drakes", f"seed={seed}") == 0
    runs = [str(tmp_path / "0"), str(tmp_path / "1")]
    assert cli.main(["tune", "compare", *runs, f"output={tmp_path / 'both'}"]) == 0
    assert "drakes" in capsys.readouterr().out
    assert (tmp_path / "both" / "report.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method=none"], "nothing to do"),
        (["method.relaxed=3"], "unknown key 'pathwise.relaxed'"),
        (["method.type=magic"], "unknown method 'magic'"),
        (["guidance=cfg"], "cond_dropout"),
        (["kl_weight=-1"], "kl_weight"),
        (["base.type=guidance"], "base.type"),
        (["base.ordr=1"], "ordr"),
        (["guidance=smc", "guidance.particle=3"], "particle"),
        (["trainer.step=3"], "trainer.step"),
    ],
)
def test_wrong_settings_are_refused_before_anything_runs(
    arguments, message, pretrained, tmp_path, capsys
):
    assert tuned(pretrained, tmp_path / "run", *arguments) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_missing_pretrained_model_names_the_command(tmp_path, capsys):
    assert tuned(tmp_path / "tfbind8", tmp_path / "run", "experiment=tfbind8_drakes") == 1
    assert "diffpolicy train experiment=tfbind8" in capsys.readouterr().err


def test_settings_of_policies_are_refused_for_sequences(capsys):
    assert cli.main(["train", "experiment=tfbind8", "policy.horizon=4"]) == 1
    assert "policy" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["tfbind8", "dna", "rna", "gb1", "tfbind8_drakes", "dna_drakes", "gb1_drakes"]
)
def test_experiments_compose(name, capsys):
    command = "tune" if "_" in name else "train"
    extra = ["task.kwargs.file=gb1.npz"] if name == "gb1" else []
    assert cli.main([command, f"experiment={name}", *extra, "--print-config"]) == 0
    assert f"name: {name}" in capsys.readouterr().out
