"""A tiny objective and source, and trainings of them in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch
from torch import Tensor, nn

from diffpolicy.learn.cloning.denoising import LossOutput
from diffpolicy.locks import BusyError
from diffpolicy.training.run_files import has_run
from diffpolicy.training.settings import TrainerConfig
from diffpolicy.training.trainer import Trainer


class Regression(nn.Module):
    """Noisy regression with dropout, so that every kind of randomness is in play."""

    def __init__(self, dropout: float = 0.1, noise: float = 0.1) -> None:
        super().__init__()
        self.noise = noise
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 1))

    def forward(self, batch: dict[str, Tensor], generator: torch.Generator) -> LossOutput:
        noise = self.noise * torch.randn(batch["x"].shape, generator=generator)
        error = self.net(batch["x"] + noise)[:, 0] - batch["y"]
        return LossOutput(error.square(), {"bias": error.mean().detach()})


class Table:
    """Rows of a fixed regression problem."""

    def __init__(self, count: int = 200) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(count, 3, generator=generator)
        self.y = self.x.sin().sum(1)

    def __len__(self) -> int:
        return len(self.x)

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        return {"x": self.x[indices], "y": self.y[indices]}


def begun(target, *args) -> ForkServerProcess:
    """A process that runs ``target(*args)``, forked from one that has imported torch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["diffpolicy.training.trainer"])
    process = context.Process(target=target, args=args)
    process.start()
    return process


def train(run: Path) -> None:
    """Train 200 steps with many checkpoints, going on where an earlier process stopped.

    Who holds the directory, if another process does, is written beside it.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    often = {"log_every": 7, "eval_every": 60, "checkpoint_every": 9}
    config = TrainerConfig(200, 32, lr=1e-2, warmup_steps=5, progress=False, **often)
    try:
        Trainer(Regression(), Table(), config, run, resume=has_run(run)).fit()
    except BusyError as error:
        run.with_suffix(".busy").write_text(str(error))


def train_together(run: Path, rank: int | None = None, port: int = 0) -> dict[str, Tensor]:
    """Train as one of two processes, with the environment that torchrun makes, or alone."""
    if rank is not None:
        os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.manual_seed(0)
    config = TrainerConfig(steps=60, batch_size=64, lr=1e-2, warmup_steps=5, progress=False)
    trainer = Trainer(Regression(dropout=0.0, noise=0.0), Table(), config, run)
    trainer.fit()
    torch.save(trainer.objective.state_dict(), run / f"rank{rank}.pt")
    return trainer.objective.state_dict()
