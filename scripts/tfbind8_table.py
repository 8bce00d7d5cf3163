"""Reward tuning on all DNA 8-mers: every method on one table, scored exactly.

    python scripts/tfbind8_table.py phase=tune file=path/to/tfbind8.npz
    python scripts/tfbind8_table.py phase=test

`phase=tune` tries the candidates of every method on two other transcription factors, CRX and PAX6
(one seed), and keeps the best mean progress; `phase=test` runs the kept ones on SIX6, which ships,
with new seeds, at the same number of updates and rewards per update. Both continue where they
stopped; cells are in `work`. Progress is (J - J_pre) / (J* - J_pre) with J = E[r] - kl_weight KL,
all exact.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from diffpolicy.commands.options import parse
from diffpolicy.config_sequences import load_finetune, load_sequence_train
from diffpolicy.sequences.model import SequenceModel
from diffpolicy.sequences.oracles import train_oracles
from diffpolicy.sequences.task import open_task
from diffpolicy.sequences.tuning import exactly, tune
from diffpolicy.training.settings import TrainerConfig

DEFAULTS: dict[str, Any] = {
    "phase": "test",
    "work": "runs/tfbind8_table",
    "file": None,
    "methods": None,
    "kl_weights": [0.1, 0.05],
    "updates": 1000,
    "tune_updates": 500,
    "batch_size": 256,
    "seeds": 3,
    "output": None,
    "threads": 1,
}
TASK = "diffpolicy_envs:diffpolicy/TFBind8-v0"
TUNING_TABLES = ("CRX_REF_R1", "PAX6_REF_R1")
TEST_TABLE = "SIX6_REF_R1"


class Candidate(NamedTuple):
    """One way to run a method."""

    method: str
    label: str
    overrides: tuple[str, ...]


def candidates() -> list[Candidate]:
    """What is tried per method: equally many each."""
    rates = ("2e-3", "5e-3")
    grid: dict[str, tuple[str, list[tuple[str, ...]]]] = {
        "drakes_gumbel": (
            "drakes",
            [
                (
                    "finetune.relaxation.straight_through=false",
                    "finetune.relaxation.backward=gumbel",
                    f"finetune.relaxation.gumbel_temperature={t}",
                )
                for t in (0.3, 0.6)
            ],
        ),
        "drakes": (
            "drakes",
            [(f"finetune.relaxation.backward={b}",) for b in ("probabilities", "reinmax")],
        ),
        "policy_gradient": (
            "policy_gradient",
            [("finetune.kl=path",), ("finetune.kl=path", "finetune.epochs=2")],
        ),
        "wdce": ("wdce", [("finetune.min_ess=0.1",), ("finetune.min_ess=0.3",)]),
        "vidd": ("vidd", [("finetune.min_ess=null",), ("finetune.min_ess=0.3",)]),
        "sdpo": ("sdpo", [("finetune.group_size=8",), ("finetune.group_size=32",)]),
    }
    return [
        Candidate(name, f"{number}-{rate}", (f"finetune={kind}", *extra, f"trainer.lr={rate}"))
        for name, (kind, settings) in grid.items()
        for number, extra in enumerate(settings)
        for rate in rates
    ]


class Bench:
    """Tasks, pre-trained models and cells in a working directory."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options, self.work = options, Path(options["work"])

    def task(self, table: str) -> Any:
        """The task of a transcription factor."""
        if table == TEST_TABLE:
            return open_task(TASK)
        if self.options["file"] is None:
            raise SystemExit(f"{table} does not ship: give file=path/to/tfbind8.npz")
        return open_task(TASK, table=table, file=str(self.options["file"]))

    def pretrained(self, table: str, seed: int) -> SequenceModel:
        """The model that is tuned, with the settings of experiment=tfbind8."""
        run = self.work / "pretrained" / f"{table}_{seed}"
        if (run / "done").is_file():
            return SequenceModel.from_pretrained(run)
        config = load_sequence_train(["experiment=tfbind8"])
        spec = {
            "network": config.network,
            "process": config.process,
            "time_free": config.time_free,
        }
        task = self.task(table)
        found = SequenceModel.for_task(task, spec=spec, seed=seed)
        trainer = TrainerConfig(**{**config.trainer, "seed": seed, "progress": False})
        found.learn(task.training_data()[0], trainer, run, overwrite=True)
        (run / "done").write_text("")
        return found

    def cell(
        self, table: str, seed: int, kl_weight: float, candidate: Candidate, updates: int
    ) -> dict[str, Any]:
        """Run one tuning, or read it."""
        name = f"{table}_{seed}_{kl_weight}_{candidate.method}_{candidate.label}_{updates}"
        file = self.work / "cells" / f"{name}.json"
        if file.is_file():
            return dict(json.loads(file.read_text()))
        size = int(self.options["batch_size"])
        config = load_finetune(list(candidate.overrides))
        trainer = {
            **config.trainer,
            "steps": updates,
            "batch_size": size,
            "seed": 300_000 + seed,
            "eval_every": None,
            "log_every": 100,
            "progress": False,
        }
        task, start = self.task(table), self.pretrained(table, seed)
        oracles = train_oracles(task, self.work / "oracles", TrainerConfig())
        began, cpu = time.perf_counter(), time.process_time()
        tuned = tune(
            start,
            oracles,
            {**config.finetune, "kl_weight": kl_weight},
            TrainerConfig(**trainer),
            self.work / "runs" / name,
            eval_draws=16,
            overwrite=True,
        )
        if tuned.interrupted:
            raise SystemExit("stopped; run the same command again to go on")
        row = {
            "table": table,
            "seed": seed,
            "kl_weight": kl_weight,
            "method": candidate.method,
            "label": candidate.label,
            "overrides": list(candidate.overrides),
            "updates": updates,
            "reward_evaluations": updates * size,
            "wall_s": time.perf_counter() - began,
            "cpu_s": time.process_time() - cpu,
            **exactly(tuned.model, start, task, kl_weight).scores._asdict(),
        }
        write_json(file, row)
        print(
            f"{name}: progress {row['progress']:.3f}, reward {row['reward']:.3f}, "
            f"KL {row['kl']:.3f}, {row['cpu_s']:.0f} s",
            flush=True,
        )
        return row


def wanted(options: dict[str, Any]) -> list[Candidate]:
    """The candidates of the methods that were asked for."""
    names = options["methods"]
    found = [c for c in candidates() if names is None or c.method in names]
    if not found:
        raise SystemExit(f"no such methods; choose from {sorted({c.method for c in candidates()})}")
    return found


def tuning(bench: Bench, options: dict[str, Any]) -> dict[str, Any]:
    """Mean progress of every candidate on the tuning tables, and the best per method."""
    means: dict[str, dict[str, float]] = {}
    for candidate in wanted(options):
        rows = [
            bench.cell(table, 0, options["kl_weights"][0], candidate, options["tune_updates"])
            for table in TUNING_TABLES
        ]
        mean = statistics.fmean(r["progress"] for r in rows)
        means.setdefault(candidate.method, {})[candidate.label] = mean
    chosen = {method: max(found, key=lambda k: found[k]) for method, found in means.items()}
    return {"candidates": means, "chosen": chosen}


def testing(bench: Bench, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The chosen candidates on the test table."""
    choices = json.loads((bench.work / "tuning.json").read_text())["chosen"]
    for candidate in wanted(options):
        if choices.get(candidate.method) == candidate.label:
            for kl_weight in options["kl_weights"]:
                for seed in range(1, 1 + int(options["seeds"])):
                    yield bench.cell(TEST_TABLE, seed, kl_weight, candidate, options["updates"])


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line per method and weight, mean (least to most) over seeds."""
    lines = [
        "| method | kl_weight | progress | E[r] | KL | J | CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, weight in dict.fromkeys((r["method"], r["kl_weight"]) for r in rows):
        group = [r for r in rows if (r["method"], r["kl_weight"]) == (method, weight)]

        def show(key: str, group: list[dict[str, Any]] = group, digits: int = 3) -> str:
            values = [r[key] for r in group]
            mean = statistics.fmean(values)
            return f"{mean:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"

        cells = (show("progress"), show("reward"), show("kl"), show("objective"))
        cpu = statistics.fmean(r["cpu_s"] for r in group)
        lines.append(f"| {method} | {weight} | {' | '.join(cells)} | {cpu:.0f} |")
    return "\n".join(lines)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace ``path`` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def main(arguments: list[str]) -> int:
    """Run a phase."""
    options = parse(arguments, [], DEFAULTS)
    torch.set_num_threads(int(options["threads"]))
    bench = Bench(options)
    bench.work.mkdir(parents=True, exist_ok=True)
    if options["phase"] == "tune":
        result: dict[str, Any] = tuning(bench, options)
        old = bench.work / "tuning.json"
        before = json.loads(old.read_text()) if old.is_file() else {"candidates": {}, "chosen": {}}
        result = {key: {**before[key], **result[key]} for key in ("candidates", "chosen")}
        write_json(old, result)
        print(json.dumps(result, indent=1))
        return 0
    if options["phase"] != "test":
        raise SystemExit(f"phase must be tune or test, got {options['phase']!r}")
    rows = list(testing(bench, options))
    print(table(rows))
    if options["output"]:
        choices = json.loads((bench.work / "tuning.json").read_text())
        command = "python scripts/tfbind8_table.py " + " ".join(arguments)
        record = {
            "command": command,
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s)",
            "tuning": choices,
            "rows": rows,
        }
        write_json(Path(options["output"]), record)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
