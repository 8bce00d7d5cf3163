"""The leave-one-scene-out experiment on ETH/UCY: every cell trained, scored and written at once."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from diffpolicy.files import atomic_file, write_atomic
from diffpolicy.training.settings import mix_seed
from pedestrians.arms import TRAINERS, Arm, Settings, score
from pedestrians.scenes import FOLDS, Trajectories, fold_scenes, read_scenes, trajectories

AT_HAND = tuple(name for name in FOLDS if name != "hotel")  # whose scene is a file of its own
DRAWN = 4  # held-out pedestrians in the picture, per fold
METRICS = ("min_ade", "min_fde", "footprint_diversity", "pairwise_m", "nfe", "ms")


def run(
    data: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    folds: Sequence[str] = AT_HAND,
    seeds: Sequence[int] = (0, 1, 2),
    settings: Settings | None = None,
    examples: int = 1500,
) -> dict[str, Any]:
    """Train and score every cell (fold, arm, seed) that ``output`` does not hold yet.

    The file is rewritten after every cell, so an interrupted run continues where it was.

    Args:
        data: the files of :func:`pedestrians.scenes.read_scenes`.
        output: JSON file.
        folds: held-out scenes, of :data:`pedestrians.scenes.FOLDS`.
        seeds: of training and sampling.
        settings: of both arms.
        examples: most held-out examples scored per fold, evenly spaced; 0: all.

    Returns:
        What the file holds: ``settings``, ``machine``, ``cells`` and their ``summary``.

    Raises:
        ValueError: an unknown fold, or a file made with other settings.
    """
    settings = settings or Settings()
    for fold in folds:
        fold_scenes({}, fold)  # complain before an hour of training
    path = Path(output)
    report = _open(path, {**asdict(settings), "examples": examples})
    scenes = read_scenes(*data)
    for seed in seeds:
        for fold in folds:
            train, held_out = (None, None)
            for name, trainer in TRAINERS.items():
                key = f"{fold}/{name}/{seed}"
                if key in report["cells"]:
                    continue
                if train is None or held_out is None:
                    inside, outside = fold_scenes(scenes, fold)
                    train = trajectories(scenes, inside, mirror=True)
                    held_out = _thinned(trajectories(scenes, outside), examples)
                began = time.perf_counter()
                arms = trainer(train, settings, seed)
                cell = {arm: _scored(value, held_out, seed) for arm, value in arms.items()}
                wall = round(time.perf_counter() - began, 1)
                report["cells"][key] = {"arms": cell, "wall_s": wall}
                report["summary"] = summarise(report["cells"])
                _write(path, report)
    return report


def _open(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        machine = f"{platform.machine()}, {torch.get_num_threads()} thread(s)"
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        return {"settings": settings, "machine": machine, "versions": versions, "cells": {}}
    report: dict[str, Any] = json.loads(path.read_text())
    if report["settings"] != settings:
        changed = [k for k, v in settings.items() if report["settings"].get(k) != v]
        raise ValueError(
            f"{path.name} was made with other settings ({', '.join(changed)}); give another output="
        )
    return report


def _write(path: Path, report: Mapping[str, Any]) -> None:
    write_atomic(path, json.dumps(report, indent=1))


def _thinned(data: Trajectories, examples: int) -> Trajectories:
    if not 0 < examples < len(data):
        return data
    return data.rows(torch.linspace(0, len(data) - 1, examples).long())


def _scored(arm: Arm, held_out: Trajectories, seed: int) -> dict[str, Any]:
    values: dict[str, Any] = {**arm.facts, **score(arm, held_out, seed)}
    few = held_out.rows(torch.linspace(0, len(held_out) - 1, DRAWN + 2).long()[1:-1])
    with torch.inference_mode():
        plans = arm.predict(few.observed, torch.Generator().manual_seed(mix_seed(seed, 0xD)))
    drawn = {"observed": few.observed, "future": few.future, "plans": plans}
    values["drawn"] = {
        name: (value * 1000).round().div(1000).tolist() for name, value in drawn.items()
    }
    return values


def summarise(cells: Mapping[str, Any]) -> dict[str, Any]:
    """Mean and standard deviation over seeds, per fold and arm, and the mean over whole folds.

    ``difference`` is truncated minus the better vanilla sampler, per fold and seed.
    """
    table: dict[str, dict[str, dict[str, list[float]]]] = {}
    for key, cell in cells.items():
        fold = key.split("/")[0]
        for arm, values in cell["arms"].items():
            row = table.setdefault(fold, {}).setdefault(arm, {m: [] for m in METRICS})
            for metric in METRICS:
                row[metric].append(values[metric])
    summary: dict[str, Any] = {
        fold: {
            arm: {m: _mean_std(values) for m, values in row.items()} for arm, row in arms.items()
        }
        for fold, arms in table.items()
    }
    arms = {arm for rows in table.values() for arm in rows}
    whole = [rows for rows in summary.values() if set(rows) == arms]  # the same folds for every arm
    summary["mean"] = {
        arm: {m: sum(rows[arm][m]["mean"] for rows in whole) / len(whole) for m in METRICS}
        for arm in sorted(arms)
        if whole
    }
    return {**summary, "difference": _differences(cells)}


def _mean_std(values: Sequence[float]) -> dict[str, float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    spread = tensor.std().item() if len(values) > 1 else 0.0
    return {"mean": tensor.mean().item(), "std": spread, "seeds": len(values)}


def _differences(cells: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    result = {}
    for key, cell in cells.items():
        fold, name, seed = key.split("/")
        other = cells.get(f"{fold}/vanilla/{seed}")
        if name != "truncated" or other is None:
            continue
        mine = cell["arms"]["truncated"]
        result[f"{fold}/{seed}"] = {
            metric: mine[metric] - min(arm[metric] for arm in other["arms"].values())
            for metric in ("min_ade", "min_fde")
        }
    return result


def table(report: Mapping[str, Any]) -> str:
    """The summary as a Markdown table."""
    lines = [
        "| held out | arm | NFE | minADE20 | minFDE20 | footprint D | pairwise m | ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for fold, arms in report["summary"].items():
        if fold == "difference":
            continue
        for arm, row in arms.items():
            cells = [_cell(row[m], 1 if m in ("nfe", "ms") else 3) for m in METRICS]
            ade, fde, footprint, pairwise, nfe, ms = cells
            lines.append(
                f"| {fold} | {arm} | {nfe} | {ade} | {fde} | {footprint} | {pairwise} | {ms} |"
            )
    return "\n".join(lines)


def _cell(value: float | Mapping[str, float], digits: int) -> str:
    if not isinstance(value, Mapping):
        return f"{value:.{digits}f}"
    spread = f" ± {value['std']:.{digits}f}" if value["std"] > 0 else ""
    return f"{value['mean']:.{digits}f}{spread}"


def draw(report: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """A picture of the modes: 20 plans of DDIM and of the truncated arm for held-out pedestrians.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            'the picture of the modes needs matplotlib: pip install "diffpolicy[media]"'
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = _drawn(report["cells"])
    figure, axes = pyplot.subplots(
        len(rows), DRAWN, figsize=(3 * DRAWN, 2 * len(rows)), squeeze=False
    )
    for row, (name, drawn) in zip(axes, rows.items(), strict=True):
        for axis, observed, future, plans in zip(
            row, drawn["observed"], drawn["future"], drawn["plans"], strict=True
        ):
            for plan in plans:
                axis.plot(*zip((0, 0), *plan, strict=True), color="tab:orange", alpha=0.6, lw=0.8)
            axis.plot(*zip(*observed, strict=True), color="black", lw=1.5)
            axis.plot(*zip((0, 0), *future, strict=True), color="tab:blue", lw=1.5)
            axis.set_aspect("equal", adjustable="datalim")
            axis.tick_params(labelsize=6)
        row[0].set_ylabel(name, fontsize=8)
    figure.suptitle("Observed (black), true (blue), 20 plans (orange); metres", fontsize=9)
    figure.tight_layout()
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=80)
    pyplot.close(figure)


def _drawn(cells: Mapping[str, Any]) -> dict[str, Any]:
    """What is drawn of DDIM and of the truncated arm, from each fold's first seed that kept it."""
    rows: dict[str, Any] = {}
    for key in sorted(cells, key=lambda key: (list(FOLDS).index(key.split("/")[0]), key)):
        fold = key.split("/")[0]
        for arm in {"ddim", "truncated"} & set(cells[key]["arms"]):
            drawn = cells[key]["arms"][arm]["drawn"]
            if "plans" in drawn:
                rows.setdefault(f"{fold}: {arm}", drawn)
    return rows


def parse_settings(values: Mapping[str, str]) -> Settings:
    """Settings from texts such as ``steps=2000``.

    Raises:
        ValueError: an unknown name, or a value of another type.
    """
    defaults = asdict(Settings())
    unknown = sorted(set(values) - set(defaults))
    if unknown:
        raise ValueError(f"unknown settings {unknown}; there are {sorted(defaults)}")
    parsed: dict[str, Any] = {
        name: text if isinstance(defaults[name], str) else json.loads(text)
        for name, text in values.items()
    }
    return replace(Settings(), **parsed)
