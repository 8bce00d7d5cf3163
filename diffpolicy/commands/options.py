"""Small shared pieces of the commands: `key=value` arguments and the help of config groups."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from diffpolicy.config import ConfigError, group_choices


def parse(
    arguments: Sequence[str], positional: Sequence[str], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """`a b key=value` into a dict; leading values without a key fill ``positional`` in order.

    Values are read as JSON where they are (numbers, lists, true, null), else as text.

    Raises:
        ConfigError: an unknown key, or a positional argument that is missing.
    """
    values = dict(defaults)
    waiting = list(positional)
    for argument in arguments:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not equals:
            if not waiting:
                raise ConfigError(
                    f"unexpected argument {argument!r}; options are given as key=value"
                )
            key, text = waiting[0], argument
        if key not in values and key not in positional:
            near = difflib.get_close_matches(key, [*values, *positional], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"unknown option {key!r}; expected one of {[*positional, *values]}{hint}"
            )
        if key in waiting:
            waiting.remove(key)
        values[key] = text if key in positional else _value(text)
        if isinstance(defaults.get(key), bool) and not isinstance(values[key], bool):
            raise ConfigError(f"{key} must be true or false, got {text!r}")
    if waiting:
        raise ConfigError(f"missing {waiting[0].upper()}")
    return values


def _value(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def groups_help(names: Sequence[str]) -> str:
    """The choices of config groups, one line each with its file's first comment."""
    lines = []
    for group, choices in group_choices().items():
        if group not in names:
            continue
        lines.append(f"{group}=")
        lines += [f"    {choice:<18} {text}" for choice, text in choices.items()]
    return "\n".join(lines)
