"""Scores of a policy: one episode per seed, all environments in one policy call per step."""

from __future__ import annotations

import math
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, Self

import gymnasium as gym
import numpy as np
from tqdm.auto import tqdm

from diffpolicy.rollout.local import as_spec
from diffpolicy.rollout.results import EpisodeRecord, EpisodeVideo, EvalResult, summarise
from diffpolicy.rollout.slots import Outcome
from diffpolicy.rollout.spec import EnvSpec
from diffpolicy.rollout.vector import Failure, WorkerPool, Workers


class RowState(Protocol):
    """What the evaluator needs of a policy's state: rows, and running totals per row."""

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
    """What the evaluator needs of a policy (see :mod:`diffpolicy.policies`)."""

    def initial_state(self, seeds: Sequence[int]) -> Any:
        """Memory of ``len(seeds)`` rows."""

    def act(self, obs: np.ndarray, state: Any, *, deterministic: bool = False) -> Any:
        """``(actions [N, A], new state)`` for ``obs [N, O]``."""

    def forget(self, state: Any, done: np.ndarray, seeds: Sequence[int] | None = None) -> Any:
        """The state with the rows of ``done [N]`` empty again, each with a seed (row order)."""


@dataclass(frozen=True)
class VideoOptions:
    """Which frames to keep.

    Args:
        episodes: of the first so many seeds.
        stride: a frame every so many steps.
        side: longest side of a frame in pixels; larger pictures are shrunk in the worker.
    """

    episodes: int = 4
    stride: int = 1
    side: int = 256

    def __post_init__(self) -> None:
        if min(self.episodes, self.stride, self.side) < 1:
            raise ValueError(f"video options must be at least 1, got {self}")


def evaluate(
    policy: Policy,
    spec: EnvSpec | str | Callable[..., gym.Env[Any, Any]],
    seeds: Sequence[int],
    *,
    workers: Workers | WorkerPool | None = None,
    deterministic: bool = False,
    success_threshold: float | None = None,
    video: VideoOptions | None = None,
    progress: bool = True,
) -> EvalResult:
    """Runs one episode per seed and scores them.

    All running rows go into one ``policy.act`` per step. A row whose episode ends takes the next
    seed, and the policy forgets that row and is given the new seed, so an episode depends on its
    seed
    alone: not on the row, on its neighbours or on ``num_envs``.

    An episode whose worker raises, hangs or dies is tried again ``workers.retries`` times. If that
    fails too, it is an error: it counts as a failure in every success rate (the denominator is the
    number of seeds), and is left out of the means, whose ``n`` says so.

    Args:
        policy: anything with ``initial_state``, ``act`` and ``forget``.
        spec: the environment: an :class:`EnvSpec`, an id, or a function that makes one, which then
            runs in this process (so does an id that was registered in it, as in a notebook).
        seeds: environment seeds, no two alike.
        workers: environments, processes and timeouts; or a pool to use (and leave open).
        deterministic: passed to ``act``.
        success_threshold: success at a step means ``reward >= success_threshold``; None: what the
            environment says in ``info["is_success"]`` or ``info["success"]``.
        video: which frames to keep; None: none.
        progress: whether to show a bar with the time left.

    Raises:
        EnvSpecError: the environment cannot be made.
        ValueError: seeds that repeat or are missing, or a policy whose actions are not finite or
            have the wrong shape.
    """
    spec = as_spec(spec)
    numbers = [int(seed) for seed in seeds]
    if not numbers:
        raise ValueError("no seeds to evaluate on")
    if len(set(numbers)) != len(numbers):
        raise ValueError("seeds must differ: an episode that is counted twice is no evidence")
    side = 0 if video is None else video.side
    if isinstance(workers, WorkerPool):
        if workers.spec != spec:
            raise ValueError(f"the pool runs {workers.spec}, not {spec}")
        run = _Run(policy, workers, numbers, deterministic, success_threshold, video)
        return run.finish(progress)
    asked = Workers() if workers is None else workers
    fitting = Workers(**{**asdict(asked), "num_envs": min(asked.num_envs, len(numbers))})
    with WorkerPool(spec, fitting, frame_side=side) as pool:
        run = _Run(policy, pool, numbers, deterministic, success_threshold, video)
        return run.finish(progress)


@dataclass
class _Episode:
    """An episode under way in some row."""

    seed: int
    attempts: int = 1
    failed: tuple[str, ...] = ()
    begun: bool = False
    rewards: list[float] = field(default_factory=list)
    successes: list[bool | None] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list)
    nfe: int = 0
    plans: int = 0


class _Run:
    """The evaluation under way: which row runs which episode, and the policy's state."""

    def __init__(
        self,
        policy: Policy,
        pool: WorkerPool,
        seeds: list[int],
        deterministic: bool,
        success_threshold: float | None,
        video: VideoOptions | None,
    ) -> None:
        self.policy, self.pool, self.seeds = policy, pool, seeds
        self.deterministic, self.threshold, self.video = deterministic, success_threshold, video
        self.waiting = deque(_Episode(seed) for seed in seeds)
        self.running: dict[int, _Episode] = {}
        self.records: dict[int, EpisodeRecord] = {}
        self.videos: dict[int, EpisodeVideo] = {}
        self.notes: dict[str, None] = {}  # an ordered set
        self.filmed = set(seeds[: video.episodes]) if video is not None else set()
        # Every row is forgotten before it is used, so these seeds never show.
        self.state = policy.initial_state([0] * pool.num_envs)
        self.obs = np.zeros((pool.num_envs, pool.info.obs_dim), np.float32)
        self.calls: list[tuple[float, int]] = []  # seconds and plans of the calls that planned

    def finish(self, progress: bool) -> EvalResult:
        began = time.perf_counter()
        with tqdm(
            total=len(self.seeds), desc="evaluate", unit="episode", disable=not progress
        ) as bar:
            self._begin(range(self.pool.num_envs))
            while self.running:
                rows = sorted(self.running)
                actions = self._act(rows)
                results = self.pool.step(actions, rows, frames=[self._films(row) for row in rows])
                self._begin([row for row in rows if self._ended(row, results[row])])
                bar.update(len(self.records) - bar.n)
                bar.set_postfix(self._postfix(), refresh=False)
        records = tuple(self.records[seed] for seed in self.seeds)
        wall_s = time.perf_counter() - began
        return EvalResult(
            episodes=records,
            summary=summarise(records, calls=self.calls, wall_s=wall_s),
            env=self.pool.info.labels(),
            settings=self._settings(),
            videos=tuple(self.videos[seed] for seed in self.seeds if seed in self.videos),
            notes=tuple(self.notes),
        )

    def _begin(self, rows: Sequence[int]) -> None:
        """Gives each row the next episode, until every row has one or none is left."""
        free = list(rows)
        while free and self.waiting:
            begun = free[: len(self.waiting)]
            for row in begun:
                self.running[row] = self.waiting.popleft()
            seeds = [self.running[row].seed for row in begun]
            results = self.pool.reset(begun, seeds, frames=[self._films(row) for row in begun])
            done = np.zeros(self.pool.num_envs, bool)
            done[begun] = True
            fresh = [self.running[row].seed for row in sorted(begun)]
            self.state = self.policy.forget(self.state, done, seeds=fresh)
            nfe, plans = np.asarray(self.state.nfe), np.asarray(self.state.plans)
            free = free[len(begun) :]
            for row in begun:
                result = results[row]
                if isinstance(result, Failure):
                    self._failed(row, result)
                    free.append(row)
                    continue
                self.obs[row] = result.obs
                self._keep_frame(row, result)
                self.running[row].begun = True
                self.running[row].nfe = -int(nfe[row])
                self.running[row].plans = -int(plans[row])

    def _act(self, rows: list[int]) -> np.ndarray:
        whole = len(rows) == self.pool.num_envs
        state = self.state if whole else self.state.take(np.array(rows))
        before = np.asarray(state.plans).sum()
        began = time.perf_counter()
        actions, state = self.policy.act(
            self.obs[rows].copy(), state, deterministic=self.deterministic
        )
        seconds = time.perf_counter() - began
        planned = int(np.asarray(state.plans).sum() - before)
        if planned > 0:
            self.calls.append((seconds, planned))
        self.state = state if whole else self.state.put(np.array(rows), state)
        return self._checked(np.asarray(actions), rows)

    def _checked(self, actions: np.ndarray, rows: list[int]) -> np.ndarray:
        expected = (len(rows), self.pool.info.action_dim)
        if actions.shape != expected:
            raise ValueError(f"the policy returned actions {actions.shape}, expected {expected}")
        bad = np.flatnonzero(~np.isfinite(actions).all(axis=1))
        if len(bad):
            row = rows[bad[0]]
            episode = self.running[row]
            raise ValueError(
                f"the policy's action in row {row} is not finite: {actions[bad[0]]} (seed "
                f"{episode.seed}, step {len(episode.rewards)}). Its weights or its normaliser hold "
                "non-finite values, or the observation is far outside the training data."
            )
        return actions

    def _ended(self, row: int, result: Outcome | Failure) -> bool:
        """Notes what a step brought; whether the row is free for another episode."""
        if isinstance(result, Failure):
            self._failed(row, result)
            return True
        episode = self.running[row]
        self.obs[row] = result.obs
        episode.rewards.append(result.reward)
        threshold = self.threshold
        episode.successes.append(
            result.success if threshold is None else result.reward >= threshold
        )
        self._keep_frame(row, result)
        if not (result.terminated or result.truncated):
            return False
        if episode.frames and result.frame is None:
            # The end decides, so it is drawn even between two frames; no reset has wiped it out.
            last = self.pool.render([row])[row]
            if not isinstance(last, Failure):
                episode.frames.append(last)
        del self.running[row]
        said = [one for one in episode.successes if one is not None]
        record = EpisodeRecord(
            seed=episode.seed,
            episode_return=math.fsum(episode.rewards),
            max_reward=max(episode.rewards),
            length=len(episode.rewards),
            success=any(said) if said else None,
            final_success=episode.successes[-1],
            terminated=result.terminated,
            truncated=result.truncated,
            nfe=episode.nfe + int(np.asarray(self.state.nfe)[row]),
            plans=episode.plans + int(np.asarray(self.state.plans)[row]),
            attempts=episode.attempts,
            failed_attempts=episode.failed,
        )
        self.records[episode.seed] = record
        if episode.frames:
            frames = np.stack(episode.frames)
            self.videos[episode.seed] = EpisodeVideo(episode.seed, record.success, frames)
        return True

    def _failed(self, row: int, failure: Failure) -> None:
        """Puts the episode of a row back, or gives it up."""
        episode = self.running.pop(row)
        text = f"{failure.kind}: {failure.text.strip()}"
        if failure.kind == "lost":  # another row's fault, so it costs no attempt
            self.waiting.appendleft(_Episode(episode.seed, episode.attempts, episode.failed))
        elif episode.attempts <= self.pool.workers.retries:
            again = _Episode(episode.seed, episode.attempts + 1, (*episode.failed, text))
            self.waiting.appendleft(again)
        else:
            nan = math.nan
            self.records[episode.seed] = EpisodeRecord(
                seed=episode.seed,
                episode_return=nan,
                max_reward=nan,
                length=0,
                success=False,
                final_success=False,
                terminated=False,
                truncated=False,
                nfe=0,
                plans=0,
                attempts=episode.attempts,
                error=text,
                failed_attempts=episode.failed,
            )

    def _films(self, row: int) -> bool:
        episode = self.running[row]
        # Drawing may be what killed the first attempt, so it is not tried again.
        if self.video is None or episode.seed not in self.filmed or episode.attempts > 1:
            return False
        # Asked before a reset, and before the step that will be number len(rewards) + 1.
        return not episode.begun or (len(episode.rewards) + 1) % self.video.stride == 0

    def _keep_frame(self, row: int, result: Outcome) -> None:
        if result.frame is not None:
            self.running[row].frames.append(result.frame)
        elif result.note:
            self.notes[f"no video: {result.note}"] = None

    def _postfix(self) -> dict[str, str]:
        records = self.records.values()
        shown: dict[str, str] = {}
        if any(record.success is not None for record in records):
            shown["success"] = f"{sum(record.success is True for record in records)}/{len(records)}"
        errors = sum(record.error is not None for record in records)
        return {**shown, "errors": str(errors)} if errors else shown

    def _settings(self) -> dict[str, Any]:
        statistics = getattr(self.policy, "statistics", None)  # of a policy under latency
        return {
            **({} if statistics is None else {"latency": statistics(self.state)}),
            "deterministic": self.deterministic,
            "success_threshold": self.threshold,
            **asdict(self.pool.workers),
            "num_workers": self.pool.num_workers,
            "machine": {
                "platform": platform.platform(),
                "processor": platform.processor() or platform.machine(),
                "cpus": os.cpu_count(),
            },
        }
