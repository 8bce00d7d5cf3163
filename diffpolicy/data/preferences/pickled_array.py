"""A reader of pickled arrays that runs nothing of the pickle: ``pickled_array.py SOURCE TARGET``.

A pickle is a program. ``read_pickled_array`` has it read in a process of its own, isolated and with
little memory, by an unpickler that knows numbers, texts, lists and numpy's arrays of numbers, and
refuses every other name; what comes back is a plain npy file. As a script this module needs numpy
alone and imports nothing of this package.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

MOST_BYTES = 1 << 26  # of a file; published labels are a few kilobytes
_TIMEOUT = 60.0
_MEMORY = 1 << 30


class RefusedError(Exception):
    """The file is not an array of numbers."""


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise RefusedError("bytes in an unknown encoding")
    return text.encode(encoding)


# What an array's pickle names; before numpy 2.0 ``numpy._core`` was ``numpy.core``.
_KNOWN = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
}


class _Reader(pickle.Unpickler):
    """An unpickler that resolves the names of numpy's arrays and no other."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _encode
        place = module.replace("numpy.core", "numpy._core")
        if (place, name) not in _KNOWN:
            raise RefusedError(f"it names {f'{module}.{name}'!r:.80}, which is no part of an array")
        return super().find_class(place, name)


def numbers(data: bytes) -> npt.NDArray[Any]:
    """Return the array that a pickle holds: numpy's, or a list of numbers.

    Raises:
        RefusedError: It holds anything else.
    """
    value = _Reader(io.BytesIO(data)).load()
    array = np.array(value)
    if array.dtype.kind not in "fiub":
        raise RefusedError(f"it holds {type(value).__name__}, not an array of numbers")
    return array


def read_pickled_array(path: Path) -> npt.NDArray[Any]:
    """Read an array of numbers from a pickle, in a process of its own; nothing of it is run.

    Args:
        path: The file.

    Returns:
        The array.

    Raises:
        FileNotFoundError: No file.
        ValueError: It holds something else, or is too large.
    """
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, too many for a list of labels")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "array.npy"
        command = [sys.executable, "-I", str(Path(__file__)), str(path), str(target)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired:
            raise ValueError(f"reading {path} took over {_TIMEOUT:.0f} s; given up") from None
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise ValueError(f"{path} is no pickled array of numbers: {lines[-1]}")
        array: npt.NDArray[Any] = np.load(target, allow_pickle=False)
        return array


def main() -> NoReturn:
    """Run as a script; a refusal is one line on standard error and status 1."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MOST_BYTES, 2 * MOST_BYTES))
    try:
        np.save(sys.argv[2], numbers(Path(sys.argv[1]).read_bytes()), allow_pickle=False)
    except (RefusedError, MemoryError) as error:
        sys.exit(str(error) or "it needs more memory than a list of labels can")
    except Exception as error:  # whatever a damaged or hostile pickle provokes
        sys.exit(f"damaged ({type(error).__name__}: {error})")
    sys.exit(0)


if __name__ == "__main__":
    main()
