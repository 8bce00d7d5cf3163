"""`diffpolicy resume RUN`: continue an interrupted run exactly where it stopped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffpolicy.commands.options import parse
from diffpolicy.config import ConfigError, TrainConfig, build, read_yaml
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
    from diffpolicy.commands.train import train
    from diffpolicy.rollout.trust import stored_env_id

    run_dir = Path(parse(arguments, ["run"], {})["run"])
    file = run_dir / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{run_dir} is no run directory: it has no config.yaml")
    plain = read_yaml(file)
    for section in ("env", "task"):
        if isinstance(plain.get(section), dict):
            stored_env_id(str(plain[section].get("id")), file, instead="")
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
