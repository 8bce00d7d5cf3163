"""Pictures of a policy's tuning: scores by network evaluations, and what happened on the way."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffpolicy.files import atomic_file
from diffpolicy.report.figures import read_metrics

CURVES = ("accuracy", "gap", "error_chosen", "error_rejected", "saturated", "loss")


def plot_nfe(
    rows: Mapping[str, Mapping[str, Mapping[str, Any]]],
    path: str | Path,
    *,
    score: str,
    title: str = "",
) -> Path | None:
    """The score against network evaluations per plan, a line per method, 95 % intervals.

    Returns:
        ``path``, or ``None`` without matplotlib.
    """
    try:
        figures = importlib.import_module("matplotlib.figure")
        canvas = importlib.import_module("matplotlib.backends.backend_agg")
    except ImportError:
        return None
    figure = figures.Figure(figsize=(6, 4), layout="constrained")
    canvas.FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, (name, found) in enumerate(rows.items()):
        nfe = np.array([float(n) for n in found]) * 1.02**number  # bars beside each other
        middle = np.array([v["value"] for v in found.values()])
        bounds = np.array([[v["low"], v["high"]] for v in found.values()], float)
        spread = np.abs(bounds - middle[:, None]).T
        axes.errorbar(nfe, middle, np.nan_to_num(spread), marker="o", capsize=3, label=name)
    axes.set_xscale("log")
    ticks = [float(n) for n in next(iter(rows.values()))]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks], minor=False)
    axes.minorticks_off()
    axes.set_xlabel("network evaluations per plan")
    axes.set_ylabel(score.replace("_", " "))
    axes.set_title(title)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    target = Path(path)
    with atomic_file(target) as partial:
        figure.savefig(partial, dpi=120)
    return target


def plot_curves(folder: Path) -> Path | None:
    """Accuracy, gap, errors and saturation over the updates, rounds one after the other."""
    files = sorted(folder.glob("round_*/metrics.csv"), key=lambda p: int(p.parent.name[6:]))
    files = files or [folder / "metrics.csv"]
    try:
        figures = importlib.import_module("matplotlib.figure")
        canvas = importlib.import_module("matplotlib.backends.backend_agg")
    except ImportError:
        return None
    runs = [read_metrics(file) for file in files if file.is_file()]
    names = [name for name in CURVES if any(name in run for run in runs)]
    if not names:
        return None
    figure = figures.Figure(figsize=(6, 1.7 * len(names) + 0.5), layout="constrained")
    canvas.FigureCanvasAgg(figure)
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(panels, names, strict=True):
        begun = 0.0
        for run in runs:
            steps, values = run.get(name, ([], []))
            axes.plot([begun + s for s in steps], values, color="tab:blue")
            begun += max((s[-1] for s, _ in run.values() if s), default=0.0)
        axes.set_ylabel(name.replace("_", " "))
        axes.grid(visible=True, alpha=0.3)
    panels[-1].set_xlabel("update")
    with atomic_file(folder / "curves.png") as partial:
        figure.savefig(partial, dpi=120)
    return folder / "curves.png"


__all__ = ["plot_curves", "plot_nfe"]
