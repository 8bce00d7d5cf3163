"""Episodes that begin by repeating recorded actions, many of them in one policy call per step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from diffpolicy.rollout.pool.slots import Outcome
from diffpolicy.rollout.pool.workers import WorkerPool
from diffpolicy.rollout.rows import Episode, Policy, RowLoop, planning_in_batches


class ReplayError(ValueError):
    """An environment that does not repeat itself, so that nothing can be branched off."""


class ObservingPolicy(Policy, Protocol):
    """A policy that can look on without acting (every policy of :mod:`diffpolicy.policies`)."""

    @property
    def n_obs_steps(self) -> int:
        """Observations that a plan sees, To."""

    @property
    def n_action_steps(self) -> int:
        """Actions executed per plan, Ta."""

    def observe(self, obs: np.ndarray, state: Any) -> Any:
        """The memory after observing ``obs [N, O]``."""


class Prefix(NamedTuple):
    """The recorded start of an episode, R steps.

    Attributes:
        obs: ``[R + 1, O]`` what was seen, the last one after the last action.
        action: ``[R, A]`` what was executed.
        reward: ``[R]``.
    """

    obs: np.ndarray
    action: np.ndarray
    reward: np.ndarray


class Track(NamedTuple):
    """What happened after a prefix, T steps; dtypes as in a store.

    Attributes:
        obs: ``[T, O]`` what was seen before each action.
        action: ``[T, A]``.
        reward: ``[T]``.
        terminated: ``[T]`` bool.
        truncated: ``[T]`` bool.
        success: ``[T]`` bool; false where the environment does not say.
        says_success: whether it ever said.
    """

    obs: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    success: np.ndarray
    says_success: bool


@dataclass(frozen=True)
class Job:
    """One episode to run.

    Args:
        key: names it in the results; unique.
        seed: of the environment's reset.
        policy_seed: the policy's random stream.
        later_seed: its stream from the second plan on; None: the same one.
        prefix: recorded steps to repeat first; None: none.
        limit: at most so many steps after the prefix; None: to the end of the episode.
    """

    key: tuple[int, ...]
    seed: int
    policy_seed: int
    later_seed: int | None = None
    prefix: Prefix | None = None
    limit: int | None = None


@dataclass(kw_only=True)
class _Running(Episode):
    """A job under way in some row; ``step`` counts the repeated steps too."""

    job: Job
    plans: int = 0  # the row's count when it began
    switched: bool = False
    seen: list[np.ndarray] = field(default_factory=list)
    taken: list[np.ndarray] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)

    def again(self, *failed: str) -> _Running:
        return _begun(self.job, self.attempts + len(failed), (*self.failed, *failed))

    @property
    def replayed(self) -> int:
        return 0 if self.job.prefix is None else len(self.job.prefix.action)

    @property
    def replays(self) -> bool:
        return self.step < self.replayed


def _begun(job: Job, attempts: int = 1, failed: tuple[str, ...] = ()) -> _Running:
    return _Running(job.seed, job.policy_seed, attempts, failed, job=job)


class TrackRunner(RowLoop[_Running]):
    """Runs jobs, all acting rows in one ``policy.act`` per step.

    A row that repeats its prefix only shows the policy what it sees; where the prefix ends, the
    policy makes a new plan with its own noise, from the history that the recorded episode had.

    Args:
        policy: who acts; one of this library plans in batches of constant size.
        pool: where.
    """

    def __init__(self, policy: ObservingPolicy, pool: WorkerPool) -> None:
        if not callable(getattr(policy, "observe", None)):
            raise ValueError(
                f"{type(policy).__name__} has no method observe(obs, state): where it repeats "
                "recorded steps a policy must look on without acting; give a DiffusionPolicy "
                "(without latency)"
            )
        super().__init__(planning_in_batches(policy, None), pool)
        self._urgent: deque[Job] = deque()
        self.steps = 0  # of all environments, repeated ones included

    def run(
        self,
        jobs: Iterable[Job],
        on_done: Callable[[Job, Track | str], Sequence[Job]],
    ) -> None:
        """Runs all jobs.

        Args:
            jobs: taken one at a time, when a row is free.
            on_done: called with each job and its track, or with why it failed after all attempts;
                returns further jobs, which go before the rest of ``jobs``.

        Raises:
            ReplayError: a prefix did not repeat itself.
            ValueError: the policy's actions are not finite or have the wrong shape.
        """
        self._waiting: Iterator[Job] = iter(jobs)
        self._on_done = on_done
        self.loop()

    def upcoming(self) -> _Running | None:
        job = self._urgent.popleft() if self._urgent else next(self._waiting, None)
        return None if job is None else _begun(job)

    def began(self, row: int, outcome: Outcome) -> None:
        running = self.running[row]
        running.plans = int(np.asarray(self.state.plans)[row])
        self._check_observation(running, outcome.obs)

    def actions(self, rows: list[int]) -> np.ndarray:
        self.steps += len(rows)
        actions = np.zeros((len(rows), self.pool.info.action_dim), np.float32)
        replaying = np.array([self.running[row].replays for row in rows])
        numbers = np.array(rows)
        watch, play = numbers[replaying], numbers[~replaying]
        if len(watch):
            for i in np.flatnonzero(replaying):
                running = self.running[rows[i]]
                assert running.job.prefix is not None
                actions[i] = running.job.prefix.action[running.step]
            part = self.policy.observe(self.obs[watch].copy(), self.state.take(watch))
            self.state = self.state.put(watch, part)
        if len(play):
            actions[~replaying] = self.act(play.tolist())
            self.state = self._with_later_seeds(self.state, play.tolist())
        return actions

    def _with_later_seeds(self, state: Any, rows: list[int]) -> Any:
        """The state in which rows that have made their first plan go on in their later stream."""
        plans = np.asarray(state.plans)
        changed = []
        for row in rows:
            running = self.running[row]
            if running.switched or running.job.later_seed is None:
                continue
            if plans[row] > running.plans:
                running.switched = True
                changed.append((row, running.job.later_seed))
        if not changed:
            return state
        seeds = np.array(state.seed)
        for row, seed in changed:
            seeds[row] = seed
        return replace(state, seed=seeds)

    def stepped(self, row: int, action: np.ndarray, result: Outcome) -> bool:
        running = self.running[row]
        replayed = running.replays
        if replayed:
            self._check_step(running, result)
        else:
            running.seen.append(self.obs[row].copy())
            running.taken.append(action)
            running.outcomes.append(result)
        running.step += 1
        self.obs[row] = result.obs
        if replayed:
            self._check_observation(running, result.obs)
            return False
        limit = running.job.limit
        full = limit is not None and len(running.taken) >= limit
        if not (result.terminated or result.truncated or full):
            return False
        self._urgent.extend(self._on_done(running.job, _track(running)))
        return True

    def gave_up(self, episode: _Running, why: str) -> None:
        self._urgent.extend(self._on_done(episode.job, why))

    def _check_observation(self, running: _Running, obs: np.ndarray) -> None:
        prefix = running.job.prefix
        if prefix is None or running.step > running.replayed:
            return
        known = prefix.obs[running.step]
        if not np.array_equal(known, obs):
            entry = int(np.flatnonzero(known != obs)[0])
            _not_repeated(running, f"entry {entry} of obs", known[entry], obs[entry])

    def _check_step(self, running: _Running, result: Outcome) -> None:
        assert running.job.prefix is not None
        known, got = running.job.prefix.reward[running.step], np.float32(result.reward)
        if known != got:
            _not_repeated(running, "the reward", known, got)
        if result.terminated or result.truncated:
            _not_repeated(running, "the end of the episode", "later", "now")


def _not_repeated(running: _Running, what: str, known: object, got: object) -> None:
    raise ReplayError(
        "the environment does not repeat itself: with the same seed and actions, "
        f"{what} was {known} and is {got} now (seed {running.job.seed}, step {running.step}). "
        "Branches need an environment whose reset(seed) and actions decide everything (draw from "
        "self.np_random alone, and let reset() undo every change); else collect whole episodes "
        "of the same seed"
    )


def _track(running: _Running) -> Track:
    outcomes = running.outcomes
    return Track(
        obs=np.stack(running.seen),
        action=np.stack(running.taken),
        reward=np.array([one.reward for one in outcomes], np.float32),
        terminated=np.array([one.terminated for one in outcomes]),
        truncated=np.array([one.truncated for one in outcomes]),
        success=np.array([bool(one.success) for one in outcomes]),
        says_success=any(one.success is not None for one in outcomes),
    )
