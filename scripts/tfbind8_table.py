"""Reward tuning on all DNA 8-mers: every method on one table, scored exactly.

    python scripts/tfbind8_table.py phase=tune file=path/to/tfbind8.npz
    python scripts/tfbind8_table.py phase=test
    python scripts/tfbind8_table.py phase=gradients
    python scripts/tfbind8_table.py phase=guidance order=2

`phase=tune` tries the candidates of every method on two other transcription factors, CRX and PAX6
(one seed), and keeps the best mean progress; `phase=test` runs the kept ones on SIX6, which ships,
or on `tables` of your file, with new seeds, at (within a tenth) as many rewards: those that tune
from a model guided by the reward (`base`) ask for more in an update and make as many fewer. Both
continue where they stopped; cells are in `work`. `phase=gradients` compares gradient estimators
with the exact gradient of J. `phase=guidance` scores the untuned model under reward guidance at
scale 1 / kl_weight, and `phase=cfg` a model of two classes under classifier-free guidance: their
laws are known exactly too. Progress is (J - J_pre) / (J* - J_pre) with J = E[r] - kl_weight KL,
all exact.
"""

from __future__ import annotations

import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffpolicy.commands.options import parse
from diffpolicy.config import KINDS
from diffpolicy.config_compose import compose
from diffpolicy.learn.material import SequenceMaterial
from diffpolicy.learn.methods import make_method
from diffpolicy.sequences.evaluate import exactly
from diffpolicy.sequences.exact import ExactLaw, StateSpace
from diffpolicy.sequences.guided import steered
from diffpolicy.sequences.metrics import quartiles
from diffpolicy.sequences.model import SequenceModel
from diffpolicy.sequences.oracles import score, train_oracles
from diffpolicy.sequences.task import open_task
from diffpolicy.sequences.tuning import tune
from diffpolicy.settings import from_values as build
from diffpolicy.training.settings import TrainerConfig
from tfbind8_candidates import Candidate, candidates

DEFAULTS: dict[str, Any] = {
    "phase": "test",
    "work": "runs/tfbind8_table",
    "file": None,
    "methods": None,
    "kl_weights": [0.1, 0.05],
    "updates": 800,
    "tune_updates": 300,
    "batch_size": 256,
    "seeds": 3,
    "output": None,
    "threads": 1,
    "tables": None,
    "order": 1,
}
TASK = "diffpolicy_envs:diffpolicy/TFBind8-v0"
TUNING_TABLES = ("CRX_REF_R1", "PAX6_REF_R1")
TEST_TABLE = "SIX6_REF_R1"


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

    def pretrained(self, table: str, seed: int, *, classes: bool = False) -> SequenceModel:
        """The model that is tuned, with the settings of experiment=tfbind8, or one of classes."""
        run = self.work / "pretrained" / f"{table}_{seed}{'_classes' if classes else ''}"
        if (run / "done").is_file():
            return SequenceModel.from_pretrained(run)
        config = build(KINDS["train sequences"], compose("train_sequences", ["experiment=tfbind8"]))
        spec = {
            "network": config.network,
            "process": config.process,
            "time_free": config.time_free,
        }
        if classes:
            spec |= {"label_quantiles": (0.9,), "cond_dropout": 0.2}
        task = self.task(table)
        found = SequenceModel.for_task(task, spec=spec, seed=seed)
        trainer = TrainerConfig(**{**config.trainer, "seed": seed, "progress": False})
        tokens, labels = task.training_data()
        found.learn(tokens, trainer, run, labels=labels if classes else None, overwrite=True)
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
        overrides = ["base=none", *candidate.overrides]
        config = build(KINDS["tune sequences"], compose("tune_sequences", overrides))
        base = {key: value for key, value in config.base.items() if key != "type"}
        trainer = {
            **config.trainer,
            "steps": updates // candidate.share,
            "batch_size": size if config.method["type"] != "sequence_pso" else size // 2,
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
            {**config.method, "kl_weight": kl_weight * candidate.kl_factor},
            TrainerConfig(**trainer),
            self.work / "runs" / name,
            base=base or None,
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
            "kl_factor": candidate.kl_factor,
            "updates": updates // candidate.share,
            "reward_evaluations": tuned.reward_calls,
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
    """The chosen candidates on the test table, or others."""
    choices = json.loads((bench.work / "tuning.json").read_text())["chosen"]
    chosen = [c for c in wanted(options) if choices.get(c.method) == c.label]
    for kl_weight in options["kl_weights"]:
        for name, candidate in itertools.product(options["tables"] or [TEST_TABLE], chosen):
            for seed in range(1, 1 + int(options["seeds"])):
                yield bench.cell(name, seed, kl_weight, candidate, options["updates"])


ESTIMATORS: dict[str, dict[str, Any]] = {
    **{
        f"gumbel_{t}": {"type": "pathwise", "relaxation": {"gumbel_temperature": t}}
        for t in (0.2, 0.5, 1.0)
    },
    **{
        f"straight_through_{b}": {
            "type": "pathwise",
            "relaxation": {"straight_through": True, "backward": b},
        }
        for b in ("gumbel", "probabilities", "reinmax")
    },
    "straight_through_probabilities_no_reference_graph": {
        "type": "pathwise",
        "relaxation": {"straight_through": True, "backward": "probabilities"},
        "reference_graph": False,
    },
    "policy_gradient_path": {"type": "policy_gradient", "kl": "path"},
    "policy_gradient_reward": {"type": "policy_gradient", "kl": "reward"},
}


def gradients(bench: Bench, options: dict[str, Any], *, batches: int = 40) -> list[dict[str, Any]]:
    """Cosine and size of every estimator's mean gradient, and of single batches, to the exact one.

    The exact gradient is that of ``E[r] - kl_weight KL`` of whole paths, which is what losses are
    of, at a model a little off the reference, where the divergence has a gradient too.
    """
    task, start, size = bench.task(TEST_TABLE), bench.pretrained(TEST_TABLE, 1), 256
    kl_weight = float(options["kl_weights"][0])
    moved = start.copy()
    noise = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in moved.denoiser.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=noise))
    space = StateSpace(4, 8)
    tokens = space.states[space.sequences]
    reward = torch.from_numpy(score(task.reward, tokens, 4))
    with torch.no_grad():
        reference = ExactLaw.of(start.denoiser, space)
    law = ExactLaw.of(moved.denoiser, space)
    objective = (law.p * reward).sum() - kl_weight * law.path_kl(reference)
    parameters = list(moved.denoiser.parameters())
    exact = _flat(torch.autograd.grad(objective, parameters, allow_unused=True), parameters)
    rows = []
    for name, config in ESTIMATORS.items():
        material = SequenceMaterial(task.reward, start.denoiser, size)
        method = make_method({**config, "kl_weight": kl_weight})
        loss = method.objective(moved.denoiser, material)
        generator = torch.Generator().manual_seed(1)
        found = []
        for _ in range(batches):
            mean = -loss({"index": torch.arange(size)}, generator).loss.mean()
            gradient = torch.autograd.grad(mean, parameters, allow_unused=True)
            found.append(_flat(gradient, parameters))
        every = torch.stack(found)
        average = every.mean(0)
        row = {
            "estimator": name,
            "cosine_of_mean": float(torch.cosine_similarity(average, exact, dim=0)),
            "size_of_mean": float(average.norm() / exact.norm()),
            "projection": float(average @ exact / exact.square().sum()),
            "cosine_of_batch": float(torch.cosine_similarity(every, exact[None]).mean()),
            "batches": batches,
            "batch_size": size,
        }
        rows.append(row)
        print(" ".join(f"{k} {v:.3f}" if isinstance(v, float) else str(v) for k, v in row.items()))
    return rows


def guidance(bench: Bench, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The exact law of the untuned model under reward guidance."""
    names = options["tables"] or [TEST_TABLE]
    seeds = range(1, 1 + int(options["seeds"]))
    for name, kl_weight, seed in itertools.product(names, options["kl_weights"], seeds):
        task, model = bench.task(name), bench.pretrained(name, seed)
        config = {"type": "reward", "scale": 1 / kl_weight, "order": int(options["order"])}
        known = {"method": "guidance", "table": name, "kl_weight": kl_weight, "seed": seed}
        yield {**known, "order": config["order"], **scored(model, task, kl_weight, config)}


def cfg(bench: Bench, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The exact law of a model of two classes, the upper tenth one of them, under CFG."""
    task, seeds = bench.task(TEST_TABLE), range(1, 1 + int(options["seeds"]))
    for seed in seeds:
        model = bench.pretrained(TEST_TABLE, seed, classes=True)
        for scale, kl_weight in itertools.product((1.0, 2.0, 3.0, 5.0), options["kl_weights"]):
            config = {"type": "cfg", "scale": scale}
            known = {"method": "cfg", "scale": scale, "kl_weight": kl_weight, "seed": seed}
            yield {**known, **scored(model, task, kl_weight, config)}


def scored(
    model: SequenceModel, task: Any, kl_weight: float, config: dict[str, Any]
) -> dict[str, Any]:
    """Exact scores of a model under guidance, and the CPU seconds that they took."""
    began = time.process_time()
    guided = steered(model, config, task.reward)
    found = exactly(model, model, task, kl_weight, guided=guided).scores._asdict()
    return {**found, "cpu_s": round(time.process_time() - began, 1)}


def _flat(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line per factor, method and weight, median [quartiles] over seeds."""
    head = ["factor", "method", "kl_weight", "progress", "E[r]", "KL", "J", "rewards", "CPU s"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for which in dict.fromkeys((r["table"], r["method"], r["kl_weight"]) for r in rows):
        group = [r for r in rows if (r["table"], r["method"], r["kl_weight"]) == which]
        cells = [str(part) for part in which]
        for key in ("progress", "reward", "kl", "objective"):
            found = quartiles([r[key] for r in group])
            cells.append("{median:.3f} [{q25:.3f}, {q75:.3f}]".format(**found))
        costs = ("reward_evaluations", "cpu_s")
        cells += [f"{statistics.median(r[key] for r in group):.0f}" for key in costs]
        lines.append("| " + " | ".join(cells) + " |")
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
    phases = {"test": testing, "gradients": gradients, "guidance": guidance, "cfg": cfg}
    if options["phase"] not in phases:
        raise SystemExit(f"phase must be tune or one of {[*phases]}, got {options['phase']!r}")
    test = options["phase"] == "test"
    rows = list(phases[options["phase"]](bench, options))
    print(table(rows) if test else json.dumps(rows, indent=1))
    if options["output"]:
        choices = json.loads((bench.work / "tuning.json").read_text()) if test else None
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
