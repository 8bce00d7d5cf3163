"""The loop that keeps the rows of a pool busy with episodes, whatever is done with them."""

from __future__ import annotations

import abc
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np

from diffpolicy.data.observation import Obs, stack
from diffpolicy.policies.rows import ON_CPU, usual_batch
from diffpolicy.rollout.pool.slots import Drawn, Failure, Outcome
from diffpolicy.rollout.pool.supervisor import Workers
from diffpolicy.rollout.pool.workers import WorkerPool
from diffpolicy.settings import check_range


class AllFailedError(ValueError):
    """Not one episode could be run, so there is nothing to report but why."""


class Policy(Protocol):
    """What a loop needs of a policy (see :mod:`diffpolicy.policies`).

    Its state has ``take(rows)`` and ``put(rows, other)``, and the totals ``nfe [N]`` (network
    evaluations so far) and ``plans [N]``.
    """

    def initial_state(self, seeds: Sequence[int]) -> Any:
        """Memory of ``len(seeds)`` rows."""

    def act(self, obs: Any, state: Any, *, deterministic: bool = False) -> Any:
        """``(actions [N, A], new state)`` for ``obs``, N rows of an :data:`Obs`."""

    def forget(self, state: Any, done: np.ndarray, seeds: Sequence[int] | None = None) -> Any:
        """The state with the rows of ``done [N]`` empty again, each with a seed (row order)."""


@dataclass
class Episode:
    """An episode that waits for a row or runs in one.

    Subclasses keep what becomes of it in fields that the constructor does not take.

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
    step: int = field(default=0, init=False)

    def again(self, *failed: str) -> Self:
        """The same episode from its beginning; an attempt more if the last one failed."""
        return replace(self, attempts=self.attempts + len(failed), failed=(*self.failed, *failed))


E = TypeVar("E", bound=Episode)


class RowLoop(abc.ABC, Generic[E]):
    """Keeps the rows of a pool busy: each runs an episode, then the next.

    A row whose episode fails begins it again as often as it may; one whose environment cannot be
    had any more is given up, and the others go on.

    Args:
        policy: who acts, see :func:`planning_in_batches`; None where :meth:`step` needs none.
        pool: where.

    Attributes:
        running: the episodes under way, by row.
        state: the policy's memory of all rows.
        obs: what the rows saw last, one by one.
        lost: why rows were given up, empty if none was.
    """

    def __init__(self, policy: Any, pool: WorkerPool) -> None:
        self.policy, self.pool = policy, pool
        self.running: dict[int, E] = {}
        self.obs: dict[int, Obs] = {}
        self.lost = ""
        self._rows = list(range(pool.num_envs))
        self._again: deque[E] = deque()
        # Every row is forgotten before it is used, so these seeds never show.
        self.state: Any = None if policy is None else policy.initial_state([0] * pool.num_envs)

    @abc.abstractmethod
    def upcoming(self) -> E | None:
        """The next episode; ``None``: there is none for now."""

    @abc.abstractmethod
    def stepped(self, row: int, outcome: Outcome) -> bool:
        """Note what a step brought; whether the episode is over.

        ``obs`` holds what the row saw before, ``outcome.action`` what was done.
        """

    @abc.abstractmethod
    def gave_up(self, episode: E, why: str) -> None:
        """Note that an episode failed for good."""

    def actions(self, rows: list[int]) -> np.ndarray:
        """``[len(rows), A]``: the policy's."""
        return self.act(rows)

    def step(self, rows: list[int]) -> dict[int, Outcome | Failure]:
        """Take a step in some rows; an outcome tells the action."""
        actions = self.actions(rows)
        results = self.pool.step(actions, rows, frames=[self.films(row) for row in rows])
        return {
            row: result if isinstance(result, Failure) else result._replace(action=action)
            for action, (row, result) in zip(actions, results.items(), strict=True)
        }

    def began(self, row: int, outcome: Outcome) -> None:
        """Note what a reset brought."""

    def films(self, row: int) -> Drawn:
        """Whether a picture of the row's next reset or step is wanted."""
        return False

    def loop(self, tick: Callable[[], None] = lambda: None) -> None:
        """Run until no episode is left; ``tick`` is called after every step of all rows."""
        self._fill()
        while self.running:
            rows = sorted(self.running)
            for row, result in self.step(rows).items():
                if isinstance(result, Failure):
                    self._failed(row, result)
                    continue
                self.running[row].step += 1
                over = self.stepped(row, result)
                self.obs[row] = result.obs
                if over:
                    del self.running[row]
            # Also rows that had nothing to do: one episode may bring many others.
            self._fill()
            tick()
        while (left := self._following()) is not None:  # no row is left to run it
            self.gave_up(left, self.lost)

    def act(self, rows: list[int], deterministic: bool = False) -> np.ndarray:
        """The policy's actions ``[len(rows), A]`` in some rows.

        Raises:
            ValueError: actions that are not finite or have the wrong shape.
        """
        whole = len(rows) == self.pool.num_envs
        numbers = np.array(rows)
        state = self.state if whole else self.state.take(numbers)
        chosen, state = self.policy.act(self.seen(rows), state, deterministic=deterministic)
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

    def seen(self, rows: Sequence[int]) -> Obs:
        """What some rows saw last, as one batch of its own memory."""
        batch: Obs = stack([self.obs[row] for row in rows])
        return batch

    def _following(self) -> E | None:
        return self._again.popleft() if self._again else self.upcoming()

    def _fill(self) -> None:
        """Give each free row the next episode, until every row has one or none is left."""
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
            if self.policy is not None:
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
        """Put the episode of a row back, or give it up."""
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


def distinct(seeds: Sequence[int]) -> list[int]:
    """Seeds of environments, as numbers.

    Raises:
        ValueError: there are none, or some are alike or negative.
    """
    numbers = [int(seed) for seed in seeds]
    if not numbers:
        raise ValueError("there are no seeds, so there is no episode to run")
    if len(set(numbers)) != len(numbers):
        raise ValueError(
            "seeds must differ: the same seed is the same episode, and no new evidence"
        )
    check_range("[0, inf)", seeds=min(numbers))
    return numbers
