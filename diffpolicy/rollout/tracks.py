"""Episodes that begin by repeating recorded actions, many of them in one policy call per step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from diffpolicy.rollout.evaluate import Policy
from diffpolicy.rollout.slots import Outcome
from diffpolicy.rollout.vector import Failure, WorkerPool


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


@dataclass
class _Running:
    """A job under way in some row."""

    job: Job
    attempts: int = 1
    step: int = 0  # of the environment
    plans: int = 0  # the row's count when it began
    switched: bool = False
    seen: list[np.ndarray] = field(default_factory=list)
    taken: list[np.ndarray] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def replayed(self) -> int:
        return 0 if self.job.prefix is None else len(self.job.prefix.action)

    @property
    def replays(self) -> bool:
        return self.step < self.replayed


class TrackRunner:
    """Keeps the rows of a pool busy with jobs, all acting rows in one ``policy.act`` per step.

    A row that repeats its prefix only shows the policy what it sees; where the prefix ends, the
    policy makes a new plan with its own noise, from the history that the recorded episode had.

    Args:
        policy: who acts.
        pool: where.
    """

    def __init__(self, policy: ObservingPolicy, pool: WorkerPool) -> None:
        if not callable(getattr(policy, "observe", None)):
            raise ValueError(
                f"{type(policy).__name__} has no method observe(obs, state): where it repeats "
                "recorded steps a policy must look on without acting; give a DiffusionPolicy "
                "(without latency)"
            )
        self.policy, self.pool = policy, pool
        # Every row is forgotten before it is used, so these seeds never show.
        self._state = policy.initial_state([0] * pool.num_envs)
        self._obs = np.zeros((pool.num_envs, pool.info.obs_dim), np.float32)
        self._running: dict[int, _Running] = {}
        self._urgent: deque[_Running] = deque()
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
        waiting = iter(jobs)
        self._begin(range(self.pool.num_envs), waiting, on_done)
        while self._running:
            rows = sorted(self._running)
            actions = self._act(rows)
            results = self.pool.step(actions, rows)
            self.steps += len(rows)
            for place, row in enumerate(rows):
                self._take(row, actions[place], results[row], on_done)
            # Also rows that had nothing to do: a base episode that ends brings many jobs.
            idle = [row for row in range(self.pool.num_envs) if row not in self._running]
            self._begin(idle, waiting, on_done)

    def _next(self, waiting: Any) -> _Running | None:
        if self._urgent:
            return self._urgent.popleft()
        job = next(waiting, None)
        return None if job is None else _Running(job)

    def _begin(self, rows: Sequence[int], waiting: Any, on_done: Any) -> None:
        free = list(rows)
        while free:
            begun: list[int] = []
            for row in free:
                following = self._next(waiting)
                if following is None:
                    break
                self._running[row] = following
                begun.append(row)
            if not begun:
                return
            free = free[len(begun) :]
            jobs = [self._running[row].job for row in begun]
            results = self.pool.reset(begun, [job.seed for job in jobs])
            done = np.zeros(self.pool.num_envs, bool)
            done[begun] = True
            fresh = [self._running[row].job.policy_seed for row in sorted(begun)]
            self._state = self.policy.forget(self._state, done, seeds=fresh)
            plans = np.asarray(self._state.plans)
            for row in begun:
                result = results[row]
                self._running[row].plans = int(plans[row])
                if isinstance(result, Failure):
                    self._failed(row, result, on_done)
                    free.append(row)
                    continue
                self._obs[row] = result.obs
                self._check_observation(self._running[row], result.obs)

    def _act(self, rows: list[int]) -> np.ndarray:
        actions = np.zeros((len(rows), self.pool.info.action_dim), np.float32)
        replaying = np.array([self._running[row].replays for row in rows])
        numbers = np.array(rows)
        watch, play = numbers[replaying], numbers[~replaying]
        if len(watch):
            for i in np.flatnonzero(replaying):
                running = self._running[rows[i]]
                assert running.job.prefix is not None
                actions[i] = running.job.prefix.action[running.step]
            part = self.policy.observe(self._obs[watch].copy(), self._state.take(watch))
            self._state = self._state.put(watch, part)
        if len(play):
            whole = len(play) == self.pool.num_envs
            state = self._state if whole else self._state.take(play)
            chosen, state = self.policy.act(self._obs[play].copy(), state)
            actions[~replaying] = self._checked(np.asarray(chosen, np.float32), play.tolist())
            state = self._with_later_seeds(state, play.tolist())
            self._state = state if whole else self._state.put(play, state)
        return actions

    def _with_later_seeds(self, state: Any, rows: list[int]) -> Any:
        """The state in which rows that have made their first plan go on in their later stream."""
        plans = np.asarray(state.plans)
        changed = []
        for place, row in enumerate(rows):
            running = self._running[row]
            if running.switched or running.job.later_seed is None:
                continue
            if plans[place] > running.plans:
                running.switched = True
                changed.append((place, running.job.later_seed))
        if not changed:
            return state
        seeds = np.array(state.seed)
        for place, seed in changed:
            seeds[place] = seed
        return replace(state, seed=seeds)

    def _checked(self, actions: np.ndarray, rows: list[int]) -> np.ndarray:
        expected = (len(rows), self.pool.info.action_dim)
        if actions.shape != expected:
            raise ValueError(f"the policy returned actions {actions.shape}, expected {expected}")
        bad = np.flatnonzero(~np.isfinite(actions).all(axis=1))
        if len(bad):
            running = self._running[rows[bad[0]]]
            raise ValueError(
                f"the policy's action {actions[bad[0]]} is not finite (seed {running.job.seed}, "
                f"step {running.step}): its weights or its normaliser hold non-finite values"
            )
        return actions

    def _take(self, row: int, action: np.ndarray, result: Outcome | Failure, on_done: Any) -> None:
        """Notes what a step brought; a row whose job ends is free."""
        if isinstance(result, Failure):
            self._failed(row, result, on_done)
            return
        running = self._running[row]
        replayed = running.replays
        if replayed:
            self._check_step(running, result)
        else:
            running.seen.append(self._obs[row].copy())
            running.taken.append(action)
            running.outcomes.append(result)
        running.step += 1
        self._obs[row] = result.obs
        if replayed:
            self._check_observation(running, result.obs)
            return
        limit = running.job.limit
        full = limit is not None and len(running.taken) >= limit
        if result.terminated or result.truncated or full:
            del self._running[row]
            self._finish(running.job, _track(running), on_done)

    def _failed(self, row: int, failure: Failure, on_done: Any) -> None:
        """Puts the job of a row back, or gives it up."""
        running = self._running.pop(row)
        if failure.kind == "lost":  # another row's fault, so it costs no attempt
            self._urgent.appendleft(_Running(running.job, running.attempts))
        elif running.attempts <= self.pool.workers.retries:
            self._urgent.appendleft(_Running(running.job, running.attempts + 1))
        else:
            self._finish(running.job, f"{failure.kind}: {failure.text.strip()}", on_done)

    def _finish(self, job: Job, result: Track | str, on_done: Any) -> None:
        self._urgent.extend(_Running(further) for further in on_done(job, result))

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
