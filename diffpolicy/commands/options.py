"""Small shared pieces of the commands: `key=value` arguments, and their help."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from string import Template
from typing import Any, NamedTuple, TypeVar

from diffpolicy.config_compose import group_choices, is_setting
from diffpolicy.settings import ConfigError, near_miss

C = TypeVar("C")


class Option(NamedTuple):
    """An option of a command: its default, and what its help says of it."""

    default: Any
    text: str


def helped(doc: str | None, **parts: str) -> str:
    """The help of a command: the docstring of its module, with every ``$name`` filled in."""
    return Template(doc or "").substitute(parts).strip()


def options_help(options: Mapping[str, Option], indent: str = "    ") -> str:
    """Write a line for each option, ``name=default  what it says``, or more where that is long."""
    shown = {n: json.dumps(o.default).strip('"').replace(" ", "") for n, o in options.items()}
    width = max(len(name) + len(value) for name, value in shown.items()) + 3
    lines = []
    for name, option in options.items():
        head = f"{name}={shown[name]}".ljust(width)
        margin = indent + " " * width
        lines += textwrap.wrap(
            option.text, 100, initial_indent=indent + head, subsequent_indent=margin
        )
    return "\n".join(lines)


def parse(
    arguments: Sequence[str], positional: Sequence[str], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Read `a b key=value` into a dict; leading values without a key fill ``positional`` in order.

    Values are read as JSON where they are (numbers, lists, true, null), else as text. A default
    may be an :class:`Option`, which has one.

    Raises:
        ConfigError: an unknown key, or a positional argument that is missing.
    """
    defaults = {n: d.default if isinstance(d, Option) else d for n, d in defaults.items()}
    values = dict(defaults)
    waiting = list(positional)
    for argument in arguments:
        key, _, text = argument.removeprefix("--").partition("=")
        if not is_setting(argument):
            if not waiting:
                raise ConfigError(
                    f"unexpected argument {argument!r}; options are given as key=value"
                )
            key, text = waiting[0], argument
        if key not in values and key not in positional:
            known = list(dict.fromkeys([*positional, *values]))
            hint = near_miss(key, known)
            raise ConfigError(f"unknown option {key!r}; expected one of {known}{hint}")
        if key in waiting:
            waiting.remove(key)
        if text.startswith("~/"):
            text = os.path.expanduser(text)  # shells leave it alone after a ``=``
        values[key] = text if key in positional else _value(text)
        if isinstance(defaults.get(key), bool) and not isinstance(values[key], bool):
            raise ConfigError(f"{key} must be true or false, got {text!r}")
    if waiting:
        raise ConfigError(f"missing {waiting[0].upper()}")
    return values


def given(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Those of some options that are not null."""
    return {name: options[name] for name in names if options[name] is not None}


def subcommand(arguments: Sequence[str], commands: Mapping[str, C], command: str) -> C:
    """Return what the first argument chooses of ``commands``.

    Raises:
        ConfigError: it chooses none, with the nearest one.
    """
    first = arguments[0] if arguments else ""
    if first not in commands:
        hint = near_miss(first, commands) if first else ""
        raise ConfigError(
            f"expected one of {sorted(commands)}{hint}; see `diffpolicy {command} --help`"
        )
    return commands[first]


def _value(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return _bare(text) if text[:1] in ("[", "{") else text


def _bare(text: str) -> Any:
    """A list or mapping whose words need no quotes, ``[infos/qpos,reward]`` or ``{says: false}``.

    A shell has taken quotes away by the time that they would be read.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        if text[-1] in "]}":
            return text  # such as [*/bc/*]: for the command to read
        raise ConfigError(
            f"{text} is no list or table; write [a,b] or {{a: [b,c]}}, in quotes for the shell"
        ) from None
    if isinstance(found, dict):
        return {str(k): _value(v) if isinstance(v, str) else v for k, v in found.items()}
    return [_value(v) if isinstance(v, str) else v for v in found]


def indented(text: str) -> str:
    """Move a text four columns to the right, without empty lines at its ends."""
    return "\n".join("    " + line for line in text.strip().splitlines())


def groups_help(names: Sequence[str]) -> str:
    """List the choices of config groups, one line each with its file's first comment."""
    lines = []
    for group, choices in group_choices().items():
        if group not in names:
            continue
        lines.append(f"{group}=")
        lines += [f"    {choice:<18} {text}" for choice, text in choices.items()]
    return "\n".join(lines)
