"""The labelling page in a real browser, driven over the WebDriver protocol."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

from diffpolicy.data.preferences.records import Span
from diffpolicy.data.store import EpisodeStore
from diffpolicy.rollout.labelling.clips import ClipRenderer
from diffpolicy.rollout.labelling.page import make_question, read_answers, write_page

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
    "--allow-file-access-from-files",  # else the test could not look at a film of the page
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class Browser:
    """As much of WebDriver as a person has hands for."""

    def __init__(self, address, profile, downloads):
        self._address = address
        options = {
            "binary": CHROMIUM,
            "args": [*_FLAGS, f"--user-data-dir={profile}"],
            "prefs": {"download.default_directory": str(downloads)},
        }
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
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(tmp_path_factory, downloads):
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
        running = Browser(f"http://127.0.0.1:{port}", profile, downloads)
        yield running
        running.quit()
    finally:
        driver.terminate()
        driver.wait(20)
        driver.stdout.close()


@pytest.fixture
def labels(tmp_path):
    """A page about eight episodes, each in a grey of its own, with four questions."""
    pytest.importorskip("imageio_ffmpeg", reason="needs the media extra")
    img = np.zeros((8 * 4, 32, 32, 3), np.uint8)
    img[:] = (np.repeat(np.arange(8), 4) * 30)[:, None, None, None]
    arrays = {"obs": np.zeros((32, 1)), "action": np.zeros((32, 1)), "img": img}
    ends = np.arange(1, 9) * 4
    store = EpisodeStore.from_arrays(arrays, ends, path=tmp_path / "demos.zarr")
    asked = [make_question((Span(2 * i, 0, 4),), (Span(2 * i + 1, 0, 4),)) for i in range(4)]
    with ClipRenderer(store) as renderer:
        write_page(tmp_path / "page", asked, renderer)
    return tmp_path / "page", asked


_READY = "return document.body.dataset.ready === arguments[0]"
_GREY = """
const clip = document.getElementById('clip'), canvas = document.createElement('canvas');
[canvas.width, canvas.height] = [clip.videoWidth, clip.videoHeight];
const context = canvas.getContext('2d');
context.drawImage(clip, 0, 0);
const x = canvas.width * (arguments[0] === 'left' ? 1 : 3) / 4;
return context.getImageData(x, canvas.height / 2, 1, 1).data[0];"""


def _choices(folder, file):
    return [
        (pair.info["question"], "tie" if pair.tie else pair.info["shown"])
        for pair in read_answers(folder, file)[1]
    ]


def test_a_person_labels_in_a_browser(browser, labels, downloads):
    folder, asked = labels
    keys, url = [question.key for question in asked], (folder / "index.html").as_uri()
    browser.open(url)
    browser.until(_READY, keys[0])
    for side in ("left", "right"):  # each side shows the segment that it stands for
        (span,) = getattr(asked[0], side)
        assert abs(browser.run(_GREY, side) - 30 * span.episode) < 10
    assert "0 of 4 answered" in browser.text()
    assert browser.run("return document.getElementById('undo').disabled")
    browser.press("1")
    browser.until(_READY, keys[1])
    browser.click("#choose-right")
    browser.until(_READY, keys[2])
    browser.press("0")
    browser.until(_READY, keys[3])
    assert "3 of 4 answered" in browser.text()
    browser.press("u")
    browser.until(_READY, keys[2])
    browser.press("s")
    browser.until(_READY, keys[3])
    assert "2 of 4 answered, 1 skipped" in browser.text()

    browser.open("about:blank")  # the next day: what was skipped is asked again
    browser.open(url)
    browser.until(_READY, keys[2])
    assert "2 of 4 answered" in browser.text()
    browser.press("u")  # also an answer of the day before can be taken back
    browser.until(_READY, keys[1])
    for key, following in (("2", keys[2]), ("2", keys[3])):
        browser.press(key)
        browser.until(_READY, following)
    browser.press("0")
    browser.until("return document.body.dataset.question === 'done'")
    assert "All answered" in browser.text()
    browser.press("d")
    end = time.monotonic() + 20
    while not list(downloads.glob("*.json")) and time.monotonic() < end:
        time.sleep(0.05)
    (file,) = downloads.glob("*.json")
    expected = list(zip(keys, ("left", "right", "right", "tie"), strict=True))
    assert _choices(folder, file) == expected
    assert all(0 < pair.info["seconds"] < 60 for pair in read_answers(folder, file)[1])


def test_pages_keep_their_answers_apart_and_say_what_cannot_be_played(browser, labels, tmp_path):
    folder, asked = labels
    other = tmp_path / "other"
    with ClipRenderer(EpisodeStore.open(tmp_path / "demos.zarr")) as renderer:
        write_page(other, asked[1:], renderer)
    browser.open((folder / "index.html").as_uri())
    browser.run("localStorage.clear(); location.reload()")
    browser.until(_READY, asked[0].key)
    browser.press("1")
    browser.until(_READY, asked[1].key)
    browser.open((other / "index.html").as_uri())
    browser.until(_READY, asked[1].key)
    assert "0 of 3 answered" in browser.text()
    (other / "clips" / f"{asked[2].key}.mp4").unlink()
    browser.press("1")
    browser.until("return document.getElementById('message').textContent.includes('be played')")
    browser.press("s")
    browser.until(_READY, asked[3].key)
