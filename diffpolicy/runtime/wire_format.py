"""What a policy server and its clients say to each other: msgpack maps over a WebSocket.

The address is ``ws://HOST:PORT``; a server with a token wants the header ``Authorization: Bearer
TOKEN``. Every message is binary and holds one `msgpack <https://msgpack.org>`_ map. An array is the
map ``{"dtype": "float32", "shape": [3], "bytes": ...}`` of its elements in C order, little-endian;
dtypes are those of :data:`DTYPES`. An observation is one array, or a map of arrays by name.

The server speaks first: it sends its contract (see ``PolicyServer.contract``), or closes the
connection with the reason. Then the client asks, one request after the other:

=======  =========================================  ==============================================
request  entries                                    reply
=======  =========================================  ==============================================
reset    ``seed`` (0 to 2**63 - 1, optional)        ``ok``: a new episode begins with the next
                                                    request
act      ``obs``: one observation                   ``act``: ``action`` [A], float32, in the
                                                    environment's units
plan     ``obs``: one observation, or [k, ...]      ``plan``: ``actions`` [Ta, A], float32: a new
         those since the last request, oldest       plan's actions from now on; the server counts
         first, k <= To                             them as executed
stats    none                                       ``stats``: ``actions``, ``plans``, ``nfe`` of
                                                    this connection; ``clients``, ``requests``,
                                                    ``policy_calls``, ``largest_batch`` of the
                                                    server
=======  =========================================  ==============================================

The name of a request or reply is its entry ``type``. Any request may be answered by ``error``, with
``code`` (one of :data:`ERROR_CODES`) and ``message`` (one line for people): it had no effect, and
the connection goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffpolicy.data.observation import Array, Obs, ObsField, ObsFields
from diffpolicy.extras import need

msgpack = need("msgpack")

VERSION = 2
MAX_SEED = 2**63 - 1

#: Element types that may travel, with the layout of one element.
DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(name).newbyteorder("<")
    for name in (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "float32", "float64"),
    )
}

#: What an error reply can say.
ERROR_CODES = {
    "bad_request": "no message, an unknown request, or entries that do not belong to it",
    "bad_observation": "an observation of another type or shape, or one that is not finite",
    "policy_failed": "the policy gave an action that is not finite; the row started a new episode",
    "internal": "the server failed; its log says why",
}

#: The entries that a request may have beside its type.
REQUESTS: Mapping[str, set[str]] = {
    "reset": {"seed"},
    "act": {"obs"},
    "plan": {"obs"},
    "stats": set(),
}


class WireError(ValueError):
    """What is wrong with a request, as a code and one line that a peer may read.

    Attributes:
        code: key of :data:`ERROR_CODES`.
        message: one line of text, at most 300 characters.
    """

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        self.message = " ".join(message.split())[:300]
        super().__init__(f"{code}: {self.message}")


def encode(message: Mapping[str, Any]) -> bytes:
    """The bytes of a message.

    Raises:
        TypeError: something in it that cannot travel, or an array of another type.
    """
    packed: bytes = msgpack.packb(message, default=_packed)
    return packed


def _packed(value: Any) -> dict[str, Any]:
    if not isinstance(value, np.ndarray) or value.dtype.name not in DTYPES:
        what = getattr(value, "dtype", type(value).__name__)
        raise TypeError(f"cannot send {what}; arrays of {', '.join(DTYPES)} can be sent")
    plain = np.ascontiguousarray(value, DTYPES[value.dtype.name])  # and no other copy: msgpack's
    raw = plain.reshape(-1).view(np.uint8).data
    return {"dtype": value.dtype.name, "shape": list(value.shape), "bytes": raw}


def decode(data: bytes | str) -> dict[str, Any]:
    """The message in some bytes; what it takes of memory is bounded by their number.

    Raises:
        WireError: ``bad_request``, with what is wrong.
    """
    if isinstance(data, str):
        raise WireError("bad_request", "messages are binary, this one is text")
    try:
        message = msgpack.unpackb(data, object_hook=_unpacked)
    except WireError:
        raise
    except Exception as error:  # whatever msgpack makes of arbitrary bytes
        raise WireError("bad_request", "a message is not msgpack") from error
    if not isinstance(message, dict):
        raise WireError("bad_request", "a message is not a map")
    return message


def _unpacked(value: dict[Any, Any]) -> Any:
    """An array for a map that describes one; other maps as they are."""
    if value.keys() != {"dtype", "shape", "bytes"}:
        return value
    dtype, shape, raw = value["dtype"], value["shape"], value["bytes"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise WireError("bad_request", f"an array's dtype is not one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not 1 <= len(shape) <= 8:
        raise WireError("bad_request", "an array's shape is not a list of 1 to 8 numbers")
    if not all(type(n) is int and n >= 1 for n in shape) or not isinstance(raw, bytes):
        raise WireError("bad_request", "an array's shape or bytes are of another type")
    try:
        array = np.frombuffer(raw, DTYPES[dtype]).reshape(shape)
    except (ValueError, OverflowError):
        raise WireError("bad_request", "an array's bytes are not those of its shape") from None
    return array.astype(array.dtype.newbyteorder("="), copy=False)  # read-only, of the message


def check_request(message: Mapping[str, Any]) -> None:
    """Check a request against :data:`REQUESTS`, and its seed.

    Raises:
        WireError: ``bad_request``.
    """
    kind = message.get("type")
    if not isinstance(kind, str) or kind not in REQUESTS:
        raise WireError("bad_request", f"unknown request; expected one of {', '.join(REQUESTS)}")
    if not message.keys() - {"type"} <= REQUESTS[kind]:
        takes = ", ".join(REQUESTS[kind]) or "nothing"
        raise WireError("bad_request", f"{kind} takes {takes}, and this request holds more")
    seed = message.get("seed", 0)
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise WireError("bad_request", f"seed must be a whole number from 0 to {MAX_SEED}")


def check_observation(given: Any, fields: ObsFields, *, most: int) -> Obs:
    """A request's observations as arrays ``[k, ...]``, ``k <= most``; one without k counts as one.

    Args:
        given: what the request holds, ``None`` if nothing.
        fields: what the policy observes.
        most: how many steps there may be.

    Raises:
        WireError: ``bad_observation``.
    """
    if isinstance(fields, ObsField):
        return _steps("obs", given, fields, most)
    if not isinstance(given, Mapping) or given.keys() != fields.keys():
        names = ", ".join(fields)
        raise WireError("bad_observation", f"obs must be a map of the arrays {names}")
    steps = {name: _steps(name, given[name], field, most) for name, field in fields.items()}
    if len(set(map(len, steps.values()))) > 1:
        raise WireError("bad_observation", "obs must hold as many steps of every array")
    return steps


def _steps(name: str, given: Any, field: ObsField, most: int) -> Array:
    if not isinstance(given, np.ndarray):
        raise WireError("bad_observation", f"{name} must be an array")
    wanted = np.dtype(field.dtype)
    if given.dtype != wanted and {given.dtype.kind, wanted.kind} != {"f"}:
        raise WireError("bad_observation", f"{name} must be {wanted}, got {given.dtype}")
    several = given.shape[1:] == field.shape and 1 < most >= len(given)
    if given.shape != field.shape and not several:
        one = ", ".join(map(str, field.shape))
        shapes = f"[{one}]" + (f" or [1..{most}, {one}]" if most > 1 else "")
        raise WireError("bad_observation", f"{name} must be {shapes}, got {list(given.shape)}")
    with np.errstate(over="ignore"):  # beyond float32 becomes infinite, and is refused below
        out = given.reshape(-1, *field.shape).astype(wanted, copy=False)
    if wanted.kind == "f" and not np.isfinite(out).all():
        raise WireError("bad_observation", f"{name} is not finite (as {wanted})")
    return out
