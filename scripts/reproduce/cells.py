"""The cells of a reproduction (dataset, algorithm, seed): what they are and what they came to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from diffpolicy.config import TrainConfig, load_train
from diffpolicy.config_compose import group_choices, read_yaml
from diffpolicy.settings import ConfigError
from diffpolicy.settings import from_values as build
from diffpolicy.training.checkpoint import read_pointer
from reproduce.datasets import Dataset, Toy, quoted, resolve, settings_of

LOCOMOTION = tuple(
    f"{agent}-{level}-v2"
    for level in ("medium-expert", "medium", "medium-replay")
    for agent in ("halfcheetah", "hopper", "walker2d")
)
ALGORITHMS = (
    "bc",
    "diffusion_ql",
    "idql",
    "edp",
    "diffuser",
    "decision_diffuser",
    "trajectory_diffuser",
)
# The last checkpoint is evaluated: nothing is chosen, neither on these seeds nor on others.
_PROTOCOL = ("trainer.eval_every=null", "evaluation.val_episodes=0")
# What the scores of a run do not depend on.
_INDIFFERENT = (
    "run_dir",
    "overwrite",
    "device",
    "threads",
    "trainer.progress",
    "trainer.tensorboard",
    "evaluation.num_workers",
    "evaluation.timeout",
    "evaluation.video_episodes",
)
ERRORS = (ValueError, OSError, ImportError, RuntimeError)
"""What explains itself."""


@dataclass(frozen=True)
class Reproduction:
    """What is to be reproduced.

    Args:
        datasets: D4RL ids or experiments.
        algorithms: choices of the config group ``algorithm``.
        seeds: of training; all of them are evaluated on the same episode seeds.
        overrides: of `diffpolicy train`, for every cell.
        baseline: the algorithm that the others are compared with.
        only: patterns of the cells to train, such as ``*/bc/0``; None: all. The table shows all
            cells that are done.
        jobs: cells trained at a time.
        toy: a run at toy size, on noise.

    Raises:
        ConfigError: an unknown algorithm, or no seeds, datasets, algorithms or jobs.
    """

    datasets: tuple[str, ...] = LOCOMOTION
    algorithms: tuple[str, ...] = ALGORITHMS
    seeds: tuple[int, ...] = (0, 1, 2)
    overrides: tuple[str, ...] = ()
    baseline: str = "bc"
    only: tuple[str, ...] | None = None
    jobs: int = 1
    toy: bool = False

    def __post_init__(self) -> None:
        there = group_choices()["algorithm"]
        for algorithm in (*self.algorithms, self.baseline):
            if algorithm not in there:
                raise ConfigError(f"unknown algorithm {algorithm!r}; expected of {sorted(there)}")
        for name in ("datasets", "algorithms", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"{name} must be at least one, none of them twice; got {values}")
        if self.jobs < 1 or min(self.seeds) < 0:
            raise ConfigError(f"jobs must be at least 1 and seeds 0 or more; got {self}")


@dataclass(frozen=True)
class Cell:
    """One training and its evaluation.

    Attributes:
        dataset: its name.
        algorithm: its name.
        seed: of training.
        overrides: what `diffpolicy train` is given, but seed and run_dir.
        config: the same, composed; None where that failed.
        problem: why it cannot run.
        run: its folder, relative to the others'.
    """

    dataset: Dataset
    algorithm: str
    seed: int
    overrides: tuple[str, ...]
    config: TrainConfig | None
    problem: str | None

    @property
    def run(self) -> str:
        return f"{self.dataset.name}/{self.algorithm}/{self.seed}"


def plan(wanted: Reproduction, runs: Path, toy: Toy | None = None) -> list[Cell]:
    """All cells, composed but not begun: a configuration per dataset and algorithm.

    Raises:
        ConfigError: a name that is neither dataset nor experiment, or overrides that no cell takes.
    """
    cells: list[Cell] = []
    for dataset in [resolve(name) for name in wanted.datasets]:
        for algorithm in wanted.algorithms:
            overrides, config, problem = _composed(wanted, dataset, algorithm, toy)
            for seed in wanted.seeds:
                cell = Cell(dataset, algorithm, seed, overrides, config, problem)
                if config is not None:
                    mine = replace(config, seed=seed, run_dir=str(runs / cell.run))
                    cell = replace(cell, config=mine)
                cells.append(cell)
    if wanted.overrides and all(cell.config is None for cell in cells):
        raise ConfigError(str(cells[0].problem))
    return cells


def _composed(
    wanted: Reproduction, dataset: Dataset, algorithm: str, toy: Toy | None
) -> tuple[tuple[str, ...], TrainConfig | None, str | None]:
    settings = settings_of(dataset.d4rl or dataset.name, algorithm)
    overrides = [*dataset.overrides, f"algorithm={algorithm}", *_PROTOCOL]
    overrides += [f"{name}={quoted(value)}" for name, value in settings.items()]
    if dataset.problem is not None:
        return tuple(overrides), None, dataset.problem
    try:
        if toy is not None:
            overrides += toy.overrides(load_train(overrides), dataset.name)
        overrides += wanted.overrides
        return tuple(overrides), load_train(overrides), None
    except ERRORS as error:
        return tuple(overrides), None, str(error)


def state_of(cell: Cell) -> dict[str, Any]:
    """What a cell has come to: its status, and its scores if it is done.

    ``done``, ``interrupted`` (resumed by the next run), ``to do``, ``missing`` (no data or no
    environment), ``other settings`` (the run was made with others; it is left alone).
    """
    about = {
        "dataset": cell.dataset.name,
        "algorithm": cell.algorithm,
        "seed": cell.seed,
        "overrides": list(cell.overrides),
    }
    if cell.config is None:
        return {**about, "status": "missing", "reason": cell.problem}
    run_dir = Path(cell.config.run_dir)
    if not (run_dir / "config.yaml").is_file():
        return {**about, "status": "to do"}
    try:
        changed = differences(_flat(read_config(run_dir)), _flat(cell.config))
    except ConfigError as error:  # made by another version
        changed = str(error)
    if changed:
        reason = f"{cell.run} was made with {changed}; give other runs=, or remove that folder"
        return {**about, "status": "other settings", "reason": reason}
    if not (run_dir / "eval.json").is_file():
        return {**about, "status": "interrupted"}
    return {**about, **_evaluated(cell, cell.config, run_dir)}


def read_config(run_dir: Path) -> TrainConfig:
    """The configuration that a run was made with."""
    return build(TrainConfig, read_yaml(run_dir / "config.yaml"))


def _flat(config: TrainConfig) -> dict[str, Any]:
    # By way of JSON, as tuples come back from a file as lists.
    values = json.loads(json.dumps(asdict(config)))
    found: dict[str, Any] = {}

    def walk(part: Mapping[str, Any], where: str) -> None:
        for name, value in part.items():
            if isinstance(value, Mapping) and value:
                walk(value, f"{where}{name}.")
            else:
                found[where + name] = value

    walk(values, "")
    return {name: value for name, value in found.items() if name not in _INDIFFERENT}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Settings that differ, as ``name=then (now: ...)``; empty if none does."""
    names = [n for n in {**then, **now} if then.get(n) != now.get(n)]
    return ", ".join(f"{n}={then.get(n)} (now: {now.get(n)})" for n in names)


def _evaluated(cell: Cell, config: TrainConfig, run_dir: Path) -> dict[str, Any]:
    found = json.loads((run_dir / "eval.json").read_text())
    failed = [e["error"] for e in found["episodes"] if e["error"] is not None]
    if failed:
        reason = f"{len(failed)} of {len(found['episodes'])} episodes failed: {failed[0]}"
        return {"status": "interrupted", "reason": reason}
    returns = [episode["return"] for episode in found["episodes"]]
    trained = _trained(run_dir)
    summary, selection = found["summary"], config.policy.get("selection") or {}
    return {
        "status": "done",
        **_scored(cell, config, found, returns),
        "returns": returns,
        "episode_seeds": [episode["seed"] for episode in found["episodes"]],
        "nfe": summary["nfe_per_plan"],
        "ms_per_plan": (summary["ms_per_plan"] or {}).get("mean"),
        "candidates": selection.get("num_candidates", 1),
        "steps": trained.get("step", config.trainer["steps"]),
        "train_s": trained.get("train_s"),
        "eval_s": summary["wall_s"],
        "network": config.network,
        "checkpoint": "last" if config.evaluation.val_episodes == 0 else "best on validation seeds",
        "machine": found["settings"].get("machine"),
    }


def _trained(run_dir: Path) -> dict[str, Any]:
    """Steps and seconds of the training; nothing where its checkpoints were removed since."""
    folder = run_dir / "checkpoints"
    name = read_pointer(folder / "last")
    state = folder / str(name) / "training" / "state.json"
    return dict(json.loads(state.read_text())) if state.is_file() else {}


def _scored(
    cell: Cell, config: TrainConfig, found: Mapping[str, Any], returns: list[float]
) -> dict[str, Any]:
    """The score of every episode, what it is, and whether it compares with published ones."""
    from diffpolicy.commands.stores import env_spec
    from diffpolicy.data.d4rl.catalogue import doubts, lookup
    from diffpolicy.data.store import EpisodeStore
    from diffpolicy.rollout.d4rl import score

    env = found["env"]
    if cell.dataset.d4rl is not None and lookup(cell.dataset.d4rl).has_score:
        scored = score(
            cell.dataset.d4rl,
            returns,
            environment=env_spec(config),
            transforms=[str(t) for t in config.data.transforms],
            versions=env["versions"],
            doubts=doubts(lookup(cell.dataset.d4rl), EpisodeStore.open(config.data.path).num_steps),
        )
        label = scored["label"]
        kept = {"comparable": label["comparable"], "label": label}
        return {"metric": "normalized", "scores": scored["scores"], **kept}
    metric = config.env.score
    label = {"env": {k: v for k, v in env.items() if k != "versions"}, "versions": env["versions"]}
    label["note"] = "not data of D4RL: no normalised score"
    scores = [float(episode[metric]) for episode in found["episodes"]]
    return {"metric": metric, "scores": scores, "comparable": False, "label": label}
