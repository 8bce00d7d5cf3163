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
from gymnasium.vector import AutoresetMode

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
from diffpolicy.rollout.pool.supervisor import Supervisor, WorkerError, Workers
from diffpolicy.settings import check_shape

#: Seconds of a step, its message included, below which environments share one process.
CHEAP_S = 0.5e-3

__all__ = ["Failure", "WorkerError", "WorkerPool", "Workers"]


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
        frame_side: as given.
        num_envs: number of rows.
        num_workers: number of processes; 0 if everything runs in this one.
        autoreset_mode: always ``AutoresetMode.DISABLED``.

    Raises:
        EnvSpecError: the environment cannot be made.
        WorkerError: the processes cannot be started, or this system has no way to supervise them.
    """

    autoreset_mode = AutoresetMode.DISABLED

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
        self.frame_side = frame_side
        self._ordered: list[int] = []
        self._results: dict[int, Result] = {}
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
        self._order("make", rows, {})
        self.step_wait()

    def reset(
        self, rows: Sequence[int], seeds: Sequence[int], *, frames: Sequence[Drawn] | None = None
    ) -> dict[int, Outcome | Failure]:
        """Begin an episode in each of ``rows``, with its seed.

        Args:
            rows: each in 0..num_envs-1, no two alike.
            seeds: as many environment seeds.
            frames: per row, whether a picture is wanted (``"end"``: only of an episode's end).
        """
        self._order("reset", rows, {"seed": [int(seed) for seed in seeds]}, frames)
        return self.step_wait()

    def step_async(
        self, actions: np.ndarray, rows: Sequence[int], *, frames: Sequence[Drawn] | None = None
    ) -> None:
        """Begin a step in each of ``rows``; ``actions [len(rows), A]`` in environment units."""
        check_shape("actions", np.shape(actions), (len(rows), self.info.action_dim))
        array = np.asarray(actions)
        if array.dtype != np.float64:
            array = array.astype(np.float32)
        self._order("step", rows, {"action": array}, frames)

    def step_wait(self) -> dict[int, Outcome | Failure]:
        """End the step that :meth:`step_async` began."""
        supervisor = self._supervisor
        try:
            while supervisor is not None and supervisor.busy():
                self._results.update(supervisor.events())
            found = {row: self._results[row] for row in self._ordered}
            return {row: result for row, result in found.items() if result is not None}
        except BaseException:
            if supervisor is not None:  # an interrupt must not leave stale answers behind
                supervisor.abandon()
            raise
        finally:
            self._ordered = []

    def step(
        self, actions: np.ndarray, rows: Sequence[int], *, frames: Sequence[Drawn] | None = None
    ) -> dict[int, Outcome | Failure]:
        """:meth:`step_async` and :meth:`step_wait`."""
        self.step_async(actions, rows, frames=frames)
        return self.step_wait()

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
        self._order("expert", rows, {"noise": [float(noise)] * len(rows)}, frames)
        return self.step_wait()

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

    def _order(
        self,
        name: str,
        rows: Sequence[int],
        values: Mapping[str, Values],
        frames: Sequence[Drawn] | None = None,
    ) -> None:
        if self._ordered:
            raise RuntimeError("the last command was not waited for: call step_wait() first")
        if len(set(rows)) != len(rows) or not all(0 <= row < self.num_envs for row in rows):
            raise ValueError(f"rows must differ and lie in 0..{self.num_envs - 1}, got {rows}")
        if self._closed:
            raise RuntimeError("the pool is closed")
        values = {**values, "frame": [False] * len(rows) if frames is None else frames}
        for key, value in values.items():
            if len(value) != len(rows):
                raise ValueError(f"got {len(rows)} rows but {key} of {len(value)}")
        self._ordered = [int(row) for row in rows]
        self._results = {}
        if self._supervisor is not None:
            self._order_from(self._supervisor, name, values)
            return
        for place, row in enumerate(self._ordered):
            self._results[row] = run_command(self._slots[row], name, values, place)

    def _order_from(self, supervisor: Supervisor, name: str, values: Mapping[str, Values]) -> None:
        parts: dict[int, list[int]] = {}
        for place, row in enumerate(self._ordered):
            gone = supervisor.processes[supervisor.owner[row]].gone
            if gone:
                self._results[row] = Failure("gone", gone)
            elif name in ("make", "reset") or row in supervisor.live:
                parts.setdefault(supervisor.owner[row], []).append(place)
            else:
                text = "no episode was begun in this row since its worker started"
                self._results[row] = Failure("lost", text)
        for index, places in parts.items():
            mine = [self._ordered[place] for place in places]
            if name == "reset":
                supervisor.live.update(mine)
            own = {
                key: value[places] if isinstance(value, np.ndarray) else [value[i] for i in places]
                for key, value in values.items()
            }
            supervisor.send(index, name, own, mine)
