from __future__ import annotations

import json

import numpy as np
import pytest

from diffpolicy.data.preferences.records import Pair, Span
from diffpolicy.data.preferences.set import PreferenceSet
from diffpolicy.data.store import EpisodeStore
from diffpolicy.rollout.env_spec import EnvSpec
from diffpolicy.rollout.labelling.clips import ClipError, ClipRenderer, choose_pairs, side_by_side
from diffpolicy.rollout.labelling.page import (
    make_question,
    propose,
    questions_of,
    read_answers,
    write_page,
)


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


# ---------------------------------------------------------------------- questions


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
    with pytest.raises(ValueError, match="count must be at least 1"):
        propose(plain, count=0, length=4)


# ---------------------------------------------------------------------- clips


def test_stored_frames(store):
    with ClipRenderer(store, after=1) as renderer:
        frames = renderer.frames((Span(1, 1, 2), Span(2, 3, 1)))
    assert frames.shape == (4, 16, 24, 3)  # the margin ends with the episode
    assert frames[:, 0, 0, 0].tolist() == [50, 60, 70, 110]
    with ClipRenderer(store, side=12, before=2) as renderer:
        assert renderer.frames((Span(1, 3, 1),)).shape == (3, 8, 12, 3)


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


# ---------------------------------------------------------------------- the page


@pytest.fixture
def page(store, questions, tmp_path):
    pytest.importorskip("imageio_ffmpeg", reason="needs the media extra")
    with ClipRenderer(store, side=16) as renderer:
        assert write_page(tmp_path / "page", questions, renderer) == {}
    return tmp_path / "page"


def _file(folder, questions, answers, **other):
    """A file of answers: ``(question, choice)`` each, or objects as they are."""
    told = [
        one
        if not isinstance(one, tuple)
        else {"question": one[0], "choice": one[1], "seconds": 1.5, "when": "2026-01-02T03:04:05Z"}
        for one in answers
    ]
    text = (folder / "index.html").read_text()
    made = json.loads(text.split('type="application/json">')[1].split("</script>")[0])
    assert made["questions"] == [question.key for question in questions]
    values = {"format": "diffpolicy-answers", "page": made["page"], "answers": told, **other}
    target = folder.parent / "answers.json"
    target.write_text(json.dumps(values))
    return target


def test_answers_are_pairs_of_a_person(page, store, questions):
    a, b, c = questions
    file = _file(page, questions, [(c.key, "left"), (a.key, "right"), (b.key, "tie")])
    found, (third, first, second) = read_answers(page, file)
    assert found.path.samefile(store.path)
    assert (first.chosen, first.rejected, first.tie) == (a.right, a.left, False)
    assert (second.chosen, second.rejected, second.tie) == (b.left, b.right, True)
    assert (third.chosen, third.rejected) == (c.left, c.right)
    assert {pair.source for pair in (first, second, third)} == {"human"}
    assert first.info == {
        "question": a.key,
        "seconds": 1.5,
        "when": "2026-01-02T03:04:05Z",
        "shown": "right",
    }
    assert "shown" not in second.info


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([("0" * 16, "left")], r"answers\[0\]: the page has no question '0000"),
        ([(0, "left"), (0, "right")], r"answers\[1\]: question '\w+' is answered twice"),
        ([(0, "rihgt")], r"answers\.json: unknown choice 'rihgt'.*did you mean 'right'"),
        ([(0, "skip")], "unknown choice 'skip'"),
        (
            [{"question": "x", "choice": "left", "seconds": 1}],
            r"missing key .*answers\[0\]\.'when'",
        ),
        ([{"question": 1, "choice": "left", "seconds": 1, "when": ""}], "must be str, got 1"),
        ([{"question": "x", "choice": "tie", "seconds": -1, "when": ""}], "seconds must be at"),
        ([{"question": "x", "choice": "tie", "seconds": 1, "when": "now"}], "Invalid isoformat"),
        (["left"], "must be Answer, got 'left'"),
    ],
)
def test_answers_that_make_no_sense(page, questions, answers, message):
    keyed = [
        (questions[one[0]].key, one[1]) if isinstance(one, tuple) and one[0] == 0 else one
        for one in answers
    ]
    with pytest.raises(ValueError, match=message):
        read_answers(page, _file(page, questions, keyed))


def test_files_that_hold_no_answers(page, questions):
    file = _file(page, questions, [], page="0" * 16)
    with pytest.raises(ValueError, match="another page than the one in"):
        read_answers(page, file)
    file = _file(page, questions, [], note="hello")
    with pytest.raises(ValueError, match=r"unknown key .*note"):
        read_answers(page, file)
    for text, message in (("{", "is no JSON file"), ("[1]", "does not hold the answers")):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_answers(page, file)


def test_what_a_page_is_made_of(page, questions):
    films = {f"clips/{question.key}.mp4" for question in questions}
    found = {path.relative_to(page).as_posix() for path in page.rglob("*") if path.is_file()}
    assert found == {"index.html", "questions.jsonl", "MANIFEST.json", *films}
    text = (page / "index.html").read_text()
    assert "__" not in text
    assert "http" not in text  # nothing is loaded from elsewhere
    assert all(record.tie for record in PreferenceSet.open(page / "questions.jsonl").records)


def test_nothing_is_overwritten_and_nothing_is_asked_of_nobody(page, store, questions):
    with ClipRenderer(store) as renderer:
        with pytest.raises(FileExistsError, match="choose another folder"):
            write_page(page, questions, renderer)
        with pytest.raises(ValueError, match="nothing to ask"):
            write_page(page / "other", [], renderer)
    assert not (page / "other").exists()


def test_a_clip_that_cannot_be_drawn_is_left_out(store, questions, tmp_path, monkeypatch):
    pytest.importorskip("imageio_ffmpeg", reason="needs the media extra")
    draw = ClipRenderer.frames

    def frames(self, segment):
        if segment in (questions[1].left, *broken):
            raise RuntimeError("the simulator is on fire")
        return draw(self, segment)

    broken = []
    monkeypatch.setattr(ClipRenderer, "frames", frames)
    with ClipRenderer(store, side=16) as renderer:
        left_out = write_page(tmp_path / "page", questions, renderer)
        assert left_out == {questions[1].key: "the simulator is on fire"}
        broken += [question.left for question in questions]
        with pytest.raises(ValueError, match="no pair can be shown: the simulator is on fire"):
            write_page(tmp_path / "none", questions, renderer)
    assert len(PreferenceSet.open(tmp_path / "page" / "questions.jsonl")) == 2
    assert not (tmp_path / "none").exists()
