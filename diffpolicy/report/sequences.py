"""The report on a run of reward tuning.

It is a ``report.json`` (plain values, null for what is undefined), a ``report.md`` that says the
same, and pictures if matplotlib is there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from diffpolicy.report import sequence_figures as plots
from diffpolicy.report import tables
from diffpolicy.report.figures import draw_pictures, read_metrics
from diffpolicy.report.tables import Row

FORMAT = "diffpolicy-finetune-report"
PRETRAINED, TUNED, TOP = "pre-trained", "tuned", "top of the data"


@dataclass(frozen=True)
class TuningResult:
    """What one method reached with one seed, as :func:`write_report` takes it.

    Args:
        task: name of the task.
        method: name of the method, for tables.
        seed: of the training.
        before: figures of the pre-trained model, of ``evaluate_sequences``.
        after: of the tuned one, or of sequences that a method without training chose.
        alphabet: one letter per token.
        profiles: frequencies ``[L, V]`` by name; ``"tuned"`` and ``"pre-trained"`` are what
            comparisons show.
        setting: tells results of one method and seed apart, e.g. ``"kl_weight=0.05"``.
        settings: everything that was chosen, the command among it.
        cost: numbers; ``nfe`` (network evaluations per sequence), ``reward_calls`` and ``wall_s``
            stand in tables.
        exact: figures of the whole law (``ExactScores._asdict()``), where they are known.
        best: the first of the :func:`~diffpolicy.sequences.designs.designs`.
        designs: how many different valid ones there are.
        note: what a reader must know beside the figures.
        optimum: ``(kl, reward)`` of the best laws, where they are known.

    Raises:
        ValueError: profiles that do not fit the alphabet.
    """

    task: str
    method: str
    seed: int
    before: Row
    after: Row
    alphabet: str
    profiles: Row
    setting: str = ""
    settings: Row = field(default_factory=dict)
    cost: Row = field(default_factory=dict)
    exact: Row | None = None
    best: Sequence[Row] = ()
    optimum: Sequence[Sequence[float]] = ()
    designs: int = 0
    note: str = ""

    def __post_init__(self) -> None:
        plots.check_profiles(self.profiles, self.alphabet)


def write_report(run_dir: str | Path, result: TuningResult) -> dict[str, Any]:
    """Write ``report.json``, ``report.md``, ``logo.png`` and ``curves.png`` of one run.

    The curves, and the warning of reward hacking, are those of ``metrics.csv`` in the same place;
    without it there are none. Pictures that cannot be drawn leave a note with the reason.

    Args:
        run_dir: receives the files.
        result: what was reached.

    Returns:
        The report.

    Raises:
        ValueError: values that JSON does not have.
    """
    folder = Path(run_dir)
    values = tables.plain({f.name: getattr(result, f.name) for f in fields(result)})
    metrics = folder / "metrics.csv"
    title = f"{result.task}, {tables.label_of(values)}, seed {result.seed}"
    profiles, alphabet = result.profiles, result.alphabet
    drawings: dict[str, Callable[[Path], Any]] = {
        "logo.png": lambda path: plots.plot_logo(profiles, path, alphabet=alphabet, title=title)
    }
    if metrics.is_file():
        drawings["curves.png"] = lambda path: plots.plot_curves(metrics, path, title=title)
    pictures, notes = draw_pictures(folder, drawings)
    report = {**values, "warning": _warning(metrics), "pictures": pictures, "notes": notes}
    settings = f"```json\n{json.dumps(values['settings'], indent=1)}\n```\n"
    after = ["## Settings\n", settings] if values["settings"] else []
    return tables.save_report(folder, FORMAT, report, *_words(report, title), after=after)


def _warning(metrics: Path) -> dict[str, Any] | None:
    try:
        return plots.standing_warning(read_metrics(metrics, first="eval/"))
    except (OSError, ValueError):  # no file, or no row in it yet
        return None


def _words(report: Row, title: str) -> list[str]:
    before, after, warning = report["before"], report["after"], report["warning"]
    keys = [k for k in {**before, **after} if k not in ("kl_kind", "kl_standard_error")]
    lines = [[tables.FIGURES.get(k, k), _entry(before, k), _entry(after, k)] for k in keys]
    parts = [f"# {title}\n"]
    if warning:
        parts.append(f"**Since update {warning['step']}**: {warning['message']}.\n")
    if report["note"]:
        parts.append(f"{report['note']}\n")
    table = tables.markdown(["figure", "before", "after"], lines)
    parts += ["Median [quartiles] over sequences; correlations with the top of the data.\n", table]
    for head, values in (("Exact law", report["exact"]), ("Cost", report["cost"])):
        if values:
            lines = [
                [tables.COSTS.get(k, k.replace("_", " ")), tables.text(v)]
                for k, v in values.items()
            ]
            parts += [f"## {head}\n", tables.markdown(["figure", "value"], lines)]
    if report["best"]:
        heads = list(report["best"][0])
        lines = [[tables.text(row.get(h)) for h in heads] for row in report["best"]]
        parts += [
            "## Best sequences\n",
            tables.markdown([h.replace("_", "-") for h in heads], lines),
        ]
    return parts


def _entry(row: Row, key: str) -> str:
    value = row.get(key)
    if isinstance(value, Mapping):
        return tables.distribution(value)
    if key == "kl" and value is not None:
        error = row.get("kl_standard_error")
        spread = f" +- {tables.text(error)}" if error else ""
        return f"{tables.text(value)}{spread} ({row.get('kl_kind') or 'kind unknown'})"
    return tables.text(value)
