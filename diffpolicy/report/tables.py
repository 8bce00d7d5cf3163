"""Tables of methods over seeds in Markdown, and how reports are written, read and compared."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffpolicy.files import write_atomic, write_json
from diffpolicy.report.figures import is_finite
from diffpolicy.sequences.metrics import over_seeds

COSTS = {"nfe": "NFE", "reward_calls": "reward calls", "wall_s": "wall s"}
FIGURES = {  # in the order of their columns
    "exact.progress": "progress (exact)",
    "exact.reward": "E[reward] (exact)",
    "reward": "reward, training oracle",
    "held_out": "reward, held-out oracle",
    "kl": "KL, nats",
    "log_likelihood": "log-likelihood (bound)",
    "kmer_correlation": "k-mer correlation",
    "profile_correlation": "profile correlation",
    "entropy": "entropy, nats",
    "diversity": "Hamming distance of two",
    "wild_type_distance": "distance from wild type",
    "unique": "unique fraction",
    "valid": "valid fraction",
}
VERSION = 1

Row = Mapping[str, Any]
"""What is known of a run, a report or a row of a table, as plain values."""


# ------------------------------------------------------------------ cells and tables


def markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Make a Markdown table of cells."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |\n"
        for row in rows
    )


def text(value: Any) -> str:
    """Show a value in a cell: numbers short, null blank."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    if value == 0 or abs(value) < 0.01:
        return f"{value:.2g}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3f}"


def distribution(found: Row) -> str:
    """Show median and quartiles in a cell."""
    return f"{text(found['median'])} [{text(found['q25'])}, {text(found['q75'])}]"


def signed(interval: Row | None) -> str:
    """Show a difference with its interval in a cell."""
    if interval is None:
        return ""
    low, high = interval["low"], interval["high"]
    ends = "" if low is None else f" [{low:+.3f}, {high:+.3f}]"
    return f"{interval['value']:+.3f}{ends}"


def figure(row: Row, name: str) -> float | None:
    """Look up a number of a row by its dotted name; of a distribution, its median.

    Returns:
        ``None`` if it is not there, or not a finite number.
    """
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, Mapping):
        value = value.get("median")
    return float(value) if is_finite(value) else None


def known_columns(rows: Sequence[Row], names: Mapping[str, str]) -> dict[str, str]:
    """Of figures and their heads, those that any row has a number of."""
    return {k: v for k, v in names.items() if any(figure(row, k) is not None for row in rows)}


def label_of(row: Row) -> str:
    """Method and setting of a row, as one name."""
    return f"{row['method']}, {row['setting']}" if row.get("setting") else str(row["method"])


def method_table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """Make a Markdown table with one line per method and setting, over the seeds.

    A cell is a median [lower, upper quartile]; a single value stands alone, an undefined one is
    left blank, and one that some seeds lack says how many have it.

    Args:
        rows: one per seed: ``method``, optionally ``setting``, figures, and the costs ``nfe``,
            ``reward_calls`` and ``wall_s``, whose medians are the last columns where known.
        columns: keys of figures, dotted for nested ones, with the heads of their columns. Of a
            distribution (``reward``) the median is taken.
    """
    costs = known_columns(rows, COSTS)
    lines = []
    for label, found in method_statistics(rows, [*columns, *costs]).items():
        cells = [_cell(found[name], found["seeds"]) for name in columns]
        medians = [found[name] and found[name]["median"] for name in costs]
        cells += [text(int(m) if m is not None and m.is_integer() else m) for m in medians]
        lines.append([label, str(found["seeds"]), *cells])
    return markdown(["method", "seeds", *columns.values(), *costs.values()], lines)


def method_statistics(rows: Sequence[Row], columns: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Distributions over the seeds by method and setting, in the order of the rows.

    Returns:
        By label: ``seeds`` (how many rows) and per column what
        :func:`~diffpolicy.sequences.metrics.over_seeds` says; null where no seed has a number.
    """
    found: dict[str, dict[str, Any]] = {}
    for label in dict.fromkeys(map(label_of, rows)):
        mine = [row for row in rows if label_of(row) == label]
        found[label] = {"seeds": len(mine)}
        for name in columns:
            values = [v for v in (figure(row, name) for row in mine) if v is not None]
            found[label][name] = over_seeds(values) if values else None
    return found


def _cell(found: Row | None, seeds: int) -> str:
    if found is None:
        return ""
    count = len(found["values"])
    cell = text(found["median"]) if count == 1 else distribution(found)
    return cell if count == seeds else f"{cell} ({count} of {seeds})"


# ------------------------------------------------------------------ reports


def save_report(
    folder: Path, kind: str, report: Row, *words: str, after: Sequence[str] = ()
) -> dict[str, Any]:
    """Write ``report.json`` and ``report.md``; see :func:`plain` for what may be in it.

    Args:
        folder: where.
        kind: its ``format``.
        report: among it the names of its ``pictures`` and ``notes`` on them.
        words: paragraphs of ``report.md`` before pictures and notes.
        after: paragraphs after them.

    Returns:
        The report, as it is read.
    """
    values: dict[str, Any] = plain({"format": kind, "version": VERSION, **report})
    shown = [f"![{Path(name).stem}]({name})\n" for name in report["pictures"]]
    notes = [f"{note}\n" for note in report.get("notes", ())]
    write_atomic(folder / "report.md", "\n".join([*words, *shown, *notes, *after]))
    write_json(folder / "report.json", values)
    return values


def read_report(path: str | Path, kind: str) -> dict[str, Any]:
    """Read the report of a run, from its file or directory.

    Args:
        path: where it is.
        kind: its ``format``.

    Raises:
        ValueError: there is none, or another.
    """
    file = Path(path) / "report.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(f"no report at {file}; a tuning writes it when it is done")
    try:
        report: dict[str, Any] = json.loads(file.read_bytes())
        found = (report["format"], report["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no report of a run: {error!r}") from None
    if found != (kind, VERSION):
        raise ValueError(f"{file} is {found[0]!r} of version {found[1]}, not {kind!r} of {VERSION}")
    return report


def plain(value: Any, where: str = "value") -> Any:
    """Nested values as JSON has them: arrays as lists, null in place of what is not finite.

    Raises:
        ValueError: something that JSON does not have, with its place.
    """
    if hasattr(value, "tolist"):  # arrays, tensors and their numbers
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(k): plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Path):
        return str(value)
    raise ValueError(f"a report holds plain values; {where} is {type(value).__name__}")


def check_comparable(reports: Sequence[Row], **same: Callable[[Row], Any]) -> None:
    """Raise ``ValueError`` unless reports can stand in one table.

    That is: there are some, they agree in what is given, and no two are of one method, setting and
    seed.

    Args:
        reports: of runs.
        **same: by name, what of a report all must share.
    """
    if not reports:
        raise ValueError("there are no reports to compare")
    for name, of in same.items():
        values = list(dict.fromkeys(of(report) for report in reports))
        if len(values) > 1:
            raise ValueError(f"runs of one {name} can be compared; these have {values}")
    keys = [(label_of(report), report["seed"]) for report in reports]
    twice = [key for key in keys if keys.count(key) > 1]
    if twice:
        which = f"{twice[0][0]!r} with seed {twice[0][1]}"
        raise ValueError(f"two reports are of {which}; leave one out, or name it with method=...")
