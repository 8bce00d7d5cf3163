"""Recorded episodes, which may begin by repeating recorded steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from diffpolicy.data.observation import Obs, each, from_fields, stack, take, to_fields
from diffpolicy.rollout.pool.slots import Failure, Outcome
from diffpolicy.rollout.pool.workers import WorkerPool
from diffpolicy.rollout.record.steps import InOrder, difference
from diffpolicy.rollout.rows import Episode, Policy, RowLoop, planning_in_batches

_HELD = 4  # results per row that may wait for one before them


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

    def observe(self, obs: Any, state: Any) -> Any:
        """The memory after observing ``obs``, N rows of an :data:`Obs`."""


@dataclass(frozen=True)
class Track:
    """What happened in an episode, T steps.

    Attributes:
        columns: T rows under the names and in the types of a store's fields: the observations
            (each from before the action), ``action`` (an expert's clean ones), ``reward``,
            ``terminated``, ``truncated`` and ``success`` (false where nothing was said), and
            ``info.NAME`` of each array that the environment gave beside the observation.
        success: whether any step was a success; None if the environment never said.
        final_success: what it said at the last step.
        task: the name of the episode's task, where the environment has several.
    """

    columns: dict[str, np.ndarray]
    success: bool | None
    final_success: bool | None
    task: str | None = None

    @classmethod
    def of(
        cls,
        seen: Sequence[Obs],
        outcomes: Sequence[Outcome],
        beside: Sequence[Mapping[str, np.ndarray] | None] = (),
    ) -> Track:
        """The track of some steps; ``beside`` is what was given beside each observation."""
        said = [one.success for one in outcomes]
        columns = {
            **to_fields(stack(seen)),
            "action": np.stack([np.asarray(one.action) for one in outcomes]),
            "reward": np.array([one.reward for one in outcomes], np.float32),
            "terminated": np.array([one.terminated for one in outcomes]),
            "truncated": np.array([one.truncated for one in outcomes]),
            "success": np.array([bool(one) for one in said]),
        }
        given = [one or {} for one in beside]
        for name in given[0] if given else ():
            columns[f"info.{name}"] = np.stack([one[name] for one in given])
        success = any(said) if set(said) != {None} else None
        return cls(columns, success, said[-1], outcomes[0].task)

    def __len__(self) -> int:
        return len(self.columns["reward"])

    @property
    def total(self) -> float:
        """The sum of its rewards."""
        return float(np.sum(self.columns["reward"], dtype=np.float64))


@dataclass(kw_only=True)
class Job(Episode):
    """An episode to run and record; ``step`` counts the repeated steps too.

    Args:
        key: names it in the results; unique.
        later_seed: the policy's random stream from the second plan on; None: the same one.
        prefix: a track to repeat first, as far as ``replayed``; None: none.
        replayed: steps of ``prefix`` to repeat.
        limit: at most so many steps after the prefix; None: to the end of the episode.
    """

    key: tuple[int, ...]
    later_seed: int | None = None
    prefix: Track | None = None
    replayed: int = 0
    limit: int | None = None
    seen: list[Obs] = field(default_factory=list, init=False)
    outcomes: list[Outcome] = field(default_factory=list, init=False)
    beside: list[Mapping[str, np.ndarray] | None] = field(default_factory=list, init=False)

    @property
    def repeated(self) -> dict[str, np.ndarray]:
        """The columns of what it repeats."""
        assert self.prefix is not None
        return self.prefix.columns


Done = Callable[[Job, Track | str], Sequence[Job]]
"""Called with each job and its track, or with why it failed after all attempts.

It returns further jobs, which go before the rest.
"""


class TrackRunner(RowLoop[Job]):
    """Runs jobs and records their tracks, all acting rows in one ``policy.act`` per step.

    A row that repeats its prefix only shows the policy what it sees; where the prefix ends, the
    policy makes a new plan with its own noise, from the history that the recorded episode had. A
    prefix that does not repeat itself raises :class:`ReplayError`.

    Args:
        policy: who acts; one of this library plans in batches of constant size. None where
            :meth:`step` needs none.
        pool: where.

    Attributes:
        steps: of all environments, repeated ones included.
    """

    def __init__(self, policy: ObservingPolicy | None, pool: WorkerPool) -> None:
        if policy is not None and not callable(getattr(policy, "observe", None)):
            raise ValueError(
                f"{type(policy).__name__} has no method observe(obs, state): where it repeats "
                "recorded steps a policy must look on without acting; give a DiffusionPolicy "
                "(without latency)"
            )
        super().__init__(planning_in_batches(policy, None), pool)
        self._urgent: deque[Job] = deque()
        self._given: dict[int, Mapping[str, np.ndarray] | None] = {}
        self.steps = 0

    def run(self, jobs: Iterable[Job], on_done: Done, order: InOrder) -> None:
        """Run all jobs, which are taken one at a time, when a row is free.

        Args:
            jobs: in the order of ``order``.
            on_done: see :data:`Done`.
            order: holds the results until those before them are known; while it holds many, no new
                job is begun, so that one slow episode does not fill the memory with others.

        Raises:
            ValueError: the policy's actions are not finite or have the wrong shape.
        """
        self._waiting: Iterator[Job] = iter(jobs)
        self._on_done, self._order = on_done, order
        self.loop()

    def upcoming(self) -> Job | None:
        if self._urgent:
            return self._urgent.popleft()
        full = len(self._order) >= _HELD * self.pool.num_envs
        return None if full and self.running else next(self._waiting, None)

    def began(self, row: int, outcome: Outcome) -> None:
        self._given[row] = outcome.record
        if self.running[row].prefix is not None:
            _check_observation(self.running[row], outcome.obs)

    def step(self, rows: list[int]) -> dict[int, Outcome | Failure]:
        self.steps += len(rows)
        return super().step(rows)

    def actions(self, rows: list[int]) -> np.ndarray:
        actions = np.zeros((len(rows), self.pool.info.action_dim), np.float32)
        jobs = [self.running[row] for row in rows]
        replaying = np.array([job.step < job.replayed for job in jobs])
        numbers = np.array(rows)
        watch, play = numbers[replaying], numbers[~replaying]
        if len(watch):
            repeating = [job for job in jobs if job.step < job.replayed]
            actions[replaying] = [job.repeated["action"][job.step] for job in repeating]
            part = self.policy.observe(self.seen(watch.tolist()), self.state.take(watch))
            self.state = self.state.put(watch, part)
        if len(play):
            actions[~replaying] = self.act(play.tolist())
            self._switch_seeds(play.tolist())
        return actions

    def _switch_seeds(self, rows: list[int]) -> None:
        """Rows that have just made their first plan go on in their later stream."""
        begun = {row: self.running[row] for row in rows}
        later = {
            row: job.later_seed
            for row, job in begun.items()
            if job.later_seed is not None and job.step == job.replayed
        }
        if later:
            seeds = np.array(self.state.seed)
            seeds[list(later)] = list(later.values())
            self.state = replace(self.state, seed=seeds)

    def stepped(self, row: int, outcome: Outcome) -> bool:
        job = self.running[row]
        given, self._given[row] = self._given[row], outcome.record
        if job.step <= job.replayed:
            _check_repeated(job, outcome)
            return False
        job.seen.append(each(np.array, self.obs[row]))  # shared memory, to be written again
        job.outcomes.append(outcome)
        job.beside.append(given)
        over = outcome.done or len(job.outcomes) == job.limit
        if over:
            track = Track.of(job.seen, job.outcomes, job.beside)
            job.seen, job.outcomes, job.beside = (
                [],
                [],
                [],
            )  # the track has it all, and the job is kept
            self._urgent.extend(self._on_done(job, track))
        return over

    def gave_up(self, episode: Job, why: str) -> None:
        self._urgent.extend(self._on_done(episode, why))


def _check_repeated(job: Job, outcome: Outcome) -> None:
    known, got = job.repeated["reward"][job.step - 1], np.float32(outcome.reward)
    if known != got:
        _not_repeated(job, job.step - 1, f"the reward was {known} and is {got} now")
    if outcome.done:
        _not_repeated(job, job.step - 1, "the episode ended later and ends now")
    _check_observation(job, outcome.obs)


def _check_observation(job: Job, obs: Obs) -> None:
    differs = difference(take(from_fields(job.repeated), job.step), obs)
    if differs:
        _not_repeated(job, job.step, differs)


def _not_repeated(job: Job, step: int, what: str) -> None:
    raise ReplayError(
        f"the environment does not repeat itself: with the same seed and actions, {what} (seed "
        f"{job.seed}, step {step}). "
        "Branches need an environment whose reset(seed) and actions decide everything (draw from "
        "self.np_random alone, and let reset() undo every change); else collect whole episodes "
        "of the same seed"
    )
