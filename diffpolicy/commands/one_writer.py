"""One command at a time writes to a run, from its data to its report."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import Any

from diffpolicy.files import WriterLock


def one_writer(command: Callable[..., int]) -> Callable[..., int]:
    """Let ``command(config, ...)`` hold the lock of ``config.run_dir`` while it runs.

    Of the processes of a ``torchrun`` launch the first holds it.
    """

    @wraps(command)
    def locked(config: Any, **options: Any) -> int:
        if int(os.environ.get("RANK", "0")):
            return command(config, **options)
        with WriterLock(config.run_dir, "training"):
            return command(config, **options)

    return locked


__all__ = ["one_writer"]
