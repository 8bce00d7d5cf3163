"""Settings from plain values: the one place where names and types of settings are checked.

Configurations, checkpoints and keyword arguments all become dataclasses here, so that a mistyped
name is met with the same answer everywhere: what is unknown, and which known name is nearest.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, field, fields, is_dataclass
from numbers import Integral, Real
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used: what was expected, what came, how to fix it."""


def near_miss(name: object, known: Iterable[object], *, prefix: str = "", listing: str = "") -> str:
    """The end of a message about an unknown name: the known ones, and the nearest of them.

    Args:
        name: what came.
        known: names that would have been right.
        prefix: before the nearest name, such as the section that it is in.
        listing: words before all of them; empty: they are not listed.

    Example:
        >>> near_miss("stepss", ["steps", "lr"], listing="it has")
        "; it has steps, lr; did you mean 'steps'?"
    """
    names = [str(one) for one in known]
    close = difflib.get_close_matches(str(name), names, n=1)
    every = f"; {listing} {', '.join(names)}" if listing else ""
    return every + (f"; did you mean {prefix + close[0]!r}?" if close else "")


def load_named(option: str, text: str) -> Any:
    """Return what ``package.module:name`` names, of a user's own code.

    Args:
        option: the setting whose value it is, for the message.
        text: its value.

    Raises:
        ConfigError: nothing of that name can be imported.
    """
    module, colon, name = text.partition(":")
    try:
        if not colon:
            raise ImportError("there is no ':' in it")
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{option}={text}: {error}; write MODULE:FUNCTION") from error


def check_known(values: Iterable[object], known: Iterable[object], what: str) -> None:
    """Raise ``ConfigError`` for a name that is not among those known, and say the nearest.

    Args:
        values: the names that came.
        known: the names that there are.
        what: whose settings they are, for the message.
    """
    names = list(known)
    for key in values:
        if key not in names:
            hint = near_miss(key, names, listing="it has")
            raise ConfigError(f"{what} has no setting {key!r}{hint}")


def check_choice(name: str, value: object, known: Iterable[object]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of those known; the message says the nearest.

    Example:
        >>> check_choice("tail", "hodl", ("hold", "extrapolate"))
        Traceback (most recent call last):
        ValueError: unknown tail 'hodl'; expected one of hold, extrapolate; did you mean 'hold'?
    """
    names = list(known)
    if value not in names:
        listed = ", ".join(map(str, names))
        hint = near_miss(value, names)
        raise ValueError(f"unknown {name} {value!r}; expected one of {listed}{hint}")


def check_range(interval: str, **values: float | int | None) -> None:
    """Raise ``ValueError`` unless every value lies in an interval; ``None`` is not looked at.

    Args:
        interval: as mathematics writes it, ``"[0, 1)"`` or ``"(0, inf)"``.
        values: what is checked, by the names that the message is to use. NaN lies in no interval.

    Example:
        >>> check_range("[0, 1)", cond_dropout=1.5)
        Traceback (most recent call last):
        ValueError: cond_dropout must be in [0, 1), got 1.5
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    for name, value in values.items():
        if value is None:
            continue
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if not (above and below):
            raise ValueError(f"{name} must be {_said(interval, low, high)}, got {value}")


def _said(interval: str, low: float, high: float) -> str:
    """An interval in words: "at least 1", "positive", "in [0, 1)"."""
    if high != float("inf"):
        return f"in {interval}"
    if interval[0] == "[":
        return f"at least {low:g}"
    return "positive" if low == 0 else f"above {low:g}"


def check_shape(name: str, shape: Iterable[int], expected: Iterable[int | str]) -> None:
    """Raise ``ValueError`` unless a shape is as expected; letters stand for sizes of any number.

    Example:
        >>> check_shape("noise", (4, 8, 3), ("B", 16, 3))
        Traceback (most recent call last):
        ValueError: noise must be [B, 16, 3], got [4, 8, 3]
    """
    got, wanted = list(shape), list(expected)
    fits = len(got) == len(wanted) and all(
        isinstance(w, str) or w == g for g, w in zip(got, wanted, strict=False)
    )
    if not fits:
        raise ValueError(f"{name} must be [{', '.join(map(str, wanted))}], got {got}")


def ranged(interval: str, default: Any = MISSING, **how: Any) -> Any:
    """A setting of a dataclass that must lie in an interval, see :func:`check_range`.

    Example:
        >>> @dataclass(frozen=True)
        ... class Smoothing:
        ...     rate: float = ranged("(0, 1]", 0.1)
        ...
        ...     def __post_init__(self):
        ...         check_settings(self)
    """
    return field(default=default, metadata={"interval": interval}, **how)


def one_of(*known: str, default: str | None = None, **how: Any) -> Any:
    """A setting of a dataclass that is one of some names, the first of them unless given."""
    first = known[0] if default is None else default
    return field(default=first, metadata={"known": known}, **how)


def check_settings(settings: Any) -> None:
    """Raise ``ValueError`` unless what :func:`ranged` and :func:`one_of` declared is so."""
    for entry in fields(settings):
        value = getattr(settings, entry.name)
        if "interval" in entry.metadata:
            check_range(entry.metadata["interval"], **{entry.name: value})
        if "known" in entry.metadata:
            check_choice(entry.name, value, entry.metadata["known"])


def setting_names(kind: type[Any]) -> list[str]:
    """The names of a dataclass' fields that can be given."""
    return [f.name for f in fields(kind) if f.init]


def settings_of(kind: type[T], values: Mapping[str, Any], what: str) -> T:
    """A dataclass from values whose names are checked; lists become tuples.

    Args:
        kind: the dataclass, which checks the values itself.
        values: of its fields, by name.
        what: whose settings they are, for messages.

    Raises:
        ConfigError: an unknown or missing setting.
        ValueError: what the dataclass refuses.
    """
    check_known(values, setting_names(kind), what)
    _check_complete(kind, values, f"{what} needs ")
    plain = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    try:
        return kind(**plain)
    except TypeError as error:  # a value of a type that the dataclass' own checks cannot compare
        raise ConfigError(f"{what}: {error}") from None


def from_values(kind: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """A dataclass from plain values, its names and types checked, nested ones as well.

    Nested dataclasses come from mappings, tuples (of numbers, of dataclasses) from lists, and
    mappings of dataclasses from mappings of mappings.

    Args:
        kind: the dataclass.
        values: of its fields, by name, as YAML or JSON holds them.
        where: dotted path before the names in messages, such as ``"trainer."``.

    Raises:
        ConfigError: an unknown or missing key, or a value of a wrong type, by its dotted path.
    """
    hints = typing.get_type_hints(kind)
    known = setting_names(kind)
    for key in values:
        if key not in known:
            hint = near_miss(key, known, prefix=where) or near_miss("", known, listing="there are")
            raise ConfigError(f"unknown key {where + str(key)!r}{hint}")
    _check_complete(kind, values, f"missing key {where}")
    return kind(**{key: _value(hints[key], value, where + key) for key, value in values.items()})


def _check_complete(kind: type[Any], values: Mapping[str, Any], text: str) -> None:
    for entry in fields(kind):
        required = entry.init and entry.default is MISSING and entry.default_factory is MISSING
        if required and entry.name not in values:
            raise ConfigError(f"{text}{entry.name!r}")


_UNFIT = object()


def _value(hint: Any, value: Any, where: str) -> Any:
    """``value`` as its annotation asks for it, nested settings and entries of tuples as well."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        made = _fitted(option, value, where)
        if made is not _UNFIT:
            return made
    expected = " or ".join("null" if o is type(None) else _type_name(o) for o in options)
    text = str in options and isinstance(value, int | float) and not isinstance(value, bool)
    quote = f"; as text, quote it twice: \"'{value}'\"" if text else ""
    raise ConfigError(f"{where} must be {expected}, got {value!r}{quote}")


def _type_name(hint: Any) -> str:
    plain = not typing.get_args(hint) and isinstance(hint, type)
    return hint.__name__ if plain else str(hint).replace("typing.", "")


def _fitted(hint: Any, value: Any, where: str) -> Any:
    """``value`` as one annotation asks for it, or ``_UNFIT``."""
    plain, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if plain is Any:
        return value
    if is_dataclass(plain) and isinstance(value, Mapping):
        return from_values(typing.cast("type[Any]", plain), value, where + ".")
    if plain is tuple and isinstance(value, list | tuple):
        return _tuple(inner, value, where)
    if plain is Mapping and isinstance(value, Mapping) and inner[1] is not Any:
        return {key: _value(inner[1], one, f"{where}.{key}") for key, one in value.items()}
    if not isinstance(value, bool):  # which is a number to Python
        if plain is float and isinstance(value, Real):
            return float(value)
        if plain is int and isinstance(value, Integral):
            return int(value)
    elif plain is int:
        return _UNFIT
    return value if isinstance(plain, type) and isinstance(value, plain) else _UNFIT


def _tuple(hints: tuple[Any, ...], value: Sequence[Any], where: str) -> Any:
    """Entries as ``tuple[X, ...]``, ``tuple[X, Y]`` or a bare ``tuple`` asks for them."""
    if len(hints) == 2 and hints[1] is Ellipsis:
        hints = (hints[0],) * len(value)
    hints = hints or (Any,) * len(value)
    if len(hints) != len(value):
        return _UNFIT
    entries = enumerate(zip(hints, value, strict=True))
    return tuple(_value(hint, one, f"{where}[{i}]") for i, (hint, one) in entries)


def named_settings(kind: type[T]) -> type[T]:
    """Class decorator: a dataclass whose constructor answers a mistyped name with the nearest.

    Python's own answer, ``got an unexpected keyword argument``, leaves the reader to look it up.

    Example:
        >>> TrainerConfig(stepss=100)
        Traceback (most recent call last):
        TypeError: TrainerConfig has no setting 'stepss'; it has ...; did you mean 'steps'?
    """
    construct: Callable[..., None] = kind.__init__

    @functools.wraps(construct)
    def init(self: Any, *args: Any, **values: Any) -> None:
        try:
            check_known(values, setting_names(kind), kind.__name__)
        except ConfigError as error:
            raise TypeError(str(error)) from None
        construct(self, *args, **values)

    kind.__init__ = init  # type: ignore[method-assign]
    return kind
