"""What an environment is, as a value: an id and its arguments, checked when it is made.

Only gymnasium and numpy are imported here, because every worker process imports this module.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from diffpolicy.data.bounds import inward_bounds
from diffpolicy.extras import pip_hint

# Ids that exist only once their package was imported: (how the id starts, the package).
_HOMES = (
    ("diffpolicy/", "diffpolicy_envs"),
    ("gym_pusht/", "gym_pusht"),
    *(
        (name, "gymnasium_robotics")
        for name in ("Fetch", "PointMaze", "AntMaze", "Adroit", "Franka", "HandM")
    ),
)
# Distributions whose version can change a score.
_VERSIONED = (
    "diffpolicy",
    "gymnasium",
    "mujoco",
    "gymnasium-robotics",
    "gym-pusht",
    "pymunk",
    "numpy",
)


class EnvSpecError(ValueError):
    """The environment cannot be made, or its spaces are not flat boxes."""


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
        EnvSpecError: if ``kwargs`` are not JSON values or the limit is not positive.
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
        if self.max_episode_steps is not None and self.max_episode_steps < 1:
            raise EnvSpecError(
                f"max_episode_steps must be at least 1, got {self.max_episode_steps}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The spec as JSON values; ``EnvSpec(**spec.to_dict())`` is the spec again."""
        return {
            "id": self.id,
            "kwargs": dict(self.kwargs),
            "max_episode_steps": self.max_episode_steps,
        }

    def make(self, render_mode: str | None = None) -> gym.Env[Any, Any]:
        """Makes the environment and checks that it fits.

        Args:
            render_mode: passed on to the environment, e.g. ``"rgb_array"``.

        Returns:
            An environment with a one-dimensional ``Box`` of observations and of actions and a step
            limit.

        Raises:
            EnvSpecError: the id does not exist (with close matches), its package is missing (with
                the pip command), the arguments are refused, or the spaces are of another kind (with
                how to wrap them).
        """
        _import_home(self.id)
        name = self.id.split(":", 1)[-1]
        if name not in gym.registry:
            raise EnvSpecError(_unknown_id(self.id, name))
        kwargs = dict(self.kwargs)
        if render_mode is not None:
            kwargs["render_mode"] = render_mode
        if self.max_episode_steps is not None:
            kwargs["max_episode_steps"] = self.max_episode_steps
        try:
            env: gym.Env[Any, Any] = gym.make(name, disable_env_checker=True, **kwargs)
        except (ImportError, gym.error.DependencyNotInstalled) as error:
            raise EnvSpecError(
                f"{self.id!r} cannot be made: {error}.{pip_hint(str(error))}"
            ) from error
        except (TypeError, gym.error.Error) as error:
            raise EnvSpecError(f"{self.id!r} cannot be made with {kwargs}: {error}") from error
        try:
            _check_spaces(self.id, env)
            if step_limit(env) is None:
                raise EnvSpecError(
                    f"{self.id!r} has no step limit, so an episode might never end: give "
                    "max_episode_steps (env.max_episode_steps=N at the command line; a function "
                    "that makes environments returns gymnasium.wrappers.TimeLimit(env, N))."
                )
        except EnvSpecError:
            env.close()
            raise
        return env


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
        obs_dim: O.
        action_dim: A.
        action_low: ``[A]`` float32, rounded inwards; may hold -inf.
        action_high: ``[A]`` float32, rounded inwards; may hold inf.
        max_episode_steps: the step limit.
        has_expert: whether it ships a scripted expert (``expert_action(rng)``).
        versions: versions of the packages that can change a score.
    """

    spec: EnvSpec
    obs_dim: int
    action_dim: int
    action_low: np.ndarray
    action_high: np.ndarray
    max_episode_steps: int
    has_expert: bool
    versions: dict[str, str]

    def labels(self) -> dict[str, Any]:
        """The part that belongs beside a score, as JSON values."""
        return {
            **self.spec.to_dict(),
            "max_episode_steps": self.max_episode_steps,
            "versions": dict(self.versions),
        }


def describe(spec: EnvSpec) -> EnvInfo:
    """Makes the environment once, in this process, and says what it is.

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
    box = env.action_space
    assert isinstance(box, spaces.Box)
    assert env.observation_space.shape is not None
    limit = step_limit(env)
    assert limit is not None
    low, high = inward_bounds(box.low, box.high)
    return EnvInfo(
        spec=spec,
        obs_dim=int(env.observation_space.shape[0]),
        action_dim=int(box.shape[0]),
        action_low=low,
        action_high=high,
        max_episode_steps=limit,
        has_expert=env.has_wrapper_attr("expert_action"),
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in _VERSIONED:
        # Only what this environment really loaded: an installed simulator that was not used says
        # nothing.
        if name == "diffpolicy" or name.replace("-", "_") in sys.modules:
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
    return found


def _import_home(env_id: str) -> None:
    if ":" not in env_id:
        return
    module = env_id.split(":", 1)[0]
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise EnvSpecError(
            f"{env_id!r} needs the module {module!r}, which cannot be imported: {error}."
            f"{pip_hint(f'{module} {error}')}"
        ) from error


def _unknown_id(env_id: str, name: str) -> str:
    message = f"No environment {env_id!r} is registered."
    known = list(gym.registry)
    close = difflib.get_close_matches(name, known, n=4, cutoff=0.6)
    if close:
        message += f" Close matches: {', '.join(close)}."
    if ":" not in env_id:
        home = next((home for start, home in _HOMES if name.startswith(start)), None)
        if home is None:
            message += " If a package registers it on import, write 'package:Name-v0'."
        else:
            message += f" It may be registered by the package {home}: write '{home}:{name}'."
            message += pip_hint(home)
    return message


def _check_spaces(env_id: str, env: gym.Env[Any, Any]) -> None:
    obs, action = env.observation_space, env.action_space
    wrap = "Register an id that wraps it in gymnasium.wrappers.FlattenObservation"
    if isinstance(obs, spaces.Dict | spaces.Tuple):
        raise EnvSpecError(
            f"{env_id!r} observes a {type(obs).__name__} space {obs}; a flat Box is needed. {wrap} "
            "(for goal environments, the ids of diffpolicy_envs are examples)."
        )
    if not isinstance(obs, spaces.Box) or len(obs.shape) != 1:
        raise EnvSpecError(
            f"{env_id!r} observes {obs}; a one-dimensional Box is needed. {wrap}, or ask the "
            "environment for a state observation."
        )
    if not isinstance(action, spaces.Box) or len(action.shape) != 1:
        raise EnvSpecError(
            f"{env_id!r} takes actions of {action}; a one-dimensional Box is needed (continuous "
            "control)."
        )
    try:
        inward_bounds(action.low, action.high)
    except ValueError as error:
        raise EnvSpecError(f"{env_id!r}: {error}. Mend the Box of its action_space.") from None
