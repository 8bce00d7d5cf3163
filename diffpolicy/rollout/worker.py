"""The process that holds some environments of a pool: commands in, one reply per row.

Only gymnasium and numpy are imported: a worker has to start fast and small.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

import numpy as np

from diffpolicy.rollout import wire
from diffpolicy.rollout.slots import EnvSlot, run_command
from diffpolicy.rollout.spec import EnvSpec, inspect_env


def run_worker(sock: socket.socket) -> None:
    """The worker's loop: commands in, one reply per row, until the pool closes the socket."""
    init, _ = wire.receive(sock)
    spec = EnvSpec(**init["spec"])
    slots = {row: EnvSlot(spec, init["frame_side"]) for row in init["rows"]}
    try:
        _send_hello(sock, spec, next(iter(slots.values())))
        while True:
            command, arrays = wire.receive(sock)
            if command["do"] == "close":
                break
            for index, row in enumerate(command["rows"]):
                _answer(sock, slots[row], command, arrays, (index, row))
    except (EOFError, OSError):
        pass  # the pool is gone, and so is the reason to live
    finally:
        for slot in slots.values():
            slot.close()


def _send_hello(sock: socket.socket, spec: EnvSpec, slot: EnvSlot) -> None:
    values: dict[str, Any]
    try:
        info = inspect_env(spec, slot.env)
    except Exception as error:
        values = {"fatal": str(error), "trace": traceback.format_exc()}
        values["type"] = type(error).__name__
        wire.send(sock, values, {})
        raise EOFError from None
    values = {
        "obs_dim": info.obs_dim,
        "max_episode_steps": info.max_episode_steps,
        "has_expert": info.has_expert,
        "versions": info.versions,
    }
    wire.send(sock, values, {"action_low": info.action_low, "action_high": info.action_high})


def _answer(
    sock: socket.socket,
    slot: EnvSlot,
    command: dict[str, Any],
    arrays: dict[str, np.ndarray],
    place: tuple[int, int],
) -> None:
    """Carries one command out for one row and replies, with the traceback if it raised."""
    index, row = place
    last_beat = [0.0]

    def beat() -> None:
        # Whole episodes can outlast the pool's timeout, which is meant for one step.
        now = time.monotonic()
        if now - last_beat[0] > 0.25:
            last_beat[0] = now
            wire.send(sock, {"row": row, "beat": True}, {})

    try:
        values, out = run_command(slot, command, arrays, index, beat)
    except Exception:
        trace = traceback.format_exc()
        _close_quietly(slot)
        values, out = {"error": trace}, {}
    wire.send(sock, {"row": row, **values}, out)


def _close_quietly(slot: EnvSlot) -> None:
    try:
        slot.close()
    except Exception:
        # The first error is the one that matters, and it is being reported; this one comes of it.
        traceback.print_exc()


def main(fd: int) -> NoReturn:
    """Entry point of a worker process; ``fd`` is its end of the socket pair."""
    # Ctrl-C reaches the whole process group; the pool decides what happens to its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # An environment that prints must not mix with the output of the program that asked for a score.
    os.dup2(2, 1)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    code = 0
    try:
        run_worker(socket.socket(fileno=fd))
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    # Not sys.exit: threads and atexit hooks of a simulator could keep the process.
    os._exit(code)


def _die_with_parent() -> None:
    # Nobody ever writes to our stdin; it ends when the parent does, even by SIGKILL, and even while
    # an environment hangs in the main thread.
    while os.read(0, 1024):
        pass
    os._exit(1)
