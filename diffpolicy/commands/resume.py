"""`diffpolicy resume RUN`: continue an interrupted run where it stopped, or a finished one.

usage: diffpolicy resume RUN [trainer.KEY=VALUE ...]

Continues the run in directory RUN from its last checkpoint, with the configuration it was started
with (RUN/config.yaml). On a CPU the result is bit for bit that of an uninterrupted run. A finished
run is only evaluated again, unless it is to train for longer:

    diffpolicy resume RUN trainer.steps=20000 trainer.lr=1e-4

What may change, in every kind of run: trainer.KEY of
$settings.
Any change is said, and kept in RUN/config.yaml; where the result is then not that of a run which
had the new value from its beginning, a ResumeWarning says so. Anything else is another run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffpolicy.commands.options import helped, parse
from diffpolicy.commands.runs import trainer_settings
from diffpolicy.config import (
    KINDS,
    PolicyTuningConfig,
    SequenceTrainConfig,
    SequenceTuningConfig,
    TaskConfig,
    read_run,
)
from diffpolicy.config_compose import keys_given
from diffpolicy.files import write_atomic
from diffpolicy.settings import ConfigError, near_miss
from diffpolicy.settings import from_values as build


def help_text() -> str:
    """This module's own text."""
    from diffpolicy.training.settings import MAY_CHANGE

    return helped(__doc__, settings=", ".join(MAY_CHANGE))


def run(arguments: Sequence[str]) -> int:
    """Load the run's configuration, with what is to change, and go on."""
    from diffpolicy.commands.own_sequences import typed_over
    from diffpolicy.networks.registry import check_stored_code
    from diffpolicy.policies.changes import upgraded
    from diffpolicy.rollout.env_spec import stored_env_id

    options = _options(arguments)
    run_dir = Path(options.pop("run"))
    file = run_dir / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{run_dir} is no run directory: it has no config.yaml")
    plain = upgraded(read_run(file))
    if isinstance(plain.get("env"), dict):
        stored_env_id(str(plain["env"].get("id")), file, instead="")
    if isinstance(plain.get("task"), dict):
        typed_over(build(TaskConfig, plain["task"]), None, file)
    check_stored_code(plain, file)
    if {"preference", "finetune"} & set(plain):
        raise ConfigError(
            f"{run_dir} is a tuning that an earlier version began, and this one cannot go on with; "
            "what it has made can be evaluated, and tuned on (pretrained=RUN)"
        )
    plain["run_dir"] = str(run_dir)  # a run may have been moved
    _say_actions(plain, run_dir)
    _change(plain, options, run_dir)
    go_on = _command(plain)
    recorded, trained = file.read_text(encoding="utf-8"), _trained(run_dir)
    try:
        return go_on()
    except ValueError:  # what was refused before anything was trained with it is not kept
        if options and _trained(run_dir) == trained:
            write_atomic(file, recorded)
        raise


def _say_actions(plain: dict[str, Any], run_dir: Path) -> None:
    """Put in how plans say actions where the run's configuration names no group.

    It then follows from environment and data as they were understood when the run began, in older
    runs also where the configuration says ``[]``; the policy of its checkpoint knows.
    """
    from diffpolicy.training.checkpoint import read_pointer

    policy, folder = plain.get("policy"), run_dir / "checkpoints"
    file = folder / str(read_pointer(folder / "last")) / "policy/config.json"
    if isinstance(policy, dict) and not policy.get("actions") and file.is_file():
        policy["actions"] = json.loads(file.read_text(encoding="utf-8")).get("actions")


def _options(arguments: Sequence[str]) -> dict[str, Any]:
    """``run`` and the settings that are to change, by their dotted names."""
    from diffpolicy.training.settings import MAY_CHANGE

    allowed = [f"trainer.{name}" for name in MAY_CHANGE]
    given = keys_given(arguments)
    for key in given:
        if key not in ("run", *allowed):
            hint = near_miss(key, allowed)
            raise ConfigError(
                f"{key} cannot change in a run that goes on; what may is {', '.join(allowed)}"
                f"{hint}. With another {key}, start a new run in another directory"
            )
    values = parse(arguments, ["run"], dict.fromkeys(allowed))
    return {key: value for key, value in values.items() if key == "run" or key in given}


def _change(plain: dict[str, Any], options: Mapping[str, Any], run_dir: Path) -> None:
    """Put what is to change into the run's configuration, and say it.

    Raises:
        ConfigError: a value that the trainer does not take, or a tuning whose later rounds began
            with what the earlier ones have learned.
    """
    new = {key.removeprefix("trainer."): value for key, value in options.items()}
    before = trainer_settings(plain.get("trainer") or {}, plain.get("seed", 0))
    plain["trainer"] = {**(plain.get("trainer") or {}), **new}
    after = trainer_settings(plain["trainer"], plain.get("seed", 0))
    changed = [n for n in new if getattr(before, n) != getattr(after, n)]
    if {"steps", "lr"} & set(changed) and (run_dir / "round_1").exists():
        raise ConfigError(
            f"{run_dir} has begun its second round with what the first has learned, so "
            f"trainer.{changed[0]} cannot change any more; start a new run in another directory"
        )
    for name in changed:
        was, found = getattr(before, name), getattr(after, name)
        print(f"{run_dir} goes on with trainer.{name}={found} (it was {was})")


def _command(plain: dict[str, Any]) -> Callable[[], int]:
    """The command that a run is of, ready to go on with this configuration."""
    config = build(KINDS[plain["run"]], plain)
    if isinstance(config, PolicyTuningConfig):
        from diffpolicy.commands.tune_plans import tune_plans

        return lambda: tune_plans(config, resume=True)
    if isinstance(config, SequenceTuningConfig):
        from diffpolicy.commands.tune_sequences import tune_sequences

        return lambda: tune_sequences(config, resume=True)
    if isinstance(config, SequenceTrainConfig):
        from diffpolicy.commands.train_sequences import train_sequences

        return lambda: train_sequences(config, resume=True)
    from diffpolicy.commands.train import train

    return lambda: train(config, resume=True)


def _trained(run_dir: Path) -> dict[Path, bytes]:
    """How far each training of a run has come."""
    names = ("checkpoints/last", "round_*/checkpoints/last")
    return {path: path.read_bytes() for name in names for path in run_dir.glob(name)}
