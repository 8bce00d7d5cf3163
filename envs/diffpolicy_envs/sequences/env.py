"""A design task as a Gymnasium environment of one step: the action is the whole sequence."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from diffpolicy_envs.sequences.task import BaseTask

if TYPE_CHECKING:
    from torch import Tensor

Observation = NDArray[np.float32]
Action = NDArray[np.int64]

TASKS = {
    "tfbind8": "tables:TFBind8",
    "gb1": "tables:GB1",
    "splice_site": "tables:SpliceSite",
    "lac_promoter": "promoter:LacPromoter",
    "rna_folding": "rna:RNAFolding",
}
"""Module and class of each task by name."""


class SequenceDesignEnv(gym.Env[Observation, Action]):
    """One step: the action is a sequence, the reward is the task's, and the episode ends.

    Any reinforcement-learning library can drive it; the task itself, with its data and its
    differentiable reward where there is one, is ``env.unwrapped.task``.

    Args:
        task: a task, or the name of one of this package's (`TASKS`).
        oracle: callable from one-hot rows, float32 Tensor [1, L, V], to rewards [1], in place of
            the task's reward; needed to step through a task that has none.
        **options: arguments of the named task.

    Raises:
        ValueError: there is no task of that name, or options were given with a built task.
        TypeError: the oracle is not callable, or the task takes no such option.
    """

    def __init__(
        self,
        task: str | BaseTask,
        *,
        oracle: Callable[[Tensor], Tensor] | None = None,
        **options: Any,
    ) -> None:
        if oracle is not None and not callable(oracle):
            raise TypeError(f"oracle must map rows [B, L, V] to rewards [B], got {oracle!r}")
        self.task = _build(task, options)
        self.oracle = oracle
        self.observation_space = gym.spaces.Box(0.0, 1.0, (1,), np.float32)
        self.action_space = gym.spaces.MultiDiscrete([self.task.vocab_size] * self.task.length)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin the next design; the observation [1] is always 0. See `gymnasium.Env.reset`."""
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Score a sequence and end the episode.

        Args:
            action: tokens [L], values 0..V-1.

        Returns:
            Observation [1], reward, True, False, and an info with the letters as ``sequence``.

        Raises:
            ValueError: the action is not such a sequence.
            RuntimeError: the task has no reward and no oracle was given.
        """
        tokens = self.task.check_tokens(np.asarray(action)[None])
        info = {"sequence": self.task.decode(tokens)[0]}
        return np.zeros(1, np.float32), self._reward(tokens), True, False, info

    def _reward(self, tokens: NDArray[np.int64]) -> float:
        if self.oracle is None:
            return float(self.task.scores(tokens)[0])
        import torch

        with torch.no_grad():
            rows = torch.eye(self.task.vocab_size)[torch.from_numpy(tokens)]
            return float(self.oracle(rows)[0])


def _build(task: str | BaseTask, options: dict[str, Any]) -> BaseTask:
    """The named task with its options, or the given one without any."""
    if not isinstance(task, str):
        if options:
            raise ValueError(f"a built task takes no options, got {sorted(options)}")
        return task
    if task not in TASKS:
        raise ValueError(f"no sequence task {task!r}; there are {', '.join(TASKS)}")
    module, name = TASKS[task].split(":")
    built: BaseTask = getattr(importlib.import_module(f"{__package__}.{module}"), name)(**options)
    return built
