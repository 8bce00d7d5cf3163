from __future__ import annotations

import socket
import threading

import numpy as np
import pytest

from diffpolicy.rollout.pool import wire


@pytest.fixture
def sockets():
    pair = socket.socketpair()
    yield pair
    for one in pair:
        one.close()


def test_round_trip(sockets):
    values = {"text": "ü", "number": 0.1, "none": None, "list": [1, 2]}
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "empty": np.zeros((0, 3), np.int64),
        "scalar": np.array(True),
        "turned": np.arange(6, dtype=np.float64).reshape(2, 3).T,
    }
    wire.send(sockets[0], values, arrays)
    got, back = wire.receive(sockets[1], 1.0)
    assert got == values
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)


def test_large_messages_arrive_whole(sockets):
    array = np.random.default_rng(0).integers(0, 255, (600, 600, 3)).astype(np.uint8)
    sender = threading.Thread(target=wire.send, args=(sockets[0], {}, {"frame": array}))
    sender.start()
    np.testing.assert_array_equal(wire.receive(sockets[1], 10.0)[1]["frame"], array)
    sender.join()


def test_a_peer_that_stops_in_the_middle_or_goes(sockets):
    sockets[0].sendall(b"\0\0\0\5\0\0")
    with pytest.raises(TimeoutError):
        wire.receive(sockets[1], 0.05)
    sockets[0].close()
    with pytest.raises(EOFError):
        wire.receive(sockets[1], 1.0)


def test_no_objects(sockets):
    with pytest.raises(TypeError, match="dtype object"):
        wire.send(sockets[0], {}, {"a": np.array([{}])})
