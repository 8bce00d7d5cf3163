"""Sequence logos: letters as tall as the information they carry, as outlines on an axis."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

_PIP = 'pip install "diffpolicy[media]"'
_TAB = ("blue", "orange", "green", "red", "purple", "brown", "pink", "gray", "olive", "cyan")
COLORS = tuple(f"tab:{name}" for name in _TAB)
_NUCLEOTIDES = {"A": "#109648", "C": "#255c99", "G": "#f7a600", "T": "#d62839", "U": "#d62839"}
# Amino acids by chemistry: polar, amide, basic, acidic, hydrophobic.
_AMINO_ACIDS = {
    letter: color
    for letters, color in (
        ("GSTYC", "#109648"),
        ("NQ", "#7b3294"),
        ("KRH", "#255c99"),
        ("DE", "#d62839"),
        ("AVLIPWFM", "#222222"),
    )
    for letter in letters
}
_LEAST = 1e-3  # bits below which a letter is not drawn

Floats = npt.NDArray[np.float64]


def information(profile: npt.ArrayLike) -> Floats:
    """Information content of every position in bits, ``log2 V - entropy``, ``[L]``.

    As Schneider and Stephens (1990), without their correction for few sequences.

    Args:
        profile: frequencies ``[L, V]``.
    """
    p = np.asarray(profile, dtype=np.float64)
    found: Floats = np.log2(p.shape[1]) + (p * np.log2(np.where(p > 0, p, 1.0))).sum(1)
    return found


def check_profiles(profiles: Mapping[str, Any], alphabet: str) -> dict[str, Floats]:
    """Profiles as float64 arrays.

    Raises:
        ValueError: none at all, of different sizes, or with rows that do not sum to 1.
    """
    found = {name: np.asarray(p, dtype=np.float64) for name, p in profiles.items()}
    if not found:
        raise ValueError("a logo needs at least one profile")
    length = len(next(iter(found.values())))
    for name, p in found.items():
        if p.shape != (length, len(alphabet)) or not length:
            raise ValueError(
                f"the profile {name!r} must be [{length or 'L'}, {len(alphabet)}] (positions, "
                f"letters of {alphabet!r}), got {list(p.shape)}"
            )
        if not (np.isfinite(p).all() and (p >= 0).all() and np.abs(p.sum(1) - 1).max() < 1e-3):
            raise ValueError(f"the rows of the profile {name!r} must be frequencies that sum to 1")
    return found


class LogoArtist:
    """Draws the letters of an alphabet.

    DNA and RNA have their usual colours, amino acids those of their chemistry, other alphabets
    any.

    Args:
        alphabet: one letter per token.

    Raises:
        ImportError: matplotlib is missing (with the pip command).
    """

    def __init__(self, alphabet: str) -> None:
        self.alphabet = alphabet
        self.colors = _letter_colors(alphabet)
        self.glyphs = {letter: _glyph(letter) for letter in alphabet}

    def draw(self, axis: Any, profile: Floats, start: int, stop: int) -> None:
        """Draws positions ``start .. stop - 1`` of a profile ``[L, V]``, the first at 1.

        All outlines of a letter are one path; the tallest letter of a position is on top.
        """
        paths, patches = import_matplotlib("path", "patches")
        placed: dict[str, list[Any]] = {}
        heights = profile * information(profile)[:, None]
        for position in range(start, stop):
            foot = 0.0
            for token in np.argsort(heights[position], kind="stable"):
                height, letter = float(heights[position, token]), self.alphabet[token]
                if height > _LEAST:
                    shape = self.glyphs[letter]
                    vertices = shape.vertices * [0.94, height] + [position + 0.53, foot]
                    placed.setdefault(letter, []).append(paths.Path(vertices, shape.codes))
                foot += height
        for letter, found in placed.items():
            outline = paths.Path.make_compound_path(*found)
            axis.add_patch(patches.PathPatch(outline, color=self.colors[letter], linewidth=0))
        axis.set_ylim(0, math.log2(len(self.alphabet)))


def _glyph(letter: str) -> Any:
    """The outline of a letter that fills the unit square (a narrow one stays narrow)."""
    path, fonts, text = import_matplotlib("path", "font_manager", "textpath")
    if not letter.strip():  # it has no ink
        return path.Path.unit_rectangle()
    font = fonts.FontProperties(family="DejaVu Sans", weight="bold")
    outline = text.TextPath((0, 0), letter, size=1, prop=font)
    box = outline.get_extents()
    width = max(box.width, 0.5 * box.height)
    left = (box.x0 + box.x1 - width) / 2
    vertices = (outline.vertices - [left, box.y0]) / [width, box.height]
    return path.Path(vertices, outline.codes)


def _letter_colors(alphabet: str) -> dict[str, str]:
    for known in (_NUCLEOTIDES, _AMINO_ACIDS):
        if set(alphabet.upper()) <= set(known):
            return {letter: known[letter.upper()] for letter in alphabet}
    return {letter: COLORS[i % len(COLORS)] for i, letter in enumerate(alphabet)}


def import_matplotlib(*names: str) -> tuple[Any, ...]:
    """Modules of matplotlib, e.g. ``"figure"``; ``ImportError`` with the pip command if missing."""
    try:
        # Figures without pyplot: no global state, and never a window.
        return tuple(importlib.import_module(f"matplotlib.{name}") for name in names)
    except ImportError as error:
        raise ImportError(f"pictures need matplotlib, which cannot be imported: {_PIP}") from error


__all__ = ["COLORS", "LogoArtist", "check_profiles", "import_matplotlib", "information"]
