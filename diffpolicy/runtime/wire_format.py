"""The bytes between a policy server and its clients: framed JSON with raw tensors behind it.

All integers are unsigned and little-endian. Nothing is aligned or padded, nothing is compressed.

A frame is::

    offset  size  content
    0       4     N, the length of the body in bytes; 6 <= N <= the receiver's limit (1 MiB unless
                  the server was told otherwise; `max_frame_bytes` of the hello reply)
    4       N     the body

A body is::

    offset  size  content
    0       4     J, the length of the header in bytes; 2 <= J <= 65536 and J <= N - 4
    4       J     the header: one JSON object in UTF-8, without NaN, Infinity or repeated keys
    4 + J   rest  the tensors' elements, one tensor after the other in the order of the header,
                  each in C order (last index fastest), little-endian; IEEE 754 for floats.
                  The tensors fill the body exactly

The header has a text entry ``"type"``, the entries of that type, and, where tensors follow,
``"tensors"``: a list of at most 16 objects with exactly these entries::

    {"name": "obs", "dtype": "float32", "shape": [3]}

``dtype`` is one of float32, float64, int32, int64, uint8; ``shape`` has 1 to 8 entries, each at
least 1; names differ. So ``act`` with the observation (1, 2, 3) may be sent as::

    5c 00 00 00                                        N = 92 = 4 + 76 + 12
    4c 00 00 00                                        J = 76
    {"type":"act","tensors":[{"name":"obs","dtype":"float32","shape":[3]}]}  and 5 spaces
    00 00 80 3f  00 00 00 40  00 00 40 40              1.0 2.0 3.0

(JSON allows blanks, which a client may use to keep its header at a fixed length.)

The client speaks first and sends its next request after the reply to the last one:

=======  =====================================  =================================================
request  entries                                reply
=======  =====================================  =================================================
hello    ``version`` (1), ``token`` (text, if   ``hello``: ``version``, ``obs_dim``,
         the server wants one)                  ``action_dim``, ``horizon``, ``n_obs_steps``,
                                                ``n_action_steps``, ``obs_dtype``,
                                                ``action_dtype``, ``action_low``, ``action_high``
                                                (a list of numbers, null where unbounded),
                                                ``deterministic``, ``max_frame_bytes``
reset    ``seed`` (0 to 2**63 - 1, optional)    ``ok``: a new episode begins with the next request
act      tensor ``obs`` [O], float32 or         ``act``: tensor ``action`` [A], float32, in the
         float64                                environment's units
plan     tensor ``obs`` [O], or [k, O] with     ``plan``: tensor ``actions`` [Ta, A], float32: a
         the observations since the last        new plan's actions from now on; the server counts
         request, oldest first, k <= To         them as executed
stats    none                                   ``stats``: ``actions``, ``plans``, ``nfe`` of this
                                                connection; ``clients``, ``requests``,
                                                ``policy_calls``, ``largest_batch`` of the server
close    none                                   ``ok``, and the server hangs up
=======  =====================================  =================================================

``hello`` comes first and once. Any request may be answered by ``error``, with the entries ``code``
(one of :data:`ERROR_CODES`) and ``message`` (one line for people), no tensors. After the codes in
:data:`FATAL_CODES` the server hangs up; after the others the connection goes on, and the request
had no effect.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

PROTOCOL = 1
MAX_FRAME_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 16
MAX_TENSORS = 16
MAX_DIMS = 8
MAX_SEED = 2**63 - 1

#: Element types that may travel, with the layout of one element.
DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
    "int32": np.dtype("<i4"),
    "int64": np.dtype("<i8"),
    "uint8": np.dtype("u1"),
}

#: What an error reply can say.
ERROR_CODES = {
    "too_large": "a frame's length is over the limit",
    "malformed": "a frame's body is not a header with tensors",
    "timeout": "a frame, or the greeting, was not complete in time; or nothing came for too long",
    "wrong_version": "the client speaks another version of the protocol",
    "unauthorized": "the token is missing or wrong",
    "busy": "every place for a client is taken",
    "no_hello": "the first request was not hello",
    "shutting_down": "the server is stopping",
    "bad_request": "an unknown request, or entries that do not belong to it",
    "bad_dtype": "a tensor of a type that this request does not take",
    "bad_shape": "a tensor of a shape that this policy does not take",
    "non_finite": "an observation has an entry that is NaN, infinite or beyond float32",
    "policy_failed": "the policy gave an action that is not finite; the row started a new episode",
    "internal": "the server failed; its log says why",
}
#: Those after which the server hangs up.
FATAL_CODES = frozenset(list(ERROR_CODES)[:8])

_LENGTH = struct.Struct("<I")
_TENSOR_KEYS = {"name", "dtype", "shape"}


class WireError(ValueError):
    """What is wrong with a frame or a request, as a code and one line that a peer may read.

    Attributes:
        code: key of :data:`ERROR_CODES`.
        message: one line of text, at most 300 characters.
    """

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        self.message = " ".join(message.split())[:300]
        super().__init__(f"{code}: {self.message}")

    @property
    def fatal(self) -> bool:
        """The connection cannot go on after it."""
        return self.code in FATAL_CODES


@dataclass(frozen=True)
class Message:
    """One decoded frame.

    Attributes:
        type: what it is.
        fields: the header's other entries.
        tensors: arrays by name, native byte order, their own memory.
    """

    type: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Array] = field(default_factory=dict)


def encode(message: Message) -> bytes:
    """The whole frame of a message, length first.

    Raises:
        ValueError: a tensor's type cannot travel, an entry is no JSON value, or the header is too
            long.
    """
    header: dict[str, Any] = {"type": message.type, **message.fields}
    parts = []
    for name, tensor in message.tensors.items():
        layout = DTYPES.get(tensor.dtype.name)
        if layout is None:
            raise ValueError(f"{name}: cannot send {tensor.dtype}; one of {sorted(DTYPES)} can")
        entry = {"name": name, "dtype": tensor.dtype.name, "shape": list(tensor.shape)}
        header.setdefault("tensors", []).append(entry)
        parts.append(tensor.astype(layout, copy=False).tobytes())
    text = json.dumps(header, allow_nan=False, separators=(",", ":")).encode()
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {len(text)} bytes is over {MAX_HEADER_BYTES}")
    length = _LENGTH.size + len(text) + sum(map(len, parts))
    return b"".join((_LENGTH.pack(length), _LENGTH.pack(len(text)), text, *parts))


def body_length(prefix: bytes, limit: int = MAX_FRAME_BYTES) -> int:
    """The length of the body that a frame's first four bytes announce.

    Raises:
        WireError: ``too_large`` above ``limit``, ``malformed`` when no body can be that short.
    """
    (length,) = _LENGTH.unpack(prefix)
    if length > limit:
        raise WireError("too_large", f"a frame of {length} bytes is over the limit of {limit}")
    if length < _LENGTH.size + len("{}"):
        raise WireError("malformed", f"a frame of {length} bytes is too short for a header")
    return int(length)


def decode(body: bytes) -> Message:
    """The message in a frame's body; the memory it takes is bounded by the body's length.

    Raises:
        WireError: ``malformed``, with what is wrong.
    """
    if len(body) < _LENGTH.size + len("{}"):
        raise _malformed(f"a body of {len(body)} bytes is too short for a header")
    (length,) = _LENGTH.unpack_from(body)
    end = _LENGTH.size + length
    if length > MAX_HEADER_BYTES or end > len(body):
        raise _malformed(f"a header of {length} bytes does not fit a body of {len(body)}")
    fields = _header(body[_LENGTH.size : end])
    kind = fields.pop("type", None)
    if type(kind) is not str:
        raise _malformed('the header has no text "type"')
    return Message(kind, fields, _tensors(fields.pop("tensors", []), body, end))


def _malformed(message: str) -> WireError:
    return WireError("malformed", message)


def _header(text: bytes) -> dict[str, Any]:
    try:
        header = _DECODER.decode(text.decode("utf-8"))
    except RecursionError:
        raise _malformed("the header is nested too deeply") from None
    except ValueError as error:
        # The decoder's own words can quote the frame; say only where it stopped.
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise _malformed(f"the header is not strict JSON in UTF-8{where}") from None
    if not isinstance(header, dict):
        raise _malformed("the header is not a JSON object")
    return header


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        raise ValueError("a key occurs twice")
    return out


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_unique)


def _tensors(entries: Any, body: bytes, offset: int) -> dict[str, Array]:
    if not isinstance(entries, list) or len(entries) > MAX_TENSORS:
        raise _malformed(f'"tensors" is not a list of at most {MAX_TENSORS} entries')
    out: dict[str, Array] = {}
    for entry in entries:
        name, layout, shape = _entry(entry, len(body))
        count = math.prod(shape)
        if name in out or count * layout.itemsize > len(body) - offset:
            raise _malformed("a tensor occurs twice, or the body is too short for it")
        flat = np.frombuffer(body, layout, count, offset)
        out[name] = flat.reshape(shape).astype(layout.newbyteorder("="))
        offset += count * layout.itemsize
    if offset != len(body):
        raise _malformed(f"{len(body) - offset} bytes follow the last tensor")
    return out


def _entry(entry: Any, size: int) -> tuple[str, np.dtype[Any], tuple[int, ...]]:
    """Name, layout and shape of one entry of ``tensors``; no dimension is above ``size``."""
    if not isinstance(entry, dict) or set(entry) != _TENSOR_KEYS:
        raise _malformed(f'an entry of "tensors" does not have the keys {sorted(_TENSOR_KEYS)}')
    name, dtype, shape = entry["name"], entry["dtype"], entry["shape"]
    if type(name) is not str or not 1 <= len(name) <= 64:
        raise _malformed("a tensor's name is not a text of 1 to 64 characters")
    if type(dtype) is not str or dtype not in DTYPES:
        raise _malformed(f"a tensor's dtype is not one of {sorted(DTYPES)}")
    if not isinstance(shape, list) or not 1 <= len(shape) <= MAX_DIMS:
        raise _malformed(f"a tensor's shape is not a list of 1 to {MAX_DIMS} numbers")
    if not all(type(d) is int and 1 <= d <= size for d in shape):
        raise _malformed(
            "a tensor's shape has an entry that is no number from 1 to the body's size"
        )
    return name, DTYPES[dtype], tuple(shape)


@dataclass(frozen=True)
class _Request:
    """The entries that a request has: required and optional ones by type, and its tensors."""

    required: Mapping[str, type] = field(default_factory=dict)
    optional: Mapping[str, type] = field(default_factory=dict)
    tensors: frozenset[str] = frozenset()


REQUESTS = {
    "hello": _Request(required={"version": int}, optional={"token": str}),
    "reset": _Request(optional={"seed": int}),
    "act": _Request(tensors=frozenset({"obs"})),
    "plan": _Request(tensors=frozenset({"obs"})),
    "stats": _Request(),
    "close": _Request(),
}


def check_request(message: Message) -> None:
    """Check a request against :data:`REQUESTS`: entries, their types and the seed's range.

    Raises:
        WireError: ``wrong_version`` for another protocol, else ``bad_request``.
    """
    request = REQUESTS.get(message.type)
    if request is None:
        raise WireError("bad_request", f"unknown request; expected one of {sorted(REQUESTS)}")
    version = message.fields.get("version", PROTOCOL)
    if message.type == "hello" and type(version) is int and version != PROTOCOL:
        # Before the other entries, which another version may well have changed.
        raise WireError("wrong_version", f"this server speaks version {PROTOCOL} of the protocol")
    types = {**request.required, **request.optional}
    got = set(message.fields)
    if not set(request.required) <= got <= set(types):
        raise WireError(
            "bad_request",
            f"{message.type} needs the entries {sorted(request.required)} and may have "
            f"{sorted(request.optional)}",
        )
    for name, value in message.fields.items():
        if type(value) is not types[name]:  # exact: JSON's true is no number
            raise WireError(
                "bad_request", f"{name!r} of {message.type} must be of type {types[name].__name__}"
            )
    if set(message.tensors) != request.tensors:
        raise WireError(
            "bad_request", f"{message.type} takes the tensors {sorted(request.tensors)}"
        )
    if not 0 <= message.fields.get("seed", 0) <= MAX_SEED:
        raise WireError("bad_request", f"seed must be from 0 to {MAX_SEED}")
