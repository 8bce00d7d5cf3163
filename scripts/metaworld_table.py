"""Meta-World: a policy for each task from 50 scripted demonstrations, beside the expert itself.

    python scripts/metaworld_table.py [tasks=[pick-place, door-open, ...]] [seed=0] [steps=null]
                [data=data/metaworld] [runs=runs/metaworld] [output=metaworld.json]

For each task: ``diffpolicy data make metaworld/TASK``, ``diffpolicy train experiment=metaworld
env.kwargs.task=TASK threads=1`` (and ``trainer.steps=STEPS``), and the expert without noise on the
seeds of the policy's 50 episodes (300,000 and up). What is there is not made again, and the table
is written after every task, so that a run that was stopped goes on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from diffpolicy.cli import main as command_line
from diffpolicy.commands.options import parse
from diffpolicy.files import write_json
from diffpolicy.rollout.env_spec import EnvSpec
from diffpolicy.rollout.intervals import wilson_interval
from diffpolicy.rollout.pool.supervisor import Workers
from diffpolicy.rollout.record.experts import collect
from diffpolicy.settings import ConfigError
from diffpolicy.training.identity import machine

# Those that field reports name most.
TASKS = (
    "pick-place",
    "door-open",
    "drawer-open",
    "button-press",
    "peg-insert-side",
    "push",
    "reach",
    "window-open",
    "assembly",
    "hammer",
)
SCORES = range(300_000, 300_050)
DEFAULTS: dict[str, Any] = {
    "tasks": list(TASKS),
    "seed": 0,
    "steps": None,
    "data": "data/metaworld",
    "runs": "runs/metaworld",
    "output": "metaworld.json",
}


def expert_rate(task: str, store: Path) -> dict[str, Any]:
    """How often the expert succeeds on the seeds that the policy is scored on.

    Args:
        task: its name.
        store: where its episodes are kept; those that are there are not run again.

    Returns:
        The rate with its 95 % interval, as JSON values.
    """
    spec = EnvSpec("diffpolicy_envs:diffpolicy/MetaWorld-v0", {"task": task})
    workers = Workers(num_envs=10, num_workers=1)
    episodes = collect(spec, SCORES, store, workers=workers, keep="all", progress=False)
    successes = sum(bool(attrs["success"]) for attrs in episodes.episode_attrs)
    return wilson_interval(successes, episodes.num_episodes)._asdict()


def diffpolicy(*words: str) -> None:
    """Run a command of the library.

    Raises:
        RuntimeError: it failed; it has said why.
    """
    if command_line(list(words)) != 0:
        raise RuntimeError(f"diffpolicy {' '.join(words)} failed")


def train(
    experiment: str, task: str, store: Path, run: Path, seed: int, settings: Mapping[str, Any]
) -> None:
    """Train and score a policy of one task, unless that is done; what was interrupted goes on.

    Args:
        experiment: ``experiment=NAME``, of an environment with tasks.
        task: one of them.
        store: its demonstrations.
        run: where the policy and its ``eval.json`` are left.
        seed: of the training.
        settings: further ones, by their dotted names.

    Raises:
        ConfigError: the run that is there has other settings.
        RuntimeError: a command failed; it has said why.
    """
    if (run / "config.yaml").is_file():
        check_same(run, settings)
        if not (run / "eval.json").is_file():
            diffpolicy("resume", str(run))
        return
    said = {"env.kwargs.task": task, "data.path": store, "seed": seed, "threads": 1}
    said |= {"trainer.progress": "false", "run_dir": run, **settings}
    diffpolicy("train", experiment, *(f"{k}={'null' if v is None else v}" for k, v in said.items()))


def check_same(run: Path, settings: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if a run has other settings, so that its score is no one else's."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    for name, wanted in settings.items():
        found = config
        for key in name.split("."):
            found = found.get(key) if isinstance(found, Mapping) else None
        if name != "algorithm" and found != wanted:
            raise ConfigError(f"{run} has {name}={found}, not {wanted}; give another runs=FOLDER")


def row(task: str, seed: int, steps: int | None, data: Path, runs: Path) -> dict[str, Any]:
    """Make, train and score one task, or read what is there.

    Raises:
        RuntimeError: a command failed; it has said why.
    """
    store, run = data / f"{task}.zarr", runs / f"{task}_seed{seed}"
    diffpolicy("data", "make", f"metaworld/{task}", f"out={store}")
    settings = {} if steps is None else {"trainer.steps": steps}
    train("experiment=metaworld", task, store, run, seed, settings)
    result = json.loads((run / "eval.json").read_text())
    summary = result["summary"]
    done = yaml.safe_load((run / "config.yaml").read_text())["trainer"]["steps"]
    said = f"env.kwargs.task={task} seed={seed} trainer.steps={done}"
    return {
        "task": task,
        "command": f"diffpolicy train experiment=metaworld {said}",
        "seed": seed,
        "training_steps": done,
        "success": summary["success"],
        "expert": expert_rate(task, runs / "expert" / f"{task}.zarr"),
        "steps_per_episode": summary["length"]["value"],
        "nfe_per_plan": summary["nfe_per_plan"],
        "versions": result["env"]["versions"],
    }


def main(arguments: list[str]) -> int:
    """Make the table; see the top of the file."""
    options = parse(arguments, [], DEFAULTS)
    output = Path(options["output"])
    table = json.loads(output.read_text()) if output.is_file() else {"rows": []}
    rows = {(one["task"], one["seed"], one["training_steps"]): one for one in table["rows"]}
    for task in options["tasks"]:
        places = Path(options["data"]), Path(options["runs"])
        found = row(task, options["seed"], options["steps"], *places)
        rows[task, found["seed"], found["training_steps"]] = found
        write_json(output, {"machine": machine(torch.device("cpu")), "rows": list(rows.values())})
        ours, expert = found["success"], found["expert"]
        print(
            f"{task}: {ours['value']:.2f} ({ours['low']:.2f}-{ours['high']:.2f}), "
            f"the expert {expert['value']:.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
