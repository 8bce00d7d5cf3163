"""A small client of `diffpolicy serve`: a socket and NumPy, nothing of the policy.

with PolicyClient(port=5555) as client:
    client.reset(seed=3)
    action = client.act(obs)
"""

from __future__ import annotations

import socket
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from diffpolicy.runtime.wire_format import (
    FATAL_CODES,
    PROTOCOL,
    Message,
    WireError,
    body_length,
    decode,
    encode,
)

Array = npt.NDArray[Any]


class ServerError(RuntimeError):
    """The server refused a request, or its reply cannot be used.

    Attributes:
        code: one of :data:`diffpolicy.runtime.wire_format.ERROR_CODES`, or ``bad_reply``.
        message: one line.
    """

    def __init__(self, code: str, message: str) -> None:
        self.code, self.message = code, message
        super().__init__(f"{code}: {message}")


class PolicyClient:
    """A connection to a policy server, which remembers this client's episode.

    Not for several threads at a time: every thread opens its own.

    Args:
        host: the server's address.
        port: its port.
        token: the shared secret, where the server wants one.
        timeout: seconds to wait for the connection and for each reply.

    Attributes:
        contract: what the server said of its policy: ``obs_dim``, ``action_dim``, ``horizon``,
            ``n_obs_steps``, ``n_action_steps``, ``action_low``, ``action_high`` and more.

    Raises:
        ConnectionError: no server there.
        ServerError: the server refused, e.g. ``unauthorized`` or ``busy``.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 5555,
        token: str | None = None,
        *,
        timeout: float = 10.0,
    ) -> None:
        self._where = f"{host}:{port}"
        self._timeout = timeout
        self._socket: socket.socket | None = None
        try:
            self._socket = socket.create_connection((host, port), timeout)
        except OSError as error:
            raise ConnectionError(
                f"no policy server at {self._where} ({error.strerror or error}); start one with: "
                f"diffpolicy serve checkpoint=RUN host={host} port={port}"
            ) from error
        # Requests are small and wait for their reply: never hold one back to fill a packet.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._limit = 1 << 26  # until the server has told its own
        greeting = {"version": PROTOCOL, **({} if token is None else {"token": token})}
        try:
            reply = self._ask(Message("hello", greeting), "hello")
            self.contract = dict(reply.fields)
            self._shape = (int(self.contract["action_dim"]),)
            self._chunk = (int(self.contract["n_action_steps"]), *self._shape)
        except (KeyError, TypeError, ValueError) as error:
            self._drop()
            raise ServerError("bad_reply", f"{self._where} sent no contract") from error
        except BaseException:
            self._drop()
            raise

    def reset(self, seed: int | None = None) -> None:
        """Begin a new episode.

        Args:
            seed: random stream of the plans, from 0 to 2**63 - 1; without it the stream goes on.
                A new connection begins with stream 0: give clients whose noise should differ
                seeds of their own.

        Raises:
            ServerError: the server refused.
            ConnectionError: the connection is lost; connect again.
        """
        self._ask(Message("reset", {} if seed is None else {"seed": int(seed)}), "ok")

    def act(self, obs: npt.ArrayLike) -> Array:
        """The action ``[A]``, float32 in environment units, for the observation ``[O]``.

        Raises:
            ServerError: the server refused, e.g. ``bad_shape`` or ``non_finite``.
            ConnectionError: the connection is lost; connect again.
        """
        reply = self._ask(Message("act", {}, {"obs": _array(obs)}), "act")
        return self._checked(reply, "action", self._shape)

    def plan(self, obs: npt.ArrayLike) -> Array:
        """A new plan's actions ``[Ta, A]``, to be executed from now on.

        Args:
            obs: the observation ``[O]``, or ``[k, O]`` those since the last request, oldest first,
                ``k <= n_obs_steps``. A policy that sees several observations wants them all.

        Raises:
            ServerError: the server refused, e.g. ``bad_shape`` or ``non_finite``.
            ConnectionError: the connection is lost; connect again.
        """
        reply = self._ask(Message("plan", {}, {"obs": _array(obs)}), "plan")
        return self._checked(reply, "actions", self._chunk)

    def stats(self) -> dict[str, int]:
        """Counts of this connection and of the whole server.

        ``actions``, ``plans``, ``nfe``; ``clients``, ``requests``, ``policy_calls``,
        ``largest_batch``.
        """
        return dict(self._ask(Message("stats"), "stats").fields)

    def close(self) -> None:
        """Say goodbye and close the connection; twice does no harm."""
        if self._socket is None:
            return
        try:
            self._ask(Message("close"), "ok")
        except (OSError, ServerError):
            pass  # it is gone, which is what was wanted
        finally:
            self._drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, message: Message, wanted: str) -> Message:
        """Send a request and read its reply, of type ``wanted``."""
        if self._socket is None:
            raise ConnectionError(f"the connection to {self._where} is closed; make a new client")
        try:
            self._socket.sendall(encode(message))
            reply = self._receive(self._socket)
        except TimeoutError as error:
            self._drop()  # a late reply must not be taken for the next one's
            raise ConnectionError(
                f"{self._where} did not answer {message.type} within {self._timeout} seconds; "
                "connect again, with a longer timeout if the policy is slow"
            ) from error
        except OSError as error:
            self._drop()
            raise ConnectionError(f"lost the connection to {self._where}: {error}") from error
        except WireError as error:
            self._drop()
            raise ServerError("bad_reply", f"{self._where}: {error.message}") from error
        except BaseException:  # Ctrl-C in the middle leaves half a frame behind
            self._drop()
            raise
        if reply.type == "error":
            code = str(reply.fields.get("code", "bad_reply"))
            if code in FATAL_CODES:
                self._drop()
            raise ServerError(code, str(reply.fields.get("message", "no message")))
        if reply.type != wanted:
            self._drop()
            raise ServerError("bad_reply", f"{self._where} answered something else than {wanted}")
        return reply

    def _receive(self, connection: socket.socket) -> Message:
        prefix = _exactly(connection, 4)
        return decode(bytes(_exactly(connection, body_length(bytes(prefix), self._limit))))

    def _checked(self, reply: Message, name: str, shape: tuple[int, ...]) -> Array:
        """The reply's tensor, if a robot may execute it."""
        tensor = reply.tensors.get(name)
        if tensor is None or tensor.shape != shape or tensor.dtype != np.float32:
            raise ServerError("bad_reply", f"{self._where} sent no float32 {name} {list(shape)}")
        if not np.isfinite(tensor).all():
            raise ServerError("bad_reply", f"{self._where} sent {name} that are not finite")
        return tensor

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _array(obs: npt.ArrayLike) -> Array:
    out = np.asarray(obs)
    # Lists of whole numbers are meant as observations too.
    return out.astype(np.float32) if out.dtype.kind in "iub" else out


def _exactly(connection: socket.socket, count: int) -> bytearray:
    out = bytearray(count)
    view, at = memoryview(out), 0
    while at < count:
        got = connection.recv_into(view[at:])
        if got == 0:
            raise ConnectionResetError("the server hung up")
        at += got
    return out
