"""Environments in supervised worker processes.

Why not ``gymnasium.vector.AsyncVectorEnv``: measured on Gymnasium 1.4.0, its ``step()`` waits for
ever on a worker that hangs, a worker that is killed surfaces as a bare ``EOFError`` without the
environment or the cause, and the only way on is to tear every environment down. An evaluation of
hours must lose one episode to one bad worker, and say so.

Why not ``multiprocessing``: its spawned children import the caller's main module again (which loads
torch into every worker and breaks scripts without a ``__main__`` guard), and its messages are
pickles. Our workers are fresh interpreters too, never forks (a fork of a process with threads or GL
contexts is broken); they import gymnasium and numpy only and talk through
:mod:`diffpolicy.rollout.pool.wire`.

Autoreset mode: ``gymnasium.vector.AutoresetMode.DISABLED``. A row whose episode has ended stays
ended until ``reset`` names it, so its last observation is never lost and it can be handed the next
seed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np

from diffpolicy.rollout.env_spec import EnvSpec, EnvSpecError, inspect_env, only_here
from diffpolicy.rollout.pool.slots import (
    Drawn,
    EnvSlot,
    Failure,
    Outcome,
    Result,
    Values,
    run_command,
)
from diffpolicy.rollout.pool.supervisor import Supervisor, Workers
from diffpolicy.settings import check_shape

#: Seconds of a step, its message included, below which environments share one process.
CHEAP_S = 0.5e-3


class WorkerPool:
    """Rows of one environment, in supervised processes; a bad worker is replaced and reported.

    Every method takes the rows it is about and answers per row, with an
    :class:`~diffpolicy.rollout.pool.slots.Outcome` or a :class:`Failure`. A row that failed must be
    reset before it is stepped again; all other rows carry on. Use it as a context manager, or call
    :meth:`close`; its processes also end when the pool is collected or this process ends, however
    it does.

    Args:
        spec: the environment.
        workers: numbers of environments and processes, and timeouts.
        frame_side: longest side of the frames that may be asked for (larger pictures are shrunk);
            0: there will be none.

    Attributes:
        info: what the environment is, as the workers made it.
        spec: the environment.
        workers: as given.
        num_envs: number of rows.
        num_workers: number of processes; 0 if everything runs in this one.

    Raises:
        EnvSpecError: the environment cannot be made.
        WorkerError: the processes cannot be started, or this system has no way to supervise them.
    """

    def __init__(
        self, spec: EnvSpec, workers: Workers | None = None, *, frame_side: int = 0
    ) -> None:
        self.workers = Workers() if workers is None else workers
        self.spec = spec
        self.num_envs = self.workers.num_envs
        self.num_workers = self.workers.count(self.num_envs)
        if self.num_workers > 0 and only_here(spec):
            if self.workers.num_workers is not None:
                raise EnvSpecError(
                    f"{spec.id!r} is registered in this process alone, so that workers cannot make "
                    "it: take Workers(num_workers=0), or write 'module:Name-v0' with the module "
                    "that registers it"
                )
            self.num_workers = 0
        self._slots: dict[int, EnvSlot] = {}
        self._closed = False
        self._supervisor: Supervisor | None = None
        if self.num_workers > 0:
            chooses = self.workers.num_workers is None and self.num_workers > 1
            begin = 1 if chooses else self.num_workers
            self._supervisor = Supervisor(spec, self.workers, frame_side, begin)
            self.info = self._supervisor.info
            if chooses:
                self._choose(self._supervisor)
        else:
            self._slots = {row: EnvSlot(spec, frame_side) for row in range(self.num_envs)}
            self.info = inspect_env(spec, self._slots[0].env)

    # ------------------------------------------------------------------ what users call

    def make(self, rows: Sequence[int]) -> None:
        """Make the environments of ``rows`` now, in all processes at once; else resets do.

        What cannot be made is told by the reset, which tries again.
        """
        self._run("make", rows, {})

    def reset(
        self, rows: Sequence[int], seeds: Sequence[int], *, frames: Sequence[Drawn] | None = None
    ) -> dict[int, Outcome | Failure]:
        """Begin an episode in each of ``rows``, with its seed.

        Args:
            rows: each in 0..num_envs-1, no two alike.
            seeds: as many environment seeds.
            frames: per row, whether a picture is wanted (``"end"``: only of an episode's end).
        """
        return self._run("reset", rows, {"seed": [int(seed) for seed in seeds]}, frames)

    def step(
        self, actions: np.ndarray, rows: Sequence[int], *, frames: Sequence[Drawn] | None = None
    ) -> dict[int, Outcome | Failure]:
        """Take a step in each of ``rows``; ``actions [len(rows), A]`` in environment units."""
        check_shape("actions", np.shape(actions), (len(rows), self.info.action_dim))
        array = np.asarray(actions)
        if array.dtype != np.float64:
            array = array.astype(np.float32)
        return self._run("step", rows, {"action": array}, frames)

    def expert_step(
        self, noise: float, rows: Sequence[int], *, frames: Sequence[Drawn] | None = None
    ) -> dict[int, Outcome | Failure]:
        """A step in each of ``rows`` with the action of the environment's scripted expert.

        Args:
            noise: standard deviation added to the executed actions (see
                :meth:`~diffpolicy.rollout.pool.slots.EnvSlot.expert_step`).
            rows: as for :meth:`reset`.
            frames: likewise.
        """
        return self._run("expert", rows, {"noise": [float(noise)] * len(rows)}, frames)

    def close(self) -> None:
        """End all workers; harmless when called twice."""
        self._closed = True
        if self._supervisor is not None:
            self._supervisor.close()
        for slot in self._slots.values():
            slot.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ how many processes

    def _choose(self, supervisor: Supervisor) -> None:
        """Start the other processes, unless a step is so cheap that they would not pay.

        One process remains in any case: an environment that hangs here could not be ended.
        """
        try:
            if self._step_seconds() < CHEAP_S:
                self.num_workers = 1
            else:
                supervisor.spread(self.num_workers)
        except BaseException:
            self.close()
            raise
        supervisor.live.clear()

    def _step_seconds(self) -> float:
        """The shortest of a few steps of the first row; infinite if there is none."""
        action = np.clip(0.0, self.info.action_low, self.info.action_high)[None]
        outcome, seconds = self.reset([0], [0])[0], math.inf
        for _ in range(5):
            if isinstance(outcome, Failure) or outcome.done:
                break
            began = time.perf_counter()
            outcome = self.step(action, [0])[0]
            if not isinstance(outcome, Failure):
                seconds = min(seconds, time.perf_counter() - began)
        return seconds

    # ------------------------------------------------------------------ one command

    def _run(
        self,
        name: str,
        rows: Sequence[int],
        values: Mapping[str, Values],
        frames: Sequence[Drawn] | None = None,
    ) -> dict[int, Outcome | Failure]:
        if len(set(rows)) != len(rows) or not all(0 <= row < self.num_envs for row in rows):
            raise ValueError(f"rows must differ and lie in 0..{self.num_envs - 1}, got {rows}")
        if self._closed:
            raise RuntimeError("the pool is closed")
        values = {**values, "frame": [False] * len(rows) if frames is None else frames}
        for key, value in values.items():
            if len(value) != len(rows):
                raise ValueError(f"got {len(rows)} rows but {key} of {len(value)}")
        numbers = [int(row) for row in rows]
        found: Mapping[int, Result]
        if self._supervisor is not None:
            found = self._supervisor.run(name, numbers, values)
        else:
            slots = [self._slots[row] for row in numbers]
            answers = (run_command(slot, name, values, i) for i, slot in enumerate(slots))
            found = dict(zip(numbers, answers, strict=True))
        return {row: result for row, result in found.items() if result is not None}
