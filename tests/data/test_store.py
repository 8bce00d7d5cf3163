"""The episode store: what goes in comes out, also after a kill, and bad input is named."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import zarr

from diffpolicy.data import EpisodeStore, FieldSpec, StoreDamagedError, check_store, info

FIELDS = {"obs": (3,), "action": (2,)}


def assert_same_episode(got, want):
    assert got.keys() == want.keys()
    for name, values in want.items():
        np.testing.assert_array_equal(got[name], values)


def test_round_trip_over_many_chunks_and_reopenings(tmp_path, make_episode):
    path = tmp_path / "a.zarr"
    want = [make_episode(i) for i in range(40)]
    EpisodeStore.create(path, FIELDS, attrs={"env_id": "Toy-v0"}, chunk_rows=16).close()
    for part in (want[:1], want[1:17], want[17:]):
        with EpisodeStore.open(path, "a") as store:
            for arrays in part:
                index = store.append(arrays, seed=np.int64(7), success=np.bool_(True), note="é\n")
                assert_same_episode(store.episode(index), arrays)
    store = EpisodeStore.open(path)
    lengths = [len(e["obs"]) for e in want]
    assert store.num_episodes == len(store) == 40
    assert store.num_steps == sum(lengths)
    np.testing.assert_array_equal(store.episode_ends, np.cumsum(lengths))
    np.testing.assert_array_equal(store.episode_lengths, lengths)
    for i, arrays in enumerate(want):
        assert_same_episode(store.episode(i), arrays)
    assert store.attrs == {"env_id": "Toy-v0"}
    assert store.episode_attrs == [{"seed": 7, "success": True, "note": "é\n"}] * 40
    assert store.fields == {"obs": FieldSpec((3,)), "action": FieldSpec((2,))}
    assert list(store.episode(3, ["action"])) == ["action"]
    assert check_store(path) == []


def test_layout_is_plain_zarr_compressed_and_checksummed(make_store):
    group = zarr.open_group(make_store(), mode="r")
    assert group.metadata.zarr_format == 3
    assert group["data/obs"].shape == (60, 3)
    assert group["meta/episode_ends"][:].tolist() == [10, 20, 30, 40, 50, 60]
    for name in ("data/obs", "data/action", "meta/episode_ends", "meta/episode_attrs"):
        codecs = [c["name"] for c in group[name].metadata.to_dict()["codecs"]]
        assert codecs == ["bytes", "zstd", "crc32c"]


def test_statistics_are_numpys(tmp_path):
    rng = np.random.default_rng(0)
    obs = rng.normal(3, 2, size=(5000, 4))
    obs[:, 3] = 0.25
    store = EpisodeStore.from_arrays({"obs": obs, "action": obs[:, :2]}, [1000, 5000])
    got, seen = store.statistics["obs"], obs.astype(np.float32).astype(np.float64)
    for name, want in {
        "min": seen.min(0),
        "max": seen.max(0),
        "mean": seen.mean(0),
        "std": seen.std(0),
        "q01": np.quantile(seen, 0.01, axis=0),
        "q99": np.quantile(seen, 0.99, axis=0),
    }.items():
        np.testing.assert_allclose(got[name], want, rtol=1e-12, atol=1e-12)
    assert got["count"] == 5000


def test_quantiles_of_a_sample_when_there_are_too_many_values(monkeypatch):
    monkeypatch.setattr("diffpolicy.data.statistics.MAX_SAMPLED_VALUES", 1000)
    x = np.random.default_rng(0).permutation(100_000).astype(np.float32)[:, None]
    got = EpisodeStore.from_arrays({"obs": x}, [100_000]).statistics["obs"]
    assert got["min"] == [0.0]
    assert got["max"] == [99_999.0]
    assert got["q01"][0] == pytest.approx(1000, abs=1500)
    assert got["q99"][0] == pytest.approx(99_000, abs=1500)


def test_statistics_missing_or_stale_say_how_to_get_them(make_store, make_episode):
    path = make_store()
    group = zarr.open_group(path, mode="r+")
    attrs = dict(group.attrs)
    del attrs["statistics"]
    group.attrs.put(attrs)
    with pytest.raises(ValueError, match=r"no statistics.*data info --update-statistics"):
        _ = EpisodeStore.open(path).statistics
    store = EpisodeStore.open(path, "a")
    store.finalize()
    assert store.statistics["obs"]["count"] == 60
    store.append(make_episode(9, 5))
    with pytest.raises(ValueError, match="cover 60 steps of 65"):
        _ = store.statistics
    store.close()
    assert EpisodeStore.open(path).statistics["obs"]["count"] == 65


def test_fields_of_any_number_type_and_images(tmp_path):
    rng = np.random.default_rng(0)
    want = {
        "image": rng.integers(0, 255, (40, 96, 96, 3), dtype=np.uint8),
        "reward": rng.normal(size=40).astype(np.float32),
        "terminated": np.zeros(40, np.bool_),
    }
    fields = {
        "image": FieldSpec((96, 96, 3), "uint8"),
        "reward": (),
        "terminated": FieldSpec((), "bool"),
    }
    with EpisodeStore.create(tmp_path / "i.zarr", fields) as store:
        store.append({k: v[:15] for k, v in want.items()})
        store.append({k: v[15:] for k, v in want.items()})
    store = EpisodeStore.open(tmp_path / "i.zarr")
    for name, values in want.items():
        np.testing.assert_array_equal(store.read(name), values)
        assert store.read(name).dtype == values.dtype
    assert store.chunk_rows("image") == 37  # of 1 MiB; other fields' chunks are of 256 KiB
    assert sorted(store.statistics) == ["reward", "terminated"]
    with EpisodeStore.create(tmp_path / "old.zarr", fields, chunk_rows=9) as old:  # as they were
        old.append(want)
    np.testing.assert_array_equal(
        EpisodeStore.open(tmp_path / "old.zarr").read("image", 5, 30), want["image"][5:30]
    )
    # All-false chunks are written all the same: a lost one must not look like them.
    assert (tmp_path / "i.zarr/data/terminated/c/0").exists()


def test_from_arrays_in_memory_and_on_disk(tmp_path):
    obs, ends = np.arange(30, dtype=np.float64).reshape(10, 3), [4, 10]
    for path in (None, tmp_path / "f.zarr"):
        store = EpisodeStore.from_arrays({"obs": obs}, ends, path=path, attrs={"a": [1, 2]})
        assert store.fields["obs"] == FieldSpec((3,), "float32")
        np.testing.assert_array_equal(store.episode(1)["obs"], obs[4:])
        np.testing.assert_array_equal(store.read("obs", 2, 5), obs[2:5])
        assert store.attrs == {"a": [1, 2]}
        assert store.path == path
        store.append({"obs": obs})
        assert store.num_steps == 20
        store.update_attrs({"b": None})
        assert store.attrs == {"a": [1, 2], "b": None}
        store.close()
    assert EpisodeStore.create(None, {"obs": (3,)}).path is None  # empty, to append to


def test_a_reader_sees_whole_episodes_while_a_writer_works(tmp_path, make_episode):
    path = tmp_path / "live.zarr"
    writer = EpisodeStore.create(path, FIELDS, chunk_rows=16)
    assert EpisodeStore.open(path).num_episodes == 0
    for i in range(5):
        writer.append(make_episode(i))
        reader = EpisodeStore.open(path)
        assert reader.num_episodes == i + 1
        assert_same_episode(reader.episode(i), make_episode(i))
    writer.close()


def test_appending_is_not_quadratic(tmp_path):
    # Files written per episode stay the same however long the store is.
    store = EpisodeStore.create(tmp_path / "q.zarr", {"obs": (17,), "action": (6,)})
    arrays = {"obs": np.zeros((50, 17)), "action": np.zeros((50, 6))}
    seconds = []
    for _ in range(4):
        start = time.process_time()
        for _ in range(25):
            store.append(arrays)
        seconds.append(time.process_time() - start)
    store.close()
    assert store.num_steps == 100 * 50
    assert min(seconds[2:]) < 3 * min(seconds[:2])


WRITER = """
    import os, signal, sys
    import numpy as np
    from diffpolicy.data import EpisodeStore
    from diffpolicy.data import store_layout as layout

    path, kill_at = sys.argv[1], int(sys.argv[2])

    def episode(index):
        rng = np.random.default_rng(index)
        length = int(rng.integers(1, 30))
        return {"obs": rng.normal(size=(length, 3)), "action": rng.uniform(-1, 1, (length, 2))}

    calls = 0
    write = layout.Tail.append

    def write_or_die(self, rows):
        global calls
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, rows)

    layout.Tail.append = write_or_die
    if os.path.exists(path):
        store = EpisodeStore.open(path, "a")
    else:
        store = EpisodeStore.create(path, {"obs": (3,), "action": (2,)}, chunk_rows=16)
    print("ready", flush=True)
    while True:
        index = store.append(episode(store.num_episodes), seed=store.num_episodes)
        print(index, flush=True)
"""


def start_writer(path, kill_at=0):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(path), str(kill_at)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def assert_whole_after_kill(path, acknowledged, make_episode):
    store = EpisodeStore.open(path)
    assert store.num_episodes >= acknowledged  # nothing that append returned from is lost
    for i in range(store.num_episodes):
        assert_same_episode(store.episode(i), make_episode(i))
    assert [a["seed"] for a in store.episode_attrs] == list(range(store.num_episodes))
    assert {i.severity for i in check_store(path)} <= {"warning"}
    return store.num_episodes


# An append writes obs, action, attributes and ends, in this order: die before each of them.
@pytest.mark.parametrize("kill_at", [9, 10, 11, 12])
def test_killed_before_any_write_of_an_append(tmp_path, make_episode, kill_at):
    path = tmp_path / "k.zarr"
    process = start_writer(path, kill_at)
    lines = process.communicate(timeout=60)[0].split()
    assert process.returncode == -signal.SIGKILL
    assert lines == ["ready", "0", "1"]
    assert assert_whole_after_kill(path, 2, make_episode) == 2
    with EpisodeStore.open(path, "a") as store:  # and the work goes on where it stopped
        assert zarr.open_group(path, mode="r")["data/obs"].shape[0] == store.num_steps
        for i in range(2, 6):
            store.append(make_episode(i), seed=i)
    assert assert_whole_after_kill(path, 6, make_episode) == 6
    assert check_store(path) == []


def test_killed_at_any_moment_again_and_again(tmp_path, make_episode):
    path = tmp_path / "k.zarr"
    rng = np.random.default_rng(0)
    total = 0
    for _ in range(3):
        process = start_writer(path)
        assert process.stdout.readline() == "ready\n"
        lines = [process.stdout.readline() for _ in range(4)]  # however slow the machine is
        time.sleep(float(rng.uniform(0, 0.3)))
        process.kill()
        lines += process.communicate(timeout=60)[0].split()
        acknowledged = int(lines[-1]) + 1
        total = assert_whole_after_kill(path, max(total, acknowledged), make_episode)
    assert total > 10
    EpisodeStore.open(path, "a").close()
    assert not list(path.rglob("*.partial"))


def test_a_failed_append_adds_nothing_and_the_next_one_works(tmp_path, make_episode, monkeypatch):
    from diffpolicy.data import store_layout as layout

    store = EpisodeStore.create(tmp_path / "d.zarr", FIELDS, chunk_rows=16)
    store.append(make_episode(0))
    write = layout.Tail.append

    def full_disk(self, rows):
        if rows.ndim == 2 and rows.shape[1] == 2:
            raise OSError("no space left on device")
        write(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(layout.Tail, "append", full_disk)
        with pytest.raises(OSError, match="no space"):
            store.append(make_episode(1))
    assert store.num_episodes == 1
    store.append(make_episode(2), seed=2)
    store.close()
    store = EpisodeStore.open(store.path)
    assert_same_episode(store.episode(1), make_episode(2))
    assert store.episode_attrs == [{}, {"seed": 2}]


def bad_arrays():
    obs, action = np.zeros((5, 3)), np.zeros((5, 2))
    hole = obs.copy()
    hole[3, 1] = np.nan
    return {
        "missing field": ({"obs": obs}, r"fields \['action', 'obs'\], and no other; got \['obs'\]"),
        "extra field": ({"obs": obs, "action": action, "x": obs}, "and no other"),
        "lengths": ({"obs": obs, "action": action[:4]}, r"one row a step.*'action': 4"),
        "shape": ({"obs": obs[:, :2], "action": action}, r"'obs' has rows of shape \[3\]"),
        "empty": ({"obs": obs[:0], "action": action[:0]}, "must increase strictly from above 0"),
        "not finite": ({"obs": hole, "action": action}, r"'obs' is not finite at row 3, value 1"),
        "too large": ({"obs": obs + 1e300, "action": action}, "'obs' is not finite at row 0"),
        "complex": ({"obs": obs * 1j, "action": action}, "stored as float32; got complex128"),
        "text": ({"obs": obs.astype(str), "action": action}, "stored as float32"),
    }


@pytest.mark.parametrize("case", bad_arrays())
def test_append_refuses(case, tmp_path):
    arrays, message = bad_arrays()[case]
    store = EpisodeStore.create(tmp_path / "b.zarr", FIELDS)
    with pytest.raises(ValueError, match=message):
        store.append(arrays)
    assert store.num_episodes == 0


def test_bad_attributes_and_fields(tmp_path):
    with pytest.raises(ValueError, match=r"attrs.f must be JSON"):
        EpisodeStore.create(tmp_path / "1", FIELDS, attrs={"f": object()})
    with pytest.raises(ValueError, match="the store's own"):
        EpisodeStore.create(tmp_path / "2", FIELDS, attrs={"statistics": 1})
    with pytest.raises(ValueError, match="needs fields"):
        EpisodeStore.create(tmp_path / "3", {})
    with pytest.raises(ValueError, match="field names"):
        EpisodeStore.create(tmp_path / "4", {"../x": (1,)})
    with pytest.raises(ValueError, match="plain numbers"):
        FieldSpec((1,), "object")
    with pytest.raises(ValueError, match="at least 1"):
        FieldSpec((0,))
    with pytest.raises(ValueError, match="chunk_rows"):
        EpisodeStore.create(tmp_path / "5", FIELDS, chunk_rows=0)
    store = EpisodeStore.create(tmp_path / "6", FIELDS)
    with pytest.raises(ValueError, match=r"episode_attrs.when must be JSON"):
        store.append({"obs": np.zeros((1, 3)), "action": np.zeros((1, 2))}, when=object())


def test_create_leaves_what_is_there(make_store, tmp_path):
    path = make_store()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        EpisodeStore.create(path, FIELDS)
    assert EpisodeStore.open(path).num_episodes == 6
    EpisodeStore.create(path, FIELDS, overwrite=True).close()
    assert EpisodeStore.open(path).num_episodes == 0
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="not a store"):
        EpisodeStore.create(tmp_path / "home", FIELDS, overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").exists()


def test_open_names_what_is_wrong(make_store, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no episode store at .*nowhere"):
        EpisodeStore.open(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="not an episode store"):
        EpisodeStore.open(tmp_path / "empty")
    (tmp_path / "text.zip").write_text("not a zip")
    with pytest.raises(ValueError, match="not an episode store"):
        EpisodeStore.open(tmp_path / "text.zip")
    path = make_store()
    with pytest.raises(ValueError, match="unknown mode 'w'"):
        EpisodeStore.open(path, "w")
    store = EpisodeStore.open(path)
    with pytest.raises(ValueError, match="open for reading"):
        store.append({})
    with pytest.raises(KeyError, match="no field 'state'"):
        store.read("state")
    with pytest.raises(IndexError, match="episode 6"):
        store.episode(6)
    zarr.open_group(path, mode="r+")["data/obs"].resize((30, 3))
    with pytest.raises(StoreDamagedError, match="'obs' has 30 rows but episode_ends says 60"):
        EpisodeStore.open(path)


def test_a_changed_byte_is_noticed_on_reading(make_store):
    path = make_store()
    chunk = path / "data" / "obs" / "c" / "1" / "0"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    store = EpisodeStore.open(path)
    store.read("obs", 0, 16)
    with pytest.raises(StoreDamagedError, match=r"'obs', rows 10\.\.19 .*data check"):
        store.episode(1)
    EpisodeStore.open(path, "a").close()  # the last chunk is whole, so one may go on
    (path / "data" / "obs" / "c" / "3" / "0").write_bytes(b"")
    with pytest.raises(StoreDamagedError, match=r"last chunk of .*data/obs cannot be read"):
        EpisodeStore.open(path, "a")


def test_from_arrays_refuses_bad_ends():
    x = np.zeros((10, 2))
    for ends, message in (
        ([5, 5, 10], r"must increase strictly from above 0.*5, 5, 10"),
        ([7, 5, 10], "must increase strictly"),
        ([5, 9], r"says 9 steps, but the fields have .*10"),
        ([], "must be a vector of whole numbers"),
        ([5.0, 10.0], "must be a vector of whole numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            EpisodeStore.from_arrays({"obs": x}, ends)


def test_info(make_store):
    path = make_store()
    got = info(EpisodeStore.open(path))
    assert json.loads(json.dumps(got)) == got
    assert got["episodes"] == 6
    assert got["steps"] == 60
    assert got["length"] == {"min": 10, "mean": 10.0, "max": 10}
    assert got["fields"]["obs"] == {"shape": [3], "dtype": "float32"}
    assert got["episode_attrs"]["success"] == {"count": 6, "mean": 0.5}
    assert got["has_statistics"] is True
    assert got["format"] == "diffpolicy"
    assert got["bytes_on_disk"] > 0


def test_importing_the_normaliser_does_not_import_zarr():
    code = "import sys; from diffpolicy.data import Normalizer; sys.exit('zarr' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("foreign", ["thesis.tex", "data/obs/notes", "data/obs/mine/", "meta/c/0"])
def test_a_store_with_something_else_in_it_is_not_overwritten(tmp_path, foreign):
    path = tmp_path / "s.zarr"
    EpisodeStore.from_arrays({"obs": np.zeros((4, 2)), "action": np.zeros((4, 1))}, [4], path=path)
    place = path / foreign
    place.parent.mkdir(exist_ok=True, parents=True)
    place.mkdir() if foreign.endswith("/") else place.write_text("mine")
    with pytest.raises(FileExistsError, match=foreign):
        EpisodeStore.create(path, {"obs": (2,)}, overwrite=True)
    assert EpisodeStore.open(path).num_episodes == 1


def test_two_handles_of_one_store_lose_nothing(tmp_path):
    path = tmp_path / "s.zarr"
    rows = {"obs": np.ones((3, 2), "f4"), "action": np.ones((3, 1), "f4")}
    EpisodeStore.from_arrays(rows, [3], path=path)
    a, b = EpisodeStore.open(path, "a"), EpisodeStore.open(path, "a")
    for handle in (a, b, a, a, b):
        handle.append(rows)
        handle.update_attrs({f"n{handle.num_episodes}": 1})
    a.finalize()
    b.close()
    a.close()
    back = EpisodeStore.open(path)
    assert back.num_episodes == 6
    assert set(back.attrs) == {f"n{n}" for n in range(2, 7)}
    np.testing.assert_array_equal(back.read("obs", 0, 18), np.ones((18, 2)))
    assert [p.name for p in tmp_path.iterdir()] == ["s.zarr"]


SECOND_WRITER = """
import sys
import numpy as np
from diffpolicy.data.store import EpisodeStore
rows = {"obs": np.ones((3, 2), "f4"), "action": np.ones((3, 1), "f4")}
try:
    with EpisodeStore.open(sys.argv[1], "a") as store:
        store.append(rows)
except ValueError as error:
    sys.exit(f"refused: {error}")
"""


def test_another_process_may_write_when_the_first_has_finished_and_not_before(tmp_path):
    path = tmp_path / "s.zarr"
    rows = {"obs": np.ones((3, 2), "f4"), "action": np.ones((3, 1), "f4")}
    store = EpisodeStore.from_arrays(rows, [3], path=path)
    store.append(rows)
    for finished in (False, True):
        if finished:
            store.finalize()
        other = [sys.executable, "-c", SECOND_WRITER, str(path)]
        result = subprocess.run(other, capture_output=True, text=True, check=False)
        assert (f"refused: {path} is in use: process {os.getpid()} on" in result.stderr) != finished
    assert EpisodeStore.open(path).num_episodes == 3
    store.append(rows)
    assert store.num_episodes == 4
