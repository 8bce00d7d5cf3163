"""Settings dataclasses from plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

S = TypeVar("S")


def settings_of(kind: type[S], values: Mapping[str, Any], what: str) -> S:
    """A settings dataclass from plain values.

    Args:
        kind: the dataclass.
        values: of its fields, by name.
        what: its name in messages.

    Raises:
        ValueError: an unknown setting, with the valid ones, or what the dataclass refuses.
    """
    check_known(values, setting_names(kind), what)
    return kind(**values)


def setting_names(kind: type[Any]) -> list[str]:
    """The names of a dataclass' fields."""
    return [f.name for f in fields(kind)]


def check_known(values: Mapping[str, Any], known: list[str], what: str) -> None:
    """Raise ``ValueError`` for a name that is not among those known, and say which are."""
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{what} has no setting {unknown[0]!r}; it has {', '.join(known)}")


__all__ = ["check_known", "setting_names", "settings_of"]
