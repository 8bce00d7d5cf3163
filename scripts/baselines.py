"""Diffusion beside the baselines that papers compare with first: data x algorithms x seeds.

    python scripts/baselines.py [sets=[metaworld/reach, ocbench/block-lite-single-task1, ...]]
                [algorithms=[diffusion, bc_mlp, bc_gmm, act]] [seeds=[0]] [steps=3000]
                [demonstrations=50] [episodes=50] [data=data] [runs=runs/baselines]
                [output=baselines.json]

A cell is ``diffpolicy data make SET`` and ``diffpolicy train experiment=BENCHMARK
env.kwargs.task=TASK algorithm=ALGORITHM``: all algorithms have the same demonstrations, windows,
number of steps, batch size, learning rate and episodes (seeds 300,000 and up), and are scored with
their last weights. Seeds come one after the other, in each the algorithms, of each the sets, the
cheapest first. What is done is not done again, an interrupted training goes on, and the table is
written after every cell.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffpolicy.commands.options import parse
from diffpolicy.files import write_json
from diffpolicy.rollout.intervals import paired_difference
from diffpolicy.rollout.results import EvalResult
from diffpolicy.settings import check_choice
from diffpolicy.training.identity import machine
from metaworld_table import diffpolicy, train

ALGORITHMS = ("diffusion", "bc_mlp", "bc_gmm", "act")
# By what an episode costs that fails, which is where most of the time goes.
SETS = (
    "metaworld/reach",
    "metaworld/button-press",
    "ocbench/block-lite-single-task1",
    "metaworld/push",
    "metaworld/hammer",
    "metaworld/pick-place",
    "metaworld/peg-insert-side",
    "metaworld/assembly",
)
DEFAULTS: dict[str, Any] = {
    "sets": list(SETS),
    "algorithms": list(ALGORITHMS),
    "seeds": [0],
    "steps": 3000,
    "demonstrations": 50,
    "episodes": 50,
    "data": "data",
    "runs": "runs/baselines",
    "output": "baselines.json",
}


def cell(name: str, algorithm: str, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Make, train and score one cell, or read what is there.

    Args:
        name: of the set, ``BENCHMARK/TASK``.
        algorithm: one of `ALGORITHMS`.
        seed: of the training.
        options: of the command.

    Returns:
        What is in the table, as JSON values.

    Raises:
        RuntimeError: a command failed; it has said why.
    """
    benchmark, task = name.split("/")
    store = Path(options["data"]) / f"{name}.zarr"
    run = Path(options["runs"]) / f"{benchmark}_{task}_{algorithm}_seed{seed}"
    settings = {
        "trainer.steps": options["steps"],
        "trainer.eval_every": None,
        "evaluation.val_episodes": 0,
        "evaluation.episodes": options["episodes"],
    }
    settings |= {} if algorithm == "diffusion" else {"algorithm": algorithm}
    diffpolicy("data", "make", name, f"out={store}", f"episodes={options['demonstrations']}")
    train(f"experiment={benchmark}", task, store, run, seed, settings)
    result = EvalResult.load(run / "eval.json")
    return {
        "set": name,
        "algorithm": algorithm,
        "seed": seed,
        "steps": options["steps"],
        "demonstrations": options["demonstrations"],
        "success": result.summary["success"],
        "episodes": [int(bool(one.success)) for one in result.episodes],
        "length": result.summary["length"]["value"],
        "nfe_per_plan": result.summary["nfe_per_plan"],
        "parameters": _parameters(run),
        "versions": result.env["versions"],
    }


def _parameters(run: Path) -> int:
    """How many weights the policy of a run has."""
    from diffpolicy import DiffusionPolicy

    return sum(p.numel() for p in DiffusionPolicy.from_pretrained(run).denoiser.parameters())


def compared(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Diffusion minus each baseline on each set, paired by training seed and episode.

    Returns:
        A row for each set and baseline of which both have a cell, as JSON values: ``difference``
        with its 95 % interval; ``better`` says whether diffusion is above, ``below`` or neither.
    """
    known = {(one["set"], one["algorithm"], one["seed"]): one["episodes"] for one in cells}
    rows = []
    for name in dict.fromkeys(one["set"] for one in cells):
        for algorithm in dict.fromkeys(one["algorithm"] for one in cells):
            both = [
                (episodes, known[name, algorithm, seed])
                for (of, kind, seed), episodes in known.items()
                if (of, kind) == (name, "diffusion") and (name, algorithm, seed) in known
            ]
            if algorithm == "diffusion" or not both:
                continue
            found = paired_difference(*np.concatenate(both, axis=1))
            better = "diffusion" if found.low > 0 else algorithm if found.high < 0 else None
            row = {"set": name, "baseline": algorithm, "seeds": len(both)}
            rows.append({**row, "difference": found.to_dict(), "better": better})
    return rows


def main(arguments: list[str]) -> int:
    """Run the cells that are not done, and write the table; see the top of the file."""
    options = parse(arguments, [], DEFAULTS)
    for algorithm in options["algorithms"]:
        check_choice("algorithms", algorithm, ALGORITHMS)
    output = Path(options["output"])
    cells: dict[tuple[Any, ...], dict[str, Any]] = {}
    if output.is_file():
        kept = json.loads(output.read_text())["cells"]
        cells = {(c["set"], c["algorithm"], c["seed"], c["steps"]): c for c in kept}
    for seed in options["seeds"]:
        for algorithm in options["algorithms"]:
            for name in options["sets"]:
                one = cell(name, algorithm, seed, options)
                cells[name, algorithm, seed, options["steps"]] = one
                found = list(cells.values())
                table = {"cells": found, "against_diffusion": compared(found)}
                write_json(output, {"machine": machine(torch.device("cpu")), **table})
                rate = one["success"]
                ends = f"({rate['low']:.2f}-{rate['high']:.2f})"
                print(f"{name} {algorithm} seed {seed}: {rate['value']:.2f} {ends}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
