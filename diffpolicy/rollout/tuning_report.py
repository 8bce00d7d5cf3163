"""What a tuning did to a policy: scores before and after on the same episodes, with pictures."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffpolicy.rollout.plots import read_metrics
from diffpolicy.rollout.results import EvalResult
from diffpolicy.rollout.scores import mean_interval, paired_difference

FORMAT, VERSION = "diffpolicy-tuning", 1
FIELDS = {"max_reward": "max_reward", "return": "episode_return", "length": "length"}
CURVES = ("accuracy", "gap", "error_chosen", "error_rejected", "saturated", "loss")


def episode_scores(result: EvalResult, score: str) -> list[float]:
    """The score of every episode, in the order of its seeds; an error counts as 0.

    Raises:
        ValueError: a score that episodes do not have.
    """
    name = FIELDS.get(score, score)
    values = [0.0 if e.error is not None else getattr(e, name, None) for e in result.episodes]
    if any(value is None for value in values):
        raise ValueError(f"these episodes have no {score!r}")
    return [float(value) for value in values if value is not None]


def write_tuning_report(
    run_dir: str | Path,
    *,
    method: str,
    task: str,
    seed: int,
    score: str,
    scores: Mapping[str, Mapping[str, EvalResult]],
    training: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Write ``report.json``, ``report.md`` and pictures.

    Args:
        run_dir: of the tuning; ``metrics.csv`` (or that of each ``round_*``) is drawn.
        method: its name in comparisons.
        task: name of the environment.
        seed: of the tuning.
        score: which number of an episode counts.
        scores: ``before`` and ``after``, by number of network evaluations per plan; the same
            seeds in both.
        training: what is known of it, JSON values.
        settings: of the run.

    Returns:
        The report. ``before``, ``after``: mean and 95 % interval of the score by NFE;
        ``difference``: after - before, paired by episode; ``episodes``: the scores themselves.
    """
    folder = Path(run_dir)
    values = {
        when: {nfe: episode_scores(result, score) for nfe, result in found.items()}
        for when, found in scores.items()
    }
    report: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "task": task,
        "method": method,
        "seed": seed,
        "score": score,
        "seeds": next(([e.seed for e in r.episodes] for r in scores["before"].values()), []),
        **{
            when: {nfe: mean_interval(v).to_dict() for nfe, v in found.items()}
            for when, found in values.items()
        },
        "difference": {
            nfe: paired_difference(values["after"][nfe], before).to_dict()
            for nfe, before in values["before"].items()
        },
        "episodes": values,
        "training": dict(training),
        "settings": dict(settings),
    }
    pictures = [_curves(folder)]
    if report["before"]:
        rows = {"before": report["before"], method: report["after"]}
        pictures.append(plot_nfe(rows, folder / "score_by_nfe.png", score=score, title=task))
    report["pictures"] = [p.name for p in pictures if p is not None]
    _write(folder / "report.json", json.dumps(report, indent=1))
    _write(folder / "report.md", _text(report))
    return report


def read_tuning_report(path: str | Path) -> dict[str, Any]:
    """A report of :func:`write_tuning_report`, from its file or directory.

    Raises:
        ValueError: a file that is none.
    """
    file = Path(path)
    file = file / "report.json" if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"no report at {file}; `diffpolicy finetune` writes it when it is done")
    report = json.loads(file.read_text())
    if report.get("format") != FORMAT or report.get("version") != VERSION:
        raise ValueError(f"{file} is no report of a policy's tuning of version {VERSION}")
    return dict(report)


def compare_tunings(
    reports: Iterable[str | Path], output: str | Path, *, baseline: str = "bc"
) -> Path:
    """Several tunings of the same policies beside each other.

    A line is a method over its seeds: mean score by NFE, and the differences from the policies
    before and from the method ``baseline``, paired by tuning seed and episode.

    Args:
        reports: of :func:`write_tuning_report`, files or directories.
        output: a directory for ``report.json``, ``report.md`` and ``score_by_nfe.png``.
        baseline: name of a method among them; without it that column is left out.

    Returns:
        The path of ``report.md``.

    Raises:
        ValueError: no reports, runs of different tasks or episodes, or two runs of one method
            with the same seed.
    """
    found = [read_tuning_report(path) for path in reports]
    _check_comparable(found)
    rows = [_row(name, found, baseline) for name in dict.fromkeys(r["method"] for r in found)]
    rows.insert(0, _row(None, found, baseline))
    folder, first = Path(output), found[0]
    folder.mkdir(parents=True, exist_ok=True)
    lines = {row["method"]: row["score"] for row in rows}
    plot_nfe(lines, folder / "score_by_nfe.png", score=first["score"], title=first["task"])
    names = {"task": first["task"], "score": first["score"], "baseline": baseline}
    _write(folder / "report.json", json.dumps({**names, "rows": rows}, indent=1))
    text = [f"# {first['task']}: tunings compared", "", comparison_table(rows, baseline)]
    text += ["", "![score](score_by_nfe.png)", ""]
    return _write(folder / "report.md", "\n".join(text))


def comparison_table(rows: Sequence[Mapping[str, Any]], baseline: str) -> str:
    """The rows of :func:`compare_tunings` as Markdown."""
    nfes = list(rows[0]["score"])
    head = ["method", "seeds", "updates", *(f"NFE {n}" for n in nfes)]
    last = nfes[-1]
    head += [f"minus before (NFE {last})", f"minus {baseline} (NFE {last})", "training s"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [row["method"], str(len(row["seeds"])), str(row["updates"] or "")]
        cells += [f"{row['score'][n]['value']:.3f}" for n in nfes]
        for key in ("minus_before", "minus_baseline"):
            cells.append(signed(row[key][last]) if row[key] else "")
        cells.append("" if row["train_s"] is None else f"{row['train_s']:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def signed(interval: Mapping[str, Any]) -> str:
    """A difference with its interval."""
    if interval["low"] is None:
        return f"{interval['value']:+.3f}"
    return f"{interval['value']:+.3f} [{interval['low']:+.3f}, {interval['high']:+.3f}]"


def _check_comparable(reports: Sequence[Mapping[str, Any]]) -> None:
    if not reports:
        raise ValueError("there are no reports to compare")
    for name in ("task", "score", "seeds"):
        values = [report[name] for report in reports]
        if any(value != values[0] for value in values):
            raise ValueError(f"tunings of one {name} can be compared; these differ in it")
    keys = [(report["method"], report["seed"]) for report in reports]
    twice = [key for key in keys if keys.count(key) > 1]
    if twice:
        raise ValueError(
            f"two reports are of {twice[0][0]!r} with seed {twice[0][1]}; leave one out, or name "
            "them with method=..."
        )


def _row(name: str | None, reports: Sequence[Mapping[str, Any]], baseline: str) -> dict[str, Any]:
    """A method over its seeds; ``None``: the policies before."""
    if name is None:
        mine = list({report["seed"]: report for report in reports}.values())
    else:
        mine = [report for report in reports if report["method"] == name]
    when = "before" if name is None else "after"
    others = {r["seed"]: r for r in reports if r["method"] == baseline}
    paired = name not in (None, baseline) and all(r["seed"] in others for r in mine)
    nfes = list(mine[0][when])

    def joined(key: str, nfe: str, chosen: Sequence[Mapping[str, Any]]) -> Any:
        return np.concatenate([report["episodes"][key][nfe] for report in chosen])

    partners = [others[r["seed"]] for r in mine] if paired else []
    return {
        "method": "before" if name is None else name,
        "seeds": [r["seed"] for r in mine],
        "updates": None if name is None else sum(t["steps"] for t in mine[0]["training"]["rounds"]),
        "score": {n: mean_interval(joined(when, n, mine)).to_dict() for n in nfes},
        "per_seed": {n: [r[when][n]["value"] for r in mine] for n in nfes},
        "minus_before": {
            n: paired_difference(joined("after", n, mine), joined("before", n, mine)).to_dict()
            for n in nfes
            if name is not None
        },
        "minus_baseline": {
            n: paired_difference(joined("after", n, mine), joined("after", n, partners)).to_dict()
            for n in nfes
            if paired
        },
        "train_s": None
        if name is None
        else float(np.mean([r["training"]["train_s"] for r in mine])),
    }


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
    figure.savefig(target, dpi=120)
    return target


def _curves(folder: Path) -> Path | None:
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
    figure.savefig(folder / "curves.png", dpi=120)
    return folder / "curves.png"


def _text(report: Mapping[str, Any]) -> str:
    head = ["NFE", f"{report['score']} before", "after", "difference (paired, 95 %)"]
    lines = [f"# {report['task']}: {report['method']}, seed {report['seed']}", ""]
    lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for nfe, before in report["before"].items():
        after, difference = report["after"][nfe], report["difference"][nfe]
        lines.append(
            f"| {nfe} | {before['value']:.3f} | {after['value']:.3f} | {signed(difference)} |"
        )
    training = report["training"]
    lines += ["", f"{len(report['seeds'])} episodes; training {training['train_s']:.0f} s.", ""]
    lines += [f"![{name.split('.')[0]}]({name})" for name in report["pictures"]]
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str) -> Path:
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_text(text)
    partial.replace(path)
    return path


__all__ = [
    "compare_tunings",
    "comparison_table",
    "episode_scores",
    "plot_nfe",
    "read_tuning_report",
    "signed",
    "write_tuning_report",
]
