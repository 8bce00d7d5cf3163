"""What to say where an environment cannot be made: of its id, its package and its arguments."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import load_env_creator

from diffpolicy.extras import pip_hint
from diffpolicy.rollout.declared import declared, install_hint
from diffpolicy.settings import near_miss

_UNEXPECTED = re.compile(r"got an unexpected keyword argument '(\w+)'")
_NOT_SAID = ("self", "render_mode")  # arguments that are given otherwise


def how_to_install(text: str) -> str:
    """Return how to install what a message names, unless the message says it itself."""
    return "" if "pip install" in text else pip_hint(text) or install_hint(text)


def unknown_id(env_id: str, name: str) -> str:
    """Return what to say of an id that is not registered, with close ones."""
    close = difflib.get_close_matches(name, list(gym.registry), n=4, cutoff=0.6)
    near = f" Close matches: {', '.join(close)}." if close else ""
    message = f"No environment {env_id!r} is registered.{near}"
    if ":" in env_id:
        return message
    space, known = name.split("/")[0], declared().homes
    homes = [home for home in known if home.startswith(space)] if "/" in name else []
    return (
        f"{message} If a package registers it on import, write '{(homes or ['package'])[0]}:{name}'"
        f" (packages that do: {', '.join(known)}).{install_hint(homes[0]) if homes else ''}"
    )


def refused(name: str, kwargs: Mapping[str, Any], error: Exception) -> str:
    """Return what to say where a registered id was not made with these arguments.

    Args:
        name: the id, as Gymnasium knows it.
        kwargs: what the user gave.
        error: what it raised.
    """
    text = str(error).split(" was raised from the environment creator")[0]
    found = _UNEXPECTED.search(text)
    if found is None or found[1] not in kwargs:
        return f"cannot be made with {dict(kwargs)}: {text}"
    known = _arguments(gym.registry[name])
    return f"takes no argument {found[1]!r}{near_miss(found[1], known, listing='it takes')}"


def _arguments(spec: Any) -> list[str]:
    """Arguments of what makes an environment, and of a class that it hands the others on to."""
    handed = [v for v in spec.kwargs.values() if isinstance(v, str) and ":" in v]
    found: dict[str, None] = {}
    for place in (spec.entry_point, *handed):
        made: Any = load_env_creator(place) if isinstance(place, str) else place
        for one in made.__mro__ if isinstance(made, type) else (made,):
            function = vars(one).get("__init__") if isinstance(one, type) else one
            if function is None or one is object:
                continue
            given = inspect.signature(function).parameters.values()
            found |= {
                p.name: None for p in given if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
            }
            if all(p.kind is not p.VAR_KEYWORD for p in given):
                break
    return [key for key in found if key not in (*_NOT_SAID, *spec.kwargs)]
