"""`diffpolicy resume RUN`: continue an interrupted run exactly where it stopped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffpolicy.commands.options import parse
from diffpolicy.config import ConfigError, TrainConfig, build
from diffpolicy.config_policy_tuning import PolicyTuningConfig
from diffpolicy.config_sequences import FinetuneConfig, SequenceTrainConfig


def help_text() -> str:
    """The text of `diffpolicy resume --help`."""
    return """\
usage: diffpolicy resume RUN

Continues the run in directory RUN from its last checkpoint, with the configuration it was started
with (RUN/config.yaml). On a CPU the result is bit for bit that of an uninterrupted run. A finished
run is only evaluated again."""


def run(arguments: Sequence[str]) -> int:
    """Load the run's configuration and go on."""
    from omegaconf import OmegaConf

    from diffpolicy.commands.train import train

    run_dir = Path(parse(arguments, ["run"], {})["run"])
    file = run_dir / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{run_dir} is no run directory: it has no config.yaml")
    values = OmegaConf.to_container(OmegaConf.load(file))
    if not isinstance(values, dict):
        raise ConfigError(f"{file} does not hold a run's configuration")
    plain: dict[str, Any] = {str(k): v for k, v in values.items()}
    plain["run_dir"] = str(run_dir)  # a run may have been moved
    if "preference" in plain:
        from diffpolicy.commands.finetune_policy import finetune_policy

        return finetune_policy(build(PolicyTuningConfig, plain), resume=True)
    if "pretrained" in plain:
        from diffpolicy.commands.finetune import finetune

        return finetune(build(FinetuneConfig, plain), resume=True)
    if "task" in plain:
        from diffpolicy.commands.train_sequences import train_sequences

        return train_sequences(build(SequenceTrainConfig, plain), resume=True)
    return train(build(TrainConfig, plain), resume=True)
