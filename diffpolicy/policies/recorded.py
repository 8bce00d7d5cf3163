"""Recorded episodes that a policy is driven along: their observations in, its actions out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from diffpolicy.data.blocks import read_rows
from diffpolicy.data.observation import (
    Obs,
    as_seen,
    count,
    from_fields,
    obs_fields,
    of_store,
    take,
    to_fields,
)
from diffpolicy.data.statistics import usual_step
from diffpolicy.data.store import EpisodeStore
from diffpolicy.policies.base import Array, ChunkedPolicy, PolicyState
from diffpolicy.policies.diffusion import DiffusionPlanner


class Demonstrations(NamedTuple):
    """Whole episodes side by side: ``obs [E, T, O]``, ``action [E, T, A]``, ``valid [E, T]``.

    Observations may be such arrays by name. Raw units; after an episode's end its last step is
    repeated.
    """

    obs: Obs
    action: Array
    valid: Array


def demonstrations(
    store: EpisodeStore, episodes: int = 60, *, length: int = 64, seed: int = 0
) -> Demonstrations:
    """A random choice of a store's episodes, of each at most ``length`` steps in a row.

    Raises:
        ValueError: fewer than two episodes.
    """
    acting = np.flatnonzero(store.has_actions)
    if min(len(acting), episodes) < 2:
        got = f"{episodes} of {len(acting)}"
        raise ValueError(f"choosing a level needs at least 2 episodes, got {got}")
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(acting)[:episodes]
    whole = store.episode_lengths[chosen]
    lengths = np.minimum(whole, length)
    first = store.episode_ends[chosen] - whole + rng.integers(0, whole - lengths + 1)
    step = np.arange(lengths.max())
    rows = first[:, None] + np.minimum(step, lengths[:, None] - 1)
    read = {name: read_rows(store, name, rows) for name in (*obs_fields(store), "action")}
    obs = as_seen(from_fields(read), of_store(store), lead=("E", "T"))
    action = read["action"].astype(np.float32, copy=False)
    return Demonstrations(obs, action, step < lengths[:, None])


def observation_step(store: EpisodeStore) -> tuple[float, ...]:
    """The usual largest change of each observation entry between two steps ``[O]``.

    The 0.999 quantile over a store's steps, and at least a thousandth of the entry's range;
    the largest float32 where an entry never changes. ``rti.innovation`` counts in these units.

    Raises:
        ValueError: observations that are not one vector.
    """
    seen = obs_fields(store)
    if seen != ["obs"] or store.fields["obs"].is_image:
        raise ValueError(
            f"rti.innovation compares vectors, one 'obs' a step; {store.name} has {seen} (images "
            "count as none): leave it out"
        )
    return tuple(float(v) for v in usual_step(store))


def told(state: PolicyState, cond: Array | None, rows: Any, steps: Any) -> PolicyState:
    """The memory with what its observations were encoded to, if they were."""
    return state if cond is None else state.remember(cond=cond[rows, steps])


def replay(
    policy: ChunkedPolicy,
    obs: Obs,
    seeds: Sequence[int],
    start: PolicyState | None = None,
    cond: Array | None = None,
) -> Array:
    """Normalised actions ``[E, T, A]``, as plans say them, for observations ``[E, T, O]``.

    From ``start``, a memory that holds the first plan, if there is one; ``cond`` ``[E, T, C]`` is
    what the observations were encoded to.
    """
    state = policy.initial_state(seeds) if start is None else start
    rows, steps = np.arange(count(obs)), next(iter(to_fields(obs).values())).shape[1]
    planner = policy if isinstance(policy, DiffusionPlanner) else None
    grippers = () if planner is None else planner.boundary.grippers
    width = policy.action_dim if planner is None else planner.layout.action_dim
    out = []
    for step in range(steps):
        state = policy.observe(take(obs, (slice(None), step)), state)
        state = told(state, cond, rows, step)
        due = np.flatnonzero(policy.needs_plan(state))
        if len(due):
            state = policy.replan(state, due)
        action = state.plan[rows, np.minimum(state.cursor, policy.horizon - 1), -width:]
        for gripper in grippers:
            action = gripper.snap(action)
        out.append(action)
        state = replace(state, cursor=state.cursor + 1)
    return np.stack(out, 1)
