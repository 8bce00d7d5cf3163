from __future__ import annotations

import msgpack
import numpy as np
import pytest

from diffpolicy.runtime import wire_format as wire
from diffpolicy.runtime.wire_format import WireError


def test_the_documented_bytes():
    # Packed by msgpack alone, as a client in another language would.
    floats = bytes.fromhex("0000803f 00000040 00004040")
    obs = {"dtype": "float32", "shape": [3], "bytes": floats}
    packed = msgpack.packb({"type": "act", "obs": obs})
    message = wire.decode(packed)
    assert message.keys() == {"type", "obs"}
    np.testing.assert_array_equal(message["obs"], np.array([1, 2, 3], np.float32))
    assert wire.encode({"type": "act", "obs": np.array([1, 2, 3], np.float32)}) == packed


@pytest.mark.parametrize("dtype", list(wire.DTYPES))
def test_every_type_comes_back_bit_for_bit(dtype):
    rng = np.random.default_rng(0)
    sent = {
        "a": rng.integers(0, 200, (2, 3, 4)).astype(dtype),
        "b": rng.integers(0, 200, (5, 4)).astype(dtype)[:, ::2],  # not contiguous
        "c": rng.integers(0, 200, 3).astype(np.dtype(dtype).newbyteorder(">")),
    }
    got = wire.decode(wire.encode({"type": "x", "n": 1, "t": "ü", "obs": sent}))
    assert (got["n"], got["t"], list(got["obs"])) == (1, "ü", ["a", "b", "c"])
    for name, array in sent.items():
        assert got["obs"][name].dtype == np.dtype(dtype)
        np.testing.assert_array_equal(got["obs"][name], array)


@pytest.mark.parametrize("value", [np.zeros(2, np.complex64), np.array([None]), object()])
def test_what_cannot_be_sent(value):
    with pytest.raises(TypeError, match="cannot send"):
        wire.encode({"type": "x", "a": value})


def array(**changes) -> dict:
    return {"dtype": "float32", "shape": [2], "bytes": bytes(8), **changes}


BAD_MESSAGES = {
    "empty": b"",
    "text": "text",
    "no msgpack": b"\xc1",
    "no UTF-8": b"\x81\xa1\xff\x01",
    "more than one": msgpack.packb({}) * 2,
    "half": msgpack.packb({"type": "act"})[:-1],
    "deep nesting": b"\x91" * 100_000 + b"\x01",
    "an enormous list": b"\xdd\xff\xff\xff\xff",
    "a number as a key": msgpack.packb({1: 2}),
    "a list": msgpack.packb([1]),
    "an array alone": msgpack.packb(array()),
    "object dtype": {"a": array(dtype="object")},
    "NumPy's dtype": {"a": array(dtype="<f4")},
    "dtype is a list": {"a": array(dtype=["float32"])},
    "shape is no list": {"a": array(shape=2)},
    "no shape": {"a": array(shape=[])},
    "nine dimensions": {"a": array(shape=[1] * 8 + [2])},
    "dimension 0": {"a": array(shape=[0], bytes=b"")},
    "dimension -1": {"a": array(shape=[-1])},
    "dimension true": {"a": array(shape=[True, 2])},
    "dimension 2.0": {"a": array(shape=[2.0])},
    "product overflows": {"a": array(shape=[2**63, 2**63])},
    "bytes are text": {"a": array(bytes="12345678")},
    "too few bytes": {"a": array(bytes=bytes(7))},
    "too many bytes": {"a": array(bytes=bytes(12))},
}


@pytest.mark.parametrize("what", list(BAD_MESSAGES))
def test_bad_messages_are_refused(what):
    bad = BAD_MESSAGES[what]
    with pytest.raises(WireError) as error:
        wire.decode(msgpack.packb(bad) if isinstance(bad, dict) else bad)
    assert error.value.code == "bad_request"
    assert "\n" not in error.value.message
    assert len(error.value.message) <= 300


OBS = np.zeros(3, np.float32)
GOOD = [
    {"type": "reset"},
    {"type": "reset", "seed": 2**63 - 1},
    {"type": "act", "obs": OBS},
    {"type": "plan", "obs": {"a": OBS, "b": np.ones((2, 3)), "c": np.arange(4, dtype="u1")}},
    {"type": "stats"},
]
BAD = [
    {},
    {"type": "exec"},
    {"type": 1},
    {"type": ["act"]},
    {"type": "reset", "seed": 1.0},
    {"type": "reset", "seed": True},
    {"type": "reset", "seed": None},
    {"type": "reset", "seed": -1},
    {"type": "reset", "seed": 2**63},
    {"type": "act", "obs": OBS, "x": OBS},
    {"type": "act", "seed": 1, "obs": OBS},
    {"type": "stats", "obs": OBS},
]


def test_requests():
    for message in GOOD:
        wire.check_request(wire.decode(wire.encode(message)))
    for message in BAD:
        with pytest.raises(WireError) as error:
            wire.check_request(wire.decode(wire.encode(message)))
        assert error.value.code == "bad_request"


def mutants(count: int, rng: np.random.Generator):
    """Good messages with bytes flipped, parts cut, repeated and exchanged; drawn in bulk."""
    messages = [wire.encode(m) for m in GOOD]
    which, kind = rng.integers(len(messages), size=count), rng.integers(4, size=count)
    draws, values = rng.random((count, 4)), rng.integers(256, size=(count, 4), dtype=np.uint8)
    for i in range(count):
        message = bytearray(messages[which[i]])
        at = (draws[i] * len(message)).astype(int).tolist()
        first, last = sorted(at[:2])
        match kind[i]:
            case 0:  # some bytes replaced
                for place, value in zip(at, values[i].tolist(), strict=True):
                    message[place] = value
            case 1:  # one bit
                message[at[0]] ^= 1 << int(values[i, 0] & 7)
            case 2:  # a part cut out
                del message[first:last]
            case 3:  # a part repeated
                message[last:last] = message[first:last]
        yield bytes(message)


def arrays(value) -> list[np.ndarray]:
    if isinstance(value, np.ndarray):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [array for one in inner for array in arrays(one)]


def test_mutated_messages():
    """Nothing but a message or a WireError comes out, and arrays are not larger than it was."""
    outcomes, texts = {"message": 0, "request": 0, "bad_request": 0}, set()
    for data in mutants(40_000, np.random.default_rng(7)):
        try:
            message = wire.decode(data)
            outcomes["message"] += 1
            assert sum(a.nbytes for a in arrays(message)) < len(data)
            wire.check_request(message)
            outcomes["request"] += 1
        except WireError as error:
            outcomes[error.code] += 1
            texts.add(error.message)
    assert not any("\n" in text for text in texts)
    assert min(outcomes.values()) > 500  # the mutations reach every stage
