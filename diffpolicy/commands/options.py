"""Small shared pieces of the commands: `key=value` arguments and the help of config groups."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from diffpolicy.config import ConfigError, group_choices
from diffpolicy.config_compose import is_setting
from diffpolicy.settings import near_miss

C = TypeVar("C")


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
    """What the first argument chooses of ``commands``.

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
        return _bare(text) if text[:1] + text[-1:] in ("[]", "{}") else text


def _bare(text: str) -> Any:
    """A list or mapping whose words need no quotes, ``[infos/qpos,reward]`` or ``{says: false}``.

    A shell has taken quotes away by the time that they would be read.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # such as [*/bc/*]: for the command to read
    if isinstance(found, dict):
        return {str(k): _value(v) if isinstance(v, str) else v for k, v in found.items()}
    return [_value(v) if isinstance(v, str) else v for v in found]


def indented(text: str) -> str:
    """A text four columns to the right, without empty lines at its ends."""
    return "\n".join("    " + line for line in text.strip().splitlines())


def groups_help(names: Sequence[str]) -> str:
    """The choices of config groups, one line each with its file's first comment."""
    lines = []
    for group, choices in group_choices().items():
        if group not in names:
            continue
        lines.append(f"{group}=")
        lines += [f"    {choice:<18} {text}" for choice, text in choices.items()]
    return "\n".join(lines)
