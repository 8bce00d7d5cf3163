"""The addresses of the labelling page: a fixed table, on 127.0.0.1 alone."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffpolicy.rollout.labelling.page import LabelServer

HOST = "127.0.0.1"
_MAX_BODY = 4096


class RequestError(Exception):
    """A request that is refused, with the status to say so."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


class LabelHTTPServer(ThreadingHTTPServer):
    """The socket of a :class:`~diffpolicy.rollout.labelling.page.LabelServer`.

    Args:
        labels: what answers.
        port: of 127.0.0.1; 0 takes a free one.
    """

    daemon_threads = True

    def __init__(self, labels: LabelServer, port: int) -> None:
        self.labels = labels
        super().__init__((HOST, port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: LabelHTTPServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "diffpolicy", ""
    timeout = 30

    def do_GET(self) -> None:
        self._reply(self._get)

    def do_POST(self) -> None:
        self._reply(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not worth a line each."""

    def _get(self) -> None:
        labels = self.server.labels
        match self.path.split("/")[1:]:
            case [""]:
                nonce = secrets.token_urlsafe(12)
                self._send(labels.page(nonce), "text/html; charset=utf-8", own=f"'nonce-{nonce}'")
            case ["api", "state"]:
                self._send_json(labels.state())
            case ["api", "clips", key]:
                self._send_json(labels.clips(key))
            case ["clips", key, ("left.png" | "right.png") as name]:
                self._send(labels.picture(key, name.removesuffix(".png")), "image/png")
            case _:
                raise RequestError(HTTPStatus.NOT_FOUND, "there is nothing here")

    def _post(self) -> None:
        labels, headers, body = self.server.labels, self.headers, self._body()
        labels.check_writer(headers["Host"], headers["Origin"], headers["X-Token"])
        writes: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "/api/answer": labels.answer,
            "/api/undo": labels.undo,
        }
        if self.path not in writes:
            raise RequestError(HTTPStatus.NOT_FOUND, "there is nothing here")
        try:
            values = json.loads(body)
        except ValueError:
            values = None
        if headers.get_content_type() != "application/json" or not isinstance(values, dict):
            raise RequestError(HTTPStatus.BAD_REQUEST, "expected a JSON object")
        self._send_json(writes[self.path](values))

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > _MAX_BODY:
            self.close_connection = True  # what was sent stays unread
            text = f"expected at most {_MAX_BODY} bytes, and their number"
            raise RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text)
        return self.rfile.read(int(length))

    def _reply(self, work: Callable[[], None]) -> None:
        if self.server.labels.closed:
            self.close_connection = True
            return
        try:
            self.server.labels.check_host(self.headers["Host"])
            work()
        except RequestError as error:
            # A body may be unread; the next request must not begin in it.
            self.close_connection = self.command == "POST"
            self._send_json({"error": str(error)}, error.status)
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception as error:
            # A full disk, say: the page must hear that the answer was not kept.
            text = f"{type(error).__name__}: {error}"
            self._send_json({"error": text}, HTTPStatus.INTERNAL_SERVER_ERROR)

    def _send_json(self, values: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(json.dumps(values).encode(), "application/json", status)

    def _send(
        self, data: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK, own: str = "'none'"
    ) -> None:
        policy = (
            f"default-src 'none'; script-src {own}; style-src {own}; img-src 'self'; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(data))),
            ("Cache-Control", "no-store"),
            ("Content-Security-Policy", policy),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "same-origin"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
        ):
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)
