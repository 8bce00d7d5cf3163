"""One writer at a time: a lock that names its holder and outlives neither it nor a crash.

The lock of ``DIR/NAME`` is the file ``DIR/.NAME.lock``, which says who holds it; where nothing can
be written to ``DIR`` it is ``DIR/NAME/.lock``. The package ``filelock`` does the locking: by the
kernel, which drops the lock when its holder dies, or, on a file system without such locks, by the
file's existence, until its holder is seen to be dead.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import time
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout


class BusyError(ValueError):
    """Another process, or another thread, is writing there."""


class WriterLock:
    """The right to write to ``path``, a directory or file that need not exist yet.

    Use it in a ``with`` block, or call :meth:`acquire` and :meth:`release`. A thread that holds it
    may take it again; a forked child does not inherit it.

    Args:
        path: what is written.
        what: what the holder does, for the message that others get.
        wait_s: how long to wait for another holder before refusing.

    Raises:
        BusyError: (on entering) another process or thread holds it: who, and what to do.
    """

    def __init__(
        self, path: str | os.PathLike[str], what: str = "writing", wait_s: float = 0.0
    ) -> None:
        self.path = Path(path).resolve()
        self.file = _lock_file(self.path)
        self.what, self.wait_s = what, wait_s
        self._held: list[FileLock] = []  # one entry for each time that this object took it
        self._made: list[Path] = []  # directories that were made for the lock, the innermost first

    def acquire(self) -> Self:
        """Take the lock.

        Raises:
            BusyError: another process or thread holds it.
        """
        lock = FileLock(self.file, is_singleton=True, poll_interval=0.01)
        deadline = time.monotonic() + self.wait_s
        while True:
            self._made += _make_directory(self.file.parent)
            try:
                lock.acquire(timeout=max(deadline - time.monotonic(), 0.0))
                break
            except FileNotFoundError:  # the last holder has just removed the directory: again
                self._made.clear()
            except Timeout:
                raise BusyError(f"{self.path} is in use: {_refusal(self.file)}") from None
        if lock.lock_counter == 1 and _is_native(lock):
            self.file.write_text(json.dumps(self._record()))
        self._held.append(lock)
        return self

    def release(self) -> None:
        """Give the lock back; does nothing if this object does not hold it."""
        if not self._held:
            return
        lock = self._held.pop()
        is_last = lock.lock_counter == 1
        if is_last and _is_native(lock):
            self.file.unlink(missing_ok=True)  # while it is still ours
        lock.release()
        if is_last:
            with contextlib.suppress(OSError):  # a holder that wrote nothing leaves no trace
                for folder in self._made:
                    folder.rmdir()
            self._made.clear()

    __enter__ = acquire

    def __exit__(self, *error: object) -> None:
        """Give the lock back."""
        self.release()

    def __del__(self) -> None:
        """Give back what its owner forgot."""
        with contextlib.suppress(Exception):
            while self._held:
                self.release()

    def _record(self) -> dict[str, Any]:
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        return {"what": self.what, "pid": os.getpid(), "host": platform.node(), "since": now}


def _lock_file(path: Path) -> Path:
    """The lock of ``path``: beside it, or within it where nothing can be written beside it."""
    if path.is_dir() and (not path.name or not os.access(path.parent, os.W_OK)):
        return path / ".lock"  # such as a volume of its own, mounted where only root writes
    return path.with_name(f".{path.name}.lock")


def _make_directory(folder: Path) -> list[Path]:
    """Make a directory; returns those that were missing, the innermost first."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        place = next(p for p in (folder, *folder.parents) if p.exists())
        raise NotADirectoryError(errno.ENOTDIR, "is a file, not a directory", str(place)) from None
    return missing


def _is_native(lock: FileLock) -> bool:
    """Whether the kernel keeps the lock: then the file's text is ours, else it is filelock's."""
    return getattr(lock, "pid", None) is None


def _refusal(file: Path) -> str:
    """Who holds a lock, and what to do about it."""
    try:
        holder = json.loads(file.read_text())
        who = f"process {holder['pid']} on {holder['host']}"
        if holder["pid"] == os.getpid() and holder["host"] == platform.node():
            who = "another thread of this process"
        return (
            f"{who} is {holder['what']} since {holder['since']}; wait until it has ended, or end it"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return f"{file} locks it. If nothing writes there, remove that file"


# ------------------------------------------------------- processes, as names of unfinished files


def machine() -> str:
    """Return what tells this machine, and this container on it, from others."""
    try:
        inside = os.readlink("/proc/self/ns/pid")  # process numbers mean something only within
    except OSError:
        inside = ""
    return hashlib.sha256(f"{platform.node()} {inside}".encode()).hexdigest()[:8]


def started(pid: int) -> int:
    """Return when process ``pid`` began, in the kernel's ticks; 0 if that is unknown."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def is_alive(pid: int, start: int) -> bool:
    """Return whether the process ``pid`` of this machine that began at ``start`` still runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return not start or not started(pid) or started(pid) == start
