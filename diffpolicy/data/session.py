"""The right to write to a store, from the first episode appended until the store is finalized."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from diffpolicy.files import WriterLock

if TYPE_CHECKING:
    from pathlib import Path


class Session:
    """One handle's turn to write to a store.

    Other processes are refused meanwhile, with the name of this one. Another handle of the same
    thread may take its turn; each then finds out that what it knows of the store is old.

    Args:
        path: the store.
    """

    _latest: ClassVar[dict[Path, Session]] = {}

    def __init__(self, path: Path) -> None:
        what = "appending to it (until it finalizes or closes the store)"
        self._lock = WriterLock(path, what, wait_s=2.0)
        self._active = False

    def begin(self) -> bool:
        """Take the turn, or go on with it; returns whether the store must be read anew.

        Raises:
            BusyError: another process is writing.
        """
        going_on = self._active and self._latest.get(self._lock.path) is self
        if not self._active:
            self._lock.acquire()
        self._active, self._latest[self._lock.path] = True, self
        return not going_on

    def end(self) -> None:
        """Let others write."""
        if self._active:
            self._active = False
            if self._latest.get(self._lock.path) is self:
                del self._latest[self._lock.path]
            self._lock.release()


__all__ = ["Session"]
