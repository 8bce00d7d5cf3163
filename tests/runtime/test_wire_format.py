from __future__ import annotations

import json
import struct

import numpy as np
import pytest

from diffpolicy.runtime import wire_format as wire
from diffpolicy.runtime.wire_format import Message, WireError


def body_of(header: object, raw: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<I", len(text)) + text + raw


def tensor(name: str = "obs", dtype: str = "float32", shape: object = (2,)) -> dict:
    return {"name": name, "dtype": dtype, "shape": shape}


def test_the_documented_bytes():
    # Written out by hand, as a client in another language would.
    header = b'{"type":"act","tensors":[{"name":"obs","dtype":"float32","shape":[3]}]}     '
    floats = bytes.fromhex("0000803f 00000040 00004040")
    frame = bytes.fromhex("5c000000 4c000000") + header + floats
    assert wire.body_length(frame[:4]) == len(frame) - 4 == 92
    message = wire.decode(frame[4:])
    assert message.type == "act"
    assert message.fields == {}
    np.testing.assert_array_equal(message.tensors["obs"], [1, 2, 3])
    assert header.decode().strip() in (wire.__doc__ or "")
    # What we send ourselves is the same without the blanks.
    sent = wire.encode(Message("act", {}, {"obs": np.array([1, 2, 3], np.float32)}))
    assert sent == bytes.fromhex("57000000 47000000") + header.rstrip() + floats


@pytest.mark.parametrize("dtype", list(wire.DTYPES))
def test_every_type_comes_back_bit_for_bit(dtype):
    rng = np.random.default_rng(0)
    sent = {
        "a": rng.integers(0, 200, (2, 3, 4)).astype(dtype),
        "b": rng.integers(0, 200, (5, 4)).astype(dtype)[:, ::2],  # not contiguous
        "c": rng.integers(0, 200, 3).astype(np.dtype(dtype).newbyteorder(">")),
    }
    frame = wire.encode(Message("x", {"n": 1, "t": "ü"}, sent))
    got = wire.decode(frame[4:])
    assert got.fields == {"n": 1, "t": "ü"}
    assert list(got.tensors) == ["a", "b", "c"]
    for name, array in sent.items():
        assert got.tensors[name].dtype == np.dtype(dtype)
        assert got.tensors[name].flags.writeable
        np.testing.assert_array_equal(got.tensors[name], array)


def test_what_cannot_be_sent():
    with pytest.raises(ValueError, match="cannot send complex64"):
        wire.encode(Message("x", {}, {"a": np.zeros(2, np.complex64)}))
    with pytest.raises(ValueError, match="cannot send object"):
        wire.encode(Message("x", {}, {"a": np.array([None])}))
    with pytest.raises(ValueError, match="JSON compliant"):
        wire.encode(Message("x", {"a": float("nan")}))
    with pytest.raises(ValueError, match="over 65536"):
        wire.encode(Message("x", {"a": "b" * 70_000}))


def test_lengths_are_checked_before_anything_is_read():
    assert wire.body_length(struct.pack("<I", 100), limit=100) == 100
    with pytest.raises(WireError, match="101 bytes is over the limit of 100") as error:
        wire.body_length(struct.pack("<I", 101), limit=100)
    assert error.value.code == "too_large"
    assert error.value.fatal
    with pytest.raises(WireError, match="over the limit"):
        wire.body_length(b"GET ")  # a web browser
    with pytest.raises(WireError, match="too short"):
        wire.body_length(struct.pack("<I", 5))


BAD_BODIES = {
    "empty": b"",
    "header beyond the body": struct.pack("<I", 100) + b"{}",
    "huge header": struct.pack("<I", 2**32 - 1) + b"{}",
    "no JSON": body_of(b"hello"),
    "no UTF-8": body_of(b'{"type":"\xff"}'),
    "NaN": body_of(b'{"type":"a","x":NaN}'),
    "infinity": body_of(b'{"type":"a","x":-Infinity}'),
    "a key twice": body_of(b'{"type":"a","type":"b"}'),
    "deep nesting": body_of(b"[" * 30_000 + b"]" * 30_000),
    "an enormous number": body_of(b'{"type":' + b"9" * 20_000 + b"}"),
    "a list": body_of([1]),
    "no type": body_of({"a": 1}),
    "type is no text": body_of({"type": 1}),
    "bytes after the header": body_of({"type": "a"}, b"x"),
    "tensors is no list": body_of({"type": "a", "tensors": {}}),
    "too many tensors": body_of({"type": "a", "tensors": [tensor(str(i)) for i in range(17)]}),
    "entry is no object": body_of({"type": "a", "tensors": [1]}),
    "entry has more keys": body_of({"type": "a", "tensors": [{**tensor(), "x": 1}]}, bytes(8)),
    "bad name": body_of({"type": "a", "tensors": [tensor(name="")]}, bytes(8)),
    "name is no text": body_of({"type": "a", "tensors": [tensor(name=1)]}, bytes(8)),
    "object dtype": body_of({"type": "a", "tensors": [tensor(dtype="object")]}, bytes(16)),
    "NumPy's dtype": body_of({"type": "a", "tensors": [tensor(dtype="<f4")]}, bytes(8)),
    "dtype is a list": body_of({"type": "a", "tensors": [tensor(dtype=["float32"])]}, bytes(8)),
    "no shape": body_of({"type": "a", "tensors": [tensor(shape=[])]}, bytes(4)),
    "nine dimensions": body_of({"type": "a", "tensors": [tensor(shape=[1] * 9)]}, bytes(4)),
    "dimension 0": body_of({"type": "a", "tensors": [tensor(shape=[0])]}),
    "dimension -1": body_of({"type": "a", "tensors": [tensor(shape=[-1])]}, bytes(4)),
    "dimension true": body_of({"type": "a", "tensors": [tensor(shape=[True])]}, bytes(4)),
    "dimension 2.0": body_of({"type": "a", "tensors": [tensor(shape=[2.0])]}, bytes(8)),
    "product overflows": body_of({"type": "a", "tensors": [tensor(shape=[90] * 8)]}, bytes(8)),
    "too few bytes": body_of({"type": "a", "tensors": [tensor()]}, bytes(7)),
    "too many bytes": body_of({"type": "a", "tensors": [tensor()]}, bytes(9)),
    "a name twice": body_of({"type": "a", "tensors": [tensor(), tensor()]}, bytes(16)),
}


@pytest.mark.parametrize("what", list(BAD_BODIES))
def test_bad_bodies_are_malformed(what):
    with pytest.raises(WireError) as error:
        wire.decode(BAD_BODIES[what])
    assert error.value.code == "malformed"
    assert "\n" not in error.value.message
    assert len(error.value.message) <= 300


OBS = {"obs": np.zeros(3, np.float32)}
GOOD = [
    Message("hello", {"version": 1}),
    Message("hello", {"version": 1, "token": "abc"}),
    Message("reset"),
    Message("reset", {"seed": 2**63 - 1}),
    Message("act", {}, OBS),
    Message("plan", {}, OBS),
    Message("stats"),
    Message("close"),
]
BAD = {
    "unknown": Message("exec"),
    "hello without version": Message("hello"),
    "version is text": Message("hello", {"version": "1"}),
    "version is true": Message("hello", {"version": True}),
    "token is a number": Message("hello", {"version": 1, "token": 5}),
    "hello with more": Message("hello", {"version": 1, "user": "me"}),
    "seed is a number with a point": Message("reset", {"seed": 1.0}),
    "seed is true": Message("reset", {"seed": True}),
    "seed is null": Message("reset", {"seed": None}),
    "seed below 0": Message("reset", {"seed": -1}),
    "seed too large": Message("reset", {"seed": 2**63}),
    "act without obs": Message("act"),
    "act with more tensors": Message("act", {}, {**OBS, "x": OBS["obs"]}),
    "act with entries": Message("act", {"seed": 1}, OBS),
    "tensors of close": Message("close", {}, OBS),
}


@pytest.mark.parametrize("message", GOOD, ids=lambda m: m.type)
def test_good_requests_pass(message):
    wire.check_request(wire.decode(wire.encode(message)[4:]))


@pytest.mark.parametrize("what", list(BAD))
def test_bad_requests_are_refused(what):
    with pytest.raises(WireError) as error:
        wire.check_request(BAD[what])
    assert error.value.code == "bad_request"
    assert not error.value.fatal


def test_another_version_is_named_whatever_else_it_says():
    with pytest.raises(WireError, match="version 1 of the protocol") as error:
        wire.check_request(Message("hello", {"version": 2, "colour": "red"}))
    assert error.value.code == "wrong_version"


def test_every_code_is_explained_and_fatal_ones_are_the_connection_s():
    assert wire.FATAL_CODES.issubset(wire.ERROR_CODES)
    assert {"busy", "unauthorized", "shutting_down"} <= wire.FATAL_CODES
    assert "bad_request" not in wire.FATAL_CODES


def mutants(count: int, rng: np.random.Generator):
    """Good frames with bytes flipped, parts cut, repeated and exchanged; drawn in bulk."""
    frames = [wire.encode(m) for m in GOOD]
    frames.append(
        wire.encode(Message("plan", {}, {"obs": np.ones((2, 3)), "x": np.arange(4, dtype="u1")}))
    )
    which, kind = rng.integers(len(frames), size=count), rng.integers(6, size=count)
    draws, values = rng.random((count, 4)), rng.integers(256, size=(count, 4), dtype=np.uint8)
    small = rng.integers(-3, 4, size=count)
    for i in range(count):
        frame = bytearray(frames[which[i]])
        at = (draws[i] * len(frame)).astype(int).tolist()
        first, last = sorted(at[:2])
        match kind[i]:
            case 0:  # some bytes replaced
                for place, value in zip(at, values[i].tolist(), strict=True):
                    frame[place] = value
            case 1:  # one bit
                frame[at[0]] ^= 1 << int(values[i, 0] & 7)
            case 2:  # a part cut out
                del frame[first:last]
            case 3:  # a part repeated
                frame[last:last] = frame[first:last]
            case 4:  # a digit: shapes, versions, seeds
                digits = [j for j, b in enumerate(frame) if 48 <= b <= 57]
                frame[digits[at[0] % len(digits)] if digits else at[0]] = 48 + values[i, 0] % 10
            case 5:  # lengths slightly off
                frame[4] = (frame[4] + int(small[i])) % 256
        yield bytes(frame)


def test_hundred_thousand_mutated_frames():
    """Nothing but a message or a WireError comes out, and no tensor is larger than its frame."""
    outcomes, messages = {"message": 0, "request": 0}, set()
    for frame in mutants(100_000, np.random.default_rng(7)):
        try:
            if len(frame) < 4:
                continue
            wire.body_length(frame[:4], limit=4096)
            message = wire.decode(frame[4:])
            outcomes["message"] += 1
            assert sum(t.nbytes for t in message.tensors.values()) < len(frame)
            wire.check_request(message)
            outcomes["request"] += 1
        except WireError as error:
            outcomes[error.code] = outcomes.get(error.code, 0) + 1
            messages.add(error.message)
    assert set(outcomes) <= {"message", "request", *wire.ERROR_CODES}
    assert not any("\n" in message for message in messages)
    # The mutations reach every stage.
    assert min(outcomes[k] for k in ("message", "request", "malformed", "bad_request")) > 1000
    assert outcomes["too_large"] > 100
    assert outcomes["wrong_version"] > 10
