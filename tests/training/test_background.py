"""Checkpoints on a thread of their own: the same bits, and no error is lost."""

from __future__ import annotations

import threading

import pytest
import torch

from diffpolicy.training.checkpoint import Snapshots, read_bundle
from diffpolicy.training.process import BackgroundWriter, copied
from diffpolicy.training.settings import TrainerConfig
from diffpolicy.training.trainer import Trainer

CONFIG = TrainerConfig(steps=8, batch_size=32, lr=1e-2, checkpoint_every=2, progress=False)


def test_what_is_written_is_what_was_when_it_was_asked_for(
    make_objective, table, tmp_path, monkeypatch
):
    go_on, save = threading.Event(), Snapshots.save

    def slow(self, step, *files, **options):
        if step == 4:
            assert go_on.wait(20)
        save(self, step, *files, **options)

    monkeypatch.setattr(Snapshots, "save", slow)
    config = TrainerConfig(**{**vars(CONFIG), "keep_last": 9})
    trainer = Trainer(make_objective(), table, config, tmp_path / "slow")
    step = trainer._train_step

    def train_step():
        step()
        if trainer.step == 6:  # two steps further
            go_on.set()

    trainer._train_step = train_step
    trainer.fit()
    monkeypatch.undo()
    whole = Trainer(make_objective(), table, config, tmp_path / "whole")
    whole.fit()
    for name in ("params", "ema", "optimizer", "totals"):
        a, b = (
            read_bundle(tmp_path / run / "checkpoints" / "0000004", "training/")
            for run in ("slow", "whole")
        )
        assert all(
            torch.equal(v, b[f"{name}.safetensors"][k]) for k, v in a[f"{name}.safetensors"].items()
        )


def test_an_error_surfaces_and_what_was_written_stays(make_objective, table, tmp_path, monkeypatch):
    save = Snapshots.save

    def full(self, step, *files, **options):
        if step == 4:
            raise OSError(28, "No space left on device", "somewhere")
        save(self, step, *files, **options)

    monkeypatch.setattr(Snapshots, "save", full)
    trainer = Trainer(make_objective(), table, CONFIG, tmp_path)
    with pytest.raises(OSError, match="No space left"):
        trainer.fit()
    assert trainer.step < 8
    assert (tmp_path / "checkpoints" / "last").read_text().strip() == "0000002"


def test_leaving_waits_and_keeps_the_first_error():
    done = []

    def slow():
        threading.Event().wait(0.2)
        done.append(1)

    def broken():
        raise OSError("full")

    def leave(write, error):
        with BackgroundWriter() as writer:
            writer.start(write)
            raise error

    with pytest.raises(KeyboardInterrupt):
        leave(slow, KeyboardInterrupt())
    assert done == [1]
    with pytest.raises(RuntimeError, match="simulator") as caught:
        leave(broken, RuntimeError("simulator gone"))
    assert "full" in caught.value.__notes__[0]
    with pytest.raises(OSError, match="full"), BackgroundWriter() as writer:
        writer.start(broken)


def test_copies_do_not_follow():
    tensor = torch.zeros(3)
    files = copied({"a.safetensors": {"x": tensor}, "b.json": {"y": 1}})
    tensor += 1
    assert files["a.safetensors"]["x"].tolist() == [0, 0, 0]
    assert files["b.json"] == {"y": 1}
