"""Index pairs as segments: exactly the rows that the labels were given for."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from diffpolicy.data import EpisodeStore, convert, load_d4rl, qlearning_dataset
from diffpolicy.data.preferences.pickled_array import RefusedError, numbers, read_pickled_array
from diffpolicy.data.preferences.published import from_indices, qlearning_rows, read_label_file
from diffpolicy.data.preferences.records import Pair, Span
from diffpolicy.data.preferences.set import PreferenceSet

DOOR = Path(__file__).parents[3] / "shared" / "data" / "adroit_door_human"


@pytest.fixture
def store():
    arrays = {"obs": np.zeros((12, 2)), "action": np.zeros((12, 1))}
    return EpisodeStore.from_arrays(arrays, [5, 12])


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    if not DOOR.exists():
        pytest.skip("the Adroit door demonstrations (../shared/data/adroit_door_human) are absent")
    return convert(DOOR / "door_human.npz", tmp_path_factory.mktemp("door") / "door.zarr")


# qlearning order: the last step of each episode (rows 4 and 11) is left out.
KEPT = [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]


def test_labels_and_spans(store):
    pairs = from_indices(store, [0, 2, 0], [4, 5, 6], [0, 1, -1], 4, raw_index_map=KEPT)
    first, crossing = (Span(0, 0, 4),), (Span(0, 2, 2), Span(1, 0, 2))
    assert pairs == [
        Pair(first, (Span(1, 0, 4),), source="human", info={"row": 0}),
        Pair((Span(1, 1, 4),), crossing, source="human", info={"row": 1}),
        Pair(first, (Span(1, 2, 4),), tie=True, source="human", info={"row": 2}),
    ]
    kept = PreferenceSet(store, pairs)
    assert kept.rows(crossing).tolist() == [2, 3, 5, 6]  # row 4 is not in it


def test_without_a_map_and_with_two_columns(store):
    labels = [[1, 0], [0, 1], [1, 1]]
    pairs = from_indices(store, [0, 2, 0], [4, 5, 6], np.array(labels, np.int8), 4, source="me")
    assert pairs[0].rejected == (Span(0, 4, 1), Span(1, 0, 3))
    assert pairs[1].chosen == (Span(1, 0, 4),)
    assert [p.tie for p in pairs] == [False, False, True]
    assert {p.source for p in pairs} == {"me"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": [0, 2]}, r"label must be 0, 1 or -1; got 2 in row 1"),
        ({"label": [0]}, "must have the same length; got 2, 2 and 1"),
        ({"label": [[0, 1, 0]] * 2}, r"label must be \[N\] or \[N, 2\] finite numbers"),
        ({"label": ["a", "b"]}, "label must be .* finite numbers; got shape"),
        ({"index_1": [0.5, 1.0]}, "index_1 must be a vector of whole numbers; got shape"),
        (
            {"index_2": [3, 7]},
            r"row 1 of the labels: a segment of 4 from index 7 does not fit 0..9",
        ),
        ({"index_2": [3, -1]}, "row 1 of the labels: a segment of 4 from index -1"),
        ({"index_2": [0, 1]}, "row 0 of the labels: chosen and rejected are the same segment"),
        ({"length": 0}, "length must be at least 1, got 0"),
        (
            {"raw_index_map": [*KEPT[:6], 12]},
            "row 0 of the labels: .*rows must be in 0..11; got 3.",
        ),
    ],
)
def test_wrong_labels(store, changes, message):
    values = {"index_1": [0, 0], "index_2": [3, 1], "label": [0, 1], "length": 4}
    with pytest.raises(ValueError, match=message):
        from_indices(store, **{"raw_index_map": KEPT, **values, **changes})


def test_files(store, tmp_path):
    path = tmp_path / "labels.npz"
    np.savez(path, index_1=[0], index_2=[4], label=[1], seg_len=4)
    assert read_label_file(path, store, index="rows")[0].chosen == (Span(0, 4, 1), Span(1, 0, 3))
    assert read_label_file(path, store, index="qlearning")[0].chosen == (Span(1, 0, 4),)
    assert read_label_file(path, store, length=1, index="rows")[0].chosen == (Span(0, 4, 1),)
    with pytest.raises(ValueError, match="what its indices count must be said: index=qlearning"):
        read_label_file(path, store)
    with pytest.raises(ValueError, match="unknown index 'raw'; expected one of"):
        read_label_file(path, store, index="raw")
    with pytest.raises(ValueError, match=r"has no array robot_label; it has .*'seg_len'"):
        read_label_file(path, store, kind="robot", index="rows")
    np.savez(path, index_1=[0], index_2=[4], label=[1])
    with pytest.raises(ValueError, match="has no array seg_len"):
        read_label_file(path, store, index="rows")
    np.savez(path, index_1=np.array([{}]))
    with pytest.raises(ValueError, match=r"of plain arrays: Object arrays cannot be loaded$"):
        read_label_file(path, store)  # and no advice to load it unsafely
    path.write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(ValueError, match="is not an npz file"):
        read_label_file(path, store)
    with pytest.raises(FileNotFoundError, match="no label file at"):
        read_label_file(tmp_path / "none.npz", store)


def test_three_pickles_as_they_are_published(store, tmp_path):
    end = "_domain_adroit_env_x_num_2_len_4_0af1.pkl"
    values = {"indices_1": np.array([0, 2]), "indices_2": np.array([4, 5], np.int32)}
    values["human_label"] = np.array([0, 1])
    for name, value in values.items():
        (tmp_path / f"{name}{end}").write_bytes(pickle.dumps(value))
    pairs = read_label_file(tmp_path / f"human_label{end}", store)
    assert [p.chosen for p in pairs] == [(Span(0, 0, 4),), (Span(1, 1, 4),)]  # qlearning's rows
    with pytest.raises(ValueError, match="there are 1, 1 and 0 of them"):
        read_label_file(tmp_path, store, kind="fake")


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_pickles_of_every_protocol(protocol):
    columns = np.asfortranarray([[1, 0], [0, 1], [3, 4]], ">f8")
    for value in (columns, np.arange(3, dtype=np.int32), [np.int64(4), 2], [0, 1, -1]):
        np.testing.assert_array_equal(numbers(pickle.dumps(value, protocol)), np.array(value))


def test_a_pickle_that_is_no_array_is_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    for value, message in [
        (Hostile(), r"it names '(posix|nt)\.system', which is no part of an array"),
        (np.array([{}], object), "it holds ndarray, not an array of numbers"),
        ({"a": 1}, "it holds dict, not an array"),
    ]:
        with pytest.raises(RefusedError, match=message):
            numbers(pickle.dumps(value))
    (tmp_path / "labels").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(ValueError, match=r"is no pickled array of numbers: it names"):
        read_pickled_array(tmp_path / "labels")
    assert not (tmp_path / "ran").exists()


def test_the_rows_of_qlearning_dataset_are_those_of_the_file(tmp_path):
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    for number, timeouts in enumerate((True, False)):
        arrays = {"observations": rng.normal(size=(60, 3)), "actions": rng.normal(size=(60, 2))}
        arrays |= {"rewards": rng.normal(size=60), "terminals": rng.random(60) < 0.1}
        if timeouts:
            arrays["timeouts"] = (rng.random(60) < 0.1) & ~arrays["terminals"]
        path = tmp_path / f"{number}.hdf5"
        with h5py.File(path, "w") as file:
            for name, values in arrays.items():
                file[name] = values
        with load_d4rl(path, max_episode_steps=None if timeouts else 7) as source:
            kept, whole = source.to_store(), qlearning_dataset(source)
        rows = qlearning_rows(kept)
        np.testing.assert_array_equal(kept.read("obs")[rows], whole["observations"])


def test_the_door_map_follows_from_the_store_alone(door):
    with np.load(DOOR / "door_human_prefs_unirlhf.npz") as file:
        np.testing.assert_array_equal(qlearning_rows(door), file["raw_index_map"])


def test_door(door):
    labels = DOOR / "door_human_prefs_unirlhf.npz"
    human = PreferenceSet(door, read_label_file(labels, door))
    facts = human.summary()
    assert (facts["pairs"], facts["ties"]) == (1348, 111)
    assert facts["length"] == [50, 50]
    assert facts["crossing"] / facts["segments"] == pytest.approx(0.2, abs=0.01)
    with np.load(labels) as file:
        first, second, label = (file[n] for n in ("index_1", "index_2", "human_label"))
        rows = file["raw_index_map"]
    won = [
        np.array_equal(human.rows(p.chosen), rows[i : i + 50])
        for p, i in zip(human.records, first.tolist(), strict=True)
    ]
    assert [sum(np.array(won) & (label == k)) for k in (0, 1, -1)] == [650, 0, 111]
    for pair, i in zip(human.records, np.where(label == 1, first, second).tolist(), strict=True):
        np.testing.assert_array_equal(human.rows(pair.rejected), rows[i : i + 50])
    # Counted on this file; its README says 83.2 % and 98.5 % of "the full set".
    assert facts["reward_agreement"] == pytest.approx(1118 / 1348)
    scripted = PreferenceSet(door, read_label_file(labels, door, kind="scripted"))
    assert scripted.summary()["reward_agreement"] == pytest.approx(1441 / 1459)
    assert human.check() == []


def test_door_without_the_map_agrees_less(door):
    with np.load(DOOR / "door_human_prefs_unirlhf.npz") as file:
        names = ("index_1", "index_2", "human_label")
        naive = PreferenceSet(door, from_indices(door, *(file[n] for n in names), 50))
    assert naive.agreement(door.read("reward")) < 0.77


def test_door_split_by_episode(door):
    kept = PreferenceSet(door, read_label_file(DOOR / "door_human_prefs_unirlhf.npz", door))
    folds = kept.split_by_episode(5, seed=0)
    for train, held_out in folds:
        assert len(train.pairs()) > 600
        assert len(held_out.pairs()) >= 30
    first, second = kept.split_by_episode(2, seed=0)
    assert first[0].records == second[1].records
    assert len(first[1].pairs()) > 250
