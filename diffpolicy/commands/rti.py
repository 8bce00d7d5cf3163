"""`diffpolicy rti`: warm starts for a trained policy, their level chosen from demonstrations.

usage: diffpolicy rti RUN OUTPUT [data=STORE] [key=value] ...

Real-time iteration: every plan after an episode's first starts from the last one, shifted, and
takes one to three network evaluations. The noise level it starts from is chosen from the
demonstrations and the trained policy alone (no rollouts); OUTPUT receives a policy with these
settings, and levels.json, which says why.

$options

    diffpolicy rti runs/demo runs/demo_rti
    diffpolicy eval checkpoint=runs/demo_rti
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpolicy.commands.lineage import recorded
from diffpolicy.commands.options import Option, helped, options_help, parse
from diffpolicy.config_compose import read_yaml
from diffpolicy.files import write_atomic, write_json
from diffpolicy.settings import ConfigError

if TYPE_CHECKING:
    from diffpolicy.api import DiffusionPolicy
    from diffpolicy.data.joined import Stored

    Derived = tuple[DiffusionPolicy, dict[str, Any], dict[str, Any]]

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
    """This module's own text."""
    return helped(__doc__, options=options_help(OPTIONS))


def run(arguments: Sequence[str]) -> int:
    """Choose the level, write the policy, print the table."""
    return derive(arguments, OPTIONS, _warm_starts)


def _warm_starts(policy: DiffusionPolicy, data: Stored, options: dict[str, Any]) -> Derived:
    chosen, report = policy.choose_rti(data, **options)
    print(report.table())
    result = {"t_start": report.t_start, "shift_error": report.shift_error}
    return chosen, {"levels.json": report.to_json()}, result


def derive(
    arguments: Sequence[str],
    options: Mapping[str, Option],
    change: Callable[[DiffusionPolicy, Stored, dict[str, Any]], Derived],
) -> int:
    """Make a policy of a trained one and demonstrations, and write a run directory with it.

    Args:
        arguments: of the command: RUN, OUTPUT and its options.
        options: of the command, ``data`` and ``threads`` among them.
        change: the policy, the demonstrations (or their path) and the other options into the new
            policy, what is written beside it (JSON values by file name) and what is printed.

    Returns:
        The command's exit status.
    """
    given = parse(arguments, ["checkpoint", "output"], options)
    from diffpolicy.api import DiffusionPolicy
    from diffpolicy.commands.preflight import check_writable, pick_device

    began = time.perf_counter()
    checkpoint, output = Path(given.pop("checkpoint")), Path(given.pop("output"))
    if output.exists():
        raise ConfigError(f"{output} exists; give another OUTPUT or remove it")
    check_writable(output)
    pick_device("cpu", given.pop("threads"))
    data = demonstrations_of(checkpoint, given.pop("data"))
    policy, files, result = change(DiffusionPolicy.from_pretrained(checkpoint), data, given)
    policy.save(output / "policy")
    for name, values in files.items():
        write_json(output / name, values)
    config = checkpoint / "config.yaml"
    if config.is_file():  # so that `diffpolicy eval` knows the environment
        write_atomic(output / "config.yaml", config.read_bytes())
    print("RESULT " + json.dumps({**result, "total_s": round(time.perf_counter() - began, 1)}))
    return 0


def demonstrations_of(checkpoint: str | Path, data: str | None) -> Stored:
    """Return the store to learn from: ``data``, or what the configuration of the run names.

    It has goals in hindsight where those that the policy was trained on had.
    """
    file = Path(checkpoint) / "config.yaml"
    own = read_yaml(file).get("demonstrations") if file.is_file() else None
    told: dict[str, Any] = {}
    # A tuned run says which run it was tuned from, and that one its data; it may be gone.
    with suppress(*([ConfigError] if data or own else [])):
        told = recorded(checkpoint, "data") or {}
    path = data or own or told.get("path")
    if path is None or not (data or Path(path).exists()):
        raise ConfigError(
            f"{checkpoint} does not say where its demonstrations are (or they are gone); "
            "give data=STORE"
        )
    if told.get("goals") is None:
        return str(path)
    from diffpolicy.commands.stores import with_goals
    from diffpolicy.data.store import EpisodeStore

    return with_goals(EpisodeStore.open(path), told["goals"])
