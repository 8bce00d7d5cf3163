"""Our published rows by name: their data, trainings and evaluations, and the figure beside ours.

    python scripts/reproduce.py --list [PATTERN]
    python scripts/reproduce.py NAME [NAME ...] [work=runs/reproduce] [files=data] [--dry-run]

NAME is a study (`demo`), a row of one (`realtime_fetch/rti3`), or a pattern (`planners_*/ddim20`).
Commands run in the folder `work`, one after the other; what is there already is not made again, and
an interrupted training goes on, so that the same call is the way to resume. --dry-run prints the
commands alone. Some studies need files that cannot be passed on; they are looked for in `files` and
the folders in it, and --list says which. The last lines are

    STUDY/ROW: ours X, recorded Y, tolerance Z: within (or outside)

and the exit status is 1 if any is outside. The table is scripts/reproduce/rows/*.yaml.
"""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffpolicy.cli import guarded
from diffpolicy.config_compose import is_setting, keys_given
from diffpolicy.settings import ConfigError, check_known
from reproduce.steps import reproduce, verdict
from reproduce.studies import Study, chosen, read_studies


def listing(studies: Mapping[str, Study], pattern: str) -> list[str]:
    """Lines about the studies and rows that a pattern names."""
    lines = []
    for name, study in studies.items():
        rows = {row: f"{name}/{row}" for row in study.rows}
        if not any(fnmatch.fnmatchcase(text, pattern) for text in (name, *rows.values())):
            continue
        lines.append(f"{name}: {study.about} ({study.hours:g} h)")
        lines += [f"    needs {n['file']}: {n['about']}" for n in study.needs.values()]
        lines += [f"    cannot be run: {study.cannot}"] * bool(study.cannot)
        for row, full in rows.items():
            recorded, digits = study.rows[row].recorded, study.digits
            within = f"{study.tolerance(row):.{digits}f}"
            lines.append(f"    {full}: {recorded:.{digits}f}, tolerance {within}")
    return lines


def run(arguments: Sequence[str]) -> int:
    """List, show or reproduce."""
    studies = read_studies()
    names = [a for a in arguments if not is_setting(a) and not a.startswith("-")]
    flags = {a for a in arguments if a.startswith("-") and not is_setting(a)}
    options = {"work": "runs/reproduce", "files": "data", **keys_given(arguments)}
    check_known(options, ("work", "files"), "reproduce")
    check_known(flags, ("--list", "--dry-run"), "reproduce")
    if "--list" in flags:
        print("\n".join(listing(studies, names[0] if names else "*")))
        return 0
    if not names:
        raise ConfigError("name a row; `python scripts/reproduce.py --list` shows them")
    work, files = Path(options["work"]), Path(options["files"]).resolve()
    wanted = [chosen(studies, name) for name in names]
    agreed = True
    for study, rows in [item for one in wanted for item in one.items()]:
        if reproduce(studies[study], rows, work, files, dry_run="--dry-run" in flags):
            agreed &= all([verdict(study, studies[study], row, work) for row in rows])
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(guarded("reproduce", run, lambda: str(__doc__)))
