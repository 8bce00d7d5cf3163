"""Which run a policy comes from: a tuned one knows the run before it, and that its environment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffpolicy.config import ConfigError, TrainConfig, build, choice_files, read_yaml

FILE = "config.yaml"


def read_config(run: Path) -> dict[str, Any]:
    """The configuration of a run, as plain values."""
    return read_yaml(run / FILE)


def lineage(run: str | Path) -> list[Path]:
    """A run, the run that it was tuned from, and so on.

    Raises:
        ConfigError: one of them is not there, or was made of a later one.
    """
    found = [Path(run)]
    while True:
        last = found[-1]
        if not (last / FILE).is_file():
            raise ConfigError(_missing(found))
        values = read_config(last)
        if values.get("env") or not values.get("pretrained"):
            return found
        found.append(Path(values["pretrained"]))
        if found[-1].resolve() in [known.resolve() for known in found[:-1]]:
            chain = " from ".join(map(str, found))
            raise ConfigError(f"these runs say that each was tuned from the next: {chain}")


def _missing(found: Sequence[Path]) -> str:
    run = found[-1]
    if len(found) == 1:
        return f"no trained policy in {run}: {how_to_make(run)}"
    return (
        f"{found[-2]} was tuned from {run}, which knows its environment and is not here; start "
        "where both are, or give the environment if the command takes one (env=ID, env.id=ID)"
    )


def how_to_make(run: Path) -> str:
    """What to do where a run to start from is missing."""
    if run.name in choice_files()["experiment"]:
        return f"make it with `diffpolicy train experiment={run.name}`, or set pretrained=RUN"
    return "set pretrained=RUN, the directory of a run of `diffpolicy train`"


def pretraining(run: str) -> TrainConfig:
    """The configuration that a policy was trained with, before it was tuned, if it was.

    Raises:
        ConfigError: no run of a policy.
        EnvSpecError: its environment is of a package that is not known (see ``trust_env``).
    """
    from diffpolicy.rollout.env_spec import stored_env_id

    first = lineage(run)[-1]
    values = read_config(first)
    if "env" not in values:
        raise ConfigError(f"{run} is no run of a policy; set pretrained=RUN")
    config = build(TrainConfig, values)
    stored_env_id(config.env.id, first / FILE, instead="")
    return config


def recorded_env(checkpoint: str | Path) -> dict[str, Any] | None:
    """The environment of the run that a checkpoint lies in, or that it was tuned from.

    Raises:
        ConfigError: the run that it was tuned from is not there.
    """
    return recorded_section(checkpoint, "env")


def recorded_section(checkpoint: str | Path, section: str) -> dict[str, Any] | None:
    """A section of the configuration of the run that :func:`recorded_env` speaks of.

    Raises:
        ConfigError: the run that it was tuned from is not there.
    """
    root = Path(checkpoint).resolve()
    folders = (root, *list(root.parents)[:3])
    run = next((folder for folder in folders if (folder / FILE).is_file()), None)
    if run is None:
        return None
    return read_config(lineage(run)[-1]).get(section) or None


__all__ = ["lineage", "pretraining", "read_config", "recorded_env", "recorded_section"]
