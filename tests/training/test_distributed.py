"""Two gloo processes under torchrun train one model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from diffpolicy.training.checkpoint import read_bundle

SCRIPT = """
import os, sys, torch
sys.path.insert(0, {here!r})
from conftest import Regression, Table
from diffpolicy.training.settings import TrainerConfig
from diffpolicy.training.trainer import Trainer
torch.manual_seed(0)
config = TrainerConfig(steps=60, batch_size=64, lr=1e-2, warmup_steps=5, progress=False)
trainer = Trainer(Regression(dropout=0.0, noise=0.0), Table(), config, sys.argv[1])
trainer.fit()
torch.save(trainer.objective.state_dict(), sys.argv[1] + f"/rank{{trainer.group.rank}}.pt")
"""


def run(script, folder, *launcher):
    folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, str(script), str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_agree_and_follow_the_single_run(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(here=str(Path(__file__).parent)))
    run(script, tmp_path / "one")
    run(
        script,
        tmp_path / "two",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
    )
    ranks = [torch.load(tmp_path / "two" / f"rank{r}.pt", weights_only=True) for r in range(2)]
    single = torch.load(tmp_path / "one" / "rank0.pt", weights_only=True)
    for name in single:
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], single[name], rtol=1e-4, atol=1e-5)
    saved = read_bundle(tmp_path / "two" / "checkpoints" / "0000060", "training/")
    assert torch.equal(saved["params.safetensors"]["net.0.weight"], ranks[0]["net.0.weight"])
