"""Training cells one after the other, or several at a time."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Generator, Sequence
from dataclasses import asdict
from pathlib import Path

from diffpolicy.config import TrainConfig
from reproduce.cells import ERRORS, Cell

Outcomes = Generator[tuple[Cell, str | None]]
"""Cells that ended, each with why it failed, or None."""


def run_cell(config: TrainConfig) -> int:
    """Trains and evaluates in this process; an interrupted run goes on where it stopped."""
    from diffpolicy.commands.train import train

    return train(config, resume=(Path(config.run_dir) / "config.yaml").is_file())


def run_here(cells: Sequence[Cell]) -> Outcomes:
    """Trains cells one after the other; yields each with why it failed, or None.

    Raises:
        KeyboardInterrupt: the training was interrupted; its checkpoint is written.
    """
    for cell in cells:
        assert cell.config is not None
        print(f"== {cell.run}", flush=True)
        try:
            code = run_cell(cell.config)
        except Exception as error:  # whatever it is, the other cells go on
            if not isinstance(error, ERRORS):
                traceback.print_exc()
            yield cell, f"{type(error).__name__}: {error}"
            continue
        if code == 128 + signal.SIGINT:
            raise KeyboardInterrupt
        yield cell, None


def run_beside(cells: Sequence[Cell], jobs: int) -> Outcomes:
    """As `run_here`, ``jobs`` at a time in processes of their own that write RUN/log.txt."""
    waiting, running = list(cells), dict[subprocess.Popen[bytes], Cell]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.pop(0)
                running[_start(cell)] = cell
                print(f"== {cell.run}", flush=True)
            time.sleep(0.2)
            for process in [p for p in running if p.poll() is not None]:
                cell = running.pop(process)
                yield cell, None if process.returncode == 0 else _last_line(cell)
    finally:
        for process in running:  # each finishes its step and writes a checkpoint
            process.send_signal(signal.SIGINT)
        for process in running:
            process.wait()


def _start(cell: Cell) -> subprocess.Popen[bytes]:
    from omegaconf import OmegaConf

    assert cell.config is not None
    run_dir = Path(cell.config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(asdict(cell.config)), run_dir / "config.yaml")
    command = [sys.executable, "-m", "diffpolicy.cli", "resume", str(run_dir)]
    with (run_dir / "log.txt").open("ab") as log:
        # A session of its own: Ctrl-C reaches it once, from here.
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def _last_line(cell: Cell) -> str:
    assert cell.config is not None
    lines = (Path(cell.config.run_dir) / "log.txt").read_text(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "no output")
