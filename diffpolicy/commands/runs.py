"""What every command does that leaves a run directory: one writer, its settings, its last line."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpolicy.config import RunConfig
from diffpolicy.files import write_atomic
from diffpolicy.locks import WriterLock
from diffpolicy.settings import ConfigError
from diffpolicy.settings import from_values as build

if TYPE_CHECKING:
    from diffpolicy.training.settings import TrainerConfig

FILE = "config.yaml"


def one_writer(command: Callable[..., int]) -> Callable[..., int]:
    """Let ``command(config, ...)`` hold the lock of ``config.run_dir`` while it runs.

    Of the processes of a ``torchrun`` launch the first holds it.
    """

    @wraps(command)
    def locked(config: Any, **options: Any) -> int:
        if int(os.environ.get("RANK", "0")):
            return command(config, **options)
        with WriterLock(config.run_dir, "training"):
            return command(config, **options)

    return locked


def check_new(config: RunConfig, *, resume: bool) -> Path:
    """The directory of a run, unless another run is in it.

    Raises:
        ConfigError: there is one, and it is neither to go on nor to be replaced.
        ValueError: what is there is no run, and would be removed.
    """
    from diffpolicy.training.run_files import clear_run, has_run

    run_dir = Path(config.run_dir)
    written = has_run(run_dir) or (run_dir / "report.json").exists()
    if written and not resume and not config.overwrite:
        raise ConfigError(already_there(run_dir))
    if not resume:
        clear_run(run_dir, only_check=True)
    return run_dir


def already_there(run_dir: Path) -> str:
    """The message about a run that is in the way of another."""
    return (
        f"{run_dir} already holds a run; continue it with `diffpolicy resume {run_dir}`, "
        "replace it with overwrite=true, or choose another run_dir"
    )


def trainer_settings(
    values: Mapping[str, Any], seed: int, where: str = "trainer."
) -> TrainerConfig:
    """Settings of a trainer, with a clear error for an unknown one."""
    from diffpolicy.training.settings import TrainerConfig

    return build(TrainerConfig, {**values, "seed": seed}, where)


def as_yaml(config: Any) -> str:
    """A configuration as its run keeps it."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def print_config(config: Any) -> int:
    """Show a composed configuration; the status of ``--print-config``."""
    print(as_yaml(config))
    return 0


def write_config(config: RunConfig) -> None:
    """Keep the configuration beside the run."""
    write_atomic(Path(config.run_dir) / FILE, as_yaml(config))


def stopped(run_dir: str | Path, step: int | None = None) -> int:
    """Say how a run that was interrupted goes on; its exit status."""
    at = "" if step is None else f" at step {step}"
    print(f"stopped{at}; continue with `diffpolicy resume {run_dir}`")
    return 130


def print_result(values: Mapping[str, Any], began: float) -> None:
    """Print a run's last line: ``RESULT {json}`` with the seconds since ``began``."""
    total = round(time.perf_counter() - began, 1)
    print("RESULT " + json.dumps({**values, "total_s": total}))
