"""Figures of reward tuning: reward against divergence, curves of a run, sequence logos."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffpolicy.extras import need
from diffpolicy.report.figures import (
    Panel,
    Series,
    finish,
    is_finite,
    new_figure,
    plot_panels,
    read_metrics,
    save_figure,
)
from diffpolicy.sequences.metrics import hacking_warning
from diffpolicy.settings import check_shape

_KL = "KL to the reference (nats)"
_QUARTILES = ("_q25", "_q75")
_PANELS = (
    Panel("reward", {"reward": "training oracle", "held_out": "held-out oracle"}, _QUARTILES),
    Panel(_KL, {"kl": None}, _QUARTILES),
)
_NUCLEOTIDES = {"A": "#109648", "C": "#255c99", "G": "#f7a600", "T": "#d62839", "U": "#d62839"}
_CHEMISTRY = {  # amino acids: polar, amide, basic, acidic, hydrophobic
    "GSTYC": "#109648",
    "NQ": "#7b3294",
    "KRH": "#255c99",
    "DE": "#d62839",
    "AVLIPWFM": "#222222",
}
_AMINO_ACIDS = {letter: color for group, color in _CHEMISTRY.items() for letter in group}
_PER_ROW = 40
_LEAST = 1e-3  # bits below which a letter is not drawn

Floats = npt.NDArray[np.float64]


# ------------------------------------------------------------------ reward against divergence


def plot_front(
    rows: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    optimum: Sequence[Sequence[float]] = (),
    title: str = "",
    label: str = "reward",
) -> Path:
    """Draw reward against the divergence from the reference.

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
    drawn = [row for row in rows if is_finite(row.get("reward"))]
    if not drawn and not optimum:
        raise ValueError("there is nothing to draw: no row has a number as its reward")
    figure, (axis,) = new_figure(7, 5, title=title)
    for number, method in enumerate(dict.fromkeys(str(row["method"]) for row in drawn)):
        mine = [row for row in drawn if str(row["method"]) == method]
        _draw_method(axis, method, mine, f"C{number}")
    if optimum:
        kl, reward = zip(*sorted((float(k), float(r)) for k, r in optimum), strict=True)
        axis.plot(kl, reward, color="black", linewidth=1, label="optimum", zorder=1)
    finish(axis, label, _KL)
    return save_figure(figure, path)


def _draw_method(axis: Any, method: str, rows: list[Mapping[str, Any]], color: str) -> None:
    placed = [row for row in rows if is_finite(row.get("kl"))]
    if not placed:
        level = np.median([row["reward"] for row in rows])
        axis.axhline(level, color=color, linestyle=":", label=f"{method} (no KL)")
        return
    groups: dict[Any, list[tuple[float, float]]] = {}
    for row in placed:
        groups.setdefault(row.get("setting"), []).append((row["kl"], row["reward"]))
    points = [point for group in groups.values() for point in group]
    axis.plot(*zip(*points, strict=True), "o", color=color, markersize=4, alpha=0.4)
    medians = np.array(sorted(tuple(np.median(group, axis=0)) for group in groups.values()))
    axis.plot(*medians.T, color=color, label=method, marker="o", markersize=8, linewidth=1.2)


# ------------------------------------------------------------------ curves of a run


def standing_warning(curves: Mapping[str, Series]) -> dict[str, Any] | None:
    """Find the warning of reward hacking that stands at the end of a run.

    Args:
        curves: ``reward`` and ``held_out``, as ``read_metrics(file, first="eval/")`` reads them.

    Returns:
        ``step``, the update since which it has stood, and ``message`` (see
        :func:`~diffpolicy.sequences.metrics.hacking_warning`); ``None`` if there is none.
    """
    if not {"reward", "held_out"} <= set(curves):
        return None
    judged = dict(zip(*curves["held_out"], strict=True))
    rows = [(s, r, judged[s]) for s, r in zip(*curves["reward"], strict=True) if s in judged]
    found: dict[str, Any] | None = None
    for count in range(len(rows), 0, -1):
        _, reward, held_out = zip(*rows[:count], strict=True)
        message = hacking_warning(reward, held_out)
        if message is None:
            break
        last = message if found is None else found["message"]
        found = {"step": int(rows[count - 1][0]), "message": last}
    return found


def plot_curves(metrics: str | Path, path: str | Path, *, title: str = "") -> Path:
    """Draw reward and held-out reward above the divergence, over the updates of a run.

    Bands are quartiles (``reward_q25``, ...), where the file has them. The step since which there
    is a warning of reward hacking is marked.

    Args:
        metrics: a CSV file; ``eval/reward`` goes before the ``reward`` of batches.
        path: of the PNG.
        title: above it.

    Returns:
        ``path``.

    Raises:
        ImportError: matplotlib is missing (with the pip command).
        ValueError: the file has no column ``step`` or nothing to draw, or ``path`` is no PNG.
    """
    curves = read_metrics(metrics, first="eval/")
    warned = standing_warning(curves)
    marked = None if warned is None else (warned["step"], "hacking warning")
    return plot_panels(curves, path, _PANELS, marker=".", title=title, marked=marked)


# ------------------------------------------------------------------ sequence logos


def plot_logo(
    profiles: Mapping[str, Any], path: str | Path, *, alphabet: str, title: str = ""
) -> Path:
    """Draw sequence logos below each other: letters as tall as the information they carry.

    Sequences longer than 40 are wrapped; the same positions of all profiles stand together. All
    axes reach to ``log2 V`` bits.

    Args:
        profiles: by name the frequencies ``[L, V]``, as
            :func:`~diffpolicy.sequences.metrics.profile` gives them.
        path: of the PNG.
        alphabet: one letter per token. DNA and RNA have their usual colours, amino acids those of
            their chemistry, other alphabets any.
        title: above it.

    Returns:
        ``path``.

    Raises:
        ImportError: matplotlib is missing (with the pip command).
        ValueError: profiles that are none or do not fit together, or not a PNG.
    """
    checked = check_profiles(profiles, alphabet)
    length = len(next(iter(checked.values())))
    rows = math.ceil(length / _PER_ROW)
    width = math.ceil(length / rows)
    count = rows * len(checked)
    size = max(4.0, 0.25 * width + 1), 1.3 * count + 0.4
    figure, axes = new_figure(*size, count, title=title)
    every = 1 if width <= 20 else 5
    for number, axis in enumerate(axes):
        row, which = divmod(number, len(checked))
        name, p = list(checked.items())[which]
        start, stop = row * width, min((row + 1) * width, length)
        _draw_letters(axis, p, alphabet, range(start, stop))
        axis.set_xlim(start + 0.5, start + width + 0.5)
        axis.set_ylim(0, math.log2(len(alphabet)))
        axis.set_ylabel("bits")
        axis.set_title(name, fontsize=9, loc="left")
        axis.set_xticks([i for i in range(start + 1, stop + 1) if i % every == 0 or i == start + 1])
        axis.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, path)


def check_profiles(profiles: Mapping[str, Any], alphabet: str) -> dict[str, Floats]:
    """Return profiles as float64 arrays.

    Raises:
        ValueError: none at all, of different sizes, or with rows that do not sum to 1.
    """
    found = {name: np.asarray(p, dtype=np.float64) for name, p in profiles.items()}
    if not found:
        raise ValueError("a logo needs at least one profile")
    length = len(next(iter(found.values())))
    for name, p in found.items():
        check_shape(f"the profile {name!r}", p.shape, (length, len(alphabet)))
        if p.min() < 0 or not np.allclose(p.sum(1), 1, atol=1e-3):
            raise ValueError(f"the rows of the profile {name!r} must be frequencies that sum to 1")
    return found


def information(profile: npt.ArrayLike) -> Floats:
    """Information content of every position in bits, ``log2 V - entropy``, ``[L]``.

    As Schneider and Stephens (1990), without their correction for few sequences.

    Args:
        profile: frequencies ``[L, V]``.
    """
    p = np.asarray(profile, dtype=np.float64)
    found: Floats = np.log2(p.shape[1]) + (p * np.log2(np.where(p > 0, p, 1.0))).sum(1)
    return found


def _draw_letters(axis: Any, profile: Floats, alphabet: str, positions: range) -> None:
    """Draw the letters of some positions, the first at 1.

    All outlines of a letter are one path; the tallest letter of a position is on top.
    """
    paths, patches = need("matplotlib.path"), need("matplotlib.patches")
    placed: dict[str, list[Any]] = {}
    heights = profile * information(profile)[:, None]
    for position in positions:
        foot = 0.0
        for token in np.argsort(heights[position], kind="stable"):
            height, letter = float(heights[position, token]), alphabet[token]
            if height > _LEAST:
                shape = _glyph(letter)
                vertices = shape.vertices * [0.94, height] + [position + 0.53, foot]
                placed.setdefault(letter, []).append(paths.Path(vertices, shape.codes))
            foot += height
    colors = _letter_colors(alphabet)
    for letter, found in placed.items():
        outline = paths.Path.make_compound_path(*found)
        axis.add_patch(patches.PathPatch(outline, color=colors[letter], linewidth=0))


@cache
def _glyph(letter: str) -> Any:
    """Return the outline of a letter that fills the unit square (a narrow one stays narrow)."""
    path = need("matplotlib.path").Path
    if not letter.strip():  # it has no ink
        return path.unit_rectangle()
    font = need("matplotlib.font_manager").FontProperties(family="DejaVu Sans", weight="bold")
    outline = need("matplotlib.textpath").TextPath((0, 0), letter, size=1, prop=font)
    box = outline.get_extents()
    width = max(box.width, 0.5 * box.height)
    left = (box.x0 + box.x1 - width) / 2
    return path((outline.vertices - [left, box.y0]) / [width, box.height], outline.codes)


def _letter_colors(alphabet: str) -> dict[str, str]:
    for known in (_NUCLEOTIDES, _AMINO_ACIDS):
        if set(alphabet.upper()) <= set(known):
            return {letter: known[letter.upper()] for letter in alphabet}
    return {letter: f"C{i}" for i, letter in enumerate(alphabet)}
