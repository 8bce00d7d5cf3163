"""One worker process: a fresh interpreter, a socket to it, and its end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffpolicy.rollout import wire
from diffpolicy.rollout.spec import EnvSpec

# The child gets our import path, so that it finds whatever registers the environment.
_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from diffpolicy.rollout.worker import main; main(int(sys.argv[1]))"
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

    Args:
        spec: the environment.
        rows: the rows of the pool that live in this process.
        frame_side: longest side of the frames that may be asked for; 0: none.
        start_timeout: seconds that starting may take.

    Attributes:
        pending: rows of the running command that were not answered yet, in order.
        greeted: whether the process has said that its environment could be made.
        deadline: ``time.monotonic()`` by which the next message is due.
    """

    def __init__(
        self, spec: EnvSpec, rows: Sequence[int], *, frame_side: int, start_timeout: float
    ) -> None:
        self.rows = tuple(rows)
        self.pending: deque[int] = deque()
        self.greeted = False
        self.deadline = time.monotonic() + start_timeout
        self.sock, theirs = socket.socketpair()
        try:
            self.proc = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    _BOOTSTRAP,
                    str(theirs.fileno()),
                    json.dumps([str(entry) for entry in sys.path]),
                ],
                stdin=subprocess.PIPE,  # never written to: its end tells that we are gone
                pass_fds=(theirs.fileno(),),
                env={**os.environ, **_CHILD_ENV, **_headless()},
            )
        except BaseException:
            self.sock.close()
            raise
        finally:
            theirs.close()
        hello = {"spec": spec.to_dict(), "rows": list(self.rows), "frame_side": frame_side}
        with contextlib.suppress(OSError):  # it died already: reading will say how
            wire.send(self.sock, hello, {})

    def order(
        self,
        command: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray],
        *,
        rows: Sequence[int],
        timeout: float,
    ) -> None:
        """Sends a command for some rows; one reply per row is due, in order.

        Raises:
            OSError: the process is gone.
        """
        self.pending = deque(rows)
        if self.greeted:
            self.deadline = time.monotonic() + timeout
        self.sock.settimeout(timeout)
        wire.send(self.sock, {**command, "rows": list(rows)}, arrays)

    def end(self, grace: float = 0.0) -> str:
        """Ends the process and says how it ended; harmless when it has ended.

        Args:
            grace: seconds to leave for ending by itself before it is killed.
        """
        ended_itself = self._wait(grace) if grace > 0 else self.proc.poll() is not None
        self.sock.close()
        if not ended_itself:
            self.proc.kill()
            self._wait(10.0)
        if self.proc.stdin is not None:
            self.proc.stdin.close()
        code = self.proc.returncode
        if not ended_itself:
            return "was killed by the pool"
        if code is not None and code < 0:
            return f"was killed by signal {_signal_name(-code)}"
        return f"ended with exit code {code}"

    def _wait(self, timeout: float) -> bool:
        try:
            self.proc.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True


def _signal_name(number: int) -> str:
    try:
        return f"{signal.Signals(number).name} ({number})"
    except ValueError:
        return str(number)


def _headless() -> dict[str, str]:
    if "DISPLAY" in os.environ or "SDL_VIDEODRIVER" in os.environ:
        return {}
    return {"SDL_VIDEODRIVER": "dummy"}  # environments drawn with pygame (Push-T) need no screen
