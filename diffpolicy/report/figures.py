"""Figures: what all of them share, the curves of runs, and scores by network evaluations.

All are drawn without a window and without global state; the same input gives the same bytes.
"""

from __future__ import annotations

import csv
import importlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffpolicy.files import atomic_file

Series = tuple[list[float], list[float]]

_TAB = ("blue", "orange", "green", "red", "purple", "brown", "pink", "gray", "olive", "cyan")
COLORS = tuple(f"tab:{name}" for name in _TAB)
_ROUND_CURVES = ("accuracy", "gap", "error_chosen", "error_rejected", "saturated", "loss")
_DPI = 120


# ------------------------------------------------------------------ what all figures share


def import_matplotlib(*names: str) -> tuple[Any, ...]:
    """Import modules of matplotlib, e.g. ``"figure"``.

    Raises:
        ImportError: matplotlib is missing; names the pip command.
    """
    try:
        # Figures without pyplot: no global state, and never a window.
        return tuple(importlib.import_module(f"matplotlib.{name}") for name in names)
    except ImportError as error:
        raise ImportError(
            'pictures need matplotlib, which cannot be imported: pip install "diffpolicy[media]"'
        ) from error


def new_figure(
    width: float, height: float, panels: int = 1, *, title: str = ""
) -> tuple[Any, list[Any]]:
    """Make a figure of a size in inches, with axes below each other."""
    figure_module, canvas_module = import_matplotlib("figure", "backends.backend_agg")
    figure = figure_module.Figure(figsize=(width, height), layout="constrained")
    canvas_module.FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure, list(figure.subplots(panels, 1, squeeze=False)[:, 0])


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write a figure as a PNG file.

    Raises:
        ValueError: the name does not end in ``.png``.
    """
    target = Path(path)
    if target.suffix != ".png":
        raise ValueError(f"pictures are PNG files: expected a name that ends in .png, got {path}")
    with atomic_file(target) as partial:
        figure.savefig(partial, dpi=_DPI)
    return target


def draw_pictures(
    folder: Path, drawings: Mapping[str, Callable[[Path], Any]]
) -> tuple[list[str], list[str]]:
    """Draw what can be drawn into a directory.

    Returns:
        The names of the pictures that are there, and notes why others are not.
    """
    pictures, notes = [], []
    for name, draw in drawings.items():
        try:
            draw(folder / name)
            pictures.append(name)
        except (ImportError, ValueError) as error:  # figures are worth having without pictures
            notes.append(f"No {name}: {error}")
    return pictures, notes


def is_finite(value: Any) -> bool:
    """Whether a value is a number, and finite."""
    return isinstance(value, int | float | np.number) and math.isfinite(value)


def read_metrics(path: str | Path, first: str = "") -> dict[str, Series]:
    """Read a metrics file.

    Args:
        path: a CSV file with a column ``step``.
        first: columns whose names begin with this go before others of the same last part.

    Returns:
        Per column, by the last part of its name (``eval/success`` is ``success``; the first of two
        that are alike): the steps and the finite values at them.

    Raises:
        ValueError: there is no column ``step``, or no row.
    """
    with Path(path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or "step" not in rows[0]:
        raise ValueError(f"{path} has no rows, or no column 'step'")
    columns: dict[str, Series] = {}
    names = [name for name in rows[0] if name != "step"]
    for full in sorted(names, key=lambda name: not name.startswith(first)):
        pairs = [(_number(row["step"]), _number(row[full])) for row in rows]
        kept = [pair for pair in pairs if all(map(math.isfinite, pair))]
        if kept:
            series = [step for step, _ in kept], [value for _, value in kept]
            columns.setdefault(full.rsplit("/", 1)[-1], series)
    return columns


def _number(cell: str | None) -> float:
    try:
        return float(cell) if cell else math.nan
    except ValueError:
        return math.nan


def draw_series(
    axis: Any,
    columns: Mapping[str, Series],
    name: str,
    ends: tuple[str, str],
    *,
    band: str | None = None,
    **style: Any,
) -> None:
    """Draw a column with the band between ``name + end`` of two ends, where these are there."""
    steps, values = columns[name]
    axis.plot(steps, values, marker="o", **style)
    low, high = (columns.get(name + end) for end in ends)
    if low is not None and high is not None and low[0] == high[0] == steps:
        axis.fill_between(
            steps, low[1], high[1], color=style["color"], alpha=0.2, linewidth=0, label=band
        )


# ------------------------------------------------------------------ the curves of runs


def plot_curve(
    metrics: str | Path,
    path: str | Path,
    *,
    losses: tuple[str, ...] = ("loss", "val_loss"),
    score: str = "success",
    title: str = "",
) -> Path:
    """Draw the losses (logarithmic) above the score with its 95 % interval.

    The interval is drawn from ``<score>_low`` and ``<score>_high`` where they are there.

    Args:
        metrics: a CSV file, see :func:`read_metrics`.
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
    upper = [name for name in losses if name in columns]
    panels = bool(upper) + (score in columns)
    if not panels:
        raise ValueError(
            f"{metrics} has none of the columns {[*losses, score]}; it has {sorted(columns)}"
        )
    figure, axes = new_figure(7, 3 * panels + 0.5, panels, title=title)
    if upper:
        _draw_losses(axes[0], {name: columns[name] for name in upper})
    if score in columns:
        _draw_score(axes[-1], columns, score)
    axes[-1].set_xlabel("step")
    return save_figure(figure, path)


def _draw_losses(axis: Any, losses: Mapping[str, Series]) -> None:
    for name, (steps, values) in losses.items():
        axis.plot(steps, values, label=name.replace("_", " "), linewidth=1.2)
    if all(value > 0 for _, values in losses.values() for value in values):
        axis.set_yscale("log")
    axis.set_ylabel("loss")
    axis.grid(alpha=0.3, which="both")
    axis.legend()


def _draw_score(axis: Any, columns: Mapping[str, Series], score: str) -> None:
    style = {"color": "tab:green", "markersize": 4}
    draw_series(axis, columns, score, ("_low", "_high"), band="95 %", **style)
    if axis.get_legend_handles_labels()[0]:
        axis.legend()
    if all(0 <= value <= 1 for value in columns[score][1]):
        axis.set_ylim(-0.03, 1.03)
    axis.set_ylabel(score.replace("_", " "))
    axis.grid(alpha=0.3)


def plot_rounds(folder: Path, path: Path) -> Path:
    """Draw accuracy, gap, errors and saturation of a tuning by comparisons, over its updates.

    Args:
        folder: of the run: its ``metrics.csv``, or those of its ``round_*`` one after the other.
        path: of the PNG.

    Raises:
        ImportError: matplotlib is missing (with the pip command).
        ValueError: there is nothing to draw.
    """
    files = sorted(folder.glob("round_*/metrics.csv"), key=lambda p: int(p.parent.name[6:]))
    runs = [read_metrics(p) for p in files or [folder / "metrics.csv"] if p.is_file()]
    names = [name for name in _ROUND_CURVES if any(name in run for run in runs)]
    if not names:
        raise ValueError(f"{folder} has no metrics, or none of the columns {list(_ROUND_CURVES)}")
    figure, axes = new_figure(6, 1.7 * len(names) + 0.5, len(names))
    for axis, name in zip(axes, names, strict=True):
        begun = 0.0
        for run in runs:
            steps, values = run.get(name, ([], []))
            axis.plot([begun + s for s in steps], values, color="tab:blue")
            begun += max((s[-1] for s, _ in run.values()), default=0.0)
        axis.set_ylabel(name.replace("_", " "))
        axis.grid(visible=True, alpha=0.3)
    axes[-1].set_xlabel("update")
    return save_figure(figure, path)


# ------------------------------------------------------------------ scores of policies


def plot_nfe(
    rows: Mapping[str, Mapping[str, Mapping[str, Any]]],
    path: str | Path,
    *,
    score: str,
    title: str = "",
) -> Path:
    """Draw a score against the network evaluations per plan, a line per method.

    Args:
        rows: by method and number of evaluations: ``value``, ``low`` and ``high``.
        path: of the PNG.
        score: its name.
        title: above it.

    Raises:
        ImportError: matplotlib is missing (with the pip command).
    """
    figure, (axis,) = new_figure(6, 4, title=title)
    for number, (name, found) in enumerate(rows.items()):
        nfe = np.array([float(n) for n in found]) * 1.02**number  # bars beside each other
        middle = np.array([v["value"] for v in found.values()])
        bounds = np.array([[v["low"], v["high"]] for v in found.values()], float)
        spread = np.abs(bounds - middle[:, None]).T
        axis.errorbar(nfe, middle, np.nan_to_num(spread), marker="o", capsize=3, label=name)
    axis.set_xscale("log")
    ticks = [float(n) for n in next(iter(rows.values()))]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks], minor=False)
    axis.minorticks_off()
    axis.set_xlabel("network evaluations per plan")
    axis.set_ylabel(score.replace("_", " "))
    axis.grid(visible=True, alpha=0.3)
    axis.legend()
    return save_figure(figure, path)
