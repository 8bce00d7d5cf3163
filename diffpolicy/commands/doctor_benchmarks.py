"""Which benchmarks' packages are here, whether their versions fit, and what installs the others."""

from __future__ import annotations

import contextlib
import importlib.metadata
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from diffpolicy.commands.doctor_checks import Finding, release

READ = """
import json
from diffpolicy.rollout.declared import declared
found = declared()
sets = [[found.sources[name], recipe.extra] for name, recipe in found.recipes.items()]
print(json.dumps({"homes": found.homes, "sets": sets, "broken": found.broken}))
"""
"""Prints what is declared. It imports gymnasium, and so runs in a process of its own."""

_OPERATORS: Mapping[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}


class Requirement(NamedTuple):
    """A requirement of a package, as its metadata say it.

    Attributes:
        name: of the distribution that is required.
        bounds: ``(operator, version)`` each, all of which must hold.
        extra: under which it is required; empty: always.
    """

    name: str
    bounds: tuple[tuple[str, str], ...]
    extra: str

    @classmethod
    def read(cls, text: str) -> Requirement | None:
        """Read ``mujoco<3.12,>=3.3; extra == "robotics"``; None if it has another condition."""
        plain, _, condition = text.partition(";")
        extra = re.fullmatch(r"""\s*(extra == ["'](?P<extra>[\w.-]+)["'])?\s*""", condition)
        name = re.match(r"[\w.-]+", plain)
        if extra is None or name is None:
            return None
        # A bound with a star (1.4.*) is not judged.
        bounds = re.findall(r"(==|!=|<=|>=|<|>)\s*([\w.]+)(?=\s*(?:,|\)|$))", plain[name.end() :])
        return cls(name[0], tuple(bounds), extra["extra"] or "")

    def met(self, version: str) -> bool:
        """Whether a version fits."""
        return all(
            _OPERATORS[sign](*_padded(release(version), release(bound)))
            for sign, bound in self.bounds
        )

    def __str__(self) -> str:
        return self.name + ",".join(sign + bound for sign, bound in self.bounds)


def _padded(*versions: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Versions as tuples of one length: 3.3 is 3.3.0."""
    length = max(map(len, versions))
    return [one + (0,) * (length - len(one)) for one in versions]


def requirements(distribution: str) -> list[Requirement]:
    """Read what an installed package requires; empty where it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found = map(Requirement.read, importlib.metadata.requires(distribution) or ())
        return [one for one in found if one is not None]
    return []


def version_of(name: str) -> str | None:
    """Read the version of an installed distribution, without importing it."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def check_benchmarks(
    told: Mapping[str, Any],
    version: Callable[[str], str | None] = version_of,
    required: Callable[[str], Sequence[Requirement]] = requirements,
) -> list[Finding]:
    """Judge the packages of every extra that some environments need.

    Args:
        told: what :data:`READ` prints: ``homes`` (by module the distribution and its extra),
            ``sets`` (of each recipe the distribution and its extra) and ``broken``.
        version: of a distribution, None where it is not installed.
        required: what a distribution requires.

    Returns:
        A finding for each extra, and one for each declaration that cannot be read.
    """
    modules: dict[tuple[str, str], list[str]] = {}
    for module, (distribution, extra) in told["homes"].items():
        if extra:
            modules.setdefault((distribution, extra), []).append(module.replace("_", "-"))
    findings = [
        _judge(source, names, told["sets"].count(list(source)), version, required)
        for source, names in modules.items()
    ]
    return findings + [
        Finding("warning", f"declaration of {name}", why, f"pip install --force-reinstall {name}")
        for name, why in told["broken"].items()
    ]


def _judge(
    source: tuple[str, str],
    names: Sequence[str],
    sets: int,
    version: Callable[[str], str | None],
    required: Callable[[str], Sequence[Requirement]],
) -> Finding:
    distribution, extra = source
    title, fix = f"simulators of [{extra}]", f'pip install "{distribution}[{extra}]"'
    can = f"; {sets} data sets can be made" if sets else ""
    missing = [name for name in names if version(name) is None]
    if missing:
        lost = f" ({sets} data sets need it)" if sets else ""
        return Finding("info", title, f"not installed: {', '.join(missing)}{lost}", fix)
    wanted = [one for one in required(distribution) if one.extra == extra]
    wanted += [one for name in names for one in required(name) if not one.extra]
    unfit = {
        f"{one.name} {have} is not {one}"
        for one in wanted
        if (have := version(one.name)) is not None and not one.met(have)
    }
    if unfit:
        return Finding("warning", title, "; ".join(sorted(unfit)), f"in a fresh environment: {fix}")
    return Finding("ok", title, ", ".join(f"{n} {version(n)}" for n in names) + can)
