"""Markdown tables of methods over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from diffpolicy.sequences.metrics import quartiles

COSTS = {"nfe": "NFE", "reward_calls": "reward calls", "wall_s": "wall s"}


def method_table(
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, str] | Sequence[str],
    *,
    spread: str = "quartiles",
) -> str:
    """A Markdown table with one line per method and setting, over the seeds.

    Args:
        rows: one per seed: ``method``, optionally ``setting``, figures, and the costs ``nfe``,
            ``reward_calls`` and ``wall_s``, whose medians are the last columns where known.
        columns: keys of figures, dotted for nested ones, with the heads of their columns. Of a
            distribution (``reward``) the median is taken.
        spread: ``"quartiles"``: median [lower, upper quartile]; ``"std"``: mean +- standard
            deviation (n - 1). A single value stands alone, an undefined one is left blank, and
            one that some seeds lack says how many have it.

    Raises:
        ValueError: no rows, a column that no row has, or an unknown spread.
    """
    if not rows:
        raise ValueError("there are no rows for a table")
    if spread not in ("quartiles", "std"):
        raise ValueError(f"spread must be 'quartiles' or 'std', got {spread!r}")
    heads = dict(columns) if isinstance(columns, Mapping) else {c: c for c in columns}
    for name in heads:
        if all(figure(row, name, missing="") == "" for row in rows):
            raise ValueError(f"no row has {name!r}; the first has {sorted(rows[0])}")
    costs = {k: v for k, v in COSTS.items() if any(figure(r, k) is not None for r in rows)}
    lines = []
    for label, found in method_statistics(rows, [*heads, *costs]).items():
        cells = [_cell(found[name], found["seeds"], spread) for name in heads]
        cells += [_cost(found[name]) for name in costs]
        lines.append([label, str(found["seeds"]), *cells])
    return markdown(["method", "seeds", *heads.values(), *costs.values()], lines)


def method_statistics(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Distributions over the seeds by method and setting, in the order of the rows.

    Returns:
        By label: ``seeds`` (how many rows) and per column ``median``, ``q25``, ``q75``, ``mean``,
        ``std`` (of n - 1; null for one seed) and ``values``; null where no seed has a number.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(label_of(row), []).append(row)
    found: dict[str, dict[str, Any]] = {}
    for label, mine in groups.items():
        found[label] = {"seeds": len(mine)}
        for name in columns:
            values = [v for v in (figure(row, name) for row in mine) if v is not None]
            std = float(np.std(values, ddof=1)) if len(values) > 1 else None
            spread = {**quartiles(values), "std": std, "values": values} if values else None
            found[label][name] = spread
    return found


def _cell(found: Mapping[str, Any] | None, seeds: int, spread: str) -> str:
    if found is None:
        return ""
    count = len(found["values"])
    if count == 1:
        cell = text(found["median"])
    elif spread == "std":
        cell = f"{text(found['mean'])} +- {text(found['std'])}"
    else:
        cell = distribution(found)
    return cell if count == seeds else f"{cell} ({count} of {seeds})"


def _cost(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    median = found["median"]
    return text(int(median) if median.is_integer() else median)


def figure(row: Mapping[str, Any], name: str, missing: Any = None) -> Any:
    """A number of a row by its dotted name; None if undefined, ``missing`` if not there."""
    value: Any = row
    for part in name.split("."):
        if value is None:
            return None
        if not isinstance(value, Mapping) or part not in value:
            return missing
        value = value[part]
    if isinstance(value, Mapping):
        value = value.get("median")
    usable = isinstance(value, int | float | np.number) and math.isfinite(value)
    return float(value) if usable else None


def label_of(row: Mapping[str, Any]) -> str:
    """Method and setting of a row, as one name."""
    return f"{row['method']}, {row['setting']}" if row.get("setting") else str(row["method"])


def text(value: Any) -> str:
    """A value in a cell: numbers short, null blank."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    if value == 0 or abs(value) < 0.01:
        return f"{value:.2g}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3f}"


def distribution(found: Mapping[str, Any]) -> str:
    """Median and quartiles in a cell."""
    return f"{text(found['median'])} [{text(found['q25'])}, {text(found['q75'])}]"


def markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table of cells."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |\n"
        for row in rows
    )


__all__ = [
    "COSTS",
    "distribution",
    "figure",
    "label_of",
    "markdown",
    "method_statistics",
    "method_table",
    "text",
]
