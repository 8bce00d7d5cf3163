"""Running the commands of a study, those that are not done yet, and judging its figures."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffpolicy.files import write_json
from diffpolicy.settings import ConfigError
from reproduce.studies import ROOT, Step, Study


def command_of(
    step: Step, study: Study, rows: Sequence[str], files: Mapping[str, str]
) -> list[str]:
    """The words of a step's command, as docs/results.md writes it."""
    values = {**files, "rows": ",".join(dict.fromkeys(row.split("/")[0] for row in rows))}
    words = []
    for word in shlex.split(step.run):
        for name, value in values.items():
            word = word.replace(f"{{{name}}}", value)
        words.append(word)
    return words


def files_of(study: Study, folder: Path, *, missing: bool = False) -> dict[str, str]:
    """Where the files are that a study needs.

    Args:
        study: with ``needs``.
        folder: where to look, and in the folders directly in it.
        missing: whether files that are not there have the paths that they should have.

    Raises:
        ConfigError: one is not there; says where it is had.
    """
    found = {}
    for name, need in study.needs.items():
        file = str(need["file"])
        places = [folder / file, *sorted(folder.glob(f"*/{file}"))]
        there = next((place for place in places if place.exists()), None)
        if there is None and not missing:
            raise ConfigError(
                f"this needs {file}, which is not in {folder}: {need['about']}. Put it there, or "
                "say files=FOLDER"
            )
        found[name] = str((there or places[0]).resolve())
    return found


def is_done(step: Step, study: Study, rows: Sequence[str], work: Path) -> bool:
    """Whether a step needs not be run: what it makes is there, or else the figures of its rows."""
    if step.makes is not None:
        return (work / step.makes).exists()
    return all(study.figure(row, work) is not None for row in rows)


def going_on(words: Sequence[str], work: Path) -> list[str]:
    """The command that goes on with a run of `diffpolicy` that was interrupted; or the same."""
    folder = next((w.partition("=")[2] for w in words if w.startswith("run_dir=")), None)
    if words[0] != "diffpolicy" or folder is None or not (work / folder / "config.yaml").is_file():
        return list(words)
    return ["diffpolicy", "resume", folder]


def run_command(words: Sequence[str], work: Path) -> None:
    """Run a command in the working folder.

    Raises:
        ConfigError: it failed.
    """
    started = {"diffpolicy": [sys.executable, "-m", "diffpolicy.cli"], "python": [sys.executable]}
    rest = list(words[1:])
    if words[0] == "python":
        rest[0] = str(ROOT / rest[0])
    paths = [str(ROOT), str(ROOT / "envs"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run([*started[words[0]], *rest], cwd=work, env=environment, check=False)
    if done.returncode:
        raise ConfigError(
            f"`{shlex.join(words)}` ended with status {done.returncode}; what is done stays, and "
            "the same call goes on there"
        )


def reproduce(
    study: Study, rows: Sequence[str], work: Path, files: Path, *, dry_run: bool = False
) -> bool:
    """Run what rows of a study need; with ``dry_run`` only show it.

    Returns:
        Whether there is anything to judge.

    Raises:
        ConfigError: a command failed, a file is missing, or the study cannot be run any more.
    """
    if study.cannot:
        raise ConfigError(f"{study.section}: {study.cannot}")
    where = files_of(study, files, missing=dry_run)
    for folder in ("runs", "data", "results") if not dry_run else ():
        (work / folder).mkdir(parents=True, exist_ok=True)
    for step in study.commands(rows):
        words = command_of(step, study, rows, where)
        if is_done(step, study, rows, work):
            print(f"# done: {shlex.join(words)}")
            continue
        words = going_on(words, work)
        print(("" if dry_run else "$ ") + shlex.join(words), flush=True)
        if not dry_run:
            run_command(words, work)
    return not dry_run


def verdict(name: str, study: Study, row: str, work: Path) -> bool:
    """Print ours beside the recorded figure, and keep it in ``reproduced.json``.

    Returns:
        Whether they agree within the tolerance.

    Raises:
        ConfigError: the commands have left no figure.
    """
    ours, recorded = study.figure(row, work), study.rows[row].recorded
    if ours is None:
        raise ConfigError(f"{name}/{row}: no figure in {study.results}, though all commands ran")
    tolerance = study.tolerance(row)
    within = abs(ours - recorded) <= tolerance
    digits = study.digits
    said = "within" if within else "outside"
    print(
        f"{name}/{row}: ours {ours:.{digits}f}, recorded {recorded:.{digits}f}, "
        f"tolerance {tolerance:.{digits}f}: {said}"
    )
    file = work / "reproduced.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    known[f"{name}/{row}"] = {
        "ours": ours,
        "recorded": recorded,
        "tolerance": tolerance,
        "reason": study.rows[row].reason,
        "within": within,
    }
    write_json(file, known)
    return within
