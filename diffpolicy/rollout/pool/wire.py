"""Messages between the pool and its worker processes: a JSON header and raw arrays, over a socket.

No pickle: a message can hold numbers, text and arrays of a few types, and reading has a deadline,
so that a peer that stops in the middle of a message cannot hold the reader up for ever.
"""

from __future__ import annotations

import json
import math
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_LENGTHS = struct.Struct(">IQ")
Message = tuple[dict[str, Any], dict[str, np.ndarray]]  # values and arrays
_DTYPES = frozenset({"bool", "uint8", "int32", "int64", "float32", "float64"})


def send(sock: socket.socket, values: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Sends one message.

    Args:
        sock: a connected stream socket.
        values: JSON values.
        arrays: bool, uint8, int32, int64, float32 or float64 arrays.

    Raises:
        TypeError: an array of another type.
        OSError: the peer is gone.
    """
    parts = []
    layout = []
    for name, array in arrays.items():
        if array.dtype.name not in _DTYPES:
            raise TypeError(f"array {name!r} has dtype {array.dtype}, expected {sorted(_DTYPES)}")
        layout.append([name, array.dtype.name, list(array.shape)])
        parts.append(np.ascontiguousarray(array).tobytes())
    header = json.dumps([dict(values), layout]).encode()
    payload = b"".join(parts)
    sock.sendall(_LENGTHS.pack(len(header), len(payload)) + header + payload)


def receive(
    sock: socket.socket, timeout: float | None = None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Receives one whole message.

    Args:
        sock: a connected stream socket.
        timeout: seconds for the whole message; None waits for ever.

    Returns:
        The values and the arrays that were sent.

    Raises:
        EOFError: the peer closed the socket.
        TimeoutError: the message was not complete in time.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    n_header, n_payload = _LENGTHS.unpack(_receive_exactly(sock, _LENGTHS.size, deadline))
    values, layout = json.loads(_receive_exactly(sock, n_header, deadline))
    payload = _receive_exactly(sock, n_payload, deadline)
    arrays = {}
    offset = 0
    for name, dtype, shape in layout:
        if dtype not in _DTYPES:
            raise TypeError(f"array {name!r} has dtype {dtype}, expected {sorted(_DTYPES)}")
        array = np.frombuffer(payload, np.dtype(dtype), count=math.prod(shape), offset=offset)
        offset += array.nbytes
        arrays[name] = array.reshape(shape)
    return values, arrays


def send_all(sock: socket.socket, messages: Sequence[Message]) -> None:
    """Sends some messages as one, see :func:`send`; :func:`split` undoes it."""
    arrays = {f"{i} {name}": a for i, (_, own) in enumerate(messages) for name, a in own.items()}
    send(sock, {"all": [values for values, _ in messages]}, arrays)


def split(values: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> list[Message]:
    """The messages that :func:`send_all` sent as one."""
    messages: list[Message] = [(own, {}) for own in values["all"]]
    for key, array in arrays.items():
        index, name = key.split(" ", 1)
        messages[int(index)][1][name] = array
    return messages


def _receive_exactly(sock: socket.socket, count: int, deadline: float | None) -> bytearray:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        if deadline is not None:
            sock.settimeout(max(deadline - time.monotonic(), 1e-3))
        else:
            sock.settimeout(None)
        got = sock.recv_into(view)
        if got == 0:
            raise EOFError("the peer closed the connection")
        view = view[got:]
    return data
