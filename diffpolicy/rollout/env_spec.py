"""What an environment is, as a value: an id and its arguments, checked when it is made.

Only gymnasium and numpy are imported here, because every worker process imports this module.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import itertools
import json
import platform
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from diffpolicy.data.fields import inward_bounds
from diffpolicy.data.observation import ObsField, ObsFields, by_store_field, of_space
from diffpolicy.extras import TRUST_VARIABLE, trusts
from diffpolicy.rollout.declared import declared
from diffpolicy.rollout.env_advice import how_to_install, refused, unknown_id
from diffpolicy.settings import check_range

# Distributions whose version can change any score; MuJoCo's simulator is part of Gymnasium's own
# environments. Others are named by the environment: ``metadata["packages"]``.
_VERSIONED = ("diffpolicy", "gymnasium", "mujoco", "numpy")
_NUMBERS = itertools.count()

# Gymnasium's adapters, whose arguments name, and import, an environment of another library.
_ADAPTERS = ("GymV21Environment", "GymV26Environment")


class EnvSpecError(ValueError):
    """The environment cannot be made, or its spaces are of a kind that no policy is for."""


@dataclass(frozen=True)
class EnvSpec:
    """An environment as a value that can be written to a file and sent to another process.

    Args:
        id: Gymnasium id; ``"module:Name-v0"`` imports ``module`` first, so that it can register the
            id.
        kwargs: arguments of the environment. JSON values only (numbers, strings, lists, dicts),
            because they are stored with every result; tuples become lists. An environment that
            needs more should be registered under an id.
        max_episode_steps: the step limit; None keeps the one the id was registered with.

    Raises:
        EnvSpecError: if ``kwargs`` are not JSON values.
        ValueError: a limit that is not positive.
    """

    id: str
    kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    max_episode_steps: int | None = None

    def __post_init__(self) -> None:
        try:
            plain = json.loads(json.dumps(dict(self.kwargs)))
        except (TypeError, ValueError) as error:
            raise EnvSpecError(
                f"kwargs of {self.id!r} must be JSON values (numbers, strings, lists, dicts), got "
                f"{self.kwargs!r}: {error}. Register an environment id of your "
                "own that builds such objects itself."
            ) from None
        object.__setattr__(self, "kwargs", plain)
        check_range("[1, inf)", max_episode_steps=self.max_episode_steps)

    def to_dict(self) -> dict[str, Any]:
        """The spec as JSON values; ``EnvSpec(**spec.to_dict())`` is the spec again."""
        return {**vars(self), "kwargs": dict(self.kwargs)}

    def make(self, render_mode: str | None = None) -> gym.Env[Any, Any]:
        """Make the environment and check that it fits.

        Args:
            render_mode: passed on to the environment, e.g. ``"rgb_array"``.

        Returns:
            An environment with a step limit, actions as :func:`action_ends` and observations as
            :func:`obs_fields` accept them.

        Raises:
            EnvSpecError: the id does not exist (with close matches), its package is missing (with
                the pip command), the arguments are refused, or the spaces are of another kind (with
                how to wrap them).
        """
        _import_home(self.id)
        name = self.id.split(":", 1)[-1]
        if name not in gym.registry:
            raise EnvSpecError(unknown_id(self.id, name))
        limit = {"max_episode_steps": self.max_episode_steps, "render_mode": render_mode}
        kwargs = {**self.kwargs, **{k: v for k, v in limit.items() if v is not None}}
        try:
            env: gym.Env[Any, Any] = gym.make(name, disable_env_checker=True, **kwargs)
        except (ImportError, gym.error.DependencyNotInstalled) as error:
            raise EnvSpecError(
                f"{self.id!r} cannot be made: {error}.{how_to_install(str(error))}"
            ) from error
        except (TypeError, ValueError, gym.error.Error) as error:
            raise EnvSpecError(f"{self.id!r} {refused(name, kwargs, error)}") from error
        try:
            _check(env)
        except ValueError as error:
            env.close()
            raise EnvSpecError(f"{self.id!r}: {error}") from None
        return env


def _check(env: gym.Env[Any, Any]) -> None:
    """Raise ``ValueError`` unless the environment is one of the kind that policies are for."""
    obs_fields(env.observation_space)
    inward_bounds(*action_ends(env.action_space))
    if step_limit(env) is None:
        raise ValueError(
            "it has no step limit, so an episode might never end: give max_episode_steps "
            "(env.max_episode_steps=N at the command line; a function that makes environments "
            "returns gymnasium.wrappers.TimeLimit(env, N))"
        )


def obs_fields(space: spaces.Space[Any]) -> ObsFields:
    """What an environment's observations are made of.

    A flat ``Box`` is one vector and becomes float32, whatever its own type. A picture
    ``[height, width, C]`` of bytes, and the entries of a ``Dict`` of Boxes, keep their types.

    Raises:
        ValueError: a space of another kind.
    """
    fields = of_space(space)
    if isinstance(fields, ObsField) and fields.role != "image":
        if len(fields.shape) != 1:
            raise ValueError(
                f"it observes {space}; a one-dimensional Box, an image of bytes or a Dict of Boxes "
                "is needed. Register an id that wraps it in gymnasium.wrappers.FlattenObservation"
            )
        return replace(fields, dtype="float32")
    return fields


def action_ends(space: spaces.Space[Any]) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest action ``[A]`` of a space.

    An action that chooses is the number of its choice (A = 1 of a ``Discrete`` space).

    Raises:
        ValueError: a space of another kind.
    """
    if isinstance(space, spaces.Box) and len(space.shape) == 1:
        return space.low, space.high
    if isinstance(space, spaces.Discrete):
        return np.array([space.start]), np.array([space.start + space.n - 1])
    if isinstance(space, spaces.MultiDiscrete) and len(space.shape) == 1:
        return space.start, space.start + space.nvec - 1
    raise ValueError(
        f"it takes actions of {space}; a one-dimensional Box, a Discrete or a one-dimensional "
        "MultiDiscrete is needed"
    )


def step_limit(env: gym.Env[Any, Any]) -> int | None:
    """The number of steps after which the environment ends an episode, or None."""
    limit = None if env.spec is None else env.spec.max_episode_steps
    for name in ("max_episode_steps", "_max_episode_steps", "max_path_length"):
        if limit is None and env.has_wrapper_attr(name):
            limit = env.get_wrapper_attr(name)
    return None if limit is None else int(limit)


@dataclass(frozen=True)
class EnvInfo:
    """What a policy and a table of results have to know about an environment.

    Attributes:
        spec: the environment.
        obs: what an observation is made of.
        action_low: ``[A]`` float32, rounded inwards; may hold -inf.
        action_high: ``[A]`` float32, rounded inwards; may hold inf.
        chooses: whether actions are whole numbers that choose, from ``action_low`` to
            ``action_high``.
        whole: NumPy's type of actions that are whole numbers and do not choose; else None.
        max_episode_steps: the step limit.
        has_expert: whether it ships a scripted expert (``expert_action(rng)``).
        versions: versions of the packages that can change a score.
        task_groups: names of tasks by the groups that ``metadata["task_groups"]`` declares.
    """

    spec: EnvSpec
    obs: ObsFields
    action_low: np.ndarray
    action_high: np.ndarray
    chooses: bool
    whole: str | None
    max_episode_steps: int
    has_expert: bool
    versions: dict[str, str]
    task_groups: dict[str, list[str]] = field(default_factory=dict)

    @property
    def action_dim(self) -> int:
        """Length A of an action."""
        return len(self.action_low)

    @property
    def action_groups(self) -> list[dict[str, Any]]:
        """A policy's ``actions``, where those of the environment are whole numbers; else empty."""
        if self.whole is not None:
            return [{"dims": list(range(self.action_dim)), "whole": self.whole}]
        ends = np.stack([self.action_low, self.action_high], 1).astype(int) if self.chooses else ()
        return [
            {"dims": [dim], "choices": int(high - low + 1), "first": int(low)}
            for dim, (low, high) in enumerate(ends)
        ]

    @property
    def obs_dim(self) -> int:
        """Length O of an observation that is one vector.

        Raises:
            EnvSpecError: it observes several things, or an image.
        """
        if not isinstance(self.obs, ObsField) or len(self.obs.shape) != 1:
            raise EnvSpecError(
                f"{self.spec.id!r} observes {sorted(by_store_field(self.obs))}; one vector is "
                "needed here. Register an id that wraps it in gymnasium.wrappers.FlattenObservation"
            )
        return self.obs.size

    def labels(self) -> dict[str, Any]:
        """The part that belongs beside a score, as JSON values."""
        return {
            **self.spec.to_dict(),
            "max_episode_steps": self.max_episode_steps,
            "versions": dict(self.versions),
            **({"task_groups": self.task_groups} if self.task_groups else {}),
        }


def describe(spec: EnvSpec) -> EnvInfo:
    """Make the environment once, in this process, and say what it is.

    Raises:
        EnvSpecError: as :meth:`EnvSpec.make`.
    """
    env = spec.make()
    try:
        return inspect_env(spec, env)
    finally:
        env.close()


def inspect_env(spec: EnvSpec, env: gym.Env[Any, Any]) -> EnvInfo:
    """:func:`describe` for an environment that was made already."""
    limit = step_limit(env)
    assert limit is not None
    space: Any = env.action_space
    low, high = inward_bounds(*action_ends(space))
    return EnvInfo(
        spec=spec,
        obs=obs_fields(env.observation_space),
        action_low=low,
        action_high=high,
        chooses=not isinstance(space, spaces.Box),
        whole=space.dtype.name
        if isinstance(space, spaces.Box) and space.dtype.kind in "iu"
        else None,
        max_episode_steps=limit,
        has_expert=env.has_wrapper_attr("expert_action"),
        versions=_versions(spec, env),
        task_groups=_task_groups(spec, env),
    )


def _task_groups(spec: EnvSpec, env: gym.Env[Any, Any]) -> dict[str, list[str]]:
    """The groups of tasks that an environment of several declares; most declare none."""
    groups = env.metadata.get("task_groups", {})
    kinds = map(type, groups.values() if isinstance(groups, Mapping) else [None])
    if not set(kinds) <= {list, tuple}:
        raise EnvSpecError(
            f"{spec.id!r} has metadata['task_groups'] = {groups!r}; lists of task names by group "
            "are needed, such as {'easy': ['reach', 'push']}"
        )
    return {str(group): list(map(str, names)) for group, names in groups.items()}


def _versions(spec: EnvSpec, env: gym.Env[Any, Any]) -> dict[str, str]:
    """Versions of what the environment really loaded; an unused simulator says nothing."""
    home = spec.id.split(":")[0].split(".")[0]
    named = (*_VERSIONED, *env.metadata.get("packages", ()), *([home] if ":" in spec.id else []))
    return installed_versions(
        name for name in named if name == "diffpolicy" or name.replace("-", "_") in sys.modules
    )


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of those distributions that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name.replace("_", "-")] = importlib.metadata.version(name)
    return found


def _import_home(env_id: str) -> None:
    module, colon, _ = env_id.partition(":")
    if not colon:
        return
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise EnvSpecError(
            f"{env_id!r} needs the module {module!r}, which cannot be imported: {error}."
            f"{how_to_install(f'{module} {error}')}"
        ) from error


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


def stored_env_id(env_id: str, source: object, *, instead: str = "env.id=") -> str:
    """The id of an environment that was read from a file, if it may be run.

    Args:
        env_id: what the file says.
        source: the file, for the message.
        instead: the argument by which the user can name it; empty: there is none.

    Returns:
        ``env_id``.

    Raises:
        EnvSpecError: it imports a package that no installed package declares (see
            :mod:`~diffpolicy.rollout.declared`) and that the user does not trust (the variable
            ``DIFFPOLICY_TRUST_ENVS`` names packages, or is ``true`` for all; on the command line
            ``trust_env=`` sets it).
    """
    module, colon, name = env_id.rpartition(":")
    package = module.split(".")[0]
    safe = package in declared().homes if colon else True
    if (safe and not name.startswith(_ADAPTERS)) or trusts(package):
        return env_id
    name_it = f"{instead}{env_id}, or " if instead else ""
    raise EnvSpecError(
        f"{source} names the environment {env_id!r}, which imports {package or name!r}: code that "
        f"you did not choose. If you know it, say {name_it}trust_env={package or 'true'} (from "
        f"Python: {TRUST_VARIABLE}={package or 'true'} in the environment)"
    )
