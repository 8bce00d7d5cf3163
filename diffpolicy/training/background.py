"""Checkpoints written beside the training: one at a time, from copies of the tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from torch import Tensor


class BackgroundWriter:
    """One write at a time on a thread of its own; the next one, and the end, wait for it.

    An error of a write is raised by whatever call comes next. Leaving the block waits too, also
    after an exception or an interrupt, so that nothing is cut short.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Write when the one before is done."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(write,), name="checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a write that failed; waits for nothing."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Wait for the write that is under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        except BaseException as failed:
            if error is None:
                raise
            error.add_note(f"The last checkpoint could not be written either: {failed!r}")

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:
            self._error = error


def copied(files: Mapping[str, Any]) -> dict[str, Any]:
    """Files of a bundle whose tensors are copies on the host: training may go on."""
    return {
        name: {k: _on_host(v) for k, v in content.items()}
        if name.endswith(".safetensors")
        else content
        for name, content in files.items()
    }


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
