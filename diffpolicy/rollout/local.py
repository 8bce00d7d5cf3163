"""Environments of this process alone: registered in a notebook, or made by a function."""

from __future__ import annotations

import importlib.metadata
import itertools
from collections.abc import Callable
from typing import Any

import gymnasium as gym

from diffpolicy.rollout.env_spec import EnvSpec

_NUMBERS = itertools.count()


def as_spec(env: EnvSpec | str | Callable[..., gym.Env[Any, Any]]) -> EnvSpec:
    """An environment as a spec: one already, an id, or a function that makes it.

    A function is registered under an id of this process, so that it runs here and in no worker; it
    must make a new environment at every call, and one with a step limit (see
    ``gymnasium.wrappers.TimeLimit``).

    Example:
        >>> evaluate(policy, lambda: TimeLimit(MyRobot(), 100), range(300_000, 300_020))
    """
    if isinstance(env, EnvSpec):
        return env
    if isinstance(env, str):
        return EnvSpec(env)
    if not callable(env):
        raise TypeError(f"expected an EnvSpec, an id or a function that makes one, got {env!r}")
    name = "".join(c if c.isalnum() else "_" for c in getattr(env, "__name__", "env")).strip("_")
    env_id = f"here/{name or 'env'}-v{next(_NUMBERS)}"
    gym.register(env_id, entry_point=env)
    return EnvSpec(env_id)


def only_here(spec: EnvSpec) -> bool:
    """Whether other processes cannot know the environment: it was registered in this one."""
    if ":" in spec.id or spec.id not in gym.registry:
        return False
    entry = gym.registry[spec.id].entry_point
    if not isinstance(entry, str):
        return True
    plugins = importlib.metadata.entry_points(group="gymnasium.envs")
    everywhere = {"gymnasium", *(plugin.value.split(":")[0].split(".")[0] for plugin in plugins)}
    return entry.split(":")[0].split(".")[0] not in everywhere


__all__ = ["as_spec", "only_here"]
