"""Pictures of reward tuning: reward against divergence, curves of a run, sequence logos.

All are drawn without a window and without global state; the same input gives the same bytes.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffpolicy.files import atomic_file
from diffpolicy.report.logos import COLORS, LogoArtist, check_profiles, import_matplotlib
from diffpolicy.sequences.metrics import hacking_warning

_DPI = 120
_MARKERS = "osD^vPX"
_CURVES = ("reward", "held_out", "kl")

Series = tuple[list[float], list[float]]


class Warned(NamedTuple):
    """A warning that stands at the end of a run.

    Attributes:
        step: update since which it has stood.
        message: see :func:`~diffpolicy.sequences.metrics.hacking_warning`.
    """

    step: int
    message: str


# ------------------------------------------------------------------ reward against divergence


def plot_front(
    rows: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    optimum: Sequence[Sequence[float]] = (),
    title: str = "",
    label: str = "reward",
) -> Path:
    """Draws reward against the divergence from the reference.

    Every row is a small point; the median over the rows of one method and setting is a large one,
    and those of a method are joined. Rows without a divergence (best of N, say) give a dotted line
    at their median reward.

    Args:
        rows: per seed ``method``, ``reward``, ``kl`` (nats, or null) and, if a method is there with
            several settings, ``setting``. Rows without a reward are left out.
        path: of the PNG.
        optimum: ``(kl, reward)`` pairs of the best laws there are.
        title: above it.
        label: of the axis of rewards.

    Returns:
        ``path``.

    Raises:
        ImportError: matplotlib is missing (with the pip command).
        ValueError: nothing to draw, or not a PNG.
    """
    drawn = [row for row in rows if _finite(row.get("reward"))]
    if not drawn and not optimum:
        raise ValueError("there is nothing to draw: no row has a number as its reward")
    figure, axis = _figure(path, 7, 5)
    for number, method in enumerate(dict.fromkeys(str(row["method"]) for row in drawn)):
        mine = [row for row in drawn if str(row["method"]) == method]
        _draw_method(axis, method, mine, number)
    if optimum:
        kl, reward = zip(*sorted((float(k), float(r)) for k, r in optimum), strict=True)
        axis.plot(kl, reward, color="black", linewidth=1, label="optimum", zorder=1)
    axis.set_xlabel("KL to the reference (nats)")
    axis.set_ylabel(label)
    _finish(axis, title)
    return _save(figure, path)


def _draw_method(axis: Any, method: str, rows: list[Mapping[str, Any]], number: int) -> None:
    color = COLORS[number % len(COLORS)]
    marker = _MARKERS[number // len(COLORS) % len(_MARKERS)]
    placed = [row for row in rows if _finite(row.get("kl"))]
    if not placed:
        level = float(np.median([row["reward"] for row in rows]))
        axis.axhline(level, color=color, linestyle=":", label=f"{method} (no KL)")
        return
    points = [(float(row["kl"]), float(row["reward"])) for row in placed]
    axis.plot(*zip(*points, strict=True), marker, color=color, markersize=4, alpha=0.4)
    groups: dict[Any, list[tuple[float, float]]] = {}
    for row, point in zip(placed, points, strict=True):
        groups.setdefault(row.get("setting"), []).append(point)
    medians = sorted(tuple(np.median(group, axis=0)) for group in groups.values())
    axis.plot(
        *zip(*medians, strict=True),
        marker=marker,
        color=color,
        markersize=8,
        linewidth=1.2,
        label=method,
    )


# ------------------------------------------------------------------ curves of a run


def curve_columns(row: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a row of ``evaluate_sequences`` as columns of ``metrics.csv``, for a trainer.

    Returns:
        ``eval/reward`` and so on: medians with ``_q25`` and ``_q75`` beside them, and plain
        numbers; what is null or a text is left out.
    """
    columns: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            columns[f"eval/{key}"] = float(value["median"])
            columns |= {f"eval/{key}_{q}": float(value[q]) for q in ("q25", "q75")}
        elif _finite(value):
            columns[f"eval/{key}"] = float(value)
    return columns


def read_curves(metrics: str | Path) -> dict[str, Series]:
    """Reads the reward, the held-out reward and the divergence from a metrics file.

    Returns:
        Of ``reward``, ``held_out``, ``kl`` and their quartiles (``reward_q25``, ...) those that are
        there: steps and finite values. ``eval/reward`` goes before the ``reward`` of batches.

    Raises:
        ValueError: there is no column ``step``.
    """
    with Path(metrics).open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or "step" not in rows[0]:
        raise ValueError(f"{metrics} has no rows, or no column 'step'")
    curves: dict[str, Series] = {}
    for name in [f"{curve}{end}" for curve in _CURVES for end in ("", "_q25", "_q75")]:
        column = f"eval/{name}" if f"eval/{name}" in rows[0] else name
        pairs = [(_number(row["step"]), _number(row.get(column))) for row in rows]
        kept = [pair for pair in pairs if all(map(math.isfinite, pair))]
        if kept:
            curves[name] = ([step for step, _ in kept], [value for _, value in kept])
    return curves


def standing_warning(curves: Mapping[str, Series]) -> Warned | None:
    """The warning of reward hacking that stands at the end, with the step since which it does.

    Args:
        curves: of :func:`read_curves`.
    """
    if not {"reward", "held_out"} <= set(curves):
        return None
    judged = dict(zip(*curves["held_out"], strict=True))
    rows = [(s, r, judged[s]) for s, r in zip(*curves["reward"], strict=True) if s in judged]
    found = None
    for count in range(len(rows), 0, -1):
        _, reward, held_out = zip(*rows[:count], strict=True)
        message = hacking_warning(reward, held_out)
        if message is None:
            break
        found = Warned(int(rows[count - 1][0]), message if found is None else found.message)
    return found


def plot_curves(metrics: str | Path, path: str | Path, *, title: str = "") -> Path:
    """Draws reward and held-out reward above the divergence, over the updates of a run.

    Bands are quartiles, where the file has them. The step since which there is a warning of reward
    hacking is marked.

    Args:
        metrics: a CSV file, see :func:`read_curves`.
        path: of the PNG.
        title: above it.

    Returns:
        ``path``.

    Raises:
        ImportError: matplotlib is missing (with the pip command).
        ValueError: the file has no column ``step`` or nothing to draw, or ``path`` is no PNG.
    """
    curves = read_curves(metrics)
    names = {"reward": "training oracle", "held_out": "held-out oracle"}
    panels = [[c for c in group if c in curves] for group in (tuple(names), ("kl",))]
    panels = [panel for panel in panels if panel]
    if not panels:
        raise ValueError(f"{metrics} has none of the columns {list(_CURVES)}, nor eval/ of them")
    figure, axes = _figure(path, 7, 3 * len(panels) + 0.5, panels=len(panels))
    warned = standing_warning(curves)
    for axis, panel in zip(axes, panels, strict=True):
        for name in panel:
            _draw_curve(axis, curves, name, names.get(name))
        axis.set_ylabel("KL to the reference (nats)" if panel == ["kl"] else "reward")
        if warned is not None:
            axis.axvline(warned.step, color="tab:red", linestyle="--", label="hacking warning")
        _finish(axis)
    axes[-1].set_xlabel("update")
    if title:
        figure.suptitle(title, fontsize=10)
    return _save(figure, path)


def _draw_curve(axis: Any, curves: Mapping[str, Series], name: str, label: str | None) -> None:
    color = COLORS[_CURVES.index(name)]
    steps, values = curves[name]
    axis.plot(steps, values, marker="o", markersize=3, color=color, label=label)
    low, high = curves.get(f"{name}_q25"), curves.get(f"{name}_q75")
    if low is not None and high is not None and low[0] == high[0] == steps:
        axis.fill_between(steps, low[1], high[1], color=color, alpha=0.2, linewidth=0)


# ------------------------------------------------------------------ sequence logos


def plot_logo(
    profiles: Mapping[str, Any],
    path: str | Path,
    *,
    alphabet: str,
    per_row: int = 40,
    title: str = "",
) -> Path:
    """Draws sequence logos below each other: letters as tall as the information they carry.

    Longer sequences are wrapped; the same positions of all profiles stand together. All axes reach
    to ``log2 V`` bits.

    Args:
        profiles: by name the frequencies ``[L, V]``, as :func:`~diffpolicy.sequences.metrics
            .profile` gives them.
        path: of the PNG.
        alphabet: one letter per token.
        per_row: the most positions in a row.
        title: above it.

    Returns:
        ``path``.

    Raises:
        ImportError: matplotlib is missing (with the pip command).
        ValueError: profiles that are none or do not fit together, or not a PNG.
    """
    checked = check_profiles(profiles, alphabet)
    if per_row < 1:
        raise ValueError(f"per_row must be at least 1, got {per_row}")
    length = len(next(iter(checked.values())))
    rows = math.ceil(length / per_row)
    width = math.ceil(length / rows)
    count = rows * len(checked)
    figure, axes = _figure(path, max(4.0, 0.25 * width + 1), 1.3 * count + 0.4, panels=count)
    artist = LogoArtist(alphabet)
    for number, axis in enumerate(axes):
        row, which = divmod(number, len(checked))
        name, p = list(checked.items())[which]
        start, stop = row * width, min((row + 1) * width, length)
        artist.draw(axis, p, start, stop)
        axis.set_xlim(start + 0.5, start + width + 0.5)
        axis.set_ylabel("bits")
        axis.set_title(name, fontsize=9, loc="left")
        every = 1 if width <= 20 else 5
        axis.set_xticks([i for i in range(start + 1, stop + 1) if i % every == 0 or i == start + 1])
        axis.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title, fontsize=10)
    return _save(figure, path)


# ------------------------------------------------------------------ what they share


def _figure(path: str | Path, width: float, height: float, *, panels: int = 0) -> tuple[Any, Any]:
    """A figure with one axis, or a list of ``panels`` axes below each other."""
    if Path(path).suffix != ".png":
        raise ValueError(f"pictures are PNG files: expected a name that ends in .png, got {path}")
    figure_module, canvas_module = import_matplotlib("figure", "backends.backend_agg")
    figure = figure_module.Figure(figsize=(width, height), layout="constrained")
    canvas_module.FigureCanvasAgg(figure)
    axes = figure.subplots(panels or 1, 1, squeeze=False)[:, 0]
    return figure, list(axes) if panels else axes[0]


def _finish(axis: Any, title: str = "") -> None:
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
    if title:
        axis.set_title(title)


def _save(figure: Any, path: str | Path) -> Path:
    target = Path(path)
    with atomic_file(target, ".png") as partial:
        figure.savefig(partial, dpi=_DPI)
    return target


def _finite(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and math.isfinite(value)


def _number(cell: str | None) -> float:
    try:
        return float(cell) if cell else math.nan
    except ValueError:
        return math.nan


__all__ = [
    "Warned",
    "curve_columns",
    "plot_curves",
    "plot_front",
    "plot_logo",
    "read_curves",
    "standing_warning",
]
