from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect
from websockets.sync.server import serve as listen

from diffpolicy.api import DiffusionPolicy
from diffpolicy.commands import serve as command
from diffpolicy.core.sampler import Sampler
from diffpolicy.data.normalize import Normalizer
from diffpolicy.data.observation import ObsField
from diffpolicy.networks.encoders import ENCODERS, Encoder
from diffpolicy.policies.spec import PolicySpec
from diffpolicy.runtime import wire_format as wire
from diffpolicy.runtime.batching import answer_rows
from diffpolicy.runtime.client import PolicyClient, ServerError
from diffpolicy.runtime.serve import ServeConfig, serve, serving

O, A, H, TO, TA = 3, 2, 8, 2, 3  # noqa: E741
TOKEN = "correct horse"


def small_policy(**changes) -> DiffusionPolicy:
    torch.manual_seed(0)
    statistics = {
        name: {"min": [-high] * dim, "max": [high] * dim, "mean": [0.0] * dim, "std": [0.5] * dim}
        | {"q01": [-high] * dim, "q99": [high] * dim, "count": 100}
        for name, dim, high in (("obs", O, 2.0), ("action", A, 1.0))
    }
    values = {
        "horizon": H,
        "n_obs_steps": TO,
        "n_action_steps": TA,
        "network": {"type": "mlp", "width": 16, "depth": 1},
        "sampler": Sampler(num_steps=4),
        "action_low": (-0.5, float("-inf")),
        "action_high": (0.5, 0.75),
    }
    spec = PolicySpec(O, A, **{**values, **changes})
    denoiser = spec.make_denoiser()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    normalizer = Normalizer.fit(statistics, {"obs": "minmax", "action": "minmax"})
    return DiffusionPolicy(spec, denoiser, normalizer)


class CountingPolicy(DiffusionPolicy):
    """Notes the rows of its calls, and can wait, fail or spoil a plan."""

    batches, wait_s = (), 0.0

    def make_plans(self, state, *, deterministic):
        self.batches = (*self.batches, len(state))
        time.sleep(self.wait_s)
        first = state.history[:, -1, 0]
        if (first == 66).any():
            raise RuntimeError("secret /home/me/policy.py")
        plans, nfe = super().make_plans(state, deterministic=deterministic)
        return np.where((first == 77)[:, None, None], np.nan, plans), nfe


class RowByRowPolicy(CountingPolicy):
    """Plans one row at a time, so that not even rounding depends on who shares a call."""

    def make_plans(self, state, *, deterministic):
        self.batches = (*self.batches, len(state))
        rows = (state.take([row]) for row in range(len(state)))
        made = [DiffusionPolicy.make_plans(self, r, deterministic=deterministic) for r in rows]
        return np.concatenate([plan for plan, _ in made]), made[0][1]


@pytest.fixture
def policy():
    # Clean plans as the output: rounding is not amplified as it is by dividing by a small alpha.
    base = small_policy(prediction="x0")
    return CountingPolicy(base.spec, base.denoiser, base.normalizer)


@pytest.fixture
def observations():
    return np.random.default_rng(0).uniform(-1, 1, (20, 8, O)).astype(np.float32)


def limited(**limits) -> ServeConfig:
    return ServeConfig(port=0, **limits)


def client_of(server, **options) -> PolicyClient:
    return PolicyClient(server.host, server.port, **options)


def alone(policy, observations, seed=0, start=None):
    """The actions of one environment that nothing else shares the policy with."""
    state, out = policy.initial_state([seed]) if start is None else start, []
    for obs in observations:
        action, state = DiffusionPolicy.act(policy, obs[None], state)
        out.append(action[0])
    return np.array(out), state


# Connections as a client that we did not write would use them.


@contextlib.contextmanager
def raw(server):
    with connect(f"ws://{server.host}:{server.port}", ping_interval=None) as connection:
        assert wire.decode(connection.recv(5))["version"] == wire.VERSION
        yield connection


def exchange(connection, message):
    connection.send(message if isinstance(message, bytes | str) else wire.encode(message))
    return wire.decode(connection.recv(5))


def farewell(connection) -> str:
    """Why the server has hung up."""
    with pytest.raises(ConnectionClosed) as error:
        connection.recv(5)
    return error.value.rcvd.reason


@contextlib.contextmanager
def tcp(server):
    with socket.create_connection((server.host, server.port), 5) as connection:
        yield connection


def hung_up(connection) -> bool:
    with contextlib.suppress(ConnectionResetError):
        while connection.recv(1 << 16):
            pass
    return True


def eventually(condition) -> bool:
    for _ in range(500):
        if condition():
            return True
        time.sleep(0.01)
    return False


# Every message.


def test_every_message_round_trip(policy, observations):
    with serving(policy) as server, client_of(server) as client:
        assert client.contract == {
            "version": 2,
            "obs_dim": O,
            "action_dim": A,
            "horizon": H,
            "n_obs_steps": TO,
            "n_action_steps": TA,
            "observation": {"shape": [O], "dtype": "float32"},
            "action_low": [-0.5, -np.inf],
            "action_high": [0.5, 0.75],
            "deterministic": False,
        }
        obs = observations[:, 0]
        expected, state = alone(policy, obs)
        got = [client.act(o) for o in obs]
        assert got[0].shape == (A,)
        assert got[0].dtype == np.float32
        np.testing.assert_array_equal(got, expected)

        client.reset(seed=5)
        np.testing.assert_array_equal([client.act(o) for o in obs], alone(policy, obs, 5)[0])

        plans = int(state.plans[0])
        assert client.stats() == {
            "actions": 40,
            "plans": 2 * plans,
            "nfe": 2 * plans * 4,
            "clients": 1,
            "requests": 40,
            "policy_calls": 2 * plans,
            "largest_batch": 1,
        }
        client.close()
        client.close()
        with pytest.raises(ConnectionError, match="is closed; make a new client"):
            client.act(obs[0])


def test_reset_without_a_seed_goes_on_in_the_stream(policy, observations):
    obs = observations[:5, 0]
    with serving(policy) as server, client_of(server) as client:
        np.testing.assert_array_equal([client.act(o) for o in obs], alone(policy, obs)[0])
        client.reset()
        got = [client.act(o) for o in obs]
    _, state = alone(policy, obs)
    expected, _ = alone(policy, obs, start=policy.forget(state, np.array([True])))
    np.testing.assert_array_equal(got, expected)


def test_plans_are_the_actions_that_act_would_give(policy, observations):
    """A client that sends all its observations gets the same actions in chunks as one by one."""
    obs = observations[: 3 * TA, 0]
    expected, _ = alone(policy, obs)
    with serving(policy) as server, client_of(server) as client:
        chunks = [client.plan(obs[0])]
        chunks += [client.plan(obs[at - TO + 1 : at + 1]) for at in (TA, 2 * TA)]
        np.testing.assert_array_equal(np.concatenate(chunks), expected)
        assert client.stats()["actions"] == 3 * TA
        # In the middle of a plan, plan makes a new one at once.
        client.act(obs[0])
        before = client.stats()["plans"]
        client.plan(obs[1])
        assert client.stats()["plans"] == before + 1


def test_plan_and_act_in_one_batch_need_one_round_of_denoising(policy, observations):
    obs = observations[:, 0]
    state = policy.initial_state([1, 2, 3])
    rounds = []

    class Watched(CountingPolicy):
        def make_plans(self, state, *, deterministic):
            rounds.append(len(state))
            return super().make_plans(state, deterministic=deterministic)

    watched = Watched(policy.spec, policy.denoiser, policy.normalizer)
    asked = [obs[0][None], obs[:TO], obs[2][None]]
    answers, after = answer_rows(watched, asked, [False, True, True], state, False)
    assert rounds == [3]
    assert [a.shape for a in answers] == [(A,), (TA, A), (TA, A)]
    for row, chunk in enumerate((False, True, True)):
        one, _ = answer_rows(policy, [asked[row]], [chunk], policy.initial_state([row + 1]), False)
        np.testing.assert_allclose(answers[row], one[0], atol=1e-6)
    np.testing.assert_array_equal(after.cursor, [TO, TO - 1 + TA, TO - 1 + TA])


def test_deterministic_server(policy, observations):
    config = ServeConfig(port=0, deterministic=True)
    with serving(policy, config) as server, client_of(server) as client:
        assert client.contract["deterministic"] is True
        first = client.act(observations[0, 0])
        client.reset(seed=9)
        np.testing.assert_array_equal(client.act(observations[0, 0]), first)


def test_float64_and_lists_are_taken_too(policy):
    with serving(policy) as server, client_of(server) as client:
        first = client.act([0.5, 1, 0])
        for obs in (np.array([0.5, 1, 0]), np.array([0.5, 1, 0], np.float32)):
            client.reset(seed=0)
            np.testing.assert_array_equal(client.act(obs), first)
        client.reset(seed=0)
        assert client.act([1, 0, 0]).shape == (A,)


# Clients beside each other.


def test_interleaved_clients_with_resets_do_not_touch_each_other(policy, observations):
    a, b = observations[:, 0], observations[:, 1]
    with serving(policy) as server, client_of(server) as one, client_of(server) as two:
        one.reset(seed=1)
        two.reset(seed=2)
        got_one, got_two = [], []
        for step in range(20):
            if step == 7:
                two.reset(seed=3)
            if step == 12:
                with client_of(server) as passing:  # comes, acts and goes
                    passing.act(a[0])
            got_one.append(one.act(a[step]))
            got_two.append(two.act(b[step]))
    np.testing.assert_allclose(got_one, alone(policy, a, 1)[0], atol=1e-6)
    np.testing.assert_allclose(got_two[:7], alone(policy, b[:7], 2)[0], atol=1e-6)
    np.testing.assert_allclose(got_two[7:], alone(policy, b[7:], 3)[0], atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "prediction", "tolerance"),
    [(CountingPolicy, "x0", 1e-6), (CountingPolicy, "eps", 1e-4), (RowByRowPolicy, "eps", 0)],
)
def test_eight_clients_share_calls_and_get_their_own_actions(
    kind, prediction, tolerance, observations
):
    base = small_policy(prediction=prediction)
    policy = kind(base.spec, base.denoiser, base.normalizer)
    config = ServeConfig(port=0, batch_window_ms=500)
    ticks = len(observations)
    with serving(policy, config) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(client_of(server)) for _ in range(8)]
        for seed, client in enumerate(clients):
            client.reset(seed=seed)
        policy.calls, policy.batches = 0, ()
        policy.wait_s = 0.002
        barrier = threading.Barrier(8)

        def drive(number):
            out = []
            for obs in observations[:, number]:
                barrier.wait()
                out.append(clients[number].act(obs))
            return out

        with ThreadPoolExecutor(8) as threads:
            got = list(threads.map(drive, range(8)))
        plans = 8 * -(-ticks // TA)
        assert sum(policy.batches) == plans
        assert len(policy.batches) <= plans / 4  # eight requests of a tick share one call or two
        assert clients[0].stats()["largest_batch"] == 8
    for number in range(8):
        expected, _ = alone(policy, observations[:, number], number)
        np.testing.assert_allclose(got[number], expected, rtol=0, atol=tolerance)


def test_a_plan_at_hand_does_not_wait_for_another_client_s_plan(policy, observations):
    obs = observations[:3, 0]
    with serving(policy) as server, client_of(server) as one, client_of(server) as two:
        got = [one.act(obs[0])]
        started, release = threading.Event(), threading.Event()
        make_plans = policy.make_plans

        def held(state, *, deterministic):
            started.set()
            assert release.wait(10)
            return make_plans(state, deterministic=deterministic)

        policy.make_plans = held
        with ThreadPoolExecutor(1) as threads:
            planning = threads.submit(two.act, obs[0])
            assert started.wait(10)
            got += [one.act(o) for o in obs[1:]]
            assert not planning.done()
            release.set()
            got_two = planning.result()
    np.testing.assert_array_equal(got, alone(small_policy(prediction="x0"), obs)[0])
    np.testing.assert_array_equal(got_two, got[0])


def test_max_batch_splits_a_tick(policy, observations):
    config = limited(batch_window_ms=50, max_batch=3)
    with serving(policy, config) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(client_of(server)) for _ in range(5)]
        with ThreadPoolExecutor(5) as threads:
            for step in range(4):
                list(threads.map(lambda c, s=step: c.act(observations[s, 0]), clients))
    assert max(policy.batches) <= 3


def test_a_lone_client_never_waits_for_the_window(policy, observations):
    config = ServeConfig(port=0, batch_window_ms=1000)
    # The second client only looks on.
    with serving(policy, config) as server, client_of(server) as client, client_of(server):
        began = time.monotonic()
        for obs in observations[:4, 0]:
            client.plan(obs)
        assert time.monotonic() - began < 3


def test_a_killed_client_frees_its_place(policy, observations):
    with serving(policy, limited(max_clients=2)) as server, client_of(server) as good:
        with raw(server) as connection:
            with pytest.raises(ServerError, match="all 2 places") as error:
                client_of(server)
            assert error.value.code == "busy"
            good.act(observations[0, 0])
            # Killed while the policy works for it: the answer has nobody to go to.
            policy.wait_s = 0.05
            connection.send(wire.encode({"type": "act", "obs": observations[0, 1]}))
            linger = struct.pack("ii", 1, 0)  # closing resets, as a killed process's host may
            connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            connection.socket.close()
        assert eventually(lambda: len(server.batcher.sessions) == 1)
        policy.wait_s = 0.0
        with client_of(server) as late:
            np.testing.assert_array_equal(
                [late.act(o) for o in observations[:5, 2]],
                alone(policy, observations[:5, 2])[0],
            )


# What is refused.


def test_tokens(policy):
    with serving(policy, ServeConfig(port=0, token=TOKEN)) as server:
        for token in (None, "", "wrong", TOKEN + "x", "\xe4" * 8):
            with pytest.raises(ServerError, match="missing or wrong") as error:
                client_of(server, token=token)
            assert error.value.code == "unauthorized"
        with client_of(server, token=TOKEN) as client:
            client.act(np.zeros(O))
        assert TOKEN not in repr(server.config)


def test_addresses_beyond_this_machine_need_a_token():
    for host in ("0.0.0.0", "", "::", "192.168.1.5", "robot.local"):
        with pytest.raises(ValueError, match="needs a token: give token_file=FILE"):
            ServeConfig(host)
        assert ServeConfig(host, token=TOKEN).host == host
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        assert ServeConfig(host).token is None


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"port": 70_000}, "port must be in"),
        ({"token": "short"}, "at least 8 characters"),
        ({"batch_window_ms": -1}, "batch_window_ms must be in"),
        ({"batch_window_ms": float("nan")}, "batch_window_ms must be in"),
        ({"max_clients": 0}, "max_clients must be at least 1"),
        ({"peer_timeout_s": 0}, "peer_timeout_s must be positive"),
        ({"reclaim_after_s": 0}, "reclaim_after_s must be positive"),
    ],
)
def test_unusable_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        ServeConfig(**settings)


def test_a_taken_address(policy):
    config = ServeConfig(port=0)
    with (
        serving(policy, config) as server,
        pytest.raises(OSError, match=r"is taken; choose another port="),
        serving(policy, ServeConfig(port=server.port)),
    ):
        pass


def test_web_pages_and_strangers_are_turned_away(policy):
    with serving(policy, limited(peer_timeout_s=0.5)) as server:
        with pytest.raises(InvalidStatus, match="403"):  # a page asks through its browser
            connect(f"ws://{server.host}:{server.port}", origin="http://localhost").__enter__()
        for said in (b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 100, bytes(range(256)) * 300):
            with tcp(server) as connection:
                connection.sendall(said)
                assert hung_up(connection)
        with client_of(server) as client:
            client.act(np.zeros(O))


@pytest.mark.parametrize(
    "obs",
    [
        np.zeros(O + 1, np.float32),
        np.zeros((1, O), np.float32),
        np.zeros((O, 1), np.float32),
        np.zeros(O, np.int64),
        np.zeros(O, np.uint8),
        np.array([0, np.nan, 0], np.float32),
        np.array([0, 0, np.inf]),
        np.array([0, 1e300, 0]),
        [0.0, 0.0, 0.0],
        {"obs": np.zeros(O, np.float32)},
        None,
    ],
)
def test_bad_observations_are_refused_and_change_nothing(policy, observations, obs):
    good = observations[:4, 0]
    with serving(policy) as server, raw(server) as connection:
        got = []
        for o in good:
            reply = exchange(connection, {"type": "act", "obs": obs})
            assert (reply["type"], reply["code"]) == ("error", "bad_observation")
            got.append(exchange(connection, {"type": "act", "obs": o})["action"])
    np.testing.assert_array_equal(got, alone(policy, good)[0])


class Seeing(Encoder):
    """An arm and a camera of one byte, as one vector."""

    def __init__(self, fields, n_obs_steps):
        super().__init__()
        self.cond_dim = 3 * n_obs_steps

    def forward(self, obs):
        camera = obs["camera"].flatten(2) * self.scale + self.offset
        return torch.cat([obs["arm"], camera], -1).flatten(1)


def by_name(policy):
    """The same policy, which observes an arm and a camera."""
    fields = {"arm": ObsField((2,)), "camera": ObsField((1, 1, 1), "uint8", "image")}
    encoder = {"type": "seeing"}
    spec = replace(policy.spec, obs_dim=2, observations=fields, encoder=encoder)
    denoiser = spec.make_denoiser()
    denoiser.load_state_dict(policy.denoiser.state_dict())
    parts, modes = policy.normalizer.to_tensors(), policy.normalizer.modes
    encoder = denoiser.encoder
    encoder.scale, encoder.offset = parts["obs.scale"][2], parts["obs.offset"][2]
    scale, offset = (
        {"obs.arm": parts[f"obs.{kind}"][:2], "action": parts[f"action.{kind}"]}
        for kind in ("scale", "offset")
    )
    named = Normalizer({"obs.arm": modes["obs"], "action": modes["action"]}, scale, offset)
    return DiffusionPolicy(spec, denoiser, named)


def test_observations_by_name(policy, observations, monkeypatch):
    monkeypatch.setitem(ENCODERS, "seeing", Seeing)
    named = by_name(policy)
    flat = np.round(np.abs(observations[:, 0]))
    asked = [{"arm": o[:2], "camera": o[2:].reshape(1, 1, 1).astype(np.uint8)} for o in flat]
    with serving(named) as server, client_of(server) as client:
        assert client.contract["observation"] == {
            "arm": {"shape": [2], "dtype": "float32"},
            "camera": {"shape": [1, 1, 1], "dtype": "uint8"},
        }
        got = [client.act(o) for o in asked]
        client.reset(seed=0)
        two = {name: np.stack([o[name] for o in asked[:2]]) for name in asked[0]}
        assert client.plan(two).shape == (TA, A)
        for wrong in (
            flat[0],
            {"arm": asked[0]["arm"]},
            {**asked[0], "camera": np.zeros((1, 1, 1), np.float32)},
            {**asked[0], "arm": two["arm"]},
        ):
            with pytest.raises(ServerError) as error:
                client.plan(wrong)
            assert error.value.code == "bad_observation"
    np.testing.assert_array_equal(got, alone(policy, flat)[0])


def test_plan_takes_at_most_the_policy_s_history(policy):
    with serving(policy) as server, client_of(server) as client:
        assert client.plan(np.zeros((TO, O))).shape == (TA, A)
        with pytest.raises(ServerError, match=r"\[3\] or \[1..2, 3\], got \[3, 3\]") as error:
            client.plan(np.zeros((TO + 1, O)))
        assert error.value.code == "bad_observation"


def test_slow_and_silent_peers_are_hung_up_on(policy):
    with serving(policy, limited(peer_timeout_s=0.2, idle_timeout_s=1.0)) as server:
        with tcp(server) as connection:  # says nothing at all
            assert hung_up(connection)
        with raw(server) as connection:  # stops inside a message
            connection.socket.sendall(
                b"\x82\xfe\x01\x00" + bytes(4)
            )  # 256 bytes, none of which come
            assert "keepalive ping timeout" in farewell(connection)
        with raw(server) as connection:
            time.sleep(0.5)  # thinking between requests is allowed
            assert exchange(connection, {"type": "stats"})["type"] == "stats"
            assert "no request for 1.0 seconds" in farewell(connection)


def test_messages_over_the_limit_end_the_connection(policy):
    with (
        serving(policy, limited()) as server,
        client_of(server) as good,
        raw(server) as connection,
    ):
        connection.send(bytes((1 << 22) + 1))
        assert "exceeds limit of 4194304 bytes" in farewell(connection)
        assert good.act(np.zeros(O)).shape == (A,)


def test_idle_clients_do_not_keep_others_out(policy, observations):
    obs = observations[0, 0]
    with (
        serving(policy, limited(max_clients=2, reclaim_after_s=0.3)) as server,
        raw(server) as idle,
        client_of(server) as busy,
    ):
        with pytest.raises(ServerError, match="all 2 places"):
            client_of(server)  # none has been idle for long enough
        time.sleep(0.35)
        busy.act(obs)
        with client_of(server) as new:
            assert "while another client wanted the place" in farewell(idle)
            assert new.act(obs).shape == busy.act(obs).shape == (A,)
            assert new.stats()["clients"] == 2
            with pytest.raises(ServerError, match="all 2 places"):
                client_of(server)
    with serving(policy, limited(max_clients=1, reclaim_after_s=None)) as server, raw(server):
        time.sleep(0.1)
        with pytest.raises(ServerError, match="all 1 places"):
            client_of(server)


def test_a_client_that_works_is_not_idle(policy, observations):
    policy.wait_s = 0.5
    with (
        serving(policy, limited(max_clients=1, reclaim_after_s=0.1)) as server,
        ThreadPoolExecutor(1) as threads,
        client_of(server) as slow,
    ):
        answer = threads.submit(slow.act, observations[0, 0])
        time.sleep(0.25)
        with pytest.raises(ServerError, match="all 1 places"):
            client_of(server)
        assert answer.result().shape == (A,)


def test_connections_that_never_greet_are_limited_too(policy):
    with serving(policy, limited(max_clients=1)) as server, contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(tcp(server)) for _ in range(17)]
        with tcp(server) as one_more:
            assert hung_up(one_more)
        for connection in waiting:
            connection.close()


# The policy fails.


def test_a_policy_that_raises_tells_nobody_but_the_log(policy, observations, caplog):
    config = ServeConfig(port=0, batch_window_ms=200)
    poison = np.array([66, 0, 0], np.float32)
    with contextlib.ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(2))
        server = stack.enter_context(serving(policy, config))
        bad, good = (stack.enter_context(client_of(server)) for _ in range(2))
        got = []
        for step in range(TA):  # until both need a plan
            bad.act(observations[step, 0])
            got.append(good.act(observations[step, 1]))
        failing = threads.submit(bad.act, poison)  # both in one batch
        got.append(good.act(observations[TA, 1]))
        with pytest.raises(ServerError) as error:
            failing.result()
        assert 2 in policy.batches
        assert error.value.code == "internal"
        assert "secret" not in str(error.value)
        expected, _ = alone(policy, observations[: TA + 1, 1])
        np.testing.assert_allclose(got, expected, atol=1e-6)
        bad.act(observations[1, 0])
    assert "secret /home/me/policy.py" in caplog.text


def test_actions_that_are_not_finite_never_leave(policy, observations, caplog):
    with serving(policy) as server, client_of(server) as client:
        client.act(observations[0, 0])
        client.reset()
        with pytest.raises(ServerError, match="not finite; a new episode was begun") as error:
            client.act([77, 0, 0])
        assert error.value.code == "policy_failed"
        plans = client.stats()["plans"]
        assert np.isfinite(client.act(observations[1, 0])).all()
        assert client.stats()["plans"] == plans + 1
    assert "not finite" in caplog.text


# The client.


def test_client_without_a_server():
    with socket.socket() as reserved:  # bound, but it does not listen
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        with pytest.raises(ConnectionError, match="start one with: diffpolicy serve checkpoint="):
            PolicyClient(port=port)


def test_client_gives_up_on_a_slow_policy(policy, observations):
    with serving(policy) as server, client_of(server, timeout=0.1) as client:
        policy.wait_s = 0.3
        with pytest.raises(ConnectionError, match=r"did not answer act within 0.1 seconds"):
            client.act(observations[0, 0])
        policy.wait_s = 0.0
        # The late answer is not taken for the next one's.
        with pytest.raises(ConnectionError, match="make a new client"):
            client.act(observations[1, 0])


def test_client_notices_that_the_server_stops(policy, observations):
    with serving(policy) as server:
        client = client_of(server)
        client.act(observations[0, 0])
    with pytest.raises((ServerError, ConnectionError), match=r"shutting_down|lost the connection"):
        client.act(observations[1, 0])
    client.close()


HELLO = {"version": 2, "action_dim": A, "n_action_steps": TA}


@pytest.mark.parametrize(
    ("hello", "reply", "match"),
    [
        ({"version": 1}, None, "sent no contract of version 2"),
        (b"hello", None, "not msgpack"),
        (HELLO, {"type": "ok"}, "something else than act"),
        (HELLO, {"type": "act"}, "sent no float32 action"),
        (HELLO, {"type": "act", "action": np.zeros(A + 1, np.float32)}, "sent no float32 action"),
        (HELLO, {"type": "act", "action": np.array([0, np.nan], np.float32)}, "not finite"),
        (HELLO, "text", "this one is text"),
    ],
)
def test_client_trusts_no_server(hello, reply, match):
    def answer(connection):
        for message in (hello, reply):
            if message is not None:
                plain = isinstance(message, bytes | str)
                connection.send(message if plain else wire.encode(message))
            with contextlib.suppress(ConnectionClosed):
                connection.recv()

    def use(port):
        with PolicyClient(port=port, timeout=2) as client:
            client.act(np.zeros(O))

    with listen(answer, "127.0.0.1", 0) as listener:
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        try:
            with pytest.raises(ServerError, match=match) as error:
                use(listener.socket.getsockname()[1])
            assert error.value.code == "bad_reply"
        finally:
            listener.shutdown()
            thread.join()


# Garbage over a live connection.


def garbage(count, rng):
    """Good requests with some bytes changed, cut off, or others in their place."""
    obs = np.zeros(O, np.float32)
    requests = [
        wire.encode(message)
        for message in (
            {"type": "act", "obs": obs},
            {"type": "plan", "obs": obs},
            {"type": "reset", "seed": 1},
            {"type": "stats"},
        )
    ]
    for number in range(count):
        message = bytearray(requests[number % len(requests)])
        for _ in range(int(rng.integers(1, 5))):
            message[rng.integers(len(message))] = rng.integers(256)
        if rng.random() < 0.3:
            del message[rng.integers(len(message)) :]
        yield rng.bytes(50) if rng.random() < 0.1 else bytes(message)


def test_garbage_over_a_live_connection_is_answered_in_one_line_each(policy, observations, caplog):
    with serving(policy) as server, client_of(server) as good:
        with raw(server) as connection:
            mutants = garbage(1000, np.random.default_rng(3))
            replies = [exchange(connection, message) for message in mutants]
        with tcp(server) as stranger, contextlib.suppress(OSError):  # no WebSocket either
            stranger.sendall(np.random.default_rng(4).bytes(10_000))
            assert hung_up(stranger)
        assert eventually(lambda: len(server.batcher.sessions) == 1)
        good.reset(seed=0)  # and still a good client is served as ever
        got = [good.act(o) for o in observations[:5, 0]]
        np.testing.assert_array_equal(got, alone(policy, observations[:5, 0])[0])
    errors = [reply for reply in replies if reply["type"] == "error"]
    assert len(errors) > 300
    assert len(replies) - len(errors) > 20
    assert {e["code"] for e in errors} >= {"bad_request", "bad_observation"}
    text = "\n".join(e["message"] for e in errors)
    assert text.count("\n") == len(errors) - 1
    for leak in ("Traceback", "File ", ".py", "site-packages", "Error("):
        assert leak not in text
    assert not any(record.exc_info for record in caplog.records)  # nothing of it was unexpected


# The command.


def test_command_refuses_before_it_loads():
    with pytest.raises(ValueError, match=r"unknown option 'prot'; .* did you mean 'port'"):
        command.run(["checkpoint=nowhere", "prot=1"])
    with pytest.raises(ValueError, match="needs a token: give token_file="):
        command.run(["checkpoint=nowhere", "host=0.0.0.0"])
    with pytest.raises(ValueError, match="deterministic must be true or false"):
        command.run(["checkpoint=nowhere", "deterministic=maybe"])
    with pytest.raises(ValueError, match="no policy in nowhere"):
        command.run(["checkpoint=nowhere"])


def test_command_wants_one_line_in_the_token_file(tmp_path):
    file = tmp_path / "token"
    for text in ("", "\n", "one line too\nmany here"):
        file.write_text(text)
        with pytest.raises(ValueError, match="must hold one line"):
            command.run(["checkpoint=nowhere", f"token_file={file}"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_until_a_signal(policy, number):
    ports = []

    def ready(server):
        ports.append(server.port)
        signal.raise_signal(number)

    serve(policy, ServeConfig(port=0), ready=ready)
    assert len(ports) == 1


def test_command_serves_until_it_is_told_to_stop(tmp_path, observations):
    policy = small_policy()
    policy.save(tmp_path / "run")
    (tmp_path / "token").write_text(TOKEN + "\n")
    arguments = [f"checkpoint={tmp_path / 'run'}", f"token_file={tmp_path / 'token'}", "port=0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "diffpolicy.cli", "serve", *arguments, "device=cpu", "threads=1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("serving "), process.stderr.read()
        host, port = line.split()[-1].rsplit(":", 1)
        with PolicyClient(host, int(port), TOKEN) as client:
            obs = observations[:5, 0]
            got = [client.act(o) for o in obs]
            process.send_signal(signal.SIGTERM)
            output, errors = process.communicate(timeout=20)
            with pytest.raises((ServerError, ConnectionError)):
                client.act(obs[0])
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, output, errors) == (0, "stopped\n", "")
    np.testing.assert_allclose(got, alone(policy, obs)[0], atol=1e-6)
