"""Episodes of an actor: measured, or recorded in D4RL's fields."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from tqdm.auto import tqdm

from diffpolicy.rollout.env_spec import EnvSpec
from generators.agents import Actor
from generators.layout import Arrays
from generators.parts import Parts, episode_seed

SELECTION_SEEDS = 200_000
"""First of the seeds on which choices are made; nothing is reported on them."""
_FIELDS = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")


def measure(
    spec: EnvSpec, actor: Actor, first_seed: int, episodes: int, *, std_scale: float
) -> list[float]:
    """Returns of an actor's episodes.

    Args:
        spec: the environment.
        actor: the policy.
        first_seed: of the environment's resets and of the actions' noise; the next ones follow.
        episodes: how many.
        std_scale: see :meth:`~generators.agents.Actor.act`.

    Returns:
        One return an episode.
    """
    env = spec.make()
    try:
        found = []
        for seed in range(first_seed, first_seed + episodes):
            steps = record(env, actor, seed, np.random.default_rng(seed), std_scale)
            found.append(float(np.sum(steps["rewards"], dtype=np.float64)))
        return found
    finally:
        env.close()


def collect_into(
    parts: Parts,
    spec: EnvSpec,
    actor: Actor,
    *,
    steps: int,
    seed: int,
    std_scale: float,
    progress: bool = True,
) -> None:
    """Appends whole episodes until there are at least so many steps.

    Args:
        parts: where they go; those in it count.
        spec: the environment.
        actor: the policy.
        steps: rows at least.
        seed: of the dataset; episode ``e`` depends on it and on ``e`` alone.
        std_scale: see :meth:`~generators.agents.Actor.act`.
        progress: whether to show a bar.

    Raises:
        ValueError: the actor takes observations of another length.
    """
    env = spec.make()
    try:
        (obs_dim,) = env.observation_space.shape or (0,)
        if actor.obs_dim != obs_dim:
            raise ValueError(
                f"the actor takes observations of {actor.obs_dim} entries, {spec.id} has {obs_dim}"
            )
        done = parts.steps()
        with tqdm(
            total=steps, initial=done, desc="collect", unit="step", disable=not progress
        ) as bar:
            while done < steps:
                index = len(parts)
                rng = np.random.default_rng([seed, index])
                episode = record(env, actor, episode_seed(seed, index), rng, std_scale)
                parts.append(episode)
                done += len(episode["rewards"])
                bar.update(len(episode["rewards"]))
    finally:
        env.close()


def record(
    env: gym.Env[Any, Any],
    actor: Actor,
    seed: int,
    rng: np.random.Generator,
    std_scale: float,
) -> Arrays:
    """One episode in D4RL's fields, with MuJoCo's state in ``infos`` where there is one.

    Args:
        env: reset with ``seed``.
        actor: the policy.
        seed: of the reset.
        rng: of the actions' noise.
        std_scale: see :meth:`~generators.agents.Actor.act`.

    Returns:
        ``observations`` ``[T, O]``, ``actions`` ``[T, A]``, ``rewards``, ``terminals``,
        ``timeouts``, ``next_observations``, and ``infos/qpos`` and ``infos/qvel`` before each step.
    """
    observation, _ = env.reset(seed=seed)
    data = getattr(env.unwrapped, "data", None)
    physical = hasattr(data, "qpos") and hasattr(data, "qvel")
    names = (*_FIELDS, "infos/qpos", "infos/qvel") if physical else _FIELDS
    rows: dict[str, list[Any]] = {name: [] for name in names}
    ended = False
    while not ended:
        state = (data.qpos.copy(), data.qvel.copy()) if data is not None and physical else ()
        action = actor.act(observation, rng, std_scale)
        following, reward, terminated, truncated, _ = env.step(action)
        ended = terminated or truncated
        row = (observation, action, reward, terminated, truncated and not terminated, following)
        for name, value in zip(names, (*row, *state), strict=True):
            rows[name].append(value)
        observation = following
    kinds: dict[str, Any] = dict.fromkeys(_FIELDS, np.float32)
    kinds |= {"terminals": np.bool_, "timeouts": np.bool_}
    return {name: np.asarray(value, kinds.get(name)) for name, value in rows.items()}
