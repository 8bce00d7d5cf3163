"""The trainer: learning, resuming, metrics, errors."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from training_runs import begun, train

from diffpolicy.files import ForeignFilesError
from diffpolicy.learn.cloning.denoising import LossOutput
from diffpolicy.training.checkpoint import CheckpointError, read_bundle
from diffpolicy.training.diagnose import NonFiniteError
from diffpolicy.training.settings import TrainerConfig
from diffpolicy.training.trainer import Trainer
from diffpolicy.training.weights import EMA

CONFIG = TrainerConfig(
    steps=40,
    batch_size=32,
    lr=1e-2,
    warmup_steps=5,
    log_every=7,
    eval_every=20,
    checkpoint_every=9,
    progress=False,
)
TIMES = {"samples_per_s"}


def rows(path):
    with (Path(path) / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def training_files(run):
    name = (Path(run) / "checkpoints" / "last").read_text().strip()
    files = read_bundle(Path(run) / "checkpoints" / name, "training/")
    files["state.json"].pop("train_s")
    return files


def assert_same_run(left, right):
    a, b = training_files(left), training_files(right)
    assert a.keys() == b.keys()
    for name in a:
        if name.endswith(".json"):
            assert a[name] == b[name], name
            continue
        assert a[name].keys() == b[name].keys(), name
        for key in a[name]:
            assert torch.equal(a[name][key], b[name][key]), (name, key)
    assert rows(left) == rows(right)


def test_learns_and_writes_metrics_without_gaps(make_objective, table, tmp_path):
    config = TrainerConfig(
        steps=400, batch_size=64, lr=1e-2, warmup_steps=10, log_every=50, progress=False
    )
    result = Trainer(make_objective(dropout=0.0), table, config, tmp_path, val_source=table).fit()
    found = rows(tmp_path)
    assert result.step == 400
    assert [int(r["step"]) for r in found] == list(range(50, 401, 50))
    assert float(found[-1]["val_loss"]) < 0.25 < float(found[0]["loss"])
    assert (tmp_path / "checkpoints" / "last").read_text().strip() == "0000400"


def test_same_seed_same_run_other_seed_other_run(make_objective, table, tmp_path):
    for name in ("a", "b"):
        Trainer(make_objective(), table, CONFIG, tmp_path / name).fit()
    assert_same_run(tmp_path / "a", tmp_path / "b")
    other = TrainerConfig(**{**vars(CONFIG), "seed": 1})
    Trainer(make_objective(), table, other, tmp_path / "c").fit()
    assert rows(tmp_path / "c") != rows(tmp_path / "a")


def test_every_row_is_seen_once_an_epoch(make_objective, table, tmp_path):
    config = TrainerConfig(steps=12, batch_size=50, progress=False)
    trainer = Trainer(make_objective(), table, config, tmp_path)
    epochs = [torch.cat([trainer._indices(4 * e + i) for i in range(4)]) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(200))
    assert not torch.equal(epochs[0], epochs[1])


@pytest.mark.parametrize("stop_at", [1, 13, 20, 27])
def test_interrupt_and_resume_is_bit_identical(make_objective, table, tmp_path, stop_at):
    Trainer(make_objective(), table, CONFIG, tmp_path / "whole").fit()
    first = Trainer(make_objective(), table, CONFIG, tmp_path / "cut")
    original = first._train_step

    def step():
        original()
        if first.step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    first._train_step = step
    assert first.fit().interrupted
    torch.manual_seed(99)  # a resumed process does not have the old global state
    result = Trainer(make_objective(seed=5), table, CONFIG, tmp_path / "cut", resume=True).fit()
    assert not result.interrupted
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_sigkill_at_random_moments_then_resume_is_bit_identical(tmp_path):
    whole = begun(train, tmp_path / "whole")
    delays = torch.Generator().manual_seed(1)
    codes = []
    for _ in range(4):
        process = begun(train, tmp_path / "cut")
        last = tmp_path / "cut" / "checkpoints" / "last"
        before = last.read_text() if last.exists() else None
        while process.is_alive() and (not last.exists() or last.read_text() == before):
            time.sleep(0.002)  # the run is past its next checkpoint: progress is certain
        time.sleep(0.06 * float(torch.rand((), generator=delays)))
        process.kill()
        process.join()
        codes.append(process.exitcode)
    assert codes[:2] == [-signal.SIGKILL] * 2
    last_one = begun(train, tmp_path / "cut")
    for process in (whole, last_one):
        process.join()
        assert process.exitcode == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_resume_refuses_other_settings(make_objective, table, tmp_path):
    Trainer(make_objective(), table, CONFIG, tmp_path).fit()
    other = TrainerConfig(**{**vars(CONFIG), "weight_decay": 0.1, "checkpoint_every": 5})
    with pytest.raises(ValueError, match=r"another run: weight_decay was 1e-06, is 0.1\. Give"):
        Trainer(make_objective(), table, other, tmp_path, resume=True)


def test_a_used_run_directory_is_refused_or_overwritten(make_objective, table, tmp_path):
    Trainer(make_objective(), table, CONFIG, tmp_path).fit()
    with pytest.raises(ValueError, match="already holds a run"):
        Trainer(make_objective(), table, CONFIG, tmp_path)
    Trainer(make_objective(), table, CONFIG, tmp_path, overwrite=True)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"step,loss\n\xff,2\n"])
def test_metrics_that_are_damaged_or_not_ours_are_named(make_objective, table, tmp_path, content):
    Trainer(make_objective(), table, CONFIG, tmp_path).fit()
    (tmp_path / "metrics.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"metrics\.csv is .*move"):
        Trainer(make_objective(), table, CONFIG, tmp_path, resume=True)
    assert (tmp_path / "metrics.csv").read_bytes() == content


def test_best_is_kept_and_the_rest_pruned(make_objective, table, tmp_path):
    scores = iter([0.2, 0.9, 0.4, 0.9])
    seen = []

    def evaluate(path, step):
        seen.append((step, read_bundle(path)["weights.safetensors"]["net.0.weight"].shape))
        return {"success": 0.5, "score": next(scores)}

    config = TrainerConfig(steps=40, batch_size=32, eval_every=10, progress=False)
    trainer = Trainer(
        make_objective(),
        table,
        config,
        tmp_path,
        evaluate=evaluate,
        export=lambda s: {"weights.safetensors": dict(s)},
    )
    assert trainer.fit().best_score == 0.9
    folder = tmp_path / "checkpoints"
    assert [s for s, _ in seen] == [10, 20, 30, 40]
    assert (folder / "best").read_text().strip() == "0000040"  # a tie goes to the newer
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["0000030", "0000040"]
    assert not list(tmp_path.glob(".candidate*"))


def test_a_damaged_last_names_an_intact_checkpoint(make_objective, table, tmp_path):
    config = TrainerConfig(**{**vars(CONFIG), "keep_last": 3})
    Trainer(make_objective(), table, config, tmp_path).fit()
    file = tmp_path / "checkpoints" / "0000040" / "training" / "ema.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"ema.safetensors is damaged.*0000036 is intact"):
        Trainer(make_objective(), table, config, tmp_path, resume=True)
    (tmp_path / "checkpoints" / "last").write_text("0000036")
    assert Trainer(make_objective(), table, config, tmp_path, resume=True).fit().step == 40


def test_a_lost_last_names_an_intact_checkpoint_and_keeps_the_metrics(
    make_objective, table, tmp_path
):
    Trainer(make_objective(), table, CONFIG, tmp_path).fit()
    rows = (tmp_path / "metrics.csv").read_text()
    for content in (None, "", "../elsewhere"):
        (tmp_path / "checkpoints" / "last").unlink(missing_ok=True)
        if content is not None:
            (tmp_path / "checkpoints" / "last").write_text(content)
        with pytest.raises(CheckpointError, match=r"last is .*0000040 is intact: write that name"):
            Trainer(make_objective(), table, CONFIG, tmp_path, resume=True)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="the checkpoints of that run are gone"):
        Trainer(make_objective(), table, CONFIG, tmp_path, resume=True)
    assert (tmp_path / "metrics.csv").read_text() == rows


def test_resuming_in_a_wrong_directory_is_refused(make_objective, table, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    for folder in (tmp_path, tmp_path / "typo"):
        with pytest.raises(ValueError, match="no run to resume"):
            Trainer(make_objective(), table, CONFIG, folder, resume=True)


@pytest.mark.parametrize("change", [{"tensorboard": True}, {"batch_size": 999}, {"batch_size": 33}])
def test_what_can_fail_fails_before_an_earlier_run_is_removed(
    make_objective, table, tmp_path, monkeypatch, change
):
    Trainer(make_objective(), table, CONFIG, tmp_path).fit()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    config = TrainerConfig(**{**vars(CONFIG), "accumulate": 2, **change})
    with pytest.raises((ImportError, ValueError)):
        Trainer(make_objective(), table, config, tmp_path, overwrite=True)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_overwriting_leaves_no_results_of_the_old_weights_and_all_that_is_not_ours(
    make_objective, table, tmp_path
):
    Trainer(make_objective(), table, CONFIG, tmp_path).fit()
    for name in ("eval.json", "curve.png", "eval/eval.json", "eval_2/rollouts.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    mine = ("thesis.tex", "report.md", "policy/config.json", "eval/notes.txt")
    for name in (*mine, "evaluations/eval.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    Trainer(make_objective(), table, CONFIG, tmp_path, overwrite=True)
    assert {p.read_text() for p in tmp_path.rglob("*") if p.is_file()} == {"mine"}
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    (tmp_path / "eval.json").write_text("old")
    with pytest.raises(ForeignFilesError, match=r"notes\.txt"):
        Trainer(make_objective(), table, CONFIG, tmp_path, overwrite=True)
    (tmp_path / "checkpoints" / "notes.txt").unlink()
    (tmp_path / "metrics.csv").write_text("time,temperature\n1,20\n")
    with pytest.raises(ForeignFilesError, match=r"metrics\.csv is not removed"):
        Trainer(make_objective(), table, CONFIG, tmp_path, overwrite=True)
    assert (tmp_path / "eval.json").exists()  # nothing was removed


def test_a_second_trainer_of_a_run_is_refused_and_the_first_one_ends_well(
    make_objective, table, tmp_path
):
    trainer = Trainer(make_objective(), table, CONFIG, tmp_path / "run")
    begun(train, tmp_path / "run").join()
    busy = tmp_path / "run.busy"
    assert f"process {os.getpid()} on" in busy.read_text()
    busy.unlink()
    assert trainer.fit().step == 40
    assert [p.name for p in tmp_path.iterdir()] == ["run"]  # the lock is given back


class TestNonFinite:
    def run(self, objective, table, tmp_path, **options):
        config = TrainerConfig(**{**vars(CONFIG), "checkpoint_every": 1, **options})
        with pytest.raises(NonFiniteError) as caught:
            Trainer(objective, table, config, tmp_path).fit()
        return str(caught.value)

    def test_batch(self, make_objective, table, tmp_path):
        table.x[17, 1] = float("nan")
        message = self.run(make_objective(), table, tmp_path)
        assert "batch entry 'x' is not finite in source rows [17]" in message

    def test_loss(self, make_objective, table, tmp_path):
        objective = make_objective()
        forward = objective.forward

        def broken(batch, generator):
            out = forward(batch, generator)
            hit = batch["y"] == table.y[33]
            return LossOutput(out.loss * torch.where(hit, torch.nan, 1.0), out.metrics)

        objective.forward = broken
        assert "loss is not finite for source rows [33]" in self.run(objective, table, tmp_path)

    def test_gradient_and_nothing_poisoned_is_saved(self, make_objective, table, tmp_path):
        objective = make_objective()
        trainer_steps = {"n": 0}

        def poison(grad):
            trainer_steps["n"] += 1
            return grad * float("inf") if trainer_steps["n"] == 4 else grad

        objective.net[0].weight.register_hook(poison)
        message = self.run(objective, table, tmp_path)
        assert "step 3" in message
        assert "net.0.weight" in message
        saved = training_files(tmp_path)
        assert saved["state.json"]["step"] == 3
        assert all(v.isfinite().all() for v in saved["params.safetensors"].values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be positive"),
        ({"batch_size": -1}, "batch_size must be positive"),
        ({"lr_schedule": "linear"}, "unknown lr_schedule 'linear'"),
        ({"precision": "fp16"}, "unknown precision 'fp16'"),
        ({"eval_every": 0}, "eval_every must be positive, got 0"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        TrainerConfig(**options)


def test_bad_combinations(make_objective, table, tmp_path):
    with pytest.raises(ValueError, match="batch_size=500 is more than the 200 examples"):
        Trainer(make_objective(), table, TrainerConfig(batch_size=500), tmp_path)


def test_bf16_trains_on_a_cpu_and_keeps_weights_in_fp32(make_objective, table, tmp_path):
    few = {"steps": 3, "batch_size": 50, "warmup_steps": 1, "progress": False}
    ends = {}
    for precision in ("fp32", "bf16"):
        objective, config = make_objective(), TrainerConfig(**few, precision=precision)
        ends[precision] = Trainer(objective, table, config, tmp_path / precision).fit().ema
    assert {value.dtype for value in ends["bf16"].values()} == {torch.float32}
    apart = [(ends["fp32"][k] - ends["bf16"][k]).abs().max() for k in ends["fp32"]]
    assert 0 < max(apart) < 0.01


def test_ema_follows_the_power_schedule():
    module = torch.nn.Linear(1, 1, bias=False)
    ema = EMA(module)
    expected = module.weight.item()
    for n in range(20):
        with torch.no_grad():
            module.weight.fill_(float(n))
        decay = min(0.9999, 1 - (1 + max(0, n - 1)) ** -0.75)
        expected = decay * expected + (1 - decay) * n
        ema.update()
    assert ema.state["weight"].item() == pytest.approx(expected, rel=1e-5)


def test_learning_rate_schedule():
    config = TrainerConfig(steps=100, lr=1.0, warmup_steps=10)
    assert config.lr_at(0) == pytest.approx(0.1)
    assert config.lr_at(9) == pytest.approx(1.0)
    assert config.lr_at(55) == pytest.approx(0.5)
    assert config.lr_at(99) == pytest.approx(0.0, abs=1e-3)
    assert TrainerConfig(lr=1.0, lr_schedule="constant").lr_at(9000) == 1.0


def test_a_failing_evaluation_does_not_lose_the_run(make_objective, table, tmp_path):
    def broken(path, step):
        raise RuntimeError("simulator gone")

    config = TrainerConfig(steps=8, batch_size=32, progress=False)
    trainer = Trainer(
        make_objective(),
        table,
        config,
        tmp_path,
        evaluate=broken,
        export=lambda s: {"weights.safetensors": dict(s)},
    )
    with pytest.raises(RuntimeError, match="simulator gone"):
        trainer.fit()
    assert training_files(tmp_path)["state.json"]["step"] == 8


def test_other_data_is_refused_on_resume(make_objective, table, tmp_path):
    Trainer(make_objective(), table, CONFIG, tmp_path).fit()
    table.x, table.y = table.x[:150], table.y[:150]
    with pytest.raises(ValueError, match="examples was 200, is 150"):
        Trainer(make_objective(), table, CONFIG, tmp_path, resume=True)


def test_half_a_line_of_metrics_is_dropped(tmp_path):
    from diffpolicy.training.run_files import MetricsFile

    file = MetricsFile(tmp_path / "metrics.csv")
    for step in (10, 20):
        file.append(step, {"loss": 0.5})
    with (tmp_path / "metrics.csv").open("a") as handle:
        handle.write("3")
    assert [r["step"] for r in MetricsFile(tmp_path / "metrics.csv", keep_until=99).rows] == [
        "10",
        "20",
    ]


def test_tensorboard_is_optional(make_objective, table, tmp_path):
    config = TrainerConfig(**{**vars(CONFIG), "tensorboard": True})
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"diffpolicy\[tensorboard\]"):
            Trainer(make_objective(), table, config, tmp_path)
        return
    Trainer(make_objective(), table, config, tmp_path).fit()
    assert list((tmp_path / "tb").iterdir())
