"""Dataset x algorithm x seeds: every cell trained, evaluated and put into one table of scores."""

from __future__ import annotations

import fnmatch
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffpolicy.commands.options import parse
from diffpolicy.files import write_atomic
from diffpolicy.settings import ConfigError
from reproduce.cells import (
    ALGORITHMS,
    ERRORS,
    LOCOMOTION,
    Cell,
    Reproduction,
    plan,
    state_of,
)
from reproduce.datasets import Toy, facts_of, settings_sources
from reproduce.intervals import INTERVALS
from reproduce.running import run_beside, run_here
from reproduce.table import aggregates_of, rows_of, text

OPTIONS: dict[str, Any] = {
    "datasets": None,
    "algorithms": None,
    "seeds": 3,
    "baseline": "bc",
    "only": None,
    "jobs": 1,
    "runs": None,
    "output": None,
    "toy": False,
}


def reproduce(
    wanted: Reproduction,
    runs: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    command: Sequence[str] = (),
) -> tuple[dict[str, Any], int]:
    """Train and evaluate what is not done yet; write the table after every cell.

    Args:
        wanted: datasets, algorithms, seeds and settings.
        runs: folder of the runs; those that are done are read from their ``eval.json``. The data of
            a toy are made there as well.
        output: JSON file.
        command: recorded.

    Returns:
        What the file holds, and an exit status: 0, 1 if a cell has no scores although it was asked
        for, 130 after an interruption.

    Raises:
        ConfigError: names or overrides that are wrong for all cells.
    """
    toy = Toy(Path(runs) / "toy_data") if wanted.toy else None
    cells = plan(wanted, Path(runs), toy)
    states = {cell.run: state_of(cell) for cell in cells}
    facts = _prepare(cells, states)
    for mine in facts.values():
        mine["toy"] = wanted.toy
    report = _Report(wanted, states, facts, Path(output), command)
    chosen = [c for c in cells if _is_wanted(c, wanted.only) and _can_run(states[c.run])]
    outcomes = run_here(chosen) if wanted.jobs == 1 else run_beside(chosen, wanted.jobs)
    code = 0
    try:
        with closing(outcomes):
            for cell, failure in outcomes:
                states[cell.run] = state_of(cell)
                if failure is not None:
                    states[cell.run] |= {"status": "failed", "reason": failure}
                    print(f"{cell.run}: {failure}", file=sys.stderr)
                report.write()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        states.update({c.run: state_of(c) for c in chosen if _can_run(states[c.run])})
        code = 130
    asked = [states[c.run]["status"] for c in cells if _is_wanted(c, wanted.only)]
    return report.write(), code or int(any(status != "done" for status in asked))


def _is_wanted(cell: Cell, only: Sequence[str] | None) -> bool:
    return only is None or any(fnmatch.fnmatchcase(cell.run, pattern) for pattern in only)


def _can_run(state: Mapping[str, Any]) -> bool:
    return state["status"] in ("to do", "interrupted")


def _prepare(cells: Sequence[Cell], states: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The data of every dataset, made before processes could make them side by side."""
    from diffpolicy.commands.stores import open_store

    facts: dict[str, dict[str, Any]] = {}
    for dataset in dict.fromkeys(cell.dataset for cell in cells):
        mine = [cell for cell in cells if cell.dataset == dataset]
        config = next((cell.config for cell in mine if cell.config is not None), None)
        store, problem = None, None
        if config is not None:
            try:
                store = open_store(config)
            except ERRORS as error:
                problem = str(error)
        facts[dataset.name] = facts_of(dataset, store)
        for cell in mine:
            if problem is not None and _can_run(states[cell.run]):
                states[cell.run] |= {"status": "missing", "reason": problem}
    return facts


@dataclass(frozen=True)
class _Report:
    wanted: Reproduction
    states: Mapping[str, dict[str, Any]]
    facts: dict[str, dict[str, Any]]
    path: Path
    command: Sequence[str]

    def write(self) -> dict[str, Any]:
        """Tabulates what is done and writes the file whole or not at all."""
        wanted, facts = self.wanted, self.facts
        for name, mine in facts.items():
            found = [s for s in self.states.values() if s["dataset"] == name and "label" in s]
            mine["label"] = _label(found[0]["label"]) if found else None
        rows = rows_of(self.states, facts, wanted.algorithms, wanted.baseline)
        scored = [r["dataset"] for r in rows if r["metric"] == "normalized"]
        report = portable(
            {
                "command": shlex.join(self.command),
                "commit": commit(),
                "machine": machine(),
                "settings": {**asdict(wanted), "intervals": INTERVALS},
                "settings_sources": settings_sources(),
                "table": rows,
                "aggregate": aggregates_of(rows, list(dict.fromkeys(scored))),
                "datasets": facts,
                "cells": dict(self.states),
            }
        )
        write_atomic(self.path, json.dumps(report, indent=1, allow_nan=False) + "\n")
        return dict(report)


def _label(label: Mapping[str, Any]) -> str:
    env, versions = label["env"], label["versions"]
    kwargs = f" {env['kwargs']}" if env.get("kwargs") else ""
    limit = f", {env['max_episode_steps']} steps" if env.get("max_episode_steps") else ""
    verdict = "comparable" if label.get("comparable") else "not comparable"
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{env['id']}{kwargs}{limit}; {verdict} with D4RL ({label['note']}); {made}"


def commit() -> str | None:
    """The commit of the working tree that this file lies in, ``+`` after changes; None outside."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        state = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except OSError:
        return None
    if found.returncode:
        return None
    return found.stdout.strip()[:12] + ("+" if state.stdout.strip() else "")


def machine() -> dict[str, Any]:
    """What this machine is, without its name."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


_ABSOLUTE = re.compile(r"""(?<![\w.~:/])/(?:[^/\s'",]+/)*([^/\s'",]+)""")


def portable(value: Any) -> Any:
    """JSON values with nothing of an absolute path but its last part."""
    if isinstance(value, str):
        return _ABSOLUTE.sub(r"\1", value)
    if isinstance(value, Mapping):
        return {str(name): portable(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [portable(entry) for entry in value]
    return value


def parse_options(arguments: Sequence[str]) -> tuple[Reproduction, dict[str, Any]]:
    """What the arguments ask for, and the options ``runs`` and ``output``.

    Raises:
        ConfigError: an argument that is not ``key=value``, or a value of another kind.
    """
    bare = [a for a in arguments if "=" not in a]
    if bare:
        raise ConfigError(f"options are given as key=value; got {bare}")
    own = [a for a in arguments if a.removeprefix("--").partition("=")[0] in OPTIONS]
    options = parse(own, [], OPTIONS)
    toy = options["toy"]
    seeds = options["seeds"] if any(a.startswith("seeds=") for a in own) or not toy else 1
    datasets = _names(options["datasets"]) or (LOCOMOTION[1:2] if toy else LOCOMOTION)
    if not isinstance(options["jobs"], int):
        raise ConfigError(f"jobs must be a number, got {options['jobs']!r}")
    wanted = Reproduction(
        datasets=datasets,
        algorithms=_names(options["algorithms"]) or ALGORITHMS,
        seeds=_seeds(seeds),
        overrides=tuple(a for a in arguments if a not in own),
        baseline=str(options["baseline"]),
        only=_names(options["only"]),
        jobs=options["jobs"],
        toy=toy,
    )
    return wanted, options


def _names(value: Any) -> tuple[str, ...] | None:
    """``[a,b]``, ``a,b`` or a JSON list."""
    if value is None:
        return None
    if isinstance(value, list):
        return tuple(map(str, value))
    parts = str(value).removeprefix("[").removesuffix("]").split(",")
    return tuple(part.strip() for part in parts if part.strip())


def _seeds(value: Any) -> tuple[int, ...]:
    if isinstance(value, int) and not isinstance(value, bool):
        return tuple(range(value))
    if isinstance(value, list) and all(isinstance(seed, int) for seed in value):
        return tuple(value)
    raise ConfigError(f"seeds is how many, or a list such as [0,1,2]; got {value!r}")


def main(arguments: Sequence[str]) -> int:
    """Run the command; prints the table and returns an exit status."""
    wanted, options = parse_options(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) if wanted.toy else Path()
        runs = Path(options["runs"] or base / "runs" / "d4rl")
        output = Path(options["output"] or base / "d4rl.json")
        command = ["python", "scripts/reproduce_d4rl.py", *arguments]
        report, code = reproduce(wanted, runs, output, command=command)
    print(text(report))
    return code
