"""Our published rows as a table: the commands that make each, where its figure is, what it was.

A file of ``rows/`` is a study: a section of docs/results.md, its commands in order, and its rows.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from diffpolicy.settings import ConfigError, near_miss
from diffpolicy.settings import from_values as build
from reproduce.figures import REASONS, figure_at, tolerance_of

ROWS = Path(__file__).parent / "rows"
ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "docs" / "results"


@dataclass(frozen=True)
class Step:
    """A command of a study.

    Attributes:
        run: the command; ``{name}`` is a file that the study needs, a value of ``each``, or
            ``{rows}``: the rows that are wanted, up to their first ``/``, with commas.
        makes: what it leaves, so that it is not run again; None: the figures of its rows.
        each: values by name; the command is run for every combination.
        rows: patterns of the rows that need it.
    """

    run: str
    makes: str | None = None
    each: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[str, ...] = ("*",)

    def expanded(self) -> list[Step]:
        """One step for every combination of ``each``."""
        combinations = itertools.product(*self.each.values())
        return [self._filled(dict(zip(self.each, one, strict=True))) for one in combinations]

    def _filled(self, values: Mapping[str, Any]) -> Step:
        def fill(text: str) -> str:
            for name, value in values.items():
                text = text.replace(f"{{{name}}}", str(value))
            return text

        makes = None if self.makes is None else fill(self.makes)
        return Step(fill(self.run), makes, {}, tuple(map(fill, self.rows)))


@dataclass(frozen=True)
class Row:
    """A published figure.

    Attributes:
        recorded: as docs/results.md has it.
        at: path to it (:data:`reproduce.figures.Path`); ``{row}`` is the row's name, ``{0}`` and
            ``{1}`` its parts between ``/``.
        recorded_at: path in the recorded file, where that differs.
        over: path to what the figure is divided by, in the same file: of times the ratio of two
            rows of one run is recorded, as that is what another machine shares.
        tolerance: rule, see :func:`reproduce.figures.tolerance_of`.
        why: what the tolerance is, unless the rule says it.
        reduce: ``mean`` or ``median`` of several numbers.
    """

    recorded: float
    at: tuple[Any, ...]
    recorded_at: tuple[Any, ...] = ()
    over: tuple[Any, ...] = ()
    tolerance: Any = "episodes"
    why: str = ""
    reduce: str = "mean"

    def __post_init__(self) -> None:
        if self.reduce not in ("mean", "median"):
            raise ConfigError(f"reduce is mean or median, got {self.reduce!r}")
        if not self.reason:
            raise ConfigError(f"say why the tolerance is {self.tolerance!r}: why=...")

    @property
    def reason(self) -> str:
        """What the tolerance is."""
        rule = self.tolerance
        return self.why or (REASONS.get(rule, "") if isinstance(rule, str) else "")


@dataclass(frozen=True)
class Study:
    """A section of docs/results.md.

    Attributes:
        section: its heading.
        about: what is measured, in a line.
        hours: of one busy core, for all rows.
        results: the file with the figures, or several by name.
        rows: by name; a number alone is what is recorded.
        steps: commands, in order.
        cannot: why there are none.
        recorded_in: files of docs/results, as ``results``; None: docs/results.md alone has them.
        needs: files that nobody here may pass on, by name, each with where it is had.
        digits: after the point, of the recorded figures.
    """

    section: str
    about: str
    hours: float
    rows: Mapping[str, Row]
    results: Any = None
    steps: tuple[Step, ...] = ()
    cannot: str = ""
    recorded_in: Any = None
    needs: Mapping[str, Any] = field(default_factory=dict)
    digits: int = 3

    def commands(self, rows: Sequence[str]) -> list[Step]:
        """The steps that some rows need, one for each combination of their values."""
        every = [one for step in self.steps for one in step.expanded()]
        return [
            step
            for step in every
            if any(fnmatchcase(row, pattern) for row in rows for pattern in step.rows)
        ]

    @functools.cached_property
    def recorded(self) -> Any:
        """The recorded files, as :func:`read_results` reads them."""
        return None if self.recorded_in is None else read_results(self.recorded_in, RECORDED)

    def tolerance(self, name: str) -> float:
        """How far another run of a row may be from its recorded figure."""
        row = self.rows[name]
        return tolerance_of(row.tolerance, row.recorded, self.recorded, self.recorded_path(name))

    def recorded_path(self, name: str) -> list[Any]:
        """Where a row's figure is in the recorded file."""
        row = self.rows[name]
        return _filled(row.recorded_at or row.at, name)

    def figure(self, name: str, folder: Path) -> float | None:
        """A row's figure in the results below a folder; None while there is none."""
        try:
            return self.figure_in(read_results(self.results, folder), name, self.rows[name].at)
        except LookupError:
            return None

    def figure_in(self, tree: Any, name: str, path: Any) -> float:
        """A row's figure in a file, at a path; divided where the row says by what.

        Raises:
            LookupError: it is not there.
        """
        row = self.rows[name]
        found = figure_at(tree, _filled(path, name), row.reduce)
        return found / figure_at(tree, _filled(row.over, name), row.reduce) if row.over else found


def read_results(files: Any, folder: Path) -> Any:
    """A JSON file, or several by name; of those that are not there, nothing."""
    if isinstance(files, Mapping):
        return {name: read_results(file, folder) for name, file in files.items()}
    path = folder / str(files)
    return json.loads(path.read_text()) if path.is_file() else {}


def _filled(path: Any, row: str) -> Any:
    if isinstance(path, str):
        values = {"row": row, **{str(i): part for i, part in enumerate(row.split("/"))}}
        for name, value in values.items():
            path = path.replace(f"{{{name}}}", value)
        return path
    if isinstance(path, Mapping):
        return {key: _filled(value, row) for key, value in path.items()}
    return [_filled(one, row) for one in path] if isinstance(path, list | tuple) else path


def read_studies(folder: Path | None = None) -> dict[str, Study]:
    """The studies of a folder (ours, unless given), by the names of their files.

    Raises:
        ConfigError: an unknown or missing key, by its file and dotted path.
    """
    return {file.stem: read_study(file) for file in sorted((folder or ROWS).glob("*.yaml"))}


def read_study(file: Path) -> Study:
    """One study; the file's ``defaults`` are entries of rows that do not say otherwise.

    Raises:
        ConfigError: an unknown or missing key, by its file and dotted path.
    """
    try:
        values = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{file.name} is no YAML: {error}") from None
    defaults = values.pop("defaults", {})
    rows = values.get("rows", {})
    values["rows"] = {
        str(name): {**defaults, **(row if isinstance(row, Mapping) else {"recorded": row})}
        for name, row in rows.items()
    }
    try:
        return build(Study, values)
    except ConfigError as error:
        raise ConfigError(f"{file.name}: {error}") from None


def chosen(studies: Mapping[str, Study], name: str) -> dict[str, list[str]]:
    """The rows that ``STUDY``, ``STUDY/ROW`` or a pattern of these names, by study.

    Raises:
        ConfigError: it names none, with the nearest.
    """
    if name in studies:
        return {name: list(studies[name].rows)}
    every = {f"{study}/{row}": (study, row) for study, one in studies.items() for row in one.rows}
    found: dict[str, list[str]] = {}
    for full, (study, row) in every.items():
        if fnmatchcase(full, name):
            found.setdefault(study, []).append(row)
    if not found:
        hint = near_miss(name, [*studies, *every])
        raise ConfigError(f"no row {name!r}{hint}; `--list` shows them")
    return found
