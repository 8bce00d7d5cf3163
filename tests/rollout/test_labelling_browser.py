"""The labelling page in a real browser, driven over the WebDriver protocol."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

from diffpolicy.data.preferences.set import PreferenceSet, Span
from diffpolicy.data.store import EpisodeStore
from diffpolicy.rollout.labelling.clips import ClipRenderer
from diffpolicy.rollout.labelling.page import LabelServer
from diffpolicy.rollout.labelling.questions import Answers, make_question

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="needs a browser: apt-get install chromium chromium-driver",
)
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class Browser:
    """As much of WebDriver as a person has hands for."""

    def __init__(self, address, profile):
        self._address = address
        options = {"binary": CHROMIUM, "args": [*_FLAGS, f"--user-data-dir={profile}"]}
        wish = {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}
        self._session = ""
        made = self._send("POST", "/session", {"capabilities": wish})
        self._session = f"/session/{made['sessionId']}"

    def _send(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._address + self._session + path,
            data,
            {"Content-Type": "application/json"},
            method=method,
        )
        try:
            with _direct.open(request, timeout=60) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error

    def open(self, url):
        self._send("POST", "/url", {"url": url})

    def run(self, script, *args):
        return self._send("POST", "/execute/sync", {"script": script, "args": list(args)})

    def press(self, key):
        actions = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        keyboard = {"type": "key", "id": "keyboard", "actions": actions}
        self._send("POST", "/actions", {"actions": [keyboard]})

    def click(self, selector):
        query = {"using": "css selector", "value": selector}
        (found,) = self._send("POST", "/element", query).values()
        self._send("POST", f"/element/{found}/click", {})

    def until(self, script, *args):
        end = time.monotonic() + 30
        while time.monotonic() < end:
            found = self.run(script, *args)
            if found:
                return found
            time.sleep(0.05)
        raise AssertionError(f"never true: {script}; the page says {self.text()}")

    def text(self):
        return self.run("return document.body.innerText")

    def quit(self):
        self._send("DELETE", "")


# The machine's proxy settings are for other machines.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    profile = tmp_path_factory.mktemp("profile")
    driver = subprocess.Popen(
        [DRIVER, "--port=0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "HOME": str(profile)},
    )
    try:
        line = next(text for text in driver.stdout if "started successfully on port" in text)
        port = int(line.rsplit("port", 1)[1].strip(" .\n"))
        running = Browser(f"http://127.0.0.1:{port}", profile)
        yield running
        running.quit()
    finally:
        driver.terminate()
        driver.wait(20)
        driver.stdout.close()


@pytest.fixture
def labels(tmp_path):
    """Eight episodes, each in a colour of its own, and four questions about them."""
    img = np.zeros((8 * 4, 32, 32, 3), np.uint8)
    img[..., 0] = (np.repeat(np.arange(8), 4) * 30)[:, None, None]
    img[..., 1] = (np.arange(32) * 8)[:, None, None]
    arrays = {"obs": np.zeros((32, 1)), "action": np.zeros((32, 1)), "img": img}
    ends = np.arange(1, 9) * 4
    store = EpisodeStore.from_arrays(arrays, ends, path=tmp_path / "demos.zarr")
    asked = [make_question((Span(2 * i, 0, 4),), (Span(2 * i + 1, 0, 4),)) for i in range(4)]

    @contextlib.contextmanager
    def serve():
        answers = Answers(tmp_path / "answers.jsonl", store, asked)
        with ClipRenderer(store) as renderer, LabelServer(answers, renderer) as server:
            yield server

    return serve, asked, tmp_path / "answers.jsonl"


_READY = "return document.body.dataset.ready === arguments[0]"
_RED = """
const canvas = document.getElementById(arguments[0]);
return canvas.getContext('2d').getImageData(5, 5, 1, 1).data[0]"""


def _choices(path):
    return [
        (record.info["question"], "tie" if record.tie else record.info["shown"])
        for record in PreferenceSet.open(path).records
    ]


def test_a_person_labels_in_a_browser(browser, labels):
    serve, asked, path = labels
    keys = [question.key for question in asked]
    with serve() as server:
        browser.open(server.url)
        browser.until(_READY, keys[0])
        # each side shows the segment that it stands for
        assert browser.run(_RED, "left") == 30 * asked[0].left[0].episode
        assert browser.run(_RED, "right") == 30 * asked[0].right[0].episode
        assert "0 of 4 answered" in browser.text()
        browser.press("1")
        browser.until(_READY, keys[1])
        assert _choices(path) == [(keys[0], "left")]  # on the disk before the next question
        assert browser.run(_RED, "left") == 30 * asked[1].left[0].episode
        browser.click("#choose-right")
        browser.until(_READY, keys[2])
        browser.press("0")
        browser.until(_READY, keys[3])
        assert _choices(path) == [(keys[0], "left"), (keys[1], "right"), (keys[2], "tie")]
        assert "3 of 4 answered" in browser.text()
        browser.press("u")
        browser.until(_READY, keys[2])
        assert len(_choices(path)) == 2
        browser.press("s")
        browser.until(_READY, keys[3])
        assert "2 of 4 answered, 1 skipped" in browser.text()
    seconds = PreferenceSet.open(path).records[0].info["seconds"]
    assert 0 < seconds < 60

    with serve() as server:  # the next day
        browser.open(server.url)
        browser.until(_READY, keys[2])
        assert "2 of 4 answered" in browser.text()
        assert browser.run("return document.getElementById('undo').disabled")
        browser.press("2")
        browser.until(_READY, keys[3])
        browser.press("2")
        browser.until("return document.body.dataset.question === 'done'")
        assert "All answered" in browser.text()
    assert _choices(path)[2:] == [(keys[2], "right"), (keys[3], "right")]


def test_the_page_says_when_an_answer_was_not_saved(browser, labels):
    serve, asked, path = labels
    with serve() as server:
        browser.open(server.url)
        browser.until(_READY, asked[0].key)
    browser.press("1")  # the server has gone
    browser.until("return document.getElementById('message').textContent.includes('Not saved')")
    assert _choices(path) == []
    assert browser.run("return document.body.dataset.question") == asked[0].key


class _Elsewhere(http.server.BaseHTTPRequestHandler):
    """A page of another site: it may send, but not with headers of its own."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><p>hello")

    def log_message(self, *_):
        pass


def test_another_site_cannot_answer(browser, labels, monkeypatch):
    serve, asked, path = labels
    seen = []
    check = LabelServer.check_writer

    def watched(self, host, origin, token):
        seen.append((origin, token))
        return check(self, host, origin, token)

    monkeypatch.setattr(LabelServer, "check_writer", watched)
    other = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Elsewhere)
    thread = threading.Thread(target=other.serve_forever)
    thread.start()
    try:
        with serve() as server:
            origin = f"http://127.0.0.1:{other.server_address[1]}"
            browser.open(origin)
            body = {"question": asked[0].key, "choice": "left", "seconds": 1}
            send = """
            const plain = {method: 'POST', mode: 'no-cors', body: arguments[1]};
            return fetch(arguments[0] + 'api/answer', plain).then(() => true, () => true)"""
            assert browser.run(send, server.url, json.dumps(body))
            assert seen == [(origin, None)]  # it arrived, and was refused
            read = "return fetch(arguments[0]).then(() => 'read', () => 'hidden')"
            assert browser.run(read, server.url) == "hidden"  # so is the page with the token
    finally:
        other.shutdown()
        thread.join()
        other.server_close()
    assert _choices(path) == []
