"""Supervision of worker processes: what they answer, and what it means when they do not."""

from __future__ import annotations

import contextlib
import os
import selectors
import time
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from diffpolicy.data.observation import ObsField, from_fields
from diffpolicy.rollout.env_spec import EnvInfo, EnvSpec, EnvSpecError
from diffpolicy.rollout.pool import wire
from diffpolicy.rollout.pool.process import WorkerProcess
from diffpolicy.rollout.pool.slots import Failure, Result, Values, from_flat
from diffpolicy.settings import check_range, named_settings

_MAX_FAILED_STARTS = 3
_GLANCE_S = 0.5  # how often a silent process is looked after


class WorkerError(ChildProcessError):
    """No worker process can be started, or none any more."""


@named_settings
@dataclass(frozen=True)
class Workers:
    """How many environments run in how many processes, and how patient to be with them.

    Args:
        num_envs: environments that are stepped together (rows of one policy call).
        num_workers: processes they are spread over; None: one per available core, at most one per
            environment, but a single one where steps are so cheap (a few are measured) that more
            messages would cost more than the steps; 0: none, everything runs in the calling
            process, without timeouts.
        timeout: seconds that one environment may take for one reset or step.
        start_timeout: seconds that a process may take to start and make its first environment.
        retries: how often an episode that failed is tried again before it counts as an error.

    Raises:
        ValueError: if a number is out of range.
    """

    num_envs: int = 8
    num_workers: int | None = None
    timeout: float = 60.0
    start_timeout: float = 180.0
    retries: int = 1

    def __post_init__(self) -> None:
        check_range("[1, inf)", num_envs=self.num_envs)
        check_range("[0, inf)", num_workers=self.num_workers, retries=self.retries)
        check_range("(0, inf)", timeout=self.timeout, start_timeout=self.start_timeout)

    def count(self, num_envs: int) -> int:
        """The number of processes for ``num_envs`` environments."""
        return min(num_envs, _cores() if self.num_workers is None else self.num_workers)


def _cores() -> int:
    """Cores that this process may use, which in a container can be fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Supervisor:
    """Worker processes that are replaced when they fail.

    Rows are dealt to the processes in turn. Every failure of a process is told for all of its rows,
    whether they were asked anything or not; whoever asked knows which of them matter.

    Args:
        spec: the environment.
        workers: numbers of environments and processes, and timeouts.
        frame_side: longest side of the frames that may be asked for; 0: none.
        count: processes to begin with.

    Attributes:
        processes: one per index; those that could not be restarted are ``gone``.
        owner: row -> index of its process.
        live: rows in which an episode was begun since their process started.
        info: what the environment is, as the workers made it.

    Raises:
        EnvSpecError: the environment cannot be made.
        WorkerError: the processes cannot be started, or this system cannot supervise them.
    """

    def __init__(self, spec: EnvSpec, workers: Workers, frame_side: int, count: int) -> None:
        if os.name != "posix":
            raise WorkerError("worker processes need a POSIX system; use Workers(num_workers=0)")
        self.processes: list[WorkerProcess] = []
        self.owner: dict[int, int] = {}
        self.live: set[int] = set()
        self._spec, self._workers, self._frame_side = spec, workers, frame_side
        self._failed_starts: Counter[int] = Counter()
        self._selector = selectors.DefaultSelector()
        self._finalizer = weakref.finalize(self, _end_all, self.processes, self._selector)
        self._started = False
        try:
            self.spread(count)
            if all(process.gone for process in self.processes):
                raise WorkerError(self.processes[0].gone)
        except BaseException:
            self.close()
            raise

    def run(
        self, name: str, rows: Sequence[int], values: Mapping[str, Values]
    ) -> dict[int, Result]:
        """Carry a command out in some rows; what each of them answers."""
        try:
            results = self.order(name, rows, values)
            while any(process.pending for process in self.processes):
                results.update(self.events())
        except BaseException:  # an interrupt must not leave stale answers behind
            for process in [process for process in self.processes if process.pending]:
                self._fail(process, "timed out", "was not waited for")
            raise
        return {row: results[row] for row in rows}

    def order(
        self, name: str, rows: Sequence[int], values: Mapping[str, Values]
    ) -> dict[int, Result]:
        """Send a command to the processes of its rows; the rows that cannot carry it out, and why.

        Args:
            name: see :func:`~diffpolicy.rollout.pool.slots.run_command`.
            rows: in which.
            values: arguments, a list or an array of one per row each.
        """
        failed: dict[int, Result] = {}
        parts: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            index = self.owner[row]
            if self.processes[index].gone:
                failed[row] = Failure("gone", self.processes[index].gone)
            elif name in ("make", "reset") or row in self.live:
                parts.setdefault(index, []).append(place)
            else:
                text = "no episode was begun in this row since its worker started"
                failed[row] = Failure("lost", text)
        for index, places in parts.items():
            mine = [rows[place] for place in places]
            if name == "reset":
                self.live.update(mine)
            own = {
                key: value[places] if isinstance(value, np.ndarray) else [value[i] for i in places]
                for key, value in values.items()
            }
            # One that has died is noticed when its answer is read, which also tells how it ended.
            with contextlib.suppress(OSError):
                self.processes[index].order(name, own, rows=mine, timeout=self._workers.timeout)
        return failed

    def spread(self, count: int) -> None:
        """Deal the rows to ``count`` processes; those that are not there yet are started."""
        # Neighbouring rows go to different processes, so the last episodes are spread evenly too.
        for index in range(count):
            rows = range(index, self._workers.num_envs, count)
            self.owner |= dict.fromkeys(rows, index)
            if index < len(self.processes):
                self.processes[index].rows = tuple(rows)
            else:
                self.processes.append(self._launch(rows))
        while any(process.awaited for process in self.processes):
            self.events()

    def events(self) -> list[tuple[int, Result]]:
        """Wait for the next answers or failures: ``(row, what came)``, maybe none."""
        awaited = [process for process in self.processes if process.awaited]
        due = min((process.deadline for process in awaited), default=0.0)
        patience = min(max(due - time.monotonic(), 0.0), _GLANCE_S)
        ready = [key.data for key, _ in self._selector.select(patience)]
        happened: list[tuple[int, Result]] = []
        for process in ready:
            happened += self._read(process)
        for process in (process for process in awaited if process not in ready):
            if process.proc.poll() is not None:
                # Seen only here if what it has left behind holds its socket open.
                happened += self._fail(process, "died", "")
            elif time.monotonic() > process.deadline:
                what = "answer" if process.greeted else "start"
                happened += self._fail(process, "timed out", f"did not {what} in time")
        return happened

    def close(self) -> None:
        """End all processes; harmless when called twice."""
        for process in self.processes:
            with contextlib.suppress(OSError):
                wire.send(process.sock, {"do": "close"}, {})
        deadline = time.monotonic() + 5.0
        for process in self.processes:
            process.end(
                0.0 if process.awaited or process.gone else max(deadline - time.monotonic(), 0.01)
            )
        self._finalizer()

    def _launch(self, rows: Sequence[int]) -> WorkerProcess:
        process = WorkerProcess(
            self._spec, rows, frame_side=self._frame_side, start_timeout=self._workers.start_timeout
        )
        self._selector.register(process.sock, selectors.EVENT_READ, process)
        return process

    def _read(self, process: WorkerProcess) -> list[tuple[int, Result]]:
        try:
            values, arrays = wire.receive(process.sock, self._workers.timeout)
        except TimeoutError:
            return self._fail(process, "timed out", "stopped in the middle of a message")
        except (EOFError, OSError):
            return self._fail(process, "died", "")
        if not process.greeted:
            return self._greet(process, values, arrays)
        rows, process.pending = process.pending, ()
        answers = zip(rows, wire.unpack_rows((values, arrays)), strict=True)
        found = [(row, from_flat(flat, process.rooms[row])) for row, flat in answers]
        self.live -= {row for row, result in found if isinstance(result, Failure)}
        return found

    def _greet(
        self, process: WorkerProcess, values: dict[str, Any], arrays: dict[str, np.ndarray]
    ) -> list[tuple[int, Result]]:
        index = self.owner[process.rows[0]]
        if "fatal" in values:
            if not self._started:
                raise EnvSpecError(values["fatal"])
            return self._fail(process, "raised", values["fatal"])
        fields = {name: ObsField(**field) for name, field in values["obs"].items()}
        own = {"spec": self._spec, "obs": from_fields(fields)}
        process.greet(self._workers.timeout, own["obs"])
        self._started = True
        self._failed_starts[index] = 0
        self.info = EnvInfo(**{**values, **arrays, **own})
        return []

    def _fail(
        self, process: WorkerProcess, kind: Literal["raised", "timed out", "died"], text: str
    ) -> list[tuple[int, Result]]:
        """Give a process up, put a new one in its place, and say what it means for the rows."""
        index = self.owner[process.rows[0]]
        # A process that has not started was not at work on any row, so none is to blame.
        culprit = process.culprit
        if not process.greeted:
            self._failed_starts[index] += 1
        self._selector.unregister(process.sock)
        how = process.end(grace=1.0 if kind == "died" else 0.0)
        text = f"worker process {process.proc.pid} {text or how}"
        self.live.difference_update(process.rows)
        process.pending = ()
        if self._failed_starts[index] >= _MAX_FAILED_STARTS:
            process.gone = f"{text}; gave up after {_MAX_FAILED_STARTS} failed starts in a row"
            return [(row, Failure("gone", process.gone)) for row in process.rows]
        self.processes[index] = self._launch(process.rows)
        why = f"shared its process with row {culprit}, whose {text}"
        if culprit is None:
            why = f"{text} {'between two commands' if process.greeted else 'while it started'}"
        lost = Failure("lost", why)
        return [(row, Failure(kind, text) if row == culprit else lost) for row in process.rows]


def _end_all(processes: list[WorkerProcess], selector: selectors.BaseSelector) -> None:
    for process in processes:
        process.end()
    selector.close()
