"""A policy server: clients send observations over a WebSocket and get actions back.

:mod:`diffpolicy.runtime.wire_format` documents the messages, :mod:`diffpolicy.runtime.client` is a
client in Python. The memory of every client's policy lives here, one row each, so that one client's
reset, crash or garbage never touches another; requests that arrive together are answered by one
call of the policy.

The connection is not encrypted. The server listens on this machine only unless it is told
otherwise, and elsewhere it insists on a token; between machines that do not trust their network
leave it on loopback and use a tunnel (``ssh -L 5555:127.0.0.1:5555 robot``). Pages in a browser are
never let in.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hmac
import ipaddress
import logging
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from diffpolicy.data.observation import ObsField, ObsFields, to_fields, zeros
from diffpolicy.extras import need
from diffpolicy.policies.base import ChunkedPolicy
from diffpolicy.runtime.batching import Batcher, Session
from diffpolicy.runtime.wire_format import (
    VERSION,
    WireError,
    check_observation,
    check_request,
    decode,
    encode,
)
from diffpolicy.settings import check_range

if TYPE_CHECKING:
    from websockets.asyncio.server import Server, ServerConnection
    from websockets.http11 import Request, Response

log = logging.getLogger(__name__)
_quiet = logging.getLogger(f"{__name__}.connections")
_quiet.setLevel(logging.CRITICAL)  # strangers' garbage is no news

# Connections beyond the clients: those that are greeting, being turned away or hanging up.
_SPARE_CONNECTIONS = 16
_TRY_AGAIN, _TOO_SILENT = 1013, 1008  # codes with which a WebSocket is closed
_OK = encode({"type": "ok"})


@dataclass(frozen=True)
class ServeConfig:
    """Where a server listens, how it answers and what it puts up with.

    Args:
        host: address to listen on; anything but loopback needs a token.
        port: TCP port; 0 takes a free one.
        token: shared secret that clients must send; ``None`` or at least 8 characters.
        batch_window_ms: how long a request waits for others to share a policy call, in
            milliseconds; it does not wait when every acting client has asked. 0 never waits.
        deterministic: fixed noise: the same observations give the same actions.
        max_clients: most clients at a time.
        max_batch: most rows in one policy call.
        peer_timeout_s: seconds for opening a connection, and for a peer to show that it is alive.
        idle_timeout_s: seconds without a request after which a client is hung up on; ``None``
            waits for ever (until its place is wanted, see ``reclaim_after_s``).
        reclaim_after_s: when every place is taken, a new client gets the place of the one that has
            asked nothing for longest, if that is at least so many seconds; ``None`` never.

    Raises:
        ValueError: a host beyond this machine without a token, or a value out of range.
    """

    host: str = "127.0.0.1"
    port: int = 5555
    token: str | None = field(default=None, repr=False)
    batch_window_ms: float = 1.0
    deterministic: bool = False
    max_clients: int = 16
    max_batch: int = 64
    peer_timeout_s: float = 20.0
    idle_timeout_s: float | None = 600.0
    reclaim_after_s: float | None = 30.0

    def __post_init__(self) -> None:
        check_range("[0, 65535]", port=self.port)
        check_range("[0, 1000]", batch_window_ms=self.batch_window_ms)
        check_range("[1, inf]", max_clients=self.max_clients, max_batch=self.max_batch)
        check_range("(0, inf]", peer_timeout_s=self.peer_timeout_s)
        check_range("(0, inf]", idle_timeout_s=self.idle_timeout_s)
        check_range("(0, inf]", reclaim_after_s=self.reclaim_after_s)
        if self.token is not None and len(self.token) < 8:
            raise ValueError("a token needs at least 8 characters")
        if self.token is None and not is_loopback(self.host):
            raise ValueError(
                f"host={self.host!r} lets other machines drive this policy, which needs a token: "
                "give token_file=FILE (one line, at least 8 characters), or use host=127.0.0.1"
            )


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only; other names than localhost no."""
    with contextlib.suppress(ValueError):
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    return False


class PolicyServer:
    """Serves one policy to many clients from one event loop; an asynchronous context manager.

    Args:
        policy: what acts; all memory is the server's.
        config: address, token and limits.

    Attributes:
        host: where it listens.
        port: the real one, once it has started.
        contract: what every client is told of the policy: shapes, types and bounds.
        longest_message: bytes of the longest message that is read: 4 MiB, or what the observations
            of a plan take twice over.
        batcher: the clients' sessions.

    Raises:
        ImportError: the packages of the extra ``serve`` are missing.
    """

    def __init__(self, policy: ChunkedPolicy, config: ServeConfig | None = None) -> None:
        self.policy = policy
        self.config = config = config or ServeConfig()
        self.host, self.port = config.host, config.port
        self.fields = policy.observed
        seen = zeros(self.fields, (policy.n_obs_steps,))
        size = sum(array.nbytes for array in to_fields(seen).values())
        self.longest_message = max(1 << 22, 2 * size)
        self.contract = contract(policy, self.fields, deterministic=config.deterministic)
        self.batcher = Batcher(
            policy,
            max_batch=config.max_batch,
            window_s=config.batch_window_ms / 1000,
            deterministic=config.deterministic,
        )
        self._clients: dict[ServerConnection, Session] = {}
        self._hanging_up: set[asyncio.Task[None]] = set()
        self._closed = need("websockets.exceptions").ConnectionClosed

    async def __aenter__(self) -> Self:
        """Warm the policy up and listen.

        Raises:
            OSError: the address cannot be used.
        """
        try:
            await self.batcher.warm_up()
            self._server = await self._listening()
        except BaseException:
            self.batcher.stop()
            raise
        self.port = next(iter(self._server.sockets)).getsockname()[1]
        self._runner = asyncio.create_task(self.batcher.run())
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Tell every client, hang up and stop; a policy call in progress is waited for."""
        self._server.close(reason="the server is stopping")
        await self._server.wait_closed()
        self._runner.cancel()
        self.batcher.stop()

    async def _listening(self) -> Server:
        config = self.config
        try:
            server: Server = await need("websockets.asyncio.server").serve(
                self._connected,
                config.host,
                config.port,
                process_request=self._unauthorized,
                origins=[None],  # browsers name the page that asks, other clients nothing
                compression=None,
                open_timeout=config.peer_timeout_s,
                ping_interval=config.peer_timeout_s,
                ping_timeout=config.peer_timeout_s,
                close_timeout=1.0,
                max_size=self.longest_message,
                max_queue=1,
                logger=_quiet,
                create_connection=_counted(config.max_clients + _SPARE_CONNECTIONS),
            )
        except OSError as error:
            where = f"{config.host}:{config.port}"
            if error.errno == errno.EADDRINUSE:
                text = f"{where} is taken; choose another port=, or port=0 for any free one"
                raise OSError(text) from None
            raise OSError(f"cannot listen on {where}: {error.strerror or error}") from None
        return server

    def _unauthorized(self, connection: ServerConnection, request: Request) -> Response | None:
        """The refusal of a request to connect whose token is missing or wrong."""
        if self.config.token is None:
            return None
        wanted = f"Bearer {self.config.token}".encode()
        got = request.headers.get("Authorization", "").encode(errors="surrogateescape")
        # Equal or not, the comparison takes as long, so that its time says nothing of the token.
        if hmac.compare_digest(wanted, got):
            return None
        return connection.respond(401, "the token is missing or wrong\n")

    async def _connected(self, connection: ServerConnection) -> None:
        """One connection from greeting to hanging up; nothing that happens in it leaves it."""
        most = self.config.max_clients
        if len(self._clients) >= most and not self._reclaim():
            await connection.close(
                _TRY_AGAIN, f"all {most} places for clients are taken; try later"
            )
            return
        session = self._clients[connection] = self.batcher.open()
        try:
            await connection.send(encode(self.contract))
            while True:
                request = await self._next(connection, session)
                await connection.send(await self._reply(session, request))
        except TimeoutError:
            reason = f"no request for {self.config.idle_timeout_s} seconds"
            await connection.close(_TOO_SILENT, reason)
        except self._closed:
            pass  # the peer is gone; there is nobody to tell
        finally:
            self._leave(connection)

    def _leave(self, connection: ServerConnection) -> None:
        session = self._clients.pop(connection, None)
        if session is not None:
            self.batcher.close(session)

    def _reclaim(self) -> bool:
        """Hang up on the client that was silent for longest; whether there was one to be had."""
        after, now = self.config.reclaim_after_s, asyncio.get_running_loop().time()
        silent = {
            connection: now - session.silent_since
            for connection, session in self._clients.items()
            if session.silent_since is not None
        }
        if after is None or max(silent.values(), default=0.0) < after:
            return False
        oldest = max(silent, key=silent.__getitem__)
        self._leave(oldest)
        reason = f"no request for {after} seconds while another client wanted the place"
        task = asyncio.create_task(oldest.close(_TOO_SILENT, reason))
        self._hanging_up.add(task)  # or it might be collected before it is done
        task.add_done_callback(self._hanging_up.discard)
        return True

    async def _next(self, connection: ServerConnection, session: Session) -> bytes | str:
        """The next request; a session may lose its place while it is silent."""
        session.silent_since = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(self.config.idle_timeout_s):
                return await connection.recv()
        finally:
            session.silent_since = None

    async def _reply(self, session: Session, data: bytes | str) -> bytes:
        """The reply to a request, whatever it is and whatever the policy does."""
        try:
            request = decode(data)
            check_request(request)
            return await self._answer(session, request)
        except WireError as error:
            return encode({"type": "error", "code": error.code, "message": error.message})
        except Exception:
            log.exception("a request failed")
            text = "the server's log says why"
            return encode({"type": "error", "code": "internal", "message": text})

    async def _answer(self, session: Session, request: dict[str, Any]) -> bytes:
        match request["type"]:
            case "reset":
                self.batcher.reset(session, request.get("seed"))
                return _OK
            case "act":
                obs = check_observation(request.get("obs"), self.fields, most=1)
                action = await self.batcher.ask(session, obs)
                return encode({"type": "act", "action": action})
            case "plan":
                most = self.policy.n_obs_steps
                obs = check_observation(request.get("obs"), self.fields, most=most)
                actions = await self.batcher.ask(session, obs, chunk=True)
                return encode({"type": "plan", "actions": actions})
        return encode({"type": "stats", **self.batcher.totals(session)})


def contract(policy: ChunkedPolicy, fields: ObsFields, *, deterministic: bool) -> dict[str, Any]:
    """What a server's greeting says of a policy."""

    def told(one: ObsField) -> dict[str, Any]:
        return {"shape": list(one.shape), "dtype": one.dtype}

    bounds = {n: getattr(getattr(policy, "spec", None), n, None) for n in _BOUNDS}
    return {
        "version": VERSION,
        **{name: int(getattr(policy, name)) for name in _SIZES},
        "observation": told(fields)
        if isinstance(fields, ObsField)
        else {name: told(one) for name, one in fields.items()},
        **{name: None if b is None else [float(v) for v in b] for name, b in bounds.items()},
        "deterministic": deterministic,
    }


_SIZES = ("obs_dim", "action_dim", "horizon", "n_obs_steps", "n_action_steps")
_BOUNDS = ("action_low", "action_high")


def _counted(most: int) -> type[ServerConnection]:
    """Connections of which at most so many are open at a time, greeted or not."""
    from websockets.asyncio.server import ServerConnection

    connections: set[object] = set()

    class Counted(ServerConnection):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            connections.add(self)
            if len(connections) > most:
                transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            connections.discard(self)
            super().connection_lost(exc)

    return Counted


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
        ImportError: as :class:`PolicyServer`.
    """

    async def main() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with PolicyServer(policy, config) as server:
            if ready is not None:
                ready(server)
            await stop.wait()

    asyncio.run(main())


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
        ImportError: as :class:`PolicyServer`.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="diffpolicy-server", daemon=True)
    thread.start()

    def run(work: Coroutine[Any, Any, Any]) -> None:
        asyncio.run_coroutine_threadsafe(work, loop).result()

    try:
        server = PolicyServer(policy, config or ServeConfig(port=0))
        run(server.__aenter__())
        try:
            yield server
        finally:
            run(server.__aexit__())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
