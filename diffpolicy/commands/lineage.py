"""Which run a policy comes from: a tuned one knows the run before it, and that its environment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffpolicy.config import TrainConfig
from diffpolicy.config_compose import choice_files, read_yaml
from diffpolicy.settings import ConfigError
from diffpolicy.settings import from_values as build

FILE = "config.yaml"


def lineage(run: str | Path) -> list[Path]:
    """List a run, the run that it was tuned from, and so on.

    Raises:
        ConfigError: one of them is not there, or was made of a later one.
    """
    found = [Path(run)]
    while True:
        last = found[-1]
        if not (last / FILE).is_file():
            raise ConfigError(_missing(found))
        values = read_yaml(last / FILE)
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
    """Say what to do where a run to start from is missing."""
    if run.name in choice_files()["experiment"]:
        return f"make it with `diffpolicy train experiment={run.name}`, or set pretrained=RUN"
    return "set pretrained=RUN, the directory of a run of `diffpolicy train`"


def pretraining(run: str) -> TrainConfig:
    """Return the configuration that a policy was trained with, before it was tuned, if it was.

    Raises:
        ConfigError: no run of a policy.
        EnvSpecError: its environment is of a package that is not known (see ``trust_env``).
    """
    from diffpolicy.rollout.env_spec import stored_env_id

    first = lineage(run)[-1]
    values = read_yaml(first / FILE)
    if "env" not in values:
        raise ConfigError(f"{run} is no run of a policy; set pretrained=RUN")
    config = build(TrainConfig, values)
    stored_env_id(config.env.id, first / FILE, instead="")
    return config


def recorded(checkpoint: str | Path, section: str) -> dict[str, Any] | None:
    """Return a section of the configuration of a checkpoint's run, or of the one it was tuned from.

    Raises:
        ConfigError: the run that it was tuned from is not there.
    """
    root = Path(checkpoint).resolve()
    folders = (root, *list(root.parents)[:3])
    run = next((folder for folder in folders if (folder / FILE).is_file()), None)
    if run is None:
        return None
    return read_yaml(lineage(run)[-1] / FILE).get(section) or None
