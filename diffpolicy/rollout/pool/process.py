"""One worker process: a fresh interpreter, a socket to it, a note of where it is, and its end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffpolicy.data.observation import ObsFields
from diffpolicy.rollout.env_spec import EnvSpec
from diffpolicy.rollout.pool import wire
from diffpolicy.rollout.pool.shared import Progress, Room, image_rooms, memory_file

# The child gets our import path, so that it finds whatever registers the environment.
_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from diffpolicy.rollout.pool.worker import main; main(int(sys.argv[1]), int(sys.argv[3]))"
)
# One environment is one thread of work; numeric libraries that each start a thread per core only
# get in the way.
_CHILD_ENV = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYGAME_HIDE_SUPPORT_PROMPT": "1",
}


class WorkerProcess:
    """A worker process and what it still owes us.

    It leads a process group of its own, so that whatever its environments start ends with it.

    Args:
        spec: the environment.
        rows: the rows of the pool that live in this process.
        frame_side: longest side of the frames that may be asked for; 0: none.
        start_timeout: seconds that starting may take.

    Attributes:
        pending: rows of the command that is not answered yet, in order.
        greeted: whether the process has said that its environment could be made.
        gone: why there is no process any more; empty while there is one.
        rooms: where the images of its rows come, see :func:`image_rooms`; empty until it has
            started.
    """

    def __init__(
        self, spec: EnvSpec, rows: Sequence[int], *, frame_side: int, start_timeout: float
    ) -> None:
        self.rows = tuple(rows)
        self.pending: tuple[int, ...] = ()
        self.rooms: dict[int, tuple[Room, Room] | None] = {}
        self.greeted = False
        self.gone = self._how = ""
        self._asked, self._limit = time.monotonic(), start_timeout
        self.sock, theirs = socket.socketpair()
        self._file = memory_file()
        try:
            self._progress = Progress(self._file)
            self.proc = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    _BOOTSTRAP,
                    str(theirs.fileno()),
                    json.dumps([str(entry) for entry in sys.path]),
                    str(self._file),
                ],
                stdin=subprocess.PIPE,  # never written to: its end tells that we are gone
                pass_fds=(theirs.fileno(), self._file),
                env={**os.environ, **_CHILD_ENV, **_headless()},
                start_new_session=True,
            )
        except BaseException:
            self.sock.close()
            os.close(self._file)
            raise
        finally:
            theirs.close()
        hello = {"spec": spec.to_dict(), "rows": list(self.rows), "frame_side": frame_side}
        with contextlib.suppress(OSError):  # it died already: reading will say how
            wire.send(self.sock, hello, {})

    @property
    def awaited(self) -> bool:
        """Whether a message is due."""
        return not self.gone and (bool(self.pending) or not self.greeted)

    @property
    def deadline(self) -> float:
        """``time.monotonic()`` by which the row that is worked on must be done."""
        since = self._progress.read()[1] if self.greeted else 0.0
        return max(self._asked, since) + self._limit

    @property
    def culprit(self) -> int | None:
        """The row that is worked on; None if none is, or if the process has not started yet."""
        if not self.pending or not self.greeted:
            return None
        place, since = self._progress.read()
        return self.pending[place if since >= self._asked else 0]

    def order(
        self, name: str, values: Mapping[str, Any], *, rows: Sequence[int], timeout: float
    ) -> None:
        """Send a command for some rows; one reply for all of them is due.

        Args:
            name: what is to be done.
            values: arguments, a list or an array of one per row each.
            rows: in which.
            timeout: seconds that one row may take.

        Raises:
            OSError: the process is gone.
        """
        self.pending = tuple(rows)
        if self.greeted:
            self._begin(timeout)
        arrays = {key: value for key, value in values.items() if isinstance(value, np.ndarray)}
        plain = {key: value for key, value in values.items() if key not in arrays}
        self.sock.settimeout(timeout)
        wire.send(self.sock, {"do": name, "rows": list(rows), "values": plain}, arrays)

    def greet(self, timeout: float, fields: ObsFields) -> None:
        """Note that it has started, and what it observes; a command that waited begins now."""
        self.rooms = image_rooms(self._file, fields, self.rows)
        self.greeted = True
        self._begin(timeout)

    def _begin(self, timeout: float) -> None:
        self._asked, self._limit = time.monotonic(), timeout

    def end(self, grace: float = 0.0) -> str:
        """End the process and all that it started, and say how it ended. Harmless when repeated.

        Args:
            grace: seconds to leave for ending by itself before it is killed.
        """
        if self._how:  # its number may be another process's by now
            return self._how
        ended_itself = self._wait(grace)
        self.sock.close()
        os.close(self._file)
        with contextlib.suppress(OSError):  # the group is empty: nothing was left behind
            os.killpg(self.proc.pid, signal.SIGKILL)
        if not ended_itself:
            self._wait(10.0)
        if self.proc.stdin is not None:
            self.proc.stdin.close()
        code = self.proc.returncode
        if not ended_itself:
            self._how = "was killed by the pool"
        elif code < 0:
            self._how = f"was killed by signal {signal.Signals(-code).name} ({-code})"
        else:
            self._how = f"ended with exit code {code}"
        return self._how

    def _wait(self, timeout: float) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.proc.wait(timeout)
            return True
        return False


def _headless() -> dict[str, str]:
    if "DISPLAY" in os.environ or "SDL_VIDEODRIVER" in os.environ:
        return {}
    return {"SDL_VIDEODRIVER": "dummy"}  # environments drawn with pygame (Push-T) need no screen
