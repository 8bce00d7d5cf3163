"""A small client of `diffpolicy serve`: a WebSocket and NumPy, nothing of the policy.

with PolicyClient(port=5555) as client:
    client.reset(seed=3)
    action = client.act(obs)
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from diffpolicy.data.observation import each
from diffpolicy.extras import need
from diffpolicy.runtime.wire_format import VERSION, WireError, decode, encode

connect = need("websockets.sync.client").connect
_errors = need("websockets.exceptions")

Array = npt.NDArray[Any]
Observed = npt.ArrayLike | Mapping[str, npt.ArrayLike]

_MAX_REPLY_BYTES = 1 << 26
_BUSY = 1013  # WebSocket's "try again later"


class ServerError(RuntimeError):
    """The server refused a request, or its reply cannot be used.

    Attributes:
        code: one of :data:`diffpolicy.runtime.wire_format.ERROR_CODES`; ``unauthorized`` or
            ``busy`` of a connection; or ``bad_reply``.
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
        contract: what the server said of its policy: ``observation``, ``obs_dim``, ``action_dim``,
            ``horizon``, ``n_obs_steps``, ``n_action_steps``, ``action_low``, ``action_high`` and
            more.

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
        self._where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._timeout = timeout
        self._closing = ExitStack()
        self._connection: Any = None
        try:
            self._connection = self._closing.enter_context(self._connect(token))
        except _errors.InvalidStatus as error:
            status, said = error.response.status_code, error.response.body.decode(errors="replace")
            code = "unauthorized" if status == 401 else "bad_reply"
            raise ServerError(code, f"{self._where}: {said.strip()[:300]}") from None
        except (OSError, _errors.InvalidHandshake) as error:
            raise ConnectionError(
                f"no policy server at {self._where} ({error}); start one with: "
                f"diffpolicy serve checkpoint=RUN host={host} port={port}"
            ) from error
        self.contract = self._receive("the greeting")
        if self.contract.get("version") != VERSION:
            self.close()
            raise ServerError("bad_reply", f"{self._where} sent no contract of version {VERSION}")
        self._chunk = self.contract["n_action_steps"], self.contract["action_dim"]

    def _connect(self, token: str | None) -> Any:
        return connect(
            f"ws://{self._where}",
            additional_headers={"Authorization": f"Bearer {token}"} if token else None,
            open_timeout=self._timeout,
            close_timeout=1.0,
            ping_interval=None,  # the server asks whether the connection is alive
            max_size=_MAX_REPLY_BYTES,
            compression=None,
            proxy=None,
        )

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
        self._ask("ok", "reset", **({} if seed is None else {"seed": int(seed)}))

    def act(self, obs: Observed) -> Array:
        """The action ``[A]``, float32 in environment units, for one observation.

        Args:
            obs: the observation ``[O]``, or arrays by name where the policy observes several.

        Raises:
            ServerError: the server refused, e.g. ``bad_observation``.
            ConnectionError: the connection is lost; connect again.
        """
        reply = self._ask("act", "act", obs=each(_array, obs))
        return self._checked(reply, "action", self._chunk[1:])

    def plan(self, obs: Observed) -> Array:
        """A new plan's actions ``[Ta, A]``, to be executed from now on.

        Args:
            obs: the observation ``[O]``, or ``[k, O]`` those since the last request, oldest first,
                ``k <= n_obs_steps``. A policy that sees several observations wants them all.

        Raises:
            ServerError: the server refused, e.g. ``bad_observation``.
            ConnectionError: the connection is lost; connect again.
        """
        reply = self._ask("plan", "plan", obs=each(_array, obs))
        return self._checked(reply, "actions", self._chunk)

    def stats(self) -> dict[str, int]:
        """Counts of this connection and of the whole server.

        ``actions``, ``plans``, ``nfe``; ``clients``, ``requests``, ``policy_calls``,
        ``largest_batch``.
        """
        reply = self._ask("stats", "stats")
        return {name: count for name, count in reply.items() if name != "type"}

    def close(self) -> None:
        """Close the connection; twice does no harm."""
        self._connection = None
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ask(self, wanted: str, request: str, **entries: Any) -> dict[str, Any]:
        """Send a request and read its reply, of type ``wanted``."""
        if self._connection is None:
            raise ConnectionError(f"the connection to {self._where} is closed; make a new client")
        try:
            self._connection.send(encode({"type": request, **entries}))
        except _errors.ConnectionClosed as error:
            raise self._lost(error) from error
        reply = self._receive(request)
        if reply.get("type") == "error":
            code, message = reply.get("code", "bad_reply"), reply.get("message", "no message")
            raise ServerError(str(code), str(message))
        if reply.get("type") != wanted:
            self.close()
            raise ServerError("bad_reply", f"{self._where} answered something else than {wanted}")
        return reply

    def _receive(self, what: str) -> dict[str, Any]:
        try:
            return decode(self._connection.recv(self._timeout))
        except TimeoutError as error:
            self.close()  # a late reply must not be taken for the next one's
            raise ConnectionError(
                f"{self._where} did not answer {what} within {self._timeout} seconds; "
                "connect again, with a longer timeout if the policy is slow"
            ) from error
        except _errors.ConnectionClosed as error:
            raise self._lost(error) from error
        except WireError as error:
            self.close()
            raise ServerError("bad_reply", f"{self._where}: {error.message}") from error
        except BaseException:  # Ctrl-C leaves a reply behind
            self.close()
            raise

    def _lost(self, error: Any) -> Exception:
        """What a connection that has ended means, by what the server said last."""
        self.close()
        if error.rcvd is not None and error.rcvd.code == _BUSY:
            return ServerError("busy", error.rcvd.reason)
        why = error.rcvd.reason if error.rcvd is not None and error.rcvd.reason else error
        return ConnectionError(f"lost the connection to {self._where}: {why}")

    def _checked(self, reply: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Array:
        """The reply's array, if a robot may execute it."""
        array = reply.get(name)
        if not isinstance(array, np.ndarray) or (array.shape, array.dtype) != (shape, np.float32):
            raise ServerError("bad_reply", f"{self._where} sent no float32 {name} {list(shape)}")
        if not np.isfinite(array).all():
            raise ServerError("bad_reply", f"{self._where} sent {name} that are not finite")
        return array.copy()  # writable


def _array(obs: npt.ArrayLike) -> Array:
    out = np.asarray(obs)
    # Lists of whole numbers are meant as observations too; arrays keep their own type.
    lists = not isinstance(obs, np.ndarray | np.generic)
    return out.astype(np.float32) if lists and out.dtype.kind in "ib" else out
