"""The learning curve of a run, from its metrics file."""

from __future__ import annotations

import csv
import importlib
import math
from pathlib import Path
from typing import Any

from diffpolicy.files import atomic_file

_PIP = 'pip install "diffpolicy[media]"'

Series = tuple[list[float], list[float]]


def plot_curve(
    metrics: str | Path,
    path: str | Path,
    *,
    losses: tuple[str, ...] = ("loss", "val_loss"),
    score: str = "success",
    title: str = "",
) -> Path:
    """Draws the losses (logarithmic) above the score with its 95 % interval.

    Columns are found by their last part, so ``eval/success`` is ``success``; empty cells are
    skipped. The interval is drawn from ``<score>_low`` and ``<score>_high`` where they are there.

    Args:
        metrics: a CSV file with a column ``step``.
        path: of the PNG.
        losses: columns of the upper panel; those that are not there are left out.
        score: column of the lower panel; without it, the panel is left out.
        title: above both.

    Returns:
        ``path``.

    Raises:
        ImportError: matplotlib is missing (with the pip command).
        ValueError: the file has no column ``step``, or nothing to draw.
    """
    columns = read_metrics(metrics)
    upper = {name: columns[name] for name in losses if name in columns}
    panels = [bool(upper), score in columns]
    if not any(panels):
        raise ValueError(
            f"{metrics} has none of the columns {[*losses, score]}; it has {sorted(columns)}"
        )
    figure_module, canvas_module = _import_matplotlib()
    figure = figure_module.Figure(figsize=(7, 3 * sum(panels) + 0.5), layout="constrained")
    canvas_module.FigureCanvasAgg(figure)
    axes = list(figure.subplots(sum(panels), 1, sharex=True, squeeze=False)[:, 0])
    if title:
        figure.suptitle(title)
    if upper:
        _draw_losses(axes[0], upper)
    if score in columns:
        _draw_score(axes[-1], columns, score)
    axes[-1].set_xlabel("step")
    target = Path(path)
    with atomic_file(target, ".png") as partial:
        figure.savefig(partial, dpi=120)
    return target


def read_metrics(path: str | Path) -> dict[str, Series]:
    """Reads a metrics file.

    Returns:
        Per column, by the last part of its name (the first of two that are alike): the steps and
        the finite values at them.

    Raises:
        ValueError: there is no column ``step``.
    """
    with Path(path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or "step" not in rows[0]:
        raise ValueError(f"{path} has no rows, or no column 'step'")
    columns: dict[str, Series] = {}
    for full in rows[0]:
        name = full.rsplit("/", 1)[-1]
        if full == "step" or name in columns:
            continue
        pairs = [
            (step, value)
            for step, value in ((_number(row["step"]), _number(row[full])) for row in rows)
            if math.isfinite(step) and math.isfinite(value)
        ]
        if pairs:
            columns[name] = ([step for step, _ in pairs], [value for _, value in pairs])
    return columns


def _number(cell: str | None) -> float:
    try:
        return float(cell) if cell else math.nan
    except ValueError:
        return math.nan


def _draw_losses(axis: Any, losses: dict[str, Series]) -> None:
    for name, (steps, values) in losses.items():
        axis.plot(steps, values, label=name.replace("_", " "), linewidth=1.2)
    if all(value > 0 for _, values in losses.values() for value in values):
        axis.set_yscale("log")
    axis.set_ylabel("loss")
    axis.grid(alpha=0.3, which="both")
    axis.legend()


def _draw_score(axis: Any, columns: dict[str, Series], score: str) -> None:
    steps, values = columns[score]
    axis.plot(steps, values, marker="o", markersize=4, color="tab:green")
    low, high = columns.get(f"{score}_low"), columns.get(f"{score}_high")
    if low is not None and high is not None and low[0] == high[0] == steps:
        axis.fill_between(steps, low[1], high[1], color="tab:green", alpha=0.2, label="95 %")
        axis.legend()
    if all(0 <= value <= 1 for value in values):
        axis.set_ylim(-0.03, 1.03)
    axis.set_ylabel(score.replace("_", " "))
    axis.grid(alpha=0.3)


def _import_matplotlib() -> tuple[Any, Any]:
    try:
        # Figures without pyplot: no global state, and never a window.
        return (
            importlib.import_module("matplotlib.figure"),
            importlib.import_module("matplotlib.backends.backend_agg"),
        )
    except ImportError as error:
        raise ImportError(f"curves need matplotlib, which cannot be imported: {_PIP}") from error
