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


def send(sock: socket.socket, values: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Send one message.

    Args:
        sock: a connected stream socket.
        values: JSON values.
        arrays: of numbers or truth values.

    Raises:
        TypeError: an array of another type.
        OSError: the peer is gone.
    """
    parts: list[Any] = []
    layout = []
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub":
            raise TypeError(f"array {name!r} has dtype {array.dtype}, expected plain numbers")
        layout.append([name, array.dtype.name, list(array.shape)])
        parts.append(np.ascontiguousarray(array))
    header = json.dumps([dict(values), layout]).encode()
    lengths = _LENGTHS.pack(len(header), sum(part.nbytes for part in parts))
    sock.sendall(b"".join([lengths, header, *parts]))


def receive(sock: socket.socket, timeout: float | None = None) -> Message:
    """Receive one whole message.

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
        array = np.frombuffer(payload, np.dtype(dtype), count=math.prod(shape), offset=offset)
        offset += array.nbytes
        arrays[name] = array.reshape(shape)
    return values, arrays


def pack_rows(rows: Sequence[Mapping[str, Any]]) -> Message:
    """Values and arrays by name, of several rows, as one message; :func:`unpack_rows` undoes it.

    A message of columns is much smaller to describe than one of rows: alike arrays of all rows
    travel as one stack.
    """
    groups: dict[tuple[Any, ...], dict[int, Any]] = {}
    for place, row in enumerate(rows):
        for name, value in row.items():
            kind = (value.shape, value.dtype) if isinstance(value, np.ndarray) else None
            groups.setdefault((name, kind), {})[place] = value
    layout: list[Any] = []
    stacks: dict[str, np.ndarray] = {}
    for i, ((name, kind), found) in enumerate(groups.items()):
        values = list(found.values())
        layout.append([name, list(found), values if kind is None else None])
        if kind is not None:
            stacks[str(i)] = np.stack(values)
    return {"count": len(rows), "groups": layout}, stacks


def unpack_rows(message: Message) -> list[dict[str, Any]]:
    """The rows that :func:`pack_rows` made a message of."""
    header, arrays = message
    rows: list[dict[str, Any]] = [{} for _ in range(header["count"])]
    for i, (name, places, values) in enumerate(header["groups"]):
        for place, value in zip(places, arrays.get(str(i), values), strict=True):
            rows[place][name] = value
    return rows


def _receive_exactly(sock: socket.socket, count: int, deadline: float | None) -> bytearray:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        sock.settimeout(None if deadline is None else max(deadline - time.monotonic(), 1e-3))
        got = sock.recv_into(view)
        if got == 0:
            raise EOFError("the peer closed the connection")
        view = view[got:]
    return data
