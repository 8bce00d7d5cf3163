from __future__ import annotations

import http.client
import json
import socket
import struct
import threading
import zlib
from importlib import resources

import numpy as np
import pytest

from diffpolicy.data.preferences.set import Pair, PreferenceSet, Span
from diffpolicy.data.store import EpisodeStore
from diffpolicy.rollout.env_spec import EnvSpec
from diffpolicy.rollout.labelling.clips import ClipError, ClipRenderer, choose_pairs, side_by_side
from diffpolicy.rollout.labelling.page import LabelServer
from diffpolicy.rollout.labelling.questions import Answers, make_question, propose, questions_of
from diffpolicy.rollout.labelling.sheets import encode_png, frame_sheet


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Six episodes of four steps whose picture of a step is a colour of its own."""
    path = tmp_path_factory.mktemp("labels") / "demos.zarr"
    count, length = 6, 4
    img = np.zeros((count * length, 16, 24, 3), np.uint8)
    img[..., 0] = (np.arange(count * length) * 10)[:, None, None]
    img[..., 1] = np.arange(24)
    arrays = {
        "obs": np.zeros((count * length, 2)),
        "action": np.zeros((count * length, 1)),
        "img": img,
    }
    return EpisodeStore.from_arrays(arrays, np.arange(1, count + 1) * length, path=path)


@pytest.fixture
def questions():
    return [make_question((Span(2 * i, 0, 3),), (Span(2 * i + 1, 1, 3),)) for i in range(3)]


@pytest.fixture
def answers(store, questions, tmp_path):
    return Answers(tmp_path / "answers.jsonl", store, questions)


@pytest.fixture
def server(answers, store):
    with ClipRenderer(store) as renderer, LabelServer(answers, renderer) as running:
        yield running


def _ask(server, method, path, body=None, **headers):
    """A raw request: `headers` replace those that the page would send; None leaves one out."""
    data = json.dumps(body).encode() if isinstance(body, dict) else body or b""
    sent = {"Host": f"127.0.0.1:{server.port}", "Content-Type": "application/json"}
    if method == "POST":
        sent |= {"X-Token": server._token, "Origin": server.url[:-1]}
        sent["Content-Length"] = str(len(data))
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in sent.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(data)
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    if reply.headers.get_content_type() == "application/json":
        content = json.loads(content)
    return reply.status, content, reply.headers


def _answer(server, key, choice, **more):
    return _ask(
        server, "POST", "/api/answer", {"question": key, "choice": choice, "seconds": 1.5}, **more
    )


def _decoded(png):
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        name, data = png[at + 4 : at + 8], png[at + 8 : at + 8 + size]
        (check,) = struct.unpack(">I", png[at + 8 + size : at + 12 + size])
        assert check == zlib.crc32(name + data)
        chunks[name], at = data, at + 12 + size
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    assert (lines[:, 0] == 1).all()
    deltas = lines[:, 1:].reshape(height, width, 3)
    return np.cumsum(deltas, axis=1, dtype=np.uint8)


# ---------------------------------------------------------------------- questions and answers


def test_answers_are_pairs_of_a_person(answers, store, questions):
    a, b, c = questions
    answers.answer(a.key, "right", 2.25)
    answers.answer(b.key, "tie", 1)
    answers.answer(c.key, "left", 0)
    kept = PreferenceSet.open(answers.path)
    first, second, third = kept.records
    assert (first.chosen, first.rejected, first.tie) == (a.right, a.left, False)
    assert (second.chosen, second.rejected, second.tie) == (b.left, b.right, True)
    assert (third.chosen, third.rejected) == (c.left, c.right)
    assert {record.source for record in kept.records} == {"human"}
    assert (first.info["question"], first.info["seconds"]) == (a.key, 2.25)
    assert first.info["shown"] == "right"
    assert "shown" not in second.info
    assert first.info["when"].endswith("+00:00")
    assert answers.waiting() == []


def test_a_restart_goes_on_and_asks_skipped_ones_again(answers, store, questions):
    answers.answer(questions[0].key, "left", 1)
    answers.answer(questions[1].key, "skip", 1)
    assert [q.key for q in answers.waiting()] == [questions[2].key]
    again = Answers(answers.path, store, questions)
    assert again.waiting() == questions[1:]
    assert not again.undoable  # the answers of an earlier day stay


def test_undo_takes_the_last_answer_out_of_the_file(answers, questions):
    a, b, _ = questions
    answers.answer(a.key, "left", 1)
    before = answers.path.read_bytes()
    answers.answer(b.key, "right", 1)
    assert answers.undo() == b.key
    assert answers.path.read_bytes() == before
    answers.answer(b.key, "skip", 1)
    assert answers.undo() == b.key
    assert answers.undo() == a.key
    assert len(PreferenceSet.open(answers.path)) == 0
    assert answers.waiting() == questions
    with pytest.raises(ValueError, match="no answer of this session"):
        answers.undo()
    answers.answer(a.key, "tie", 1)
    assert PreferenceSet.open(answers.path).records[0].tie
    assert [path.name for path in answers.path.parent.iterdir()] == ["answers.jsonl"]


def test_an_undo_that_fails_loses_nothing(answers, questions, monkeypatch):
    answers.answer(questions[0].key, "left", 1)
    answers.answer(questions[1].key, "left", 1)
    before = answers.path.read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        answers.undo()
    assert answers.path.read_bytes() == before
    assert len(answers.answered) == 2
    assert answers.undoable


def test_sides_do_not_tell_what_was_called_better(store):
    pairs = [
        Pair((Span(i % 6, a, 1),), (Span((i + 1) % 6, b, 1),))
        for i in range(6)
        for a in range(4)
        for b in range(4)
    ]
    questions = questions_of(PreferenceSet(store, pairs))
    assert len(questions) == 96
    on_the_left = sum(q.left == p.chosen for q, p in zip(questions, pairs, strict=True))
    assert 30 < on_the_left < 66
    turned = [Pair(p.rejected, p.chosen) for p in pairs]
    assert questions_of(PreferenceSet(store, turned)) == questions
    assert len(questions_of(PreferenceSet(store, pairs + turned))) == 96


def test_proposals():
    arrays = {"obs": np.zeros((40, 1))}
    plain = EpisodeStore.from_arrays(arrays, [10, 20, 30, 40])
    found = propose(plain, count=10, length=4)
    assert found == propose(plain, count=10, length=4)
    assert found != propose(plain, count=10, length=4, seed=1)
    assert len({q.key for q in found}) == 10
    for _, (left,), (right,) in found:
        assert left.episode != right.episode
        assert left.length == right.length == 4
        assert max(left.start, right.start) <= 6
    store = EpisodeStore.from_arrays(arrays, [40])
    store.extend(arrays, [10, 20, 30, 40], [{"seed": s} for s in (1, 2, 1, 3)])
    for _, (left,), (right,) in propose(store, count=5, length=4):
        assert {left.episode, right.episode} == {1, 3}  # they start alike
        assert left.start == right.start
    with pytest.raises(ValueError, match="two can be compared"):
        propose(EpisodeStore.from_arrays(arrays, [40]), count=1, length=4)
    with pytest.raises(ValueError, match="count and length"):
        propose(plain, count=0, length=4)


def test_nothing_to_ask(store, tmp_path):
    with pytest.raises(ValueError, match="nothing to ask"):
        Answers(tmp_path / "a.jsonl", store, [])


# ---------------------------------------------------------------------- clips


def test_stored_frames(store):
    with ClipRenderer(store, after=1) as renderer:
        frames = renderer.frames((Span(1, 1, 2), Span(2, 3, 1)))
    assert frames.shape == (4, 16, 24, 3)  # the margin ends with the episode
    assert frames[:, 0, 0, 0].tolist() == [50, 60, 70, 110]
    with ClipRenderer(store, side=12, before=2) as renderer:
        assert renderer.frames((Span(1, 3, 1),)).shape == (3, 8, 12, 3)


def test_png_and_sheet_hold_every_pixel():
    frames = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), np.uint8)
    np.testing.assert_array_equal(_decoded(encode_png(frames[0])), frames[0])
    sheet = frame_sheet(frames)
    assert (sheet.frames, sheet.columns, sheet.width, sheet.height) == (5, 3, 7, 6)
    picture = _decoded(sheet.png)
    for i in range(5):
        x, y = i % 3 * 7, i // 3 * 6
        np.testing.assert_array_equal(picture[y : y + 6, x : x + 7], frames[i])


def test_side_by_side_holds_the_shorter_clip():
    left, right = np.full((2, 8, 8, 3), 10, np.uint8), np.full((3, 8, 8, 3), 20, np.uint8)
    left[1] = 11
    film = side_by_side(left, right, better="left")
    assert film.shape == (3, 16, 32, 3)
    assert film[:, 8, 8, 0].tolist() == [10, 11, 11]
    assert film[0, 8, 24, 0] == 20
    assert film[0, 0, 0].tolist() == [46, 160, 67]
    assert film[0, 0, -1].tolist() == [218, 54, 51]
    assert side_by_side(left, right)[0, 0, 0].tolist() == [128, 128, 128]
    with pytest.raises(ValueError, match="differ in size"):
        side_by_side(left, right[:, :4])


def _point_store(tmp_path, change=0.0, **attrs):
    from diffpolicy.rollout.pool.slots import EnvSlot

    spec = EnvSpec("branch_fake_envs:branch_fakes/Drawn-v0")
    slot = EnvSlot(spec)
    outcome, obs, action = slot.reset(3), [], []
    for step in range(5):
        obs.append(outcome.obs)
        action.append(np.array([0.1 * step, -0.2], np.float32))
        outcome = slot.step(action[-1])
    arrays = {"obs": np.stack(obs), "action": np.stack(action) + np.float32(change)}
    path = tmp_path / "points.zarr"
    store = EpisodeStore.create(path, {"obs": (3,), "action": (2,)}, attrs={"env_id": spec.id})
    with store:
        store.append(arrays, **attrs)
    return EpisodeStore.open(path)


def test_frames_of_an_episode_repeated_from_its_seed(tmp_path):
    store = _point_store(tmp_path, seed=3)
    with ClipRenderer(store, side=64) as renderer:
        frames = renderer.frames((Span(0, 2, 3),))
    assert frames.shape == (3, 64, 64, 3)
    assert frames[:, 0, 0, 0].tolist() == [20, 30, 40]  # the picture says the step


def test_a_repeat_that_differs_is_not_shown(tmp_path):
    store = _point_store(tmp_path, change=0.25, seed=3)
    with (
        ClipRenderer(store) as renderer,
        pytest.raises(ClipError, match=r"another observation at step 1.*collected with noise"),
    ):
        renderer.frames((Span(0, 2, 3),))


def test_episodes_without_a_seed(tmp_path):
    store = _point_store(tmp_path)
    refused = pytest.raises(ClipError, match=r"have no seed.*no method show_observation")
    with ClipRenderer(store) as renderer, refused:
        renderer.frames((Span(0, 2, 3),))
    shows = EnvSpec("branch_fake_envs:branch_fakes/Shown-v0")
    with ClipRenderer(store, env=shows, side=64) as renderer:
        assert renderer.frames((Span(0, 2, 3),))[:, 0, 0, 0].tolist() == [20, 30, 40]


def test_stores_that_cannot_be_shown():
    store = EpisodeStore.from_arrays({"obs": np.zeros((3, 1))}, [3])
    with pytest.raises(ClipError, match=r"neither frames .*nor says its environment"):
        ClipRenderer(store)
    with pytest.raises(ValueError, match="side must be"):
        ClipRenderer(store, side=0)


def test_which_pairs_are_drawn():
    assert choose_pairs(10, 3) == [0, 4, 9]
    assert choose_pairs(2, 6) == [0, 1]
    assert choose_pairs(10, 3, [7, 1]) == [7, 1]
    with pytest.raises(ValueError, match=r"numbered 0\.\.9; got \[10\]"):
        choose_pairs(10, 3, [1, 10])


# ---------------------------------------------------------------------- the server


def test_answers_over_http(server, answers, questions):
    status, state, _ = _ask(server, "GET", "/api/state")
    assert status == 200
    assert state == {
        "question": questions[0].key,
        "total": 3,
        "answered": 0,
        "skipped": 0,
        "undoable": False,
    }
    status, state, _ = _answer(server, questions[0].key, "right")
    assert (status, state["question"], state["answered"]) == (200, questions[1].key, 1)
    assert PreferenceSet.open(answers.path).records[0].chosen == questions[0].right
    assert _answer(server, questions[1].key, "skip")[1]["skipped"] == 1
    assert _answer(server, questions[2].key, "tie")[1]["question"] is None
    status, state, _ = _ask(server, "POST", "/api/undo", {})
    assert (status, state["question"], state["answered"]) == (200, questions[2].key, 1)


def test_clips_over_http(server, store, questions):
    status, clips, _ = _ask(server, "GET", f"/api/clips/{questions[0].key}")
    assert status == 200
    assert clips["left"] == {
        "url": f"/clips/{questions[0].key}/left.png",
        "frames": 3,
        "columns": 2,
        "width": 24,
        "height": 16,
    }
    for side, ((span,),) in {"left": [questions[0].left], "right": [questions[0].right]}.items():
        status, png, headers = _ask(server, "GET", clips[side]["url"])
        assert (status, headers["Content-Type"]) == (200, "image/png")
        row = 4 * span.episode + span.start
        assert _decoded(png)[0, 0, 0] == 10 * row


def test_answers_that_make_no_sense(server, answers, questions):
    key = questions[0].key
    assert _answer(server, "0" * 16, "left")[0] == 404
    assert _answer(server, key, "both")[0] == 409
    assert _answer(server, key, "left")[0] == 200
    status, body, _ = _answer(server, key, "right")
    assert (status, body["error"]) == (
        409,
        "this question is answered already; undo takes an answer back",
    )
    for body in (b"", b"{", b"[1]", b'{"question": 1}', b"\xff"):
        assert _ask(server, "POST", "/api/answer", body)[0] == 400
    for seconds in ("1e999", "-1", '"1"', "null"):
        text = f'{{"question": "{questions[1].key}", "choice": "left", "seconds": {seconds}}}'
        assert _ask(server, "POST", "/api/answer", text.encode())[0] == 400
    assert len(PreferenceSet.open(answers.path)) == 1


def test_only_the_page_can_answer(server, answers, questions):
    key, port = questions[0].key, server.port
    other = "http://evil.example"
    assert _answer(server, key, "left", X_Token=None)[0] == 403
    assert _answer(server, key, "left", X_Token="guess")[0] == 403
    assert _answer(server, key, "left", X_Token="gu\xe4ss")[0] == 403
    for origin in (other, "null", f"http://127.0.0.1:{port + 1}", f"http://localhost:{port}"):
        assert _answer(server, key, "left", Origin=origin)[0] == 403
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", None):
        assert _answer(server, key, "left", Host=host)[0] == 403
        assert _ask(server, "GET", "/", Host=host)[0] == 403  # no token for them either
    # what a form of another site can send: no header of its own, no JSON
    forms = {"X_Token": None, "Origin": other, "Content_Type": "text/plain"}
    assert _answer(server, key, "left", **forms)[0] == 403
    assert _answer(server, key, "left", Content_Type="text/plain")[0] == 400
    assert len(PreferenceSet.open(answers.path)) == 0
    local = f"localhost:{port}"
    assert _answer(server, key, "left", Host=local, Origin=f"http://{local}")[0] == 200


def test_no_file_is_served(server):
    for path in (
        "/../../etc/passwd",
        "/clips/../../etc/passwd/left.png",
        "/clips/..%2f..%2fetc%2fpasswd/left.png",
        "/labelling.html",
        "/answers.jsonl",
        "/api/clips/",
        "/clips/x/up.png",
        "/api/state?x=1",
    ):
        status, body, _ = _ask(server, "GET", path)
        assert (status, set(body)) == (404, {"error"})
    assert _ask(server, "POST", "/api/state", {})[0] == 404
    assert _ask(server, "PUT", "/api/answer", {})[0] == 501


def test_bodies_have_a_length_and_a_limit(server):
    status, body, _ = _ask(server, "POST", "/api/answer", b" " * 5000)
    assert (status, body["error"]) == (413, "expected at most 4096 bytes, and their number")
    assert _ask(server, "POST", "/api/answer", Content_Length="-1")[0] == 413
    assert _ask(server, "POST", "/api/answer", Content_Length=None)[0] == 413


def test_listens_on_this_machine_alone(server):
    assert server._server.server_address[0] == "127.0.0.1"
    assert server.url == f"http://127.0.0.1:{server.port}/"


def test_the_page(server):
    status, page, headers = _ask(server, "GET", "/")
    text = page.decode()
    assert status == 200
    assert server._token in text
    assert "__" not in text.replace("__proto__", "")
    assert "http://" not in text  # nothing is loaded from elsewhere
    assert "https://" not in text
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    policy = headers["Content-Security-Policy"]
    nonce = text.split('nonce="')[1].split('"')[0]
    assert f"script-src 'nonce-{nonce}'" in policy
    assert "default-src 'none'" in policy
    assert nonce not in _ask(server, "GET", "/")[1].decode()
    assert resources.files("diffpolicy.rollout.labelling").joinpath("labelling.html").is_file()


def test_a_clip_that_cannot_be_drawn_is_said_and_can_be_skipped(answers, questions):
    class Broken:
        def frames(self, segment):
            raise RuntimeError("the simulator is on fire")

    with LabelServer(answers, Broken()) as server:
        status, body, _ = _ask(server, "GET", f"/api/clips/{questions[0].key}")
        assert (status, body) == (422, {"error": "the simulator is on fire"})
        assert _answer(server, questions[0].key, "skip")[0] == 200


def test_a_full_disk_is_said(server, questions, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    status, body, _ = _answer(server, questions[0].key, "left")
    assert (status, body["error"]) == (500, "OSError: no space left on device")
    monkeypatch.undo()
    assert _answer(server, questions[0].key, "left")[0] == 200


def test_many_at_once_keep_every_answer_once(server, answers, questions):
    results = []
    threads = [
        threading.Thread(target=lambda k=q.key: results.append(_answer(server, k, "left")[0]))
        for q in questions * 4
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [200] * 3 + [409] * 9
    assert len(PreferenceSet.open(answers.path)) == 3


def test_a_taken_port(answers, store, server):
    with pytest.raises(OSError, match="in use"):
        LabelServer(answers, ClipRenderer(store), port=server.port)


def test_a_silent_connection_does_not_block_the_others(server):
    with socket.create_connection(("127.0.0.1", server.port)):
        assert _ask(server, "GET", "/api/state")[0] == 200
