"""Scores of a policy: one episode per seed, all environments in one policy call per step."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from tqdm.auto import tqdm

from diffpolicy.policies.imagined import picture_of
from diffpolicy.rollout.env_spec import EnvSpec, as_spec
from diffpolicy.rollout.pool.slots import Drawn, Outcome
from diffpolicy.rollout.pool.supervisor import Workers
from diffpolicy.rollout.pool.workers import WorkerPool
from diffpolicy.rollout.results import EpisodeRecord, EpisodeVideo, EvalResult, summarise
from diffpolicy.rollout.rows import (
    AllFailedError,
    Episode,
    Policy,
    RowLoop,
    distinct,
    fitting,
    planning_in_batches,
)
from diffpolicy.rollout.video import beside, images_of
from diffpolicy.settings import check_range


@dataclass(frozen=True)
class VideoOptions:
    """Which frames to keep.

    Args:
        episodes: of the first so many seeds.
        per_task: also of the first so many episodes of every task (``info["task"]``); where there
            are no tasks, of all. Their first frame is that of a step.
        stride: a frame every so many steps.
        frames: about so many of an episode at most, by a wider stride where its step limit asks for
            one; None: as many as there are.
        side: longest side of a frame in pixels; larger pictures are shrunk in the worker.
        cameras: whether the images that the policy sees stand beside the frame.
    """

    episodes: int = 4
    per_task: int = 0
    stride: int = 1
    frames: int | None = None
    side: int = 256
    cameras: bool = False

    def __post_init__(self) -> None:
        check_range("[1, inf)", stride=self.stride, side=self.side, frames=self.frames)
        check_range("[0, inf)", episodes=self.episodes, per_task=self.per_task)


def evaluate(
    policy: Policy,
    spec: EnvSpec | str | Callable[..., gym.Env[Any, Any]],
    seeds: Sequence[int],
    *,
    workers: Workers | WorkerPool | None = None,
    deterministic: bool = False,
    success_threshold: float | None = None,
    video: VideoOptions | None = None,
    plan_batch: int | None = None,
    progress: bool = True,
) -> EvalResult:
    """Run one episode per seed and score them.

    All running rows go into one ``policy.act`` per step. A row whose episode ends takes the next
    seed, and the policy forgets that row and is given the new seed. A policy of this library plans
    in batches of constant size, each row at a place of its own, so an episode depends on its seed
    alone, bit for bit: not on the row, on its neighbours or on ``num_envs``. (The size of a batch,
    the number of threads, the device and the libraries still show in the last bits; a policy of
    another kind answers for itself.)

    An episode whose worker raises, hangs or dies is tried again ``workers.retries`` times. If that
    fails too, it is an error: it counts as a failure in every success rate (the denominator is the
    number of seeds), and is left out of the means, whose ``n`` says so; ``notes`` say so too. If
    every episode fails there is no result but an exception.

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
        plan_batch: rows that plan at once; 1: one by one, the plainest and slowest; None: 8 on a
            CPU, 64 on an accelerator, a compiled policy's own.
        progress: whether to show a bar with the time left.

    Raises:
        AllFailedError: not one episode could be run.
        EnvSpecError: the environment cannot be made.
        ValueError: seeds that repeat or are missing, or a policy whose actions are not finite or
            have the wrong shape.
    """
    spec = as_spec(spec)
    numbers = distinct(seeds)
    side = 0 if video is None else video.side
    planner = planning_in_batches(policy, plan_batch)
    rows = getattr(planner, "plan_batch", plan_batch)
    with contextlib.ExitStack() as stack:
        if isinstance(workers, WorkerPool):
            if workers.spec != spec:
                raise ValueError(f"the pool runs {workers.spec}, not {spec}")
            pool = workers
        else:
            few = fitting(workers, len(numbers), rows)
            pool = stack.enter_context(WorkerPool(spec, few, frame_side=side))
        run = _Run(planner, pool, numbers, deterministic, success_threshold, video)
        return run.finish(progress)


@dataclass
class _Episode(Episode):
    """An episode under way in some row.

    Attributes:
        outcomes: of its steps, without what was observed.
        frames: of its reset and steps.
        before: the policy's network evaluations and plans in the row when it began; None: not yet.
    """

    outcomes: list[Outcome] = field(default_factory=list, init=False)
    frames: list[np.ndarray] = field(default_factory=list, init=False)
    before: np.ndarray | None = field(default=None, init=False)


class _Run(RowLoop[_Episode]):
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
        super().__init__(policy, pool)
        self.seeds = seeds
        self.deterministic, self.threshold, self.video = deterministic, success_threshold, video
        self.waiting = iter([_Episode(seed, seed) for seed in seeds])
        self.records: dict[int, EpisodeRecord] = {}
        self.videos: dict[int, EpisodeVideo] = {}
        self.notes: dict[str, None] = {}  # an ordered set
        self.filmed = set(seeds[: video.episodes]) if video is not None else set()
        self.per_task: Counter[str | None] = Counter()  # episodes that are filmed for their task
        self.stride = 1 if video is None else video.stride
        if video is not None and video.frames is not None:
            widest = math.ceil(pool.info.max_episode_steps / video.frames)
            self.stride = max(self.stride, widest)
        self.calls: list[tuple[float, int]] = []  # seconds and plans of the calls that planned
        self.tasks: dict[int, str] = {}  # by seed

    def finish(self, progress: bool) -> EvalResult:
        began = time.perf_counter()
        self.pool.make(range(min(self.pool.num_envs, len(self.seeds))))
        setup_s = time.perf_counter() - began
        began = time.perf_counter()
        with tqdm(
            total=len(self.seeds), desc="evaluate", unit="episode", disable=not progress
        ) as bar:

            def tick() -> None:
                if len(self.records) > bar.n:
                    bar.set_postfix(self._postfix(), refresh=False)
                    bar.update(len(self.records) - bar.n)

            self.loop(tick)
        records = tuple(self.records[seed] for seed in self.seeds)
        wall_s = time.perf_counter() - began
        self._note_errors(records)
        return EvalResult(
            episodes=records,
            summary=summarise(
                records,
                calls=self.calls,
                wall_s=wall_s,
                setup_s=setup_s,
                task_groups=self.pool.info.task_groups,
            ),
            env=self.pool.info.labels(),
            settings=self._settings(),
            videos=tuple(self.videos[seed] for seed in self.seeds if seed in self.videos),
            notes=tuple(self.notes),
        )

    def upcoming(self) -> _Episode | None:
        return next(self.waiting, None)

    def began(self, row: int, outcome: Outcome) -> None:
        self._note_task(row, outcome)
        self._film_task(self.running[row])
        self._keep_frame(row, outcome)
        self.running[row].before = self._spent(row)

    def _film_task(self, episode: _Episode) -> None:
        """Film an episode that is among the first of its task; resets come in the seeds' order."""
        task = self.tasks.get(episode.seed)
        if self.video is None or self.per_task[task] >= self.video.per_task:
            return
        if episode.attempts == 1:
            self.per_task[task] += 1
            self.filmed.add(episode.seed)

    def _note_task(self, row: int, outcome: Outcome) -> None:
        """The first task that an episode tells is its task, also of an attempt that fails later."""
        if outcome.task is not None:
            self.tasks.setdefault(self.running[row].seed, outcome.task)

    def _spent(self, row: int) -> np.ndarray:
        """Network evaluations and plans of the policy in a row so far."""
        return np.array([self.state.nfe[row], self.state.plans[row]])

    def actions(self, rows: list[int]) -> np.ndarray:
        before = self.state.plans.sum()
        began = time.perf_counter()
        chosen = self.act(rows, self.deterministic)
        seconds = time.perf_counter() - began
        planned = int(self.state.plans.sum() - before)
        if planned > 0:
            self.calls.append((seconds, planned))
        return chosen

    def stepped(self, row: int, outcome: Outcome) -> bool:
        """Note what a step brought; whether the episode is over."""
        episode = self.running[row]
        self._note_task(row, outcome)
        self._keep_frame(row, outcome)
        if self.threshold is not None:
            outcome = outcome._replace(success=outcome.reward >= self.threshold)
        episode.outcomes.append(outcome._replace(obs={}, frame=None, record=None))
        if outcome.done:
            self._ended(row, episode, outcome)
        return outcome.done

    def _ended(self, row: int, episode: _Episode, outcome: Outcome) -> None:
        rewards = [one.reward for one in episode.outcomes]
        said = [one.success for one in episode.outcomes]
        assert episode.before is not None
        nfe, plans = (self._spent(row) - episode.before).tolist()
        record = EpisodeRecord(
            seed=episode.seed,
            episode_return=math.fsum(rewards),
            max_reward=max(rewards),
            length=len(rewards),
            success=any(said) if set(said) != {None} else None,
            final_success=said[-1],
            terminated=outcome.terminated,
            truncated=outcome.truncated,
            nfe=nfe,
            plans=plans,
            attempts=episode.attempts,
            failed_attempts=episode.failed,
            task=self.tasks.get(episode.seed),
        )
        self.records[episode.seed] = record
        if episode.frames:
            frames = np.stack(episode.frames)
            self.videos[episode.seed] = EpisodeVideo(episode.seed, record.success, frames)

    def gave_up(self, episode: _Episode, why: str) -> None:
        self.records[episode.seed] = EpisodeRecord(
            episode.seed,
            error=why,
            attempts=episode.attempts,
            failed_attempts=episode.failed,
            task=self.tasks.get(episode.seed),
        )

    def films(self, row: int) -> Drawn:
        episode = self.running[row]
        # Drawing may be what killed the first attempt, so it is not tried again.
        if self.video is None or episode.seed not in self.filmed or episode.attempts > 1:
            return False
        # Asked before a reset, and before the step that will be number step + 1. The end decides,
        # so it is drawn even between two frames.
        due = episode.before is None or (episode.step + 1) % self.stride == 0
        return True if due else "end"

    def _keep_frame(self, row: int, outcome: Outcome) -> None:
        if outcome.note:  # a picture was wanted and could not be drawn
            self.notes[f"no video: {outcome.note}"] = None
        if self.video is None or not (outcome.note or outcome.frame is not None):
            return
        seen = images_of(outcome.obs) if self.video.cameras else []
        if self.video.cameras and not seen:
            self.notes["no cameras in the video: nothing that is observed is an image"] = None
        imagined = picture_of(self.policy, self.state, row)
        if outcome.frame is not None or seen:
            self.running[row].frames.append(beside(outcome.frame, *seen, imagined))

    def _note_errors(self, records: Sequence[EpisodeRecord]) -> None:
        errors = [record.error for record in records if record.error is not None]
        if not errors:
            return
        if len(errors) == len(records):
            raise AllFailedError(
                f"all {len(records)} episodes failed, so there is no score; the first: {errors[0]}"
            )
        text = (
            f"{len(errors)} of {len(records)} episodes failed and count as failures in every "
            f"success rate; the first: {errors[0].splitlines()[0]}"
        )
        self.notes[text] = None
        warnings.warn(text, RuntimeWarning, stacklevel=4)
        homeless = sum(r.error is not None and r.task is None for r in records)
        if self.tasks and homeless:
            self.notes[
                f"{homeless} episodes failed before they told their task: no task counts them"
            ] = None
        if self.lost:
            self.notes[f"environments were lost on the way: {self.lost}"] = None

    def _postfix(self) -> dict[str, int]:
        records = self.records.values()
        successes = sum(record.success is True for record in records)
        errors = sum(record.error is not None for record in records)
        return {name: n for name, n in (("success", successes), ("errors", errors)) if n}

    def _settings(self) -> dict[str, Any]:
        statistics = getattr(self.policy, "statistics", None)  # of a policy under latency
        return {
            **({} if statistics is None else {"latency": statistics(self.state)}),
            "deterministic": self.deterministic,
            "success_threshold": self.threshold,
            "plan_batch": getattr(self.policy, "plan_batch", None),
            **asdict(self.pool.workers),
            "num_workers": self.pool.num_workers,
            "machine": {
                "platform": platform.platform(),
                "processor": platform.processor() or platform.machine(),
                "cpus": os.cpu_count(),
            },
        }
