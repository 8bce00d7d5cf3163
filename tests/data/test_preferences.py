"""Preference files: what goes in comes out, whatever is torn, grown, foreign or wrong."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffpolicy.data import EpisodeStore
from diffpolicy.data.preferences.check import check_preferences
from diffpolicy.data.preferences.file import PreferenceFileError
from diffpolicy.data.preferences.records import (
    Label,
    Pair,
    Ranking,
    Span,
    rows_of_segment,
    segment_of_rows,
)
from diffpolicy.data.preferences.set import PreferenceSet

A, B, C = (Span(0, 0, 4),), (Span(1, 2, 4),), (Span(2, 6, 4), Span(3, 0, 2))
RECORDS = (
    Pair(A, B, source="human", info={"seconds": 1.5, "who": [1, None]}),
    Pair(A, C, tie=True),
    Ranking((C, A, B), source="return"),
    Label(B, good=True),
    Label(C, good=False, source="human"),
)


@pytest.fixture
def store(make_store):
    return EpisodeStore.open(make_store(count=6, length=10))


@pytest.fixture
def file(store, tmp_path):
    """A file with RECORDS; beside the store."""
    made = PreferenceSet.create(tmp_path / "prefs.jsonl", store, attrs={"task": "door"})
    made.extend(RECORDS)
    return made.path


def change_line(path: Path, number: int, **changes) -> None:
    lines = path.read_text().splitlines()
    value = {**json.loads(lines[number - 1]), "crc32": ..., **changes}
    lines[number - 1] = json.dumps({k: v for k, v in value.items() if v is not ...})
    path.write_text("\n".join(lines) + "\n")


def test_what_is_appended_is_read_back(store, tmp_path):
    made = PreferenceSet.create(tmp_path / "new" / "prefs.jsonl", store, attrs={"task": "door"})
    for record in RECORDS:
        made.append(record)
    read = PreferenceSet.open(made.path)
    assert read.records == made.records == RECORDS
    assert read.attrs == {"task": "door"}
    assert read.store.path.resolve() == store.path.resolve()
    assert read.check() == []
    header = json.loads(made.path.read_text().splitlines()[0])
    assert (header["store"], header["episodes"], header["steps"]) == ("../demo.zarr", 6, 60)
    read.append(Label(A, good=True))
    assert PreferenceSet.open(made.path).records == (*RECORDS, Label(A, good=True))
    assert repr(read).endswith("3 Label, 2 Pair, 1 Ranking; of " + read.store.name + ")")


def test_in_memory(store):
    kept = PreferenceSet(store, RECORDS)
    kept.append(Label(A, good=True))
    assert len(kept) == 6
    assert kept.path is None


def test_pairs_and_labels(store):
    kept = PreferenceSet(store, RECORDS)
    assert kept.pairs()[0] == RECORDS[0]
    assert [(p.chosen, p.rejected) for p in kept.pairs()[1:]] == [(C, A), (C, B), (A, B)]
    near = kept.pairs(rankings="adjacent", ties=True)
    assert [(p.chosen, p.rejected) for p in near[1:]] == [(A, C), (C, A), (A, B)]
    assert near[2].info == {"places": [0, 1], "of": 3}
    assert [x.good for x in kept.labels()] == [True, False]
    assert kept.labels(pairs=True)[2:4] == [
        Label(A, True, "human", RECORDS[0].info),
        Label(B, False, "human", RECORDS[0].info),
    ]
    with pytest.raises(ValueError, match="unknown rankings 'some'; expected one of all, adjacent"):
        kept.pairs(rankings="some")


def test_summary_and_agreement():
    reward = np.arange(20, dtype=np.float32)
    arrays = {"obs": np.zeros((20, 2)), "action": np.zeros((20, 1)), "reward": reward}
    store = EpisodeStore.from_arrays(arrays, [10, 20])
    low, high = (Span(0, 0, 3),), (Span(0, 9, 1), Span(1, 0, 2))
    kept = PreferenceSet(
        store, [Pair(high, low, source="human"), Pair(low, high), Label(low, True)]
    )
    assert kept.rows(high).tolist() == [9, 10, 11]
    assert kept.agreement(reward) == 0.5
    assert kept.agreement(np.zeros(20)) == 0.5  # equal sums count half
    assert kept.summary() == {
        "records": 3,
        "pairs": 2,
        "ties": 0,
        "rankings": 0,
        "good": 1,
        "bad": 0,
        "sources": {"human": 1, "": 2},
        "episodes": 2,
        "segments": 2,
        "crossing": 1,
        "length": [3, 3],
        "reward_agreement": 0.5,
    }
    with pytest.raises(ValueError, match=r"scores must be \[20\], got \[3\]"):
        kept.agreement(np.zeros(3))
    assert np.isnan(PreferenceSet(store).agreement(reward))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=5),
    data=st.data(),
)
def test_segments_and_rows_are_the_same_thing(lengths, data):
    ends = np.cumsum(lengths)
    steps = st.lists(st.integers(0, int(ends[-1]) - 1), min_size=1, max_size=20)
    rows = np.array(data.draw(steps))
    segment = segment_of_rows(rows, ends)
    np.testing.assert_array_equal(rows_of_segment(segment, ends), rows)
    for span in segment:
        assert span.length >= 1
        assert span.start + span.length <= lengths[span.episode]
    run = np.arange(ends[-1])  # everything in a row: one span an episode
    assert segment_of_rows(run, ends) == tuple(Span(i, 0, n) for i, n in enumerate(lengths))


# -- what a killed writer, a second writer and a growing store leave ------------------------------


def test_a_torn_last_line_is_passed_over_and_then_removed(file, store):
    whole = file.read_bytes()
    last = whole[:-1].rfind(b"\n") + 1
    for cut in range(last, len(whole)):
        file.write_bytes(whole[:cut])
        read = PreferenceSet.open(file, store)
        only_newline = cut == len(whole) - 1  # nothing but the newline is missing
        assert read.records == (RECORDS if only_newline else RECORDS[:-1])
        torn = check_preferences(file, store)
        assert [i.severity for i in torn] == ["warning"] * (cut > last and not only_newline)
        if not only_newline:
            read.append(RECORDS[-1])
        else:
            read.append(RECORDS[0])
            whole += whole.split(b"\n")[1] + b"\n"
        assert file.read_bytes() == whole


def test_two_writers(file):
    first, second = PreferenceSet.open(file), PreferenceSet.open(file)
    first.append(Label(A, good=True))
    with pytest.raises(PreferenceFileError, match="another program writes to it"):
        second.append(Label(B, good=True))
    assert len(second) == len(RECORDS)
    first.append(Label(B, good=True))
    assert len(PreferenceSet.open(file)) == len(RECORDS) + 2


def test_a_failed_write_adds_nothing(file, monkeypatch):
    from diffpolicy.data.preferences import file as preference_file

    made, before = PreferenceSet.open(file), file.read_bytes()

    def full(target, data):
        target.write(data[:7])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(preference_file, "_write_all", full)
        with pytest.raises(OSError, match="No space"):
            made.append(Label(A, good=True))
    assert file.read_bytes() == before
    assert made.records == RECORDS
    made.append(Label(A, good=True))
    assert PreferenceSet.open(file).records == made.records


def test_the_store_may_grow(make_store, make_episode, tmp_path):
    path = make_store(count=2, length=10)
    with EpisodeStore.open(path, "a") as store:
        made = PreferenceSet.create(tmp_path / "p.jsonl", store)
        made.append(Pair(A, B))
        for index in range(2):
            store.append(make_episode(index, 5))
            made.append(Label((Span(2 + index, 0, 5),), good=True))
    kinds = [json.loads(line).get("kind") for line in made.path.read_text().splitlines()]
    assert kinds == [None, "pair", "store", "label", "store", "label"]
    read = PreferenceSet.open(made.path)
    assert read.records == made.records
    read.append(Label((Span(3, 0, 1),), good=False))  # known by now
    assert made.path.read_text().count('"store",') == 2


def test_another_store_is_an_error(file, make_store):
    other = make_store(count=6, length=9, name="other.zarr")
    with pytest.raises(
        PreferenceFileError,
        match=r"line 1: made for a store of 6 episodes and 60 steps .* have 54 steps .*store=",
    ):
        PreferenceSet.open(file, other)
    assert "made for a store" in check_preferences(file, other)[0].message
    assert PreferenceSet.open(file, make_store(count=7, name="more.zarr")).records == RECORDS
    with pytest.raises(PreferenceFileError, match="the first 2 episodes of"):
        PreferenceSet.open(file, make_store(count=2, name="fewer.zarr"))
    (file.parent / "demo.zarr").rename(file.parent / "moved.zarr")
    with pytest.raises(FileNotFoundError, match=r"not at .*demo.zarr; say where: store="):
        PreferenceSet.open(file)
    assert PreferenceSet.open(file, file.parent / "moved.zarr").records == RECORDS


# -- wrong lines -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "changes", "message"),
    [
        (2, {"kind": "rating"}, "unknown kind 'rating'; expected one of pair, ranking, label"),
        (2, {"kind": ...}, "unknown kind None"),
        (2, {"rejected": ...}, "a pair needs 'rejected'"),
        (2, {"weight": 2}, "a pair has no setting 'weight'; it has chosen, rejected"),
        (2, {"chosen": []}, r"chosen must be a segment, one or more spans .*; got \(\)"),
        (2, {"chosen": [[0, 0]]}, r"of whole numbers .*; got \[0, 0\] in it"),
        (2, {"chosen": [[0, 0.5, 3]]}, r"got \[0, 0.5, 3\] in it"),
        (2, {"chosen": [[0, -1, 3]]}, r"start >= 0 and length >= 1; got \[0, -1, 3\]"),
        (2, {"chosen": [[0, 0, 0]]}, r"length >= 1; got \[0, 0, 0\]"),
        (2, {"chosen": [[0, 7, 4]]}, r"episode 0 steps 7..10: episode 0 has the steps 0..9"),
        (2, {"chosen": [[6, 0, 4]]}, r"episode 6 steps 0..3: the store has the episodes 0..5"),
        (2, {"chosen": [[1, 2, 4]]}, "chosen and rejected are the same segment"),
        (2, {"source": 3}, "source must be text; got 3"),
        (2, {"info": [1]}, r"info must be a mapping of JSON values; got \(1,\)"),
        (3, {"tie": "yes"}, "tie must be true or false; got 'yes'"),
        (4, {"items": [[[0, 0, 4]]]}, "items must be two segments or more, best first"),
        (4, {"items": [[[0, 0, 4]], [[0, 0, 4]]]}, "one comes twice in the ranking"),
        (5, {"good": 1}, "good must be true or false; got 1"),
    ],
)
def test_a_wrong_line_is_named(file, number, changes, message):
    change_line(file, number, **changes)
    with pytest.raises(PreferenceFileError, match=rf"prefs.jsonl, line {number}: .*{message}"):
        PreferenceSet.open(file)
    (issue,) = check_preferences(file)
    assert issue.severity == "error"
    assert issue.message.startswith(f"line {number}: ")


def test_lines_that_are_not_json(file):
    lines = file.read_bytes().split(b"\n")
    lines[1:3] = [b'{"kind":"label","item":[[0,0,4]],"good":true,"info":{"x":NaN}}', b"[1, 2"]
    lines[3] = b'{"kind":"label","item":[[0,0,4]],"good":true,"info":{"x":[1e999]}}'
    lines[4] = b"[]"
    file.write_bytes(b"\n".join(lines))
    with pytest.raises(PreferenceFileError, match="line 2: numbers must be finite; got NaN"):
        PreferenceSet.open(file)
    messages = [issue.message for issue in check_preferences(file)]
    assert [m[:7] for m in messages] == ["line 2:", "line 3:", "line 4:", "line 5:"]
    assert "expected one JSON object; got b'[1, 2'" in messages[1]
    assert "info must hold finite numbers; got {'x': [inf]}" in messages[2]
    assert "expected a JSON object with a 'kind'; got []" in messages[3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 3}, "version 3; this diffpolicy reads up to 2: update it"),
        ({"version": "1"}, "version must be int, got '1'"),
        ({"format": "other"}, "expected a header with 'format': 'diffpolicy-preferences'"),
        ({"store": ...}, "missing key 'store'"),
        ({"attrs": 3}, "attrs must be dict.*, got 3"),
        ({"steps": 1.5}, "steps must be int, got 1.5"),
        ({"ends": "ab"}, r"made for a store of 6 episodes .*ends ab"),
        ({"ends": "0" * 64}, "made for a store of 6 episodes and 60 steps"),
    ],
)
def test_wrong_headers(file, changes, message):
    change_line(file, 1, **changes)
    with pytest.raises(PreferenceFileError, match=rf"line 1: .*{message}"):
        PreferenceSet.open(file)
    assert len(check_preferences(file)) == 1


def test_no_such_file_and_no_header(tmp_path):
    with pytest.raises(FileNotFoundError, match="no preference file at"):
        PreferenceSet.open(tmp_path / "none.jsonl")
    for text in (b"", b"\x89PNG\r\n\x1a\n", b'{"format": "diffpol'):
        (tmp_path / "bad").write_bytes(text)
        with pytest.raises(PreferenceFileError, match="line 1: expected a header"):
            PreferenceSet.open(tmp_path / "bad")


def test_create_refuses(store, file, tmp_path):
    with pytest.raises(FileExistsError, match="overwrite=True"):
        PreferenceSet.create(file, store)
    assert len(PreferenceSet.create(file, store, overwrite=True)) == 0
    assert PreferenceSet.open(file).records == ()
    (tmp_path / "notes.txt").write_text("mine")
    for target in (tmp_path / "notes.txt", tmp_path):
        with pytest.raises(FileExistsError, match="not a preference file: it stays"):
            PreferenceSet.create(target, store, overwrite=True)
    memory = EpisodeStore.from_arrays({"obs": np.zeros((3, 1))}, [3])
    with pytest.raises(ValueError, match="needs a store on the disk"):
        PreferenceSet.create(tmp_path / "m.jsonl", memory)
    with pytest.raises(ValueError, match=r"attrs must hold finite numbers; got {'x': nan}"):
        PreferenceSet.create(tmp_path / "m.jsonl", store, attrs={"x": float("nan")})
    assert not (tmp_path / "m.jsonl").exists()


def test_records_that_do_not_fit_are_not_added(file):
    made, before = PreferenceSet.open(file), file.read_bytes()
    with pytest.raises(ValueError, match=r"the store has the episodes 0..5"):
        made.extend([Label(A, good=True), Label((Span(9, 0, 1),), good=True)])
    with pytest.raises(ValueError, match="records are Pair, Ranking or Label; got 'A'"):
        made.append("A")
    made.extend([])
    assert file.read_bytes() == before
    with pytest.raises(ValueError, match=r"got a single span: write \(Span\("):
        Label(Span(0, 0, 1), good=True)
    with pytest.raises(ValueError, match=r"info must hold finite numbers; got {'x': \[1.0, inf\]}"):
        Label(A, good=True, info={"x": np.array([1.0, np.inf])})
    with pytest.raises(ValueError, match=r"rows must be in 0..9; got 4..10"):
        segment_of_rows(np.arange(4, 11), np.array([10]))


def test_numpy_numbers_are_taken(file):
    made = PreferenceSet.open(file)
    span = (Span(np.int64(1), np.int32(0), np.int64(3)),)
    made.append(Label(span, good=np.bool_(True), info={"score": np.float32(0.5)}))
    assert PreferenceSet.open(file).records[-1] == Label((Span(1, 0, 3),), True, "", {"score": 0.5})


def test_doubtful_records_are_warned_of(store):
    kept = PreferenceSet(
        store, [Pair(A, B), Label(A, True), Pair(B, A), Pair(A, B), Label(A, False)]
    )
    messages = [issue.message for issue in kept.check()]
    assert len(messages) == 4
    assert messages[0].startswith("records 0 and 2 contradict each other (episode 1 steps 2..5 / ")
    assert messages[1] == "record 3 is record 0 again"
    assert messages[2].startswith("records 2 and 3 contradict")
    assert messages[3].startswith("records 1 and 4 contradict")
    assert {issue.severity for issue in kept.check()} == {"warning"}


# -- splitting -------------------------------------------------------------------------------------


def episodes(kept):
    found = [r.items if isinstance(r, Ranking) else (r.chosen, r.rejected) for r in kept.records]
    return {span.episode for segments in found for segment in segments for span in segment}


def random_pairs(store, count, group=1):
    """Pairs of different episodes of one group of consecutive ones."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        base = int(rng.integers(store.num_episodes // group)) * group
        size = store.num_episodes if group == 1 else group
        a, b = rng.choice(size, 2, replace=False) + (0 if group == 1 else base)
        yield Pair((Span(int(a), 0, 3),), (Span(int(b), 1, 3),), info={"n": int(rng.integers(99))})


def test_no_episode_is_on_both_sides(make_store):
    store = EpisodeStore.open(make_store(count=12, length=4))
    kept = PreferenceSet(store, random_pairs(store, 200), attrs={"task": "x"})
    folds = kept.split_by_episode(3, seed=1)
    held = [episodes(held_out) for _, held_out in folds]
    assert set.union(*held) == set(range(12))
    assert sum(map(len, held)) == 12
    for fold, (train, held_out) in enumerate(folds):
        assert not episodes(train) & episodes(held_out)
        assert {*train.records, *held_out.records} <= set(kept.records)
        dropped = len(kept) - len(train) - len(held_out)
        assert dropped > 0
        split = {"fold": fold, "folds": 3, "seed": 1, "dropped": dropped}
        assert train.attrs == held_out.attrs == {"task": "x", "split": split}
    again = kept.split_by_episode(3, seed=1)
    assert [a.records for a, _ in again] == [a.records for a, _ in folds]
    other = kept.split_by_episode(3, seed=2)
    assert [a.records for a, _ in other] != [a.records for a, _ in folds]


def test_groups_that_were_compared_stay_together(make_store):
    store = EpisodeStore.open(make_store(count=12, length=4))
    kept = PreferenceSet(store, random_pairs(store, 80, group=3))
    folds = kept.split_by_episode(4, seed=0)
    assert [len(train) + len(held) for train, held in folds] == [80] * 4
    assert sum(len(held) for _, held in folds) == 80
    for _, held in folds:
        assert len({e // 3 for e in episodes(held)}) == 1


def test_episodes_of_one_attribute_stay_together(make_store, make_episode):
    path = make_store(count=0)
    with EpisodeStore.open(path, "a") as store:
        for index in range(12):
            store.append(make_episode(index, 4), start=index % 4)
    kept = PreferenceSet(EpisodeStore.open(path), random_pairs(store, 300))
    for train, held in kept.split_by_episode(2, seed=0, group="start"):
        assert not {e % 4 for e in episodes(train)} & {e % 4 for e in episodes(held)}
    with pytest.raises(ValueError, match=r"episode 0 has no attribute 'seed'; it has \['start'\]"):
        kept.split_by_episode(2, seed=0, group="seed")


def test_splits_that_cannot_be(store):
    kept = PreferenceSet(store, [Pair(A, B)])
    with pytest.raises(ValueError, match="folds must be at least 2, got 1"):
        kept.split_by_episode(1, 0)
    with pytest.raises(ValueError, match="2 episodes, 2 of them independent; 3 folds need as many"):
        kept.split_by_episode(3, 0)
    with pytest.raises(ValueError, match="fold 0 of 2 has 0 records to train on and 0 to hold out"):
        kept.split_by_episode(2, 0)


def test_a_store_that_was_made_anew_is_another_one(make_store, make_episode, tmp_path, caplog):
    place = make_store(length=10)
    kept = PreferenceSet.create(tmp_path / "p.jsonl", EpisodeStore.open(place))
    kept.append(Pair((Span(0, 0, 3),), (Span(1, 0, 3),)))
    with EpisodeStore.open(place, "a") as store:  # growing is no change, and is looked at too
        store.append(make_episode(6, 10))
    kept = PreferenceSet.open(tmp_path / "p.jsonl")
    kept.append(Pair((Span(6, 0, 3),), (Span(1, 0, 3),)))
    assert len(PreferenceSet.open(tmp_path / "p.jsonl")) == 2
    assert check_preferences(tmp_path / "p.jsonl") == []
    for changed in ({5: make_episode(9, 10)}, {6: make_episode(9, 10)}):
        shutil.rmtree(place)
        make_store(count=7, length=10, replace=changed)  # the same lengths
        with pytest.raises(PreferenceFileError, match=r"the same lengths .* but other values"):
            PreferenceSet.open(tmp_path / "p.jsonl")
        (issue,) = check_preferences(tmp_path / "p.jsonl")
        assert "but other values" in issue.message
    old = [json.loads(x) for x in (tmp_path / "p.jsonl").read_text().splitlines()]
    for line in old:
        line.pop("content", None)
        line.pop("crc32", None)
    (tmp_path / "old.jsonl").write_text("".join(json.dumps(x) + "\n" for x in old))
    assert len(PreferenceSet.open(tmp_path / "old.jsonl")) == 2  # still opens, with a note
    assert "without a digest of the store's values" in caplog.text
    (issue,) = check_preferences(tmp_path / "old.jsonl")
    assert issue.severity == "warning"


# -- checksums -------------------------------------------------------------------------------------


def test_every_flipped_byte_is_noticed(file, store):
    data = file.read_bytes()
    whole = PreferenceSet.open(file).records
    for place in [*range(0, len(data), 3), len(data) - 1]:
        changed = bytearray(data)
        changed[place] ^= 1 << place % 7
        file.write_bytes(changed)
        issues = check_preferences(file, store)
        assert issues, (place, data[place - 20 : place + 20])
        assert issues[0].severity == "error" or place == len(data) - 1
    file.write_bytes(data)
    assert PreferenceSet.open(file).records == whole


def test_files_without_checksums_still_open(file):
    old = re.sub(rb',"crc32":"[0-9a-f]{8}"', b"", file.read_bytes())
    file.write_bytes(old.replace(b'"version":2', b'"version":1'))
    made = PreferenceSet.open(file)
    assert made.records == RECORDS
    assert made.check() == check_preferences(file) == []
    made.append(Label(A, good=True))
    assert PreferenceSet.open(file).records == (*RECORDS, Label(A, good=True))


def test_a_line_that_was_corrected_by_hand(file):
    value = json.loads(file.read_text().splitlines()[1])
    change_line(file, 2, source="me", crc32=value["crc32"])
    with pytest.raises(PreferenceFileError, match=r"line 2: .*remove its member 'crc32'"):
        PreferenceSet.open(file)
    change_line(file, 2)  # which removes it
    assert PreferenceSet.open(file).records[0].source == "me"
