"""One HTML page of an evaluation: its tables and a clip of every task.

The page is a file and a folder of clips beside it. It holds no script and asks nothing of any
network, so that it can be opened from a disk, archived, or sent.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from diffpolicy.files import write_atomic
from diffpolicy.report.tables import text
from diffpolicy.report.tasks import task_lines
from diffpolicy.rollout.results import EpisodeRecord, EpisodeVideo, EvalResult
from diffpolicy.rollout.video import can_film, write_mp4

PAGE, CLIPS = "report.html", "clips"
_INSTALL = 'no clips: films need imageio and more; run: pip install "diffpolicy[media]"'
_STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 25%, transparent); }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 70rem; padding: 1rem; }
table { border-collapse: collapse; } th, td { padding: .25rem .75rem; text-align: left;
border-bottom: 1px solid var(--line); } td { font-variant-numeric: tabular-nums; }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: 1rem; }
figure { margin: 0; } video { width: 100%; border-radius: .5rem; background: #8882; }
""".strip()


def write_page(
    directory: str | Path, result: EvalResult, *, title: str, fps: int = 20
) -> tuple[Path, tuple[str, ...]]:
    """Write ``report.html`` and ``clips/``: what was found, by task, and the films that there are.

    Args:
        directory: where; an earlier page is replaced.
        result: of an evaluation, with videos (see ``VideoOptions.per_task``) or without.
        title: of the page.
        fps: frames of a clip per second.

    Returns:
        The page, and why clips are missing: without the extra ``media``, or where nothing could be
        drawn, the page has its tables alone and says so.

    Example:
        >>> result = evaluate(policy, env, seeds, video=VideoOptions(episodes=0, per_task=1))
        >>> write_page("runs/demo/eval", result, title="demo")
    """
    folder = Path(directory)
    records = {record.seed: record for record in result.episodes}
    figures: list[str] = []
    notes = list(result.notes)
    if not can_film():
        notes.append(_INSTALL)
    shown: set[str | None] = set()
    for number, video in enumerate(_one_per_task(result.videos, records)):
        record = records[video.seed]
        name = f"{number:02}_{_slug(record.task or 'episode')}.mp4"
        try:
            write_mp4(folder / CLIPS / name, [video], fps=fps)
        except Exception as error:  # a missing codec or a full disk must not take the tables too
            notes.append(f"no clips: {error}")
            break
        figures.append(_figure(f"{CLIPS}/{name}", record))
        shown.add(record.task)
    tasks = dict.fromkeys(record.task for record in result.episodes)
    without = [task or "the evaluation" for task in tasks if task not in shown]
    if without:
        notes.append(f"no clip of {', '.join(without)}")
    write_atomic(folder / PAGE, _document(title, result, figures, notes))
    return folder / PAGE, tuple(notes[len(result.notes) :])


def _one_per_task(
    videos: Iterable[EpisodeVideo], records: dict[int, EpisodeRecord]
) -> list[EpisodeVideo]:
    first: dict[str | None, EpisodeVideo] = {}
    for video in videos:
        first.setdefault(records[video.seed].task, video)
    return list(first.values())


def _slug(name: str) -> str:
    """A name of letters, digits and dashes, which is safe in a path and in a link."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:60] or "task"


def _figure(source: str, record: EpisodeRecord) -> str:
    ends = {True: "success", False: "failure", None: "no notion of success"}[record.success]
    caption = html.escape(f"{record.task or 'episode'}: seed {record.seed}, {ends}")
    return (
        f'<figure><video src="{html.escape(source)}" controls loop muted playsinline '
        f'preload="metadata" aria-label="{caption}"></video>'
        f"<figcaption>{caption}, return {text(record.episode_return)}</figcaption></figure>"
    )


def _document(title: str, result: EvalResult, figures: Sequence[str], notes: Sequence[str]) -> str:
    head, lines = task_lines(result.summary)
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _table(["", ""], _facts(result)),
        "<h2>Scores</h2>",
        _table(head, lines),
        "<p>95 % intervals: Wilson for rates, Student for means; over tasks, each counts the same."
        "</p>",
        *(["<h2>Clips</h2>", f'<div class="clips">{"".join(figures)}</div>'] * bool(figures)),
        *(["<h2>Notes</h2>", _items(notes)] * bool(notes)),
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{_STYLE}\n</style>\n"
        + "\n".join(parts)
        + "\n</html>\n"
    )


def _facts(result: EvalResult) -> list[list[str]]:
    """What the scores are scores of."""
    summary, env, seeds = result.summary, result.env, [one.seed for one in result.episodes]
    versions = env.get("versions", {})
    plan = summary.get("ms_per_plan") or {}
    facts = {
        "environment": env.get("id"),
        "its arguments": ", ".join(f"{k}={v}" for k, v in env.get("kwargs", {}).items()) or None,
        "episodes": f"{len(seeds)}, seeds {min(seeds)} to {max(seeds)}",
        "could not be run": summary["n_errors"] or None,
        "network evaluations a plan": summary.get("nfe_per_plan"),
        "ms a plan": plan.get("mean"),
        "versions": ", ".join(f"{name} {value}" for name, value in versions.items()) or None,
    }
    return [[name, text(value)] for name, value in facts.items() if value is not None]


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(one)}</{tag}>' for one in cells)}</tr>"

    heads = row(head, "th") if any(head) else ""
    return f"<table>{heads}{''.join(row(line, 'td') for line in lines)}</table>"


def _items(notes: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(note)}</li>' for note in notes)}</ul>"
