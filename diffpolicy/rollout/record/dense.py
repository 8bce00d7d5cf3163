"""An environment's dense reward of steps that are recorded."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffpolicy.data.store import EpisodeStore
from diffpolicy.rollout.env_spec import EnvSpec

METHOD = "dense_reward"


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
        steps = [store.read(name, 0, store.num_steps) for name in ("obs", "action", "reward")]
        found = np.asarray(self._function(*steps), np.float32)
        if found.shape != (store.num_steps,) or not np.isfinite(found).all():
            raise ValueError(
                f"{METHOD} must return {store.num_steps} finite numbers, one for each step; got "
                f"{found.dtype} {list(found.shape)}, {int((~np.isfinite(found)).sum())} not finite"
            )
        return found
