"""Recorded steps: their fields in a store, written and read back, and rewarded densely."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffpolicy.data.fields import FieldSpec
from diffpolicy.data.observation import Obs, by_store_field, from_fields, obs_fields, to_fields
from diffpolicy.data.store import EpisodeStore
from diffpolicy.rollout.env_spec import EnvInfo, EnvSpec

METHOD = "dense_reward"


def open_record(
    path: Path,
    info: EnvInfo,
    settings: Mapping[str, Any],
    beside: Mapping[str, FieldSpec] | None = None,
    *,
    rollouts: bool = False,
) -> EpisodeStore:
    """The store of recorded steps at ``path``, made or opened to go on.

    Args:
        path: of the store.
        info: the environment.
        settings: what decides the episodes, as JSON values.
        beside: further fields of a store that is made.
        rollouts: whether they are rollouts of a policy: the settings then are part of the store's
            attribute ``rollouts``, and there is a field for the success at every step.

    Raises:
        ValueError: it was made with another environment or other settings.
    """
    env = {
        "env_id": info.spec.id,
        "env_kwargs": dict(info.spec.kwargs),
        "max_episode_steps": info.max_episode_steps,
    }
    if not path.exists():
        flags = ("terminated", "truncated", *(["success"] if rollouts else []))
        seen = by_store_field(info.obs).items()
        fields = {
            **{name: FieldSpec(field.shape, field.dtype) for name, field in seen},
            "action": FieldSpec((info.action_dim,), "float32"),
            "reward": FieldSpec((), "float32"),
            **{name: FieldSpec((), "bool") for name in flags},
            **(beside or {}),
        }
        made = {"rollouts": {**settings, "failed": {}, "env_steps": 0}} if rollouts else settings
        said = {"action_groups": info.action_groups} if info.action_groups else {}
        attrs = {**env, **made, **said, "versions": info.versions}
        return EpisodeStore.create(path, fields, attrs=attrs)
    store = EpisodeStore.open(path, "a")
    known, asked = {**store.attrs, **store.attrs.get("rollouts", {})}, {**env, **settings}
    found = {name: known.get(name) for name in asked}
    if found != asked:
        store.close()
        raise ValueError(
            f"{path} was collected with {found}, not with {asked}; choose another path, or the "
            "same settings (and policy) to go on with it"
        )
    return store


def read_obs(store: EpisodeStore, start: int, stop: int) -> Obs:
    """The observations of the rows ``start`` to ``stop`` of a store: one array, or by name."""
    obs: Obs = from_fields({name: store.read(name, start, stop) for name in obs_fields(store)})
    return obs


def difference(known: Obs, got: Obs) -> str:
    """Where two single observations differ first, in words; empty if they are the same numbers."""
    mine, other = to_fields(known), to_fields(got)
    for name, array in mine.items():
        if not np.array_equal(array, other[name]):
            entry = int(np.flatnonzero(array != other[name])[0])
            values = array.flat[entry], other[name].flat[entry]
            return f"entry {entry} of {name} was {values[0]} and is {values[1]} now"
    return ""


class InOrder:
    """Hands out what is known of seeds in the order of the seeds, whichever was known first.

    Args:
        seeds: in their order.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._left = deque(seeds)
        self._known: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._known)

    def add(self, seed: int, value: Any) -> Iterator[tuple[int, Any]]:
        """Note what is known of a seed; all that is next in order, ``(seed, value)``."""
        self._known[seed] = value
        while self._left and self._left[0] in self._known:
            following = self._left.popleft()
            yield following, self._known.pop(following)


class DenseReward:
    """What an environment's ``dense_reward(obs, action, reward)`` says of stored steps.

    Rewards that are 0 nearly everywhere tell a value little; such a function tells it how far from
    the goal a step was.

    Args:
        spec: the environment. ``dense_reward`` takes ``obs [T, O]``, ``action [T, A]`` and ``reward
            [T]`` of T steps, which may be of several episodes, and returns ``[T]``.

    Raises:
        ValueError: it has no such method.
    """

    def __init__(self, spec: EnvSpec) -> None:
        env = spec.make()
        try:
            if not env.has_wrapper_attr(METHOD):
                raise ValueError(
                    f"{spec.id} has no method {METHOD}(obs, action, reward); choose the rewards "
                    "that it gave (judge.reward=store), or give it one"
                )
            self._function: Any = env.get_wrapper_attr(METHOD)
        finally:
            env.close()

    def rewards(self, store: EpisodeStore) -> NDArray[np.float32]:
        """The dense reward of every step of a store, ``[T]``.

        Raises:
            ValueError: the function returns something else than T finite numbers.
        """
        count = store.num_steps
        known = [store.read(name, 0, count) for name in ("action", "reward")]
        found = np.asarray(self._function(read_obs(store, 0, count), *known), np.float32)
        if found.shape != (count,) or not np.isfinite(found).all():
            raise ValueError(
                f"{METHOD} must return {count} finite numbers, one for each step; got "
                f"{found.dtype} {list(found.shape)}, {int((~np.isfinite(found)).sum())} not finite"
            )
        return found
