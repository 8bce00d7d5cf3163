"""The loop that keeps the rows of a pool busy with episodes, whatever is done with them."""

from __future__ import annotations

import abc
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np

from diffpolicy.policies.rows import ON_CPU, usual_batch
from diffpolicy.rollout.pool.slots import Outcome
from diffpolicy.rollout.pool.workers import Failure, WorkerPool, Workers


class AllFailedError(ValueError):
    """Not one episode could be run, so there is nothing to report but why."""


class RowState(Protocol):
    """What a loop needs of a policy's state: rows, and running totals per row."""

    @property
    def nfe(self) -> Any:
        """``[N]`` network evaluations so far."""

    @property
    def plans(self) -> Any:
        """``[N]`` plans made so far."""

    def take(self, rows: Any) -> Self:
        """The state of some rows."""

    def put(self, rows: Any, other: Self) -> Self:
        """The state with some rows replaced."""


class Policy(Protocol):
    """What a loop needs of a policy (see :mod:`diffpolicy.policies`)."""

    def initial_state(self, seeds: Sequence[int]) -> Any:
        """Memory of ``len(seeds)`` rows."""

    def act(self, obs: np.ndarray, state: Any, *, deterministic: bool = False) -> Any:
        """``(actions [N, A], new state)`` for ``obs [N, O]``."""

    def forget(self, state: Any, done: np.ndarray, seeds: Sequence[int] | None = None) -> Any:
        """The state with the rows of ``done [N]`` empty again, each with a seed (row order)."""


@dataclass
class Episode:
    """An episode that waits for a row or runs in one; subclasses keep what becomes of it.

    Attributes:
        seed: of the environment's reset.
        policy_seed: of the policy's random stream.
        attempts: how often it was begun, this time included.
        failed: why earlier attempts failed.
        step: steps taken.
    """

    seed: int
    policy_seed: int
    attempts: int = 1
    failed: tuple[str, ...] = ()
    step: int = 0

    def again(self, *failed: str) -> Self:
        """The same episode from its beginning; an attempt more if the last one failed.

        Each kind of episode says what of it is kept.
        """
        raise NotImplementedError


E = TypeVar("E", bound=Episode)


class RowLoop(abc.ABC, Generic[E]):
    """Keeps the rows of a pool busy: each runs an episode, then the next.

    A row whose episode fails begins it again as often as it may; one whose environment cannot be
    had any more is given up, and the others go on.

    Args:
        policy: who acts, see :func:`planning_in_batches`.
        pool: where.

    Attributes:
        running: the episodes under way, by row.
        state: the policy's memory of all rows.
        obs: what the rows saw last ``[N, O]``.
        lost: why rows were given up, empty if none was.
    """

    def __init__(self, policy: Any, pool: WorkerPool) -> None:
        self.policy, self.pool = policy, pool
        self.running: dict[int, E] = {}
        self.lost = ""
        self._rows = list(range(pool.num_envs))
        self._again: deque[E] = deque()
        # Every row is forgotten before it is used, so these seeds never show.
        self.state = policy.initial_state([0] * pool.num_envs)
        self.obs = np.zeros((pool.num_envs, pool.info.obs_dim), np.float32)

    @abc.abstractmethod
    def upcoming(self) -> E | None:
        """The next episode; ``None``: there is none for now."""

    @abc.abstractmethod
    def actions(self, rows: list[int]) -> np.ndarray:
        """``[len(rows), A]``; :meth:`act` asks the policy."""

    @abc.abstractmethod
    def stepped(self, row: int, action: np.ndarray, outcome: Outcome) -> bool:
        """Notes what a step brought; whether the episode is over."""

    @abc.abstractmethod
    def gave_up(self, episode: E, why: str) -> None:
        """Notes that an episode failed for good."""

    def began(self, row: int, outcome: Outcome) -> None:
        """Notes what a reset brought."""

    def films(self, row: int) -> bool:
        """Whether the next picture of a row is wanted."""
        return False

    def loop(self, tick: Callable[[], None] = lambda: None) -> None:
        """Runs until no episode is left; ``tick`` is called after every step of all rows."""
        self._fill()
        while self.running:
            rows = sorted(self.running)
            actions = self.actions(rows)
            results = self.pool.step(actions, rows, frames=[self.films(row) for row in rows])
            for place, row in enumerate(rows):
                result = results[row]
                if isinstance(result, Failure):
                    self._failed(row, result)
                elif self.stepped(row, actions[place], result):
                    del self.running[row]
            # Also rows that had nothing to do: one episode may bring many others.
            self._fill()
            tick()
        while (left := self._following()) is not None:  # no row is left to run it
            self.gave_up(left, self.lost)

    def act(self, rows: list[int], deterministic: bool = False) -> np.ndarray:
        """The policy's actions in some rows.

        Raises:
            ValueError: actions that are not finite or have the wrong shape.
        """
        whole = len(rows) == self.pool.num_envs
        numbers = np.array(rows)
        state = self.state if whole else self.state.take(numbers)
        chosen, state = self.policy.act(self.obs[rows].copy(), state, deterministic=deterministic)
        self.state = state if whole else self.state.put(numbers, state)
        actions = np.asarray(chosen)
        expected = (len(rows), self.pool.info.action_dim)
        if actions.shape != expected:
            raise ValueError(f"the policy returned actions {actions.shape}, expected {expected}")
        bad = np.flatnonzero(~np.isfinite(actions).all(axis=1))
        if len(bad):
            row = rows[bad[0]]
            episode = self.running[row]
            raise ValueError(
                f"the policy's action in row {row} is not finite: {actions[bad[0]]} (seed "
                f"{episode.seed}, step {episode.step}). Its weights or its normaliser hold "
                "non-finite values, or the observation is far outside the training data."
            )
        return actions

    def _following(self) -> E | None:
        return self._again.popleft() if self._again else self.upcoming()

    def _fill(self) -> None:
        """Gives each free row the next episode, until every row has one or none is left."""
        while len(self.running) < len(self._rows):
            begun: list[int] = []
            for row in self._rows:
                following = None if row in self.running else self._following()
                if following is not None:
                    self.running[row] = following
                    begun.append(row)
            if not begun:
                return
            seeds = [self.running[row].seed for row in begun]
            results = self.pool.reset(begun, seeds, frames=[self.films(row) for row in begun])
            done = np.zeros(self.pool.num_envs, bool)
            done[begun] = True
            fresh = [self.running[row].policy_seed for row in begun]
            self.state = self.policy.forget(self.state, done, seeds=fresh)
            for row in begun:
                result = results[row]
                if isinstance(result, Failure):
                    self._failed(row, result)
                else:
                    self.obs[row] = result.obs
                    self.began(row, result)

    def _failed(self, row: int, failure: Failure) -> None:
        """Puts the episode of a row back, or gives it up."""
        episode = self.running.pop(row)
        text = str(failure)
        if failure.kind == "gone":
            self.lost = self.lost or text
            self._rows.remove(row)
        if failure.blameless:
            self._again.appendleft(episode.again())
        elif episode.attempts <= self.pool.workers.retries:
            self._again.appendleft(episode.again(text))
        else:
            self.gave_up(episode, text)


def planning_in_batches(policy: Any, plan_batch: int | None) -> Any:
    """The policy, planning in batches of constant size, so that no episode depends on its rows.

    Args:
        policy: one of :mod:`diffpolicy.policies`; a policy of another kind is returned as it is.
        plan_batch: rows of a batch; 1: one by one; ``None``: as many as cost little more than one
            (8 on a CPU, 64 on an accelerator).
    """
    if not callable(getattr(policy, "with_plan_batch", None)):
        return policy
    return policy.with_plan_batch(usual_batch(policy) if plan_batch is None else plan_batch)


def fitting(workers: Workers | None, episodes: int, plan_batch: int | None = None) -> Workers:
    """No more environments than pay: each costs as much to make as many steps.

    There are never more than episodes, and above one batch of plans, which more rows cannot make
    cheaper, each runs at least eight.

    Args:
        workers: as asked for.
        episodes: to be run.
        plan_batch: rows that plan at once; ``None``: few.
    """
    asked = Workers() if workers is None else workers
    useful = min(episodes, max(plan_batch or ON_CPU, math.ceil(episodes / 8)))
    return replace(asked, num_envs=max(min(asked.num_envs, useful), 1))
