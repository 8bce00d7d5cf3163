"""`diffpolicy rti`: warm starts for a trained policy, their level chosen from demonstrations."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffpolicy.commands.options import parse
from diffpolicy.commands.preflight import check_writable
from diffpolicy.config import ConfigError, read_yaml
from diffpolicy.files import write_atomic

DEFAULTS: dict[str, Any] = {
    "data": None,
    "num_steps": 3,
    "n_action_steps": 1,
    "episodes": 60,
    "solver": "ddim",
    "tail": "hold",
    "innovation": None,
    "seed": 0,
    "threads": None,
}


def help_text() -> str:
    """The text of `diffpolicy rti --help`."""
    return """\
usage: diffpolicy rti RUN OUTPUT [data=STORE] [key=value] ...

Real-time iteration: every plan after an episode's first starts from the last one, shifted, and
takes one to three network evaluations. The noise level it starts from is chosen from the
demonstrations and the trained policy alone (no rollouts); OUTPUT receives a policy with these
settings, and levels.json, which says why.

    data=STORE          demonstrations; default: the run's own
    num_steps=3         network evaluations per warm plan
    n_action_steps=1    actions executed per plan
    episodes=60         demonstrations used
    solver=ddim         ddim, ddpm, dpmpp_2m, unipc, ...
    tail=hold           what fills the end of the shifted plan: hold or extrapolate
    innovation=null     observations that jump by so many usual steps get a full solve; e.g. 3
    seed=0              of the choice of episodes and of the noise
    threads=null        torch threads

    diffpolicy rti runs/demo runs/demo_rti
    diffpolicy eval checkpoint=runs/demo_rti"""


def run(arguments: Sequence[str]) -> int:
    """Choose the level, write the policy, print the table."""
    options = parse(arguments, ["checkpoint", "output"], DEFAULTS)
    from diffpolicy.api import DiffusionPolicy
    from diffpolicy.commands.preflight import pick_device

    began = time.perf_counter()
    output = new_directory(options["output"])
    pick_device("cpu", options["threads"])
    policy = DiffusionPolicy.from_pretrained(options["checkpoint"])
    chosen, report = policy.choose_rti(
        demonstrations_of(options),
        num_steps=options["num_steps"],
        n_action_steps=options["n_action_steps"],
        episodes=options["episodes"],
        seed=options["seed"],
        solver=options["solver"],
        tail=options["tail"],
        innovation=options["innovation"],
    )
    write_policy(chosen, output, options["checkpoint"], {"levels.json": report.to_json()})
    print(report.table())
    result = {"t_start": report.t_start, "shift_error": report.shift_error}
    print("RESULT " + json.dumps({**result, "total_s": round(time.perf_counter() - began, 1)}))
    return 0


def new_directory(path: str) -> Path:
    """The output directory; it must not be there yet."""
    output = Path(path)
    if output.exists():
        raise ConfigError(f"{output} exists; give another OUTPUT or remove it")
    check_writable(output)
    return output


def demonstrations_of(options: dict[str, Any]) -> str:
    """The store to learn from: ``data=``, else what the run's configuration names."""
    if options["data"] is not None:
        return str(options["data"])
    file = Path(options["checkpoint"]) / "config.yaml"
    if file.is_file():
        path = (read_yaml(file).get("data") or {}).get("path")
        if path is not None and Path(path).exists():
            return str(path)
    raise ConfigError(
        f"{options['checkpoint']} does not say where its demonstrations are (or they are gone); "
        "give data=STORE"
    )


def write_policy(policy: Any, output: Path, source: str, extra: dict[str, Any]) -> None:
    """A run directory with the policy, notes about it, and the source's environment."""
    policy.save(output / "policy")
    for name, values in extra.items():
        write_atomic(output / name, json.dumps(values, indent=1) + "\n")
    config = Path(source) / "config.yaml"
    if config.is_file():  # so that `diffpolicy eval` knows the environment
        write_atomic(output / "config.yaml", config.read_bytes())
