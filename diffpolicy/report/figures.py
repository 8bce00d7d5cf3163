"""Figures: what all of them share, the curves of runs, and scores by network evaluations.

All are drawn without a window and without global state; the same input gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffpolicy.extras import need
from diffpolicy.files import atomic_file
from diffpolicy.training import run_files

Series = tuple[list[float], list[float]]

_ROUND_CURVES = ("accuracy", "gap", "error_chosen", "error_rejected", "saturated", "loss")
_DPI = 120


# ------------------------------------------------------------------ what all figures share


def new_figure(
    width: float, height: float, panels: int = 1, *, title: str = ""
) -> tuple[Any, list[Any]]:
    """Make a figure of a size in inches, with axes below each other.

    Without pyplot: there is no global state, and never a window.

    Raises:
        ImportError: matplotlib is missing (with the pip command).
    """
    figure = need("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    need("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
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


def finish(axis: Any, ylabel: str, xlabel: str = "") -> None:
    """Label axes, draw their grid and, if anything in them has a name, a legend."""
    axis.set_ylabel(ylabel.replace("_", " "))
    axis.set_xlabel(xlabel)
    axis.grid(visible=True, alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)


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
        ValueError: it is no metrics file, or has no row.
    """
    rows = run_files.read_metrics(Path(path))
    if not rows:
        raise ValueError(f"{path} has no rows")
    columns: dict[str, Series] = {}
    names = [name for name in rows[0] if name != "step"]
    for full in sorted(names, key=lambda name: not name.startswith(first)):
        pairs = [(float(row["step"]), _number(row[full])) for row in rows]
        kept = [pair for pair in pairs if math.isfinite(pair[1])]
        if kept:
            series = [step for step, _ in kept], [value for _, value in kept]
            columns.setdefault(full.rsplit("/", 1)[-1], series)
    return columns


def _number(cell: str | None) -> float:
    try:
        return float(cell or "nan")
    except ValueError:
        return math.nan


# ------------------------------------------------------------------ the curves of runs


class Panel(NamedTuple):
    """Columns of a metrics file that share axes.

    Attributes:
        label: of the vertical axis.
        columns: their names, with those in the legend (``None``: none).
        ends: of the names of the columns that bound a band around each, where these are there.
        log: the axis is logarithmic, if all values are positive.
    """

    label: str
    columns: Mapping[str, str | None]
    ends: tuple[str, str] = ("_low", "_high")
    log: bool = False


def plot_panels(
    columns: Mapping[str, Series],
    path: str | Path,
    panels: Sequence[Panel],
    *,
    xlabel: str = "update",
    marker: str = "",
    title: str = "",
    marked: tuple[float, str] | None = None,
) -> Path:
    """Draw columns of a metrics file over the steps, panels below each other.

    Args:
        columns: what :func:`read_metrics` reads.
        path: of the PNG.
        panels: what is drawn; columns that are not there, and panels without any, are left out.
        xlabel: what a step is.
        marker: of the points.
        title: above all.
        marked: a step at which all panels have a line, and its name.

    Raises:
        ImportError: matplotlib is missing (with the pip command).
        ValueError: there is nothing to draw.
    """
    kept = [panel for panel in panels if not columns.keys().isdisjoint(panel.columns)]
    if not kept:
        wanted = [name for panel in panels for name in panel.columns]
        raise ValueError(f"there are none of the columns {wanted}, only {sorted(columns)}")
    figure, axes = new_figure(7, 3 * len(kept) + 0.5, len(kept), title=title)
    for axis, panel in zip(axes, kept, strict=True):
        for name, legend in panel.columns.items():
            if name in columns:
                (line,) = axis.plot(*columns[name], label=legend, marker=marker, markersize=3)
                bounds = [columns.get(name + end, ([], [])) for end in panel.ends]
                if bounds[0][0] == bounds[1][0] == columns[name][0]:
                    values = [bound[1] for bound in bounds]
                    axis.fill_between(bounds[0][0], *values, color=line.get_color(), alpha=0.2)
        if panel.log and all(v > 0 for n in panel.columns for v in columns.get(n, ([], []))[1]):
            axis.set_yscale("log")
        if marked is not None:
            axis.axvline(marked[0], color="tab:red", linestyle="--", label=marked[1])
        finish(axis, panel.label)
    axes[-1].set_xlabel(xlabel)
    return save_figure(figure, path)


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
        ValueError: it is no metrics file, or there is nothing to draw.
    """
    upper = Panel("loss", {name: name.replace("_", " ") for name in losses}, log=True)
    lower = Panel(score, {score: None})
    columns = read_metrics(metrics)
    return plot_panels(columns, path, [upper, lower], xlabel="step", marker=".", title=title)


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
    joined: dict[str, Series] = {}
    begun = 0.0
    for run in [read_metrics(p) for p in files or [folder / "metrics.csv"] if p.is_file()]:
        for name, (steps, values) in run.items():
            line = joined.setdefault(name, ([], []))
            line[0].extend([*(begun + s for s in steps), math.nan])  # a gap between two rounds
            line[1].extend([*values, math.nan])
        begun += max((s[-1] for s, _ in run.values()), default=0.0)
    return plot_panels(joined, path, [Panel(name, {name: None}) for name in _ROUND_CURVES])


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
    finish(axis, score, "network evaluations per plan")
    return save_figure(figure, path)
