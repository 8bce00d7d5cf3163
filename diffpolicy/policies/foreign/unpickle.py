"""A restricted reader of torch checkpoints, run as a script: ``unpickle.py SOURCE FOLDER``.

A pickle is a program. This reader lets it build numbers, strings and plain containers, and tensors
from the bytes in the file; every class or function it names is replaced by an inert placeholder, so
nothing is imported and nothing is called. It writes the policy's tensors (averaged weights
preferred) and its config as safetensors and JSON. It needs numpy and safetensors alone and imports
nothing of this package, so it can run isolated. What it may use of memory, disk and time is a small
multiple of the file's size: a few bytes of a pickle can stand for more than any machine holds.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import math
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

MAX_VALUES = 1_000_000  # of the config; shared parts count as often as they are used
SPARE_BYTES, CPU_SECONDS = 1 << 30, 300  # beside a multiple of the file's size
TENSORS, CONFIG = "tensors.safetensors", "config.json"
KEPT = ("model.", "normalizer.", "obs_encoder.")

_FORMATS = {"Double": "<f8", "Float": "<f4", "Half": "<f2", "Long": "<i8", "Int": "<i4"}
_FORMATS |= {"Short": "<i2", "Char": "<i1", "Byte": "<u1", "Bool": "?"}


class RefusedError(Exception):
    """The file is not a checkpoint that can be read."""


class Inert:
    """Stands for whatever the pickle named; takes everything it is given and does nothing."""

    state: Any = None

    def __new__(cls, *_args: Any, **_options: Any) -> Inert:
        return object.__new__(cls)

    def __init__(self, *_args: Any, **_options: Any) -> None: ...

    def __call__(self, *_args: Any, **_options: Any) -> Inert:
        return Inert()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, *_given: Any) -> None:
        """Ignore items of a list, a set or a dict."""

    extend = add = __setitem__ = append


class Storage(NamedTuple):
    """Bytes of the archive: an entry, its number format and length."""

    key: str
    dtype: str
    length: int


class TensorRef(NamedTuple):
    """A tensor as the pickle describes it; its bytes are read when it is wanted."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_rest: Any) -> TensorRef:
    if not isinstance(storage, Storage):
        raise RefusedError("a tensor without a storage")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in numbers):
        raise RefusedError("a tensor with an impossible shape")
    return TensorRef(storage, offset, tuple(size), tuple(stride))


# All that a pickle can reach. Storage types are mere strings.
_ALLOWED: dict[tuple[str, str], Callable[..., Any] | str] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_rest: data,
    **{("torch", f"{name}Storage"): dtype for name, dtype in _FORMATS.items()},
}


class Reader(pickle.Unpickler):
    """An unpickler that resolves the few names above and no other."""

    def find_class(self, module: str, name: str) -> Any:
        """Resolve a name of the pickle: nothing is ever imported."""
        return _ALLOWED.get((module, name), Inert)

    def persistent_load(self, pid: Any) -> Any:
        """Resolve a reference to the bytes of a tensor."""
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise RefusedError(f"an unknown kind of reference: {pid!r:.80}")
        _, dtype, key, _, count = pid
        if dtype not in _FORMATS.values():
            raise RefusedError(f"tensors of an unsupported number format (storage {key!r:.40})")
        if not (isinstance(key, str) and key.isalnum() and type(count) is int and count >= 0):
            raise RefusedError("a tensor storage with an impossible name or size")
        return Storage(key, dtype, count)


class Archive:
    """The zip file that torch writes: one pickle, and one entry of raw bytes per storage."""

    def __init__(self, path: str) -> None:
        try:
            self.zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise RefusedError(f"not a checkpoint in torch's zip format: {error}") from None
        names = [n for n in self.zip.namelist() if n.endswith("/data.pkl") and n.count("/") == 1]
        if len(names) != 1:
            raise RefusedError("not a checkpoint in torch's zip format: it has no data.pkl")
        self.prefix = names[0].removesuffix("data.pkl")
        order = f"{self.prefix}byteorder"
        if order in self.zip.namelist() and self.bytes("byteorder") != b"little":
            raise RefusedError("it was written on a big-endian machine")

    def bytes(self, name: str) -> bytes:
        """An entry's bytes."""
        try:
            info = self.zip.getinfo(self.prefix + name)
        except KeyError:
            raise RefusedError(f"the entry {name!r} is missing") from None
        if info.compress_type != zipfile.ZIP_STORED:
            raise RefusedError("its entries are compressed, which torch never does")
        return self.zip.read(info)

    def payload(self) -> Any:
        """The pickled object, made of plain containers and placeholders."""
        return Reader(io.BytesIO(self.bytes("data.pkl"))).load()

    def array(self, tensor: TensorRef) -> npt.NDArray[Any]:
        """A tensor's numbers, after checking that all of them lie within its storage."""
        storage = np.frombuffer(self.bytes(f"data/{tensor.storage.key}"), tensor.storage.dtype)
        count, places = math.prod(tensor.size), zip(tensor.size, tensor.stride, strict=True)
        if not count:
            return np.empty(tensor.size, tensor.storage.dtype)
        if max(tensor.offset + sum((n - 1) * s for n, s in places), count - 1) >= len(storage):
            raise RefusedError("a tensor that reaches beyond its storage")
        strides = [s * storage.itemsize for s in tensor.stride]
        view = np.lib.stride_tricks.as_strided(storage[tensor.offset :], tensor.size, strides)
        return np.ascontiguousarray(view)


class Plain:
    """A config without its classes: containers and values of OmegaConf become plain ones."""

    def __init__(self) -> None:
        self.values = 0

    def __call__(self, node: Any) -> Any:
        """The plain form of a node.

        Raises:
            RefusedError: it stands for more values than any config has.
        """
        self.values += 1
        if self.values > MAX_VALUES:
            raise RefusedError(f"its config stands for more than {MAX_VALUES} values")
        if isinstance(node, Inert):
            state = node.state if isinstance(node.state, dict) else {}
            return self(state.get("_content", state.get("_val")))
        if isinstance(node, dict):
            return {str(key)[:1000]: self(value) for key, value in node.items()}
        if isinstance(node, list | tuple):
            return [self(value) for value in node]
        if isinstance(node, str) and len(node) > MAX_VALUES:
            raise RefusedError("its config holds a text that is too long")
        return node if isinstance(node, str | int | float | bool) else None


def export(source: str, folder: str) -> None:
    """Read a checkpoint and write its tensors and config to ``folder``.

    Raises:
        RefusedError: It is not a checkpoint of Diffusion Policy.
    """
    archive = Archive(source)
    payload = archive.payload()
    states = payload.get("state_dicts") if isinstance(payload, dict) else None
    if not isinstance(states, dict):
        raise RefusedError("not a checkpoint of Diffusion Policy: it has no state_dicts")
    state = states.get("ema_model") or states.get("model")
    if not isinstance(state, dict):
        raise RefusedError("not a checkpoint of Diffusion Policy: it has no weights of a model")
    text = json.dumps(Plain()(payload.get("cfg")) or {})
    arrays: dict[str, npt.NDArray[Any]] = {}
    held, most = 0, 2 * Path(source).stat().st_size
    for name, value in state.items():
        if not (isinstance(name, str) and name.startswith(KEPT) and isinstance(value, TensorRef)):
            continue
        arrays[name] = archive.array(value)
        held += arrays[name].nbytes
        if held > most:  # views of one storage, each written in full
            raise RefusedError("its tensors are several times the size of the file")
    save_file(arrays, Path(folder) / TENSORS)
    (Path(folder) / CONFIG).write_text(text, encoding="utf-8")


def limit(size: int) -> None:
    """Bound this process' memory, files and time by the size of the file that it reads."""
    try:
        import resource
    except ImportError:  # Windows: the checks above and the caller's time limit are left
        return
    used = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        used = pages * resource.getpagesize()
    for kind, most in (
        (resource.RLIMIT_AS, used + SPARE_BYTES + 5 * size),
        (resource.RLIMIT_FSIZE, SPARE_BYTES // 16 + 3 * size),
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        bound = most if hard == resource.RLIM_INFINITY else min(most, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (bound, bound))


def main() -> NoReturn:
    """Run as a script; a refusal is one line on standard error and status 1."""
    try:
        limit(Path(sys.argv[1]).stat().st_size)
        export(sys.argv[1], sys.argv[2])
    except RefusedError as error:
        sys.exit(str(error))
    except MemoryError:
        sys.exit("damaged, or made to fill the memory: it needs many times its own size")
    except Exception as error:  # whatever a damaged or hostile pickle provokes
        sys.exit(f"damaged, or not a checkpoint ({type(error).__name__}: {error})")
    sys.exit(0)


if __name__ == "__main__":
    main()
