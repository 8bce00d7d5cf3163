"""One writer at a time: a lock that names its holder and outlives neither it nor a crash.

The lock of ``DIR/NAME`` is the file ``DIR/.NAME.lock``, which says who holds it. On a file system
of this machine the kernel keeps the lock (``flock``) and drops it when the holder dies. On others
(NFS, SMB, FUSE) kernel locks may hold on one machine only, so there the file itself is the lock:
it is made in one step that only one writer can do. Such a lock is taken over when its holder was a
process of this machine that is dead. Of another machine nobody here can know; then the lock is
refused, with the file to remove if that process is gone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import platform
import threading
import time
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, Self

_HAS_FLOCK = True
try:
    import fcntl
except ImportError:  # Windows
    _HAS_FLOCK = False

# File systems that belong to one kernel, which therefore keeps their locks for all processes.
_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "ramfs", "overlay"}


class BusyError(ValueError):
    """Another process, or another thread, is writing there."""


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


@dataclass
class _Held:
    handle: int | None
    thread: int
    made: list[Path]  # directories that were made for the lock, the innermost first
    count: int = 1


_HELD: dict[Path, _Held] = {}
_GUARD = threading.RLock()


class WriterLock:
    """The right to write to ``path``, a directory or file that need not exist yet.

    Use it in a ``with`` block, or call :meth:`acquire` and :meth:`release`. A thread that holds it
    may take it again.

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
        self.file = self.path.with_name(f".{self.path.name}.lock")
        self.what, self.wait_s = what, wait_s
        self._taken = 0

    def acquire(self) -> Self:
        """Take the lock.

        Raises:
            BusyError: another process or thread holds it.
        """
        deadline = time.monotonic() + self.wait_s
        while True:
            with _GUARD:
                problem = self._try()
            if problem is None:
                self._taken += 1
                return self
            if time.monotonic() >= deadline:
                raise BusyError(f"{self.path} is in use: {problem}")
            time.sleep(0.01)

    def release(self) -> None:
        """Give the lock back; does nothing if this object does not hold it."""
        with _GUARD:
            if not self._taken:
                return
            self._taken -= 1
            held = _HELD.get(self.file)
            if held is None:  # of the process that this one was forked from
                return
            held.count -= 1
            if held.count:
                return
            del _HELD[self.file]
            self.file.unlink(missing_ok=True)  # before the kernel's lock goes, so it is still ours
            if held.handle is not None:
                os.close(held.handle)
            with contextlib.suppress(OSError):  # a holder that wrote nothing leaves no trace
                for folder in held.made:
                    folder.rmdir()

    __enter__ = acquire

    def __exit__(self, *error: object) -> None:
        """Give the lock back."""
        self.release()

    def __del__(self) -> None:
        """Give back what its owner forgot."""
        with contextlib.suppress(Exception):
            while self._taken:
                self.release()

    def _try(self) -> str | None:
        """Take the lock, or say why not."""
        held = _HELD.get(self.file)
        if held is not None:
            if held.thread != threading.get_ident():
                return f"another thread of this process is {_read(self.file).get('what')}"
            held.count += 1
            return None
        made = _make_directory(self.file.parent)
        try:
            taken = self._by_kernel() if _kernel_locks(self.file.parent) else self._by_file()
        except FileNotFoundError:  # another holder has just removed what it had made
            return f"{self.file.parent} is going away; try again"
        if isinstance(taken, str):
            return taken
        _HELD[self.file] = _Held(taken, threading.get_ident(), made)
        return None

    def _record(self, kind: str) -> bytes:
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        holder = {
            "what": self.what,
            "pid": os.getpid(),
            "host": platform.node(),
            "since": now,
            "machine": machine(),
            "started": started(os.getpid()),
            "kind": kind,
        }
        return json.dumps(holder).encode()

    def _by_kernel(self) -> int | str | None:
        """Return the locked file, or why it cannot be had."""
        while True:
            handle = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                return self._refusal()
            except OSError:  # no such locks here after all
                os.close(handle)
                return self._by_file()
            if _is_at(handle, self.file):
                break
            os.close(handle)  # its last holder has just removed it
        holder = _read(self.file)
        if holder.get("kind") == "file" and not _has_died(holder):
            os.close(handle)  # of a machine that sees this file system through a network
            return self._refusal()
        os.ftruncate(handle, 0)
        os.pwrite(handle, self._record("kernel"), 0)
        return handle

    def _by_file(self) -> str | None:
        """Make the file that is the lock, or return why that cannot be."""
        for _ in range(2):
            try:
                handle = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                if not self._take_away():
                    return self._refusal()
                continue
            os.write(handle, self._record("file"))
            os.fsync(handle)
            os.close(handle)
            return None
        return self._refusal()

    def _take_away(self) -> bool:
        """Remove the lock of a dead process; only one of several that try succeeds."""
        if not _has_died(_read(self.file)):
            return False
        aside = self.file.with_name(f"{self.file.name}.{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):  # another was faster
            self.file.rename(aside)
            if not _has_died(_read(aside)):  # another was faster, and this is its new lock
                aside.rename(self.file)
                return False
            aside.unlink()
        return True

    def _refusal(self) -> str:
        holder = _read(self.file)
        if not holder:
            return f"{self.file} locks it. If nothing writes there, remove that file"
        by = f"process {holder.get('pid')} on {holder.get('host')}"
        text = f"{by} is {holder.get('what')} since {holder.get('since')}; wait until it has ended"
        if holder.get("machine") != machine():
            return f"{text}. If it is gone, remove {self.file}"
        if not is_alive(int(holder["pid"]), int(holder["started"])):
            return f"{by} has died, but processes that it began still run; end them"
        return f"{text}, or end it"


def _has_died(holder: dict[str, Any]) -> bool:
    """Whether the holder is known to be dead, or to be a process that forgot this lock."""
    if holder.get("machine") != machine():
        return False
    pid = int(holder["pid"])
    return pid == os.getpid() or not is_alive(pid, int(holder["started"]))


def _read(file: Path) -> dict[str, Any]:
    try:
        holder = json.loads(file.read_bytes())
        return holder if {"pid", "started"} <= set(holder) else {}
    except (OSError, ValueError, TypeError):
        return {}


def _make_directory(folder: Path) -> list[Path]:
    """Make a directory; returns those that were missing, the innermost first."""
    missing = list(itertools.takewhile(lambda p: not p.exists(), (folder, *folder.parents)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        place = next(p for p in (folder, *folder.parents) if p.exists())
        raise NotADirectoryError(errno.ENOTDIR, "is a file, not a directory", str(place)) from None
    return missing


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


@cache
def _kernel_locks(folder: Path) -> bool:
    """Whether all who can write to ``folder`` share this kernel's locks."""
    if not _HAS_FLOCK:
        return False
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return platform.system() == "Darwin"
    kinds = {}
    for line in mounts:
        left, _, right = line.partition(" - ")
        kinds[left.split()[4].encode().decode("unicode_escape")] = right.split()[0]
    place = next((p for p in (folder, *folder.parents) if str(p) in kinds), None)
    return place is not None and kinds[str(place)] in _LOCAL


def _forget() -> None:
    """In a forked child: the locks are the parent's, and must not outlive it through the child."""
    for held in _HELD.values():
        if held.handle is not None:
            with contextlib.suppress(OSError):
                os.close(held.handle)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
