"""`diffpolicy train` of sequence tasks: a masked diffusion model, and oracles of its reward."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpolicy.commands.preflight import check_installed, check_writable, pick_device
from diffpolicy.commands.runs import (
    check_new,
    one_writer,
    print_result,
    stopped,
    trainer_settings,
    write_config,
)
from diffpolicy.config import SequenceTrainConfig
from diffpolicy.files import write_atomic
from diffpolicy.settings import ConfigError
from diffpolicy.settings import from_values as build

if TYPE_CHECKING:
    from diffpolicy.sequences.model import SequenceModel
    from diffpolicy.sequences.oracles import Oracles
    from diffpolicy.sequences.task import SequenceTask


@one_writer
def train_sequences(config: SequenceTrainConfig, *, resume: bool = False) -> int:
    """Run one pre-training, from the task's data to a report."""
    from diffpolicy.sequences.evaluate import Evaluation
    from diffpolicy.sequences.model import SequenceModel
    from diffpolicy.sequences.oracles import material
    from diffpolicy.training.run_files import has_run

    began = time.perf_counter()
    run_dir = check_new(config, resume=resume)
    check_writable(run_dir)
    device = pick_device(config.device, config.threads)
    trainer = trainer_settings(config.trainer, config.seed)
    trainer_settings(config.oracles.trainer, config.oracles.seed, "oracles.trainer.")
    build(Evaluation, config.report, "report.")
    if trainer.tensorboard:
        check_installed(("tensorboard",), "trainer.tensorboard=true")
    task = open_configured(config)
    model = SequenceModel.for_task(task, spec=model_spec(config), seed=config.seed, device=device)
    tokens, labels = task.training_data()
    if config.label_quantiles and labels is None:
        raise ConfigError(f"{config.task.name} has no labels, so label_quantiles has no effect")
    material(task, seed=config.oracles.seed, surrogate=config.oracles.surrogate)
    write_config(config)
    model.learn(
        tokens,
        trainer,
        run_dir,
        labels=labels if config.label_quantiles else None,
        val_fraction=config.val_fraction,
        resume=resume and has_run(run_dir),
        overwrite=config.overwrite,
    )
    training = model.last_training
    assert training is not None
    if training.interrupted:
        return stopped(run_dir, training.step)
    oracles = configured_oracles(config, task, run_dir, device, overwrite=config.overwrite)
    row = _report(config, model, task, oracles)
    row["sequences"] = getattr(task, "read", None)
    write_atomic(run_dir / "report.json", json.dumps(row, indent=1) + "\n")
    short = {
        "task": config.name,
        "train_s": round(training.train_s, 1),
        **summary(row["metrics"]),
    }
    print_result(short, began)
    return 0


def open_configured(config: SequenceTrainConfig) -> SequenceTask:
    """The task of a configuration; what was read of a file is said."""
    from diffpolicy.commands.own_sequences import open_task

    task = open_task(config.task)
    read = getattr(task, "read", None)
    if read is not None:
        print(_said(read))
    return task


def _said(read: dict[str, Any]) -> str:
    """What was read of a file of sequences, in a line."""
    changed = "".join(f"; {count} {why}" for why, count in read["left out or changed"].items())
    shorter = f"{read['shortest']} to " if read["shortest"] < read["length"] else ""
    return (
        f"{read['file']}: {read['sequences']} of {read['rows']} sequences, "
        f"{shorter}{read['length']} of {read['alphabet']}{changed}"
    )


def configured_oracles(
    config: SequenceTrainConfig,
    task: SequenceTask,
    run_dir: Path,
    device: Any,
    *,
    overwrite: bool = False,
) -> Oracles:
    """The rewards of a run: those kept in ``RUN/oracles``, trained first if they are not there."""
    from diffpolicy.sequences.oracles import train_oracles

    settings = config.oracles
    return train_oracles(
        task,
        run_dir / "oracles",
        trainer_settings(settings.trainer, settings.seed, "oracles.trainer."),
        seed=settings.seed,
        network=settings.network,
        surrogate=settings.surrogate,
        overwrite=overwrite,
        device=device,
    )


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """The figures of an evaluation that a RESULT line shows."""
    out: dict[str, Any] = {}
    for name in ("reward", "held_out", "log_likelihood"):
        out[name] = None if row[name] is None else _rounded(row[name]["median"])
    for name in ("kl", "kmer_correlation", "profile_correlation", "diversity", "valid"):
        out[name] = _rounded(row[name])
    return out


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def model_spec(config: SequenceTrainConfig) -> dict[str, Any]:
    """What a configuration says of its model beside the task's sizes."""
    return {
        "network": config.network,
        "process": config.process,
        "time_free": config.time_free,
        "label_quantiles": tuple(config.label_quantiles),
        "cond_dropout": config.cond_dropout,
        "env_id": config.task.id,
    }


def _report(
    config: SequenceTrainConfig, model: SequenceModel, task: SequenceTask, oracles: Oracles
) -> dict[str, Any]:
    import torch

    from diffpolicy.sequences.evaluate import Evaluation, evaluate_sequences

    settings = build(Evaluation, config.report, "report.")
    generator = torch.Generator(model.device).manual_seed(config.seed)
    tokens = model.draw(config.draws, generator=generator).cpu()
    judged: dict[str, Any] = {"oracles": oracles, "reference": model, "settings": settings}
    row = evaluate_sequences(None, task, tokens, **judged)
    return {"name": config.name, "metrics": row, "oracles": dict(oracles.report)}
