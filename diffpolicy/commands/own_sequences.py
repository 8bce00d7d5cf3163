"""Sequences of one's own in `diffpolicy tune`: the task that is typed, and its generator."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpolicy.config import (
    SequenceTrainConfig,
    SequenceTuningConfig,
    TaskConfig,
    load_run,
    read_run,
)
from diffpolicy.config_compose import keys_given
from diffpolicy.settings import ConfigError
from diffpolicy.settings import from_values as build

if TYPE_CHECKING:
    from diffpolicy.sequences.task import SequenceTask

CODE = ("oracle", "held_out")  # settings of a task that name a user's code
# What a pre-trained generator does not depend on: it is taken as it was typed this time.
_JUDGES = (*CODE, "fixed", "forbidden", "identity", "group")
_ANYHOW = ("run_dir", "overwrite", "device", "threads", "draws", "report", "name", "run")


def open_task(task: TaskConfig) -> SequenceTask:
    """The task of a configuration: of a file of sequences, or behind an environment's id.

    Raises:
        ConfigError: neither is said.
    """
    from diffpolicy.sequences import task as tasks
    from diffpolicy.sequences.own import FileTask
    from diffpolicy.settings import settings_of

    if task.id is not None:
        return tasks.open_task(task.id, **task.kwargs)
    if "sequences" not in task.kwargs:
        raise ConfigError(
            "say what the task is: task.sequences=FILE (FASTA, CSV or TSV) with "
            "task.oracle=package.module:Name or task.value=COLUMN, or "
            "task.id=package:Name-v0 of an environment"
        )
    return settings_of(FileTask, {"name": task.name, **task.kwargs}, "task")


def typed_over(stored: TaskConfig, typed: TaskConfig | None, file: Path) -> TaskConfig:
    """The task of a stored run with what was typed in its place; code that it names is checked.

    Raises:
        ValueError: the file names code that the user did not choose.
    """
    from diffpolicy.networks.registry import check_stored_code
    from diffpolicy.rollout.env_spec import stored_env_id

    given = {} if typed is None else typed.kwargs
    for key in CODE:
        if key not in given:
            check_stored_code({"type": stored.kwargs.get(key)}, file)
    if stored.id is not None:
        stored_env_id(stored.id, file, instead="")
    return replace(stored, kwargs={**stored.kwargs, **given})


def begin(config: SequenceTuningConfig, overrides: Sequence[str]) -> int:
    """Train the generator that a tuning of one's own task begins with, unless that was done.

    It is the run of `diffpolicy train` with the same ``task=``, and what ``pretrain.KEY`` say; its
    directory becomes ``config.pretrained``.

    Returns:
        0, or the status of a training that was stopped.

    Raises:
        ConfigError: the directory holds a run of other settings or data.
    """
    from diffpolicy.commands.train_sequences import model_spec, train_sequences
    from diffpolicy.commands.tune_sequences import check
    from diffpolicy.sequences.model import SequenceModel

    training = load_run("train", training_overrides(overrides))
    assert isinstance(training, SequenceTrainConfig)
    config.pretrained = training.run_dir
    if Path(config.run_dir).resolve() == Path(training.run_dir).resolve():
        raise ConfigError(
            f"{training.run_dir} is where the generator is kept: choose another run_dir, or "
            "another pretrain.run_dir"
        )
    task = open_task(training.task)
    untrained = SequenceModel.for_task(task, spec=model_spec(training))
    check(config, untrained, task, training)  # before a generator is trained in vain
    file = Path(training.run_dir) / "config.yaml"
    if training.overwrite or not file.is_file():
        return train_sequences(training)
    stored = build(SequenceTrainConfig, read_run(file))
    changed = _changed(stored, training)
    report = Path(training.run_dir) / "report.json"
    if report.is_file() and not changed:
        was = json.loads(report.read_text()).get("sequences") or {}
        now = getattr(task, "read", {})
        changed = ["the sequences"] if was.get("sha256") != now.get("sha256") else []
    if changed:
        raise ConfigError(
            f"{training.run_dir} holds a generator of other settings ({', '.join(changed)}): take "
            f"it as it is with pretrained={training.run_dir}, replace it with "
            "pretrain.overwrite=true, or choose another pretrain.run_dir"
        )
    return 0 if report.is_file() else train_sequences(training, resume=True)


def training_overrides(overrides: Sequence[str]) -> list[str]:
    """What `diffpolicy train` is told of what `diffpolicy tune` was told."""
    given = keys_given(overrides)
    kept = [o for o in overrides if o.removeprefix("--").split("=")[0].split(".")[0] == "task"]
    inner = [o.removeprefix("--") for o in overrides]
    inner = [o.removeprefix("pretrain.") for o in inner if o.startswith("pretrain.")]
    shared = [f"{key}={given[key]}" for key in ("device", "threads") if key in given]
    said = keys_given([*kept, *inner])
    return [*(one for one in shared if one.split("=")[0] not in said), *kept, *inner]


def _changed(stored: SequenceTrainConfig, training: SequenceTrainConfig) -> list[str]:
    """The settings that the generators of two configurations differ in, by their dotted names."""
    from diffpolicy.training.identity import flatten
    from diffpolicy.training.settings import MAY_CHANGE

    def plain(config: SequenceTrainConfig) -> dict[str, Any]:
        values = {k: v for k, v in asdict(config).items() if k not in _ANYHOW}
        kwargs = {k: v for k, v in config.task.kwargs.items() if k not in _JUDGES}
        values["task"] = {"id": config.task.id, **kwargs}
        found = flatten(json.loads(json.dumps(values)))
        return {k: v for k, v in found.items() if k.rpartition("trainer.")[2] not in MAY_CHANGE[2:]}

    before, now = plain(stored), plain(training)
    return [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)]
