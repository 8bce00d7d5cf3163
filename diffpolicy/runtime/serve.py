"""A policy server: clients send observations over TCP and get actions back.

:mod:`diffpolicy.runtime.wire_format` documents the bytes, :mod:`diffpolicy.runtime.client` is a
client in Python. The memory of every client's policy lives here, one row each, so that one client's
reset, crash or garbage never touches another; requests that arrive together are answered by one
call of the policy.

The connection is not encrypted. The server listens on this machine only unless it is told
otherwise, and elsewhere it insists on a token; between machines that do not trust their network
leave it on loopback and use a tunnel (``ssh -L 5555:127.0.0.1:5555 robot``).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hmac
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from diffpolicy.policies.base import ChunkedPolicy
from diffpolicy.runtime.batching import Batcher, Idle, Session
from diffpolicy.runtime.serve_config import ServeConfig, check_observation, contract
from diffpolicy.runtime.wire_format import (
    Message,
    WireError,
    body_length,
    check_request,
    decode,
    encode,
)

log = logging.getLogger(__name__)

# Connections beyond the clients: those that are greeting, being turned away or hanging up.
_SPARE_CONNECTIONS = 16
_LINGER_S = 0.5
_OK = encode(Message("ok"))


class PolicyServer:
    """Serves one policy to many clients from one event loop.

    Args:
        policy: what acts; all memory is the server's.
        config: address, token and limits.

    Raises:
        ValueError: the frame limit is too small for one observation.
    """

    def __init__(self, policy: ChunkedPolicy, config: ServeConfig | None = None) -> None:
        self.policy = policy
        self.config = config = config or ServeConfig()
        self.contract = contract(policy, config)
        self._greeting = encode(Message("hello", self.contract))
        needed = 1024 + 8 * max(
            policy.obs_dim * policy.n_obs_steps, policy.action_dim * policy.n_action_steps
        )
        if config.limits.max_frame_bytes < needed:
            raise ValueError(
                f"max_frame_bytes={config.limits.max_frame_bytes} is too small for this policy's "
                f"frames; use at least {needed}"
            )
        self.host, self.port = config.host, config.port
        self._batcher: Batcher | None = None
        self._server: asyncio.Server | None = None
        self._runner: asyncio.Task[None] | None = None
        self._connections: set[asyncio.Task[Any]] = set()

    @property
    def batcher(self) -> Batcher:
        """The sessions of a started server."""
        assert self._batcher is not None, "the server is not started"
        return self._batcher

    async def start(self) -> None:
        """Warm the policy up and listen; afterwards ``port`` is the real one.

        Raises:
            OSError: the address cannot be used.
        """
        config, limits = self.config, self.config.limits
        self._batcher = Batcher(
            self.policy,
            max_sessions=limits.max_clients,
            max_batch=limits.max_batch,
            reclaim_after_s=limits.reclaim_after_s,
            window_s=config.batch_window_ms / 1000,
            deterministic=config.deterministic,
        )
        try:
            await self._batcher.warm_up()
            self._server = await asyncio.start_server(self._connected, config.host, config.port)
        except BaseException as error:
            self._batcher.stop()
            if isinstance(error, OSError):
                raise _address_error(error, config) from None
            raise
        self.port = self._server.sockets[0].getsockname()[1]
        self._runner = asyncio.create_task(self._batcher.run())

    async def stop(self) -> None:
        """Tell every client, hang up and stop; a policy call in progress is waited for."""
        assert self._server is not None
        assert self._runner is not None
        self._server.close()
        # A connection that has been accepted but whose task has not run yet must not be missed.
        await asyncio.sleep(0)
        self._runner.cancel()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(self._runner, *self._connections, return_exceptions=True)
        self.batcher.stop()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection from greeting to hanging up; nothing that happens in it leaves it."""
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            most = self.config.limits.max_clients + _SPARE_CONNECTIONS
            if len(self._connections) > most:
                writer.transport.abort()
                return
            await self._guarded(reader, writer)
            await _hang_up(reader, writer)
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            self._connections.discard(task)

    async def _guarded(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The conversation; what ends it is told to the peer in one line, or logged."""
        try:
            try:
                await self._converse(reader, writer)
            except WireError as error:
                await self._send(writer, _error_frame(error))
            except asyncio.CancelledError:
                last = WireError("shutting_down", "the server is stopping")
                await self._send(writer, _error_frame(last))
        except (OSError, EOFError):
            pass  # the peer is gone; there is nobody to tell
        except Exception:
            log.exception("a connection failed")

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._greet(reader)
        session = self.batcher.open()
        try:
            await self._send(writer, self._greeting)
            closing = False
            while not closing:
                message = await self._receive(reader, session)
                try:
                    check_request(message)
                    reply = await self._answer(session, message)
                    closing = message.type == "close"
                except WireError as error:
                    if error.fatal:
                        raise
                    reply = _error_frame(error)
                except Exception:
                    log.exception("a request failed")
                    reply = _error_frame(WireError("internal", "the server's log says why"))
                await self._send(writer, reply)
        finally:
            self.batcher.close(session)

    async def _greet(self, reader: asyncio.StreamReader) -> None:
        """Read the first request, which must be a hello with the right version and token."""
        try:
            async with asyncio.timeout(self.config.limits.frame_timeout_s):
                message = await self._receive(reader)
        except TimeoutError:
            raise WireError("timeout", "no greeting came in time") from None
        if message.type != "hello":
            raise WireError("no_hello", "the first request must be hello")
        check_request(message)
        wanted, got = self.config.token, message.fields.get("token", "")
        # Equal or not, the comparison takes as long, so that its time says nothing of the token.
        if wanted is not None and not hmac.compare_digest(_bytes(wanted), _bytes(got)):
            raise WireError("unauthorized", "the token is missing or wrong")

    async def _next(self, reader: asyncio.StreamReader, session: Session | None) -> bytes:
        """The first byte of the next request; a session may lose its place while it is silent."""
        most = self.config.limits.idle_timeout_s
        try:
            async with asyncio.timeout(most) as timer:
                idle = Idle(asyncio.get_running_loop().time(), timer)
                if session is not None:
                    session.idle = idle
                first = await reader.readexactly(1)
        except TimeoutError:
            if not idle.lost:
                raise WireError("timeout", f"no request for {most} seconds") from None
        finally:
            if session is not None:
                session.idle = None
        if idle.lost:  # maybe in the moment in which the request came
            seconds = self.config.limits.reclaim_after_s
            message = f"no request for {seconds} seconds while another client wanted the place"
            raise WireError("timeout", message)
        return first

    async def _receive(
        self, reader: asyncio.StreamReader, session: Session | None = None
    ) -> Message:
        """The next request; the peer may think for long, but not stop inside a frame."""
        limits = self.config.limits
        first = await self._next(reader, session)
        try:
            async with asyncio.timeout(limits.frame_timeout_s):
                prefix = first + await reader.readexactly(3)
                body = await reader.readexactly(body_length(prefix, limits.max_frame_bytes))
        except TimeoutError:
            raise WireError("timeout", "the rest of a frame did not come in time") from None
        return decode(body)

    async def _send(self, writer: asyncio.StreamWriter, frame: bytes) -> None:
        """Write a frame; a peer that does not take it in time is treated as gone."""
        writer.write(frame)
        async with asyncio.timeout(self.config.limits.frame_timeout_s):
            await writer.drain()

    async def _answer(self, session: Session, message: Message) -> bytes:
        batcher = self.batcher
        match message.type:
            case "act":
                obs = check_observation(message.tensors["obs"], self.policy, most=1)
                action = await batcher.ask(session, obs)
                return encode(Message("act", {}, {"action": action}))
            case "plan":
                most = self.policy.n_obs_steps
                obs = check_observation(message.tensors["obs"], self.policy, most=most)
                actions = await batcher.ask(session, obs, chunk=True)
                return encode(Message("plan", {}, {"actions": actions}))
            case "reset":
                batcher.reset(session, message.fields.get("seed"))
                return _OK
            case "stats":
                return encode(Message("stats", batcher.totals(session)))
            case "close":
                return _OK
        raise WireError("bad_request", "hello may be said once")


def _bytes(token: str) -> bytes:
    return token.encode(errors="surrogatepass")  # JSON text can hold halves of a surrogate pair


def _error_frame(error: WireError) -> bytes:
    return encode(Message("error", {"code": error.code, "message": error.message}))


async def _hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Close so that the last frame arrives.

    Closing with unread input would reset the connection and could discard it on the way.
    """
    try:
        async with asyncio.timeout(_LINGER_S):
            if writer.can_write_eof():
                writer.write_eof()
            while await reader.read(1 << 16):
                pass
    except (OSError, RuntimeError):  # gone already; TimeoutError is an OSError
        pass
    writer.transport.abort()


def _address_error(error: OSError, config: ServeConfig) -> OSError:
    where = f"{config.host}:{config.port}"
    if error.errno == errno.EADDRINUSE:
        return OSError(f"{where} is taken; choose another port=, or port=0 for any free one")
    return OSError(f"cannot listen on {where}: {error.strerror or error}")


def serve(
    policy: ChunkedPolicy,
    config: ServeConfig | None = None,
    *,
    ready: Callable[[PolicyServer], None] | None = None,
) -> None:
    """Serve until Ctrl-C or SIGTERM; to be called from the main thread.

    Args:
        policy: what acts.
        config: address, token and limits.
        ready: called once when clients can connect.

    Raises:
        OSError: the address cannot be used.
        ValueError: as :class:`PolicyServer`.
    """

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        await _serve_until(PolicyServer(policy, config), stop, ready)

    asyncio.run(main())


async def _serve_until(
    server: PolicyServer, stop: asyncio.Event, ready: Callable[[PolicyServer], None] | None
) -> None:
    await server.start()
    try:
        if ready is not None:
            ready(server)
        await stop.wait()
    finally:
        await server.stop()


@contextlib.contextmanager
def serving(policy: ChunkedPolicy, config: ServeConfig | None = None) -> Iterator[PolicyServer]:
    """A server in a thread of this process, for notebooks, tests and simulators beside it.

    Args:
        policy: what acts.
        config: address, token and limits; a free port on loopback when absent.

    Yields:
        The started server, with ``host`` and ``port``.

    Raises:
        OSError: the address cannot be used.
        ValueError: as :class:`PolicyServer`.
    """
    server = PolicyServer(policy, config or ServeConfig(port=0))
    started = threading.Event()
    control: dict[str, Any] = {}

    def is_ready(_: PolicyServer) -> None:
        started.set()

    async def main() -> None:
        control["loop"], control["stop"] = asyncio.get_running_loop(), asyncio.Event()
        await _serve_until(server, control["stop"], is_ready)

    def body() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:  # raised again in the caller's thread
            control["error"] = error
        finally:
            started.set()

    thread = threading.Thread(target=body, name="diffpolicy-server", daemon=True)
    thread.start()
    started.wait()
    try:
        if "error" not in control:
            yield server
    finally:
        with contextlib.suppress(KeyError, RuntimeError):  # it never began, or has ended already
            control["loop"].call_soon_threadsafe(control["stop"].set)
        thread.join()
    if "error" in control:
        raise control["error"]
