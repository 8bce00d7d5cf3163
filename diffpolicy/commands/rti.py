"""`diffpolicy rti`: warm starts for a trained policy, their level chosen from demonstrations."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffpolicy.commands.options import Option, options_help, parse
from diffpolicy.commands.preflight import check_writable
from diffpolicy.config import ConfigError, read_yaml
from diffpolicy.files import write_atomic, write_json

OPTIONS = {
    "data": Option(None, "store of demonstrations; null: the run's own"),
    "num_steps": Option(3, "network evaluations per warm plan"),
    "n_action_steps": Option(1, "actions executed per plan"),
    "episodes": Option(60, "demonstrations used"),
    "solver": Option("ddim", "ddim, ddpm, dpmpp_2m, unipc, ..."),
    "tail": Option("hold", "what fills the end of the shifted plan: hold or extrapolate"),
    "innovation": Option(
        None, "observations that jump by so many usual steps get a full solve; e.g. 3"
    ),
    "seed": Option(0, "of the choice of episodes and of the noise"),
    "threads": Option(None, "torch threads"),
}


def help_text() -> str:
    """Return the text of `diffpolicy rti --help`."""
    return f"""\
usage: diffpolicy rti RUN OUTPUT [data=STORE] [key=value] ...

Real-time iteration: every plan after an episode's first starts from the last one, shifted, and
takes one to three network evaluations. The noise level it starts from is chosen from the
demonstrations and the trained policy alone (no rollouts); OUTPUT receives a policy with these
settings, and levels.json, which says why.

{options_help(OPTIONS)}

    diffpolicy rti runs/demo runs/demo_rti
    diffpolicy eval checkpoint=runs/demo_rti"""


def run(arguments: Sequence[str]) -> int:
    """Choose the level, write the policy, print the table."""
    options = parse(arguments, ["checkpoint", "output"], OPTIONS)
    from diffpolicy.api import DiffusionPolicy
    from diffpolicy.commands.preflight import pick_device

    began = time.perf_counter()
    checkpoint, output = options.pop("checkpoint"), new_directory(options.pop("output"))
    pick_device("cpu", options.pop("threads"))
    policy = DiffusionPolicy.from_pretrained(checkpoint)
    data = demonstrations_of(checkpoint, options.pop("data"))
    chosen, report = policy.choose_rti(data, **options)
    write_policy(chosen, output, checkpoint, {"levels.json": report.to_json()})
    print(report.table())
    result = {"t_start": report.t_start, "shift_error": report.shift_error}
    print("RESULT " + json.dumps({**result, "total_s": round(time.perf_counter() - began, 1)}))
    return 0


def new_directory(path: str) -> Path:
    """Return the output directory, which must not be there yet."""
    output = Path(path)
    if output.exists():
        raise ConfigError(f"{output} exists; give another OUTPUT or remove it")
    check_writable(output)
    return output


def demonstrations_of(checkpoint: str, data: str | None) -> str:
    """Return the store to learn from: ``data``, or what the configuration of the run names."""
    if data is not None:
        return str(data)
    file = Path(checkpoint) / "config.yaml"
    path = (read_yaml(file).get("data") or {}).get("path") if file.is_file() else None
    if path is None or not Path(path).exists():
        raise ConfigError(
            f"{checkpoint} does not say where its demonstrations are (or they are gone); "
            "give data=STORE"
        )
    return str(path)


def write_policy(policy: Any, output: Path, source: str, extra: dict[str, Any]) -> None:
    """Write a run directory with the policy, notes about it, and the source's environment."""
    policy.save(output / "policy")
    for name, values in extra.items():
        write_json(output / name, values)
    config = Path(source) / "config.yaml"
    if config.is_file():  # so that `diffpolicy eval` knows the environment
        write_atomic(output / "config.yaml", config.read_bytes())
