"""The process that holds some environments of a pool: commands in, one reply to each.

Only gymnasium and numpy are imported: a worker has to start fast and small.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import traceback
from dataclasses import asdict
from typing import NoReturn

from diffpolicy.data.observation import by_store_field
from diffpolicy.rollout.env_spec import EnvSpec, EnvSpecError, inspect_env
from diffpolicy.rollout.pool import wire
from diffpolicy.rollout.pool.shared import Progress, image_rooms
from diffpolicy.rollout.pool.slots import EnvSlot, run_command, to_flat


def run_worker(sock: socket.socket, file: int) -> bool:
    """The worker's loop: commands in, one reply for all their rows, until the pool says "close".

    Args:
        sock: to the pool.
        file: what both see, see :mod:`~diffpolicy.rollout.pool.shared`.

    Returns:
        Whether it did; false if it is gone without a word.
    """
    init, _ = wire.receive(sock)
    progress = Progress(file)
    spec = EnvSpec(**init["spec"])
    slots = {row: EnvSlot(spec, init["frame_side"]) for row in init["rows"]}
    try:
        _send_hello(sock, spec, slots, file)
        while True:
            command, arrays = wire.receive(sock)
            if command["do"] == "close":
                return True
            values, replies = {**command["values"], **arrays}, []
            for place, row in enumerate(command["rows"]):
                progress.at(place)
                result = run_command(slots[row], command["do"], values, place)
                replies.append(to_flat(result, slots[row].rooms))
            wire.send(sock, *wire.pack_rows(replies))
    except (EOFError, OSError):
        return False  # the pool is gone, and so is the reason to live
    finally:
        for slot in slots.values():
            slot.close()


def _send_hello(sock: socket.socket, spec: EnvSpec, slots: dict[int, EnvSlot], file: int) -> None:
    try:
        info = inspect_env(spec, next(iter(slots.values())).env)
        for row, rooms in image_rooms(file, info.obs, list(slots)).items():
            slots[row].rooms = rooms
    except Exception as error:
        expected = isinstance(error, EnvSpecError)
        wire.send(sock, {"fatal": str(error) if expected else traceback.format_exc()}, {})
        raise EOFError from None
    fields = {name: asdict(field) for name, field in by_store_field(info.obs).items()}
    values = {**vars(info), "spec": None, "obs": fields}
    bounds = {name: values.pop(name) for name in ("action_low", "action_high")}
    wire.send(sock, values, bounds)


def main(fd: int, file: int) -> NoReturn:
    """Entry point of a worker process.

    Args:
        fd: its end of the socket pair.
        file: that it shares with the pool, see :mod:`~diffpolicy.rollout.pool.shared`.
    """
    # Ctrl-C is for the pool, which decides what happens to its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # An environment that prints must not mix with the output of the program that asked for a score.
    os.dup2(2, 1)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    code = 0
    try:
        if not run_worker(socket.socket(fileno=fd), file):
            _end_group()
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
    _end_group()


def _end_group() -> None:
    """End this process and whatever its environments have started, when no pool is left to do so.

    The pool has made it the leader of a group; run by hand it is in somebody else's.
    """
    sys.stderr.flush()
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
