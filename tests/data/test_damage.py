"""Whatever is done to a store's files: a clear error or the whole result, and the check sees it."""

import contextlib
import resource
import sys
import tempfile

import numpy as np
import pytest
import torch
import zarr

from diffpolicy.data import EpisodeStore, StoreDamagedError, Windows, check_store
from diffpolicy.data.blocks import read_rows

METADATA = ("zarr.json", ".zarray", ".zattrs", ".zgroup")


def small_store(path):
    rng = np.random.default_rng(0)
    fields = {"obs": rng.normal(size=(40, 3)), "action": rng.uniform(-1, 1, (40, 2))}
    fields |= {"terminated": np.arange(40) % 20 == 19}
    EpisodeStore.from_arrays(fields, [20, 40], path=path, attrs={"env_id": "A-v0"}).close()


def small_replay(path):
    rng = np.random.default_rng(0)
    root = zarr.create_group(path, zarr_format=2)
    for name, width in (("obs", 3), ("action", 2)):
        values = rng.normal(size=(40, width)).astype(np.float32)
        root.create_array(f"data/{name}", data=values, chunks=(16, width))
    root.create_array("meta/episode_ends", data=np.array([20, 40]))


def contents(path):
    """All that a store says, with the user's attributes left out."""
    with EpisodeStore.open(path) as store:
        data = {name: store.read(name).tobytes() for name in store.fields}
        native = store.is_native
        said = (store.statistics, store.episode_attrs) if native else ()
        return data, store.fields, store.episode_ends.tolist(), native, said


def faults(data, step):
    """Bytes flipped, and files cut short, evenly over the file."""
    yield b""
    for place in range(0, len(data), step):
        yield data[:place] + bytes([data[place] ^ (1 << place % 7)]) + data[place + 1 :]
        yield data[:place]


def assert_clear(path, whole):
    """Whole, or an error that names a file of the store and that the check reports too."""
    try:
        found, failure = contents(path), None
        # What others wrote says everything once, so that a changed type reads as that type.
        assert found == whole or not whole[3]
    except (ValueError, FileNotFoundError) as error:
        failure = error
    issues = check_store(path)
    if failure is not None:
        assert str(path) in str(failure), failure
        assert type(failure) in (ValueError, StoreDamagedError), repr(failure)
        assert issues, failure
    return failure


@pytest.mark.filterwarnings("ignore")  # zarr warns of what it does not know
@pytest.mark.parametrize("make", [small_store, small_replay])
def test_damaged_metadata(tmp_path, make):
    path = tmp_path / "s.zarr"
    make(path)
    whole, failures, count = contents(path), 0, 0
    for file in sorted(f for f in path.rglob("*") if f.name in METADATA):
        data = file.read_bytes()
        for fault in faults(data, 301):
            file.write_bytes(fault)
            failures += assert_clear(path, whole) is not None
            count += 1
        file.unlink()
        assert assert_clear(path, whole) is not None or file.name == ".zattrs", file
        file.write_bytes(data)
    assert failures > count / 3
    assert contents(path) == whole
    assert check_store(path) == []


@pytest.mark.parametrize("make", [small_store, small_replay])
def test_a_missing_chunk_is_an_error_for_every_type(tmp_path, make):
    path = tmp_path / "s.zarr"
    make(path)
    with EpisodeStore.open(path) as store:
        for name in store.fields:
            chunk = next(
                f for f in (path / "data" / name).rglob("*") if f.is_file() and f.name[0] in "01"
            )
            data = chunk.read_bytes()
            chunk.unlink()
            with pytest.raises(StoreDamagedError, match=rf"field '{name}'.* chunk .* is missing"):
                store.read(name)
            (issue,) = check_store(path)
            assert (issue.severity, issue.file, issue.field) == ("error", str(chunk), name)
            chunk.write_bytes(data)


def test_lost_ends_are_not_taken_for_fewer_episodes(tmp_path):
    path = tmp_path / "s.zarr"
    with EpisodeStore.create(path, {"obs": (1,), "action": (1,)}) as store:
        values = np.arange(2048.0)[:, None]
        store.extend({"obs": values, "action": values}, np.arange(1, 2049))
    (path / "meta/episode_ends/c/1").unlink()
    with pytest.raises(StoreDamagedError, match="lost episodes: its 1024 steps are 1024 fewer"):
        EpisodeStore.open(path, "a")  # which would cut the data to what is left
    assert any("lost episodes" in i.message for i in check_store(path))


def test_fields_that_are_none(tmp_path):
    path = tmp_path / "r.zarr"
    small_replay(path)
    group = zarr.open_group(path, mode="r+")
    group.create_array("data/phase", data=np.ones((40, 2), np.complex64))
    group.create_array("data/fps", data=np.float32(10))
    group.create_array("data/empty", shape=(40, 0), dtype="f4")
    found = {i.field: i.message for i in check_store(path) if i.severity == "error"}
    assert sorted(found) == ["empty", "fps", "phase"]
    assert "complex64 is not a number type" in found["phase"]
    assert "a single number, not one row a step" in found["fps"]
    assert "hold no numbers" in found["empty"]
    with EpisodeStore.open(path) as store:
        assert sorted(store.fields) == ["action", "obs"]


@contextlib.contextmanager
def files_of_at_most(size):
    """What a full disk does: a file grows up to a size, and then the system refuses."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    values = np.random.default_rng(0).normal(size=(20_000, 3)).astype("f4")
    arrays = {"obs": values, "action": values}
    sizes = {"horizon": 2, "n_obs_steps": 1, "n_action_steps": 1}
    store, path = EpisodeStore.from_arrays(arrays, [20_000]), tmp_path / "s.zarr"
    with files_of_at_most(20_000):
        with pytest.raises(OSError, match="TMPDIR") as streamed:
            Windows(store, **sizes, in_memory=False)
        with pytest.raises(OSError) as written:  # noqa: PT011
            EpisodeStore.from_arrays(arrays, [20_000], path=path)
    assert streamed.value.filename.startswith(f"{tmp_path}/diffpolicy-windows-")
    assert written.value.filename.startswith(f"{path}/data/")
    assert not list(tmp_path.glob("diffpolicy-windows-*"))


def test_each_chunk_is_read_once(tmp_path, monkeypatch):
    from zarr.storage import LocalStore

    path, rng = tmp_path / "s.zarr", np.random.default_rng(0)
    values = rng.normal(size=(600, 2)).astype(np.float32)
    with EpisodeStore.create(path, {"obs": (2,), "action": (2,)}, chunk_rows=16) as store:
        store.extend({"obs": values, "action": values}, np.arange(5, 601, 5))
    store, seen, get = EpisodeStore.open(path), [], LocalStore.get

    async def counted(self, key, *args, **kwargs):
        seen.append(key)
        return await get(self, key, *args, **kwargs)

    monkeypatch.setattr(LocalStore, "get", counted)
    size = {"horizon": 1, "n_obs_steps": 1, "n_action_steps": 1}
    windows = Windows(store, **size, episodes=[*range(0, 60, 2), 100])
    assert len(seen) == len(set(seen)) == 2 * (19 + 1)  # rows 0..295, and 500..504
    for index in range(len(windows)):
        episode, step = windows.locate(index)
        row = windows.gather(torch.tensor([index]))["obs"][0, 0].numpy()
        assert (row == values[5 * episode + step]).all()
    rows = rng.integers(0, 600, (3, 50))
    np.testing.assert_array_equal(read_rows(store, "obs", rows), values[rows])


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        ([1, 1], [-1, -1], "must not be above"),
        (np.nan, 1, "with NaN in it"),
        ("a", 1, "must be numbers"),
        ([0, 0, 0], 1, r"\[3\] do not fit actions of shape \[2\]"),
    ],
)
def test_bounds_that_are_none(tmp_path, low, high, message):
    path = tmp_path / "s.zarr"
    small_store(path)
    with pytest.raises(ValueError, match=message):
        check_store(path, action_low=low, action_high=high)
    group = zarr.open_group(path, mode="r+")
    group.attrs.update({"action_low": np.asarray(low).tolist(), "action_high": high})
    if low is not np.nan:
        assert any(i.severity == "error" for i in check_store(path))
    if "fit" not in message:
        with EpisodeStore.open(path, "a") as store, pytest.raises(ValueError, match=message):
            store.update_attrs({"action_low": low, "action_high": high})


def test_rows_that_are_no_vectors(tmp_path):
    flat, square = np.ones(20, np.float32), np.ones((20, 4, 4), np.float32)
    for arrays, fix in (
        ({"obs": square, "action": square}, "reshape"),
        ({"obs": flat, "action": flat[:, None]}, r"array\[:, None\]"),
        ({"obs": flat[:, None], "action": flat}, r"array\[:, None\]"),
    ):
        with pytest.raises(ValueError, match=rf"must be \[T, D\], one vector a step.*{fix}"):
            EpisodeStore.from_arrays(arrays, [20])
    root = zarr.create_group(tmp_path / "r.zarr", zarr_format=2)
    root.create_array("data/action", data=flat)
    root.create_array("meta/episode_ends", data=np.array([20]))
    assert any("must be vectors" in i.message for i in check_store(tmp_path / "r.zarr"))
