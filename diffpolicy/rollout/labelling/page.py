"""A web page on this machine that shows two clips and keeps a person's choice.

Nothing but the standard library. The server listens on 127.0.0.1 alone, serves no files (its few
addresses are a fixed table), and takes answers only with the page's own token from the page's own
origin, so that no other site that is open in the browser can answer.
"""

from __future__ import annotations

import math
import secrets
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from importlib import resources
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from diffpolicy.data.preferences.set import Segment
from diffpolicy.rollout.labelling.questions import Answers, Question
from diffpolicy.rollout.labelling.requests import HOST, LabelHTTPServer, RequestError
from diffpolicy.rollout.labelling.sheets import Sheet, frame_sheet

_KEPT_CLIPS = 8  # questions whose clips are kept: the one on show, the next, and some to undo to


class Frames(Protocol):
    """Draws segments, such as :class:`~diffpolicy.rollout.labelling.clips.ClipRenderer`."""

    def frames(self, segment: Segment) -> np.ndarray:
        """``[F, height, width, 3]`` uint8."""


class LabelServer:
    """Serves the page until :meth:`close`.

    Use it as a context manager, or call :meth:`start` or :meth:`serve_forever`.

    Args:
        answers: the questions, and where the answers go.
        frames: draws the clips; always called by the same thread.
        port: of 127.0.0.1; 0 takes a free one.

    Attributes:
        url: of the page.
        port: the one it listens on.
        closed: whether it has stopped answering.

    Raises:
        OSError: the port is taken.
    """

    def __init__(self, answers: Answers, frames: Frames, *, port: int = 0) -> None:
        self._answers, self._frames = answers, frames
        self._token = secrets.token_urlsafe(24)
        self._answering = threading.Lock()
        # One thread for all drawing: a graphics context belongs to the thread that made it.
        self._drawing = ThreadPoolExecutor(1, "clips")
        self._clips: OrderedDict[str, tuple[Sheet, Sheet] | str] = OrderedDict()
        self._thread: threading.Thread | None = None
        self._server = LabelHTTPServer(self, port)
        self.closed = False
        self.port = int(self._server.server_address[1])
        self.url = f"http://{HOST}:{self.port}/"

    def start(self) -> Self:
        """Serves in a thread of its own and returns at once."""
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)
        self._thread.start()
        return self

    def serve_forever(self) -> None:
        """Serves until another thread calls :meth:`close`, or an interrupt."""
        self._server.serve_forever(poll_interval=0.1)

    def close(self) -> None:
        """Ends serving; no answer is lost, because each is on the disk when it is confirmed."""
        self.closed = True  # for connections that are still open
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._thread = None
        self._server.server_close()
        self._drawing.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ what the page asks

    def page(self, nonce: str) -> bytes:
        """The page, with its token and a nonce for its own script and style."""
        text = (
            resources.files("diffpolicy.rollout.labelling")
            .joinpath("labelling.html")
            .read_text("utf-8")
        )
        return text.replace("__TOKEN__", self._token).replace("__NONCE__", nonce).encode()

    def state(self) -> dict[str, Any]:
        """The next question and how many are answered."""
        with self._answering:
            waiting = self._answers.waiting()
            return {
                "question": waiting[0].key if waiting else None,
                "total": len(self._answers.questions),
                "answered": len(self._answers.answered),
                "skipped": self._answers.skipped,
                "undoable": self._answers.undoable,
            }

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """Keeps an answer and returns the next state."""
        key, choice, seconds = (body.get(name) for name in ("question", "choice", "seconds"))
        number = isinstance(seconds, int | float) and math.isfinite(seconds) and seconds >= 0
        if not (isinstance(key, str) and isinstance(choice, str) and number):
            raise RequestError(
                HTTPStatus.BAD_REQUEST, "expected question (text), choice (text), seconds (>= 0)"
            )
        with self._answering:
            try:
                self._answers.answer(key, choice, float(seconds))  # type: ignore[arg-type]
            except KeyError:
                raise RequestError(HTTPStatus.NOT_FOUND, f"no question {key!r}") from None
            except ValueError as error:
                raise RequestError(HTTPStatus.CONFLICT, str(error)) from None
        return self.state()

    def undo(self, _: dict[str, Any]) -> dict[str, Any]:
        """Takes the last answer back and returns the state with its question."""
        with self._answering:
            try:
                key = self._answers.undo()
            except ValueError as error:
                raise RequestError(HTTPStatus.CONFLICT, str(error)) from None
        return {**self.state(), "question": key}

    def clips(self, key: str) -> dict[str, Any]:
        """Sizes and addresses of a question's clips."""
        left, right = self._drawn(key)
        self._draw_next(key)
        return {
            side: {
                "url": f"/clips/{key}/{side}.png",
                "frames": sheet.frames,
                "columns": sheet.columns,
                "width": sheet.width,
                "height": sheet.height,
            }
            for side, sheet in (("left", left), ("right", right))
        }

    def picture(self, key: str, side: str) -> bytes:
        """The PNG with all frames of a clip."""
        return self._drawn(key)[side == "right"].png

    # ------------------------------------------------------------------ drawing

    def _drawn(self, key: str) -> tuple[Sheet, Sheet]:
        question = self._answers.questions.get(key)
        if question is None:
            raise RequestError(HTTPStatus.NOT_FOUND, f"no question {key!r}")
        found = self._drawing.submit(self._kept, question).result()
        if isinstance(found, str):
            raise RequestError(HTTPStatus.UNPROCESSABLE_ENTITY, found)
        return found

    def _kept(self, question: Question) -> tuple[Sheet, Sheet] | str:
        """The clips of a question, drawn unless they were drawn lately; or why they cannot be."""
        if question.key not in self._clips:
            self._clips[question.key] = self._draw(question)
        self._clips.move_to_end(question.key)
        while len(self._clips) > _KEPT_CLIPS:
            self._clips.popitem(last=False)
        return self._clips[question.key]

    def _draw(self, question: Question) -> tuple[Sheet, Sheet] | str:
        try:
            left, right = (self._frames.frames(s) for s in (question.left, question.right))
            return frame_sheet(left), frame_sheet(right)
        except Exception as error:
            # Whatever a simulator may raise: the page says it, and the person goes on.
            return str(error) or type(error).__name__

    def _draw_next(self, key: str) -> None:
        """Draws the question after this one while the person looks at it."""
        with self._answering:
            later = [q for q in self._answers.waiting() if q.key != key][:1]
        for question in later:
            self._drawing.submit(self._kept, question)

    # ------------------------------------------------------------------ who may ask

    def check_host(self, host: str | None) -> None:
        """Refuses names that lead here: a site could point its own name at this machine."""
        if host not in (f"{HOST}:{self.port}", f"localhost:{self.port}"):
            raise RequestError(HTTPStatus.FORBIDDEN, f"open {self.url}")

    def check_writer(self, host: str | None, origin: str | None, token: str | None) -> None:
        """Refuses answers that do not come from the page."""
        if origin is not None and origin != f"http://{host}":
            raise RequestError(HTTPStatus.FORBIDDEN, "answers come from the page alone")
        if token is None or not secrets.compare_digest(token.encode(), self._token.encode()):
            raise RequestError(
                HTTPStatus.FORBIDDEN, "the page is of an earlier start of the server; reload it"
            )
