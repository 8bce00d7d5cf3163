"""LeRobot datasets through the store; the files here have the layouts of versions 2.1 and 3.0."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from diffpolicy.commands.data import run
from diffpolicy.data import EpisodeStore, check_store, convert
from diffpolicy.data.fields import FieldSpec
from diffpolicy.data.formats import get_format, lerobot, lerobot_writer
from diffpolicy.data.formats.lerobot import LeRobotDirectory
from diffpolicy.settings import ConfigError

pa = pytest.importorskip("pyarrow", reason='pyarrow is not installed (extra "lerobot")')
pq = pytest.importorskip("pyarrow.parquet")

V2_PATH = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
V3_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
V2_FILM = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
V3_FILM = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
TOP, STILL = "observation.images.top", "observation.images.still"
CAMERAS = {
    TOP: {"dtype": "video", "shape": [16, 24, 3], "names": ["height", "width", "channels"]},
    STILL: {"dtype": "image", "shape": [3, 16, 24], "names": ["channels", "height", "width"]},
}
FEATURES = {
    "observation.caption": {"dtype": "string", "shape": [1], "names": None},
    "observation.state": {"dtype": "float32", "shape": [2], "names": {"motors": ["x", "y"]}},
    "observation.environment_state": {"dtype": "float32", "shape": [4], "names": None},
    "pose": {"dtype": "float32", "shape": [2, 3], "names": None},
    "action": {"dtype": "float32", "shape": [2], "names": None},
    "next.reward": {"dtype": "float32", "shape": [1], "names": None},
    "next.done": {"dtype": "bool", "shape": [1], "names": None},
    "next.success": {"dtype": "bool", "shape": [1], "names": None},
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    "frame_index": {"dtype": "int64", "shape": [1], "names": None},
    "episode_index": {"dtype": "int64", "shape": [1], "names": None},
    "index": {"dtype": "int64", "shape": [1], "names": None},
    "task_index": {"dtype": "int64", "shape": [1], "names": None},
}


def episode(number: int) -> dict[str, np.ndarray]:
    """Episode `number` of 3 + number steps; even ones end in success."""
    rng = np.random.default_rng(number)
    steps = 3 + number
    last = np.arange(steps) == steps - 1
    return {
        "observation.state": rng.normal(size=(steps, 2)).astype(np.float32),
        "observation.environment_state": rng.normal(size=(steps, 4)).astype(np.float32),
        "pose": rng.normal(size=(steps, 2, 3)).astype(np.float32),
        "action": rng.uniform(-1, 1, (steps, 2)).astype(np.float32),
        "next.reward": rng.normal(size=steps).astype(np.float32),
        "next.done": last,
        "next.success": last & (number % 2 == 0),
        "timestamp": np.arange(steps, dtype=np.float32) / 10,
        "frame_index": np.arange(steps),
        "episode_index": np.full(steps, number),
        "task_index": np.full(steps, number % 2),
    }


def table(episodes: list[dict[str, np.ndarray]]):
    """Vectors as lists of a fixed size, matrices as lists of lists, as LeRobot writes them."""
    columns = {}
    for name in episodes[0]:
        values = np.concatenate([e[name] for e in episodes])
        if values.ndim == 1:
            columns[name] = pa.array(values)
        elif values.ndim == 2:
            columns[name] = pa.FixedSizeListArray.from_arrays(values.reshape(-1), values.shape[1])
        else:
            columns[name] = pa.array(values.tolist(), pa.list_(pa.list_(pa.float32())))
    return pa.table(columns)


def film(path: Path, pictures: np.ndarray, fps: int = 10) -> None:
    """Write pictures as they are; by hand, so that our own writer is not its own judge."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264rgb", rate=fps, options={"crf": "0", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "rgb24"
        for pixels in pictures:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode(None))


def pictures(number: int) -> np.ndarray:
    """What a camera of 16 x 24 pixels saw in an episode."""
    rng = np.random.default_rng(100 + number)
    return rng.integers(0, 256, (3 + number, 16, 24, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> dict:
    image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    image.fromarray(pixels).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def write_info(root: Path, version: str, path: str, count: int, features: dict) -> None:
    (root / "meta").mkdir(parents=True, exist_ok=True)
    info = {
        "codebase_version": version,
        "robot_type": "2d",
        "fps": 10,
        "total_episodes": count,
        "chunks_size": 8,
        "data_path": path,
        "video_path": V2_FILM if version.startswith("v2") else V3_FILM,
        "features": features,
    }
    (root / "meta/info.json").write_text(json.dumps(info))


def write_v2(root: Path, episodes: list[dict], features: dict = FEATURES) -> Path:
    write_info(root, "v2.1", V2_PATH, len(episodes), features)
    lines = []
    for arrays in episodes:
        number = int(arrays["episode_index"][0])
        tasks = [f"task {number % 2}"]
        line = {"episode_index": number, "tasks": tasks, "length": len(arrays["action"])}
        lines.append(json.dumps(line))
        file = root / f"data/chunk-{number // 8:03d}/episode_{number:06d}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table([arrays]), file)
    (root / "meta/episodes.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    return root


def write_v3(root: Path, files: list[list[dict]], features: dict = FEATURES) -> Path:
    """Files of several episodes, with a row group each, and two lists of episodes."""
    write_info(root, "v3.0", V3_PATH, sum(map(len, files)), features)
    known, start = [], 0
    for number, episodes in enumerate(files):
        file = root / f"data/chunk-000/file-{number:03d}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(file, table(episodes).schema) as writer:
            for arrays in episodes:
                writer.write_table(table([arrays]))
                steps, index = len(arrays["action"]), int(arrays["episode_index"][0])
                known.append(
                    {
                        "episode_index": index,
                        "data/chunk_index": 0,
                        "data/file_index": number,
                        "dataset_from_index": start,
                        "dataset_to_index": start + steps,
                        "tasks": [f"task {index % 2}"],
                        "length": steps,
                        "stats/action/min": [0.0, 0.0],
                    }
                )
                start += steps
    for number, part in enumerate((known[:2], known[2:])):
        file = root / f"meta/episodes/chunk-000/file-{number:03d}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(part), file)
    return root


def check(root: Path, target: Path, version: str) -> None:
    store = convert(root, target)
    assert store.num_episodes == 11
    for number in range(11):  # numerically: episode 2 before episode 10
        want, got = episode(number), store.episode(number)
        parts = [want["observation.state"], want["observation.environment_state"]]
        np.testing.assert_array_equal(got["obs"], np.concatenate(parts, 1))
        np.testing.assert_array_equal(got["action"], want["action"])
        np.testing.assert_array_equal(got["reward"], want["next.reward"])
        last = np.arange(3 + number) == 2 + number
        np.testing.assert_array_equal(got["terminated"], last & (number % 2 == 0))
        np.testing.assert_array_equal(got["truncated"], last & (number % 2 == 1))
        tasks = [f"task {number % 2}"]
        assert store.episode_attrs[number] == {"episode_index": number, "tasks": tasks}
    attrs = store.attrs
    assert attrs["lerobot_version"] == version
    assert (attrs["fps"], attrs["robot_type"], attrs["dataset"]) == (10, "2d", root.name)
    assert attrs["tasks"] == ["task 0", "task 1"]
    assert attrs["names"] == {"observation.state": {"motors": ["x", "y"]}}
    assert attrs["unread"] == {"observation.caption": "string: only numbers and colours are read"}
    assert attrs["source"] == {"name": root.name, "format": "lerobot"}
    assert check_store(target, action_low=-1, action_high=1) == []


def test_version_2_has_a_file_an_episode(tmp_path):
    root = write_v2(tmp_path / "pusht", [episode(i) for i in range(11)])
    assert (root / "data/chunk-001/episode_000010.parquet").exists()
    assert get_format("auto", root)[0] == "lerobot"
    check(root, tmp_path / "o.zarr", "v2.1")


def test_version_3_packs_episodes(tmp_path):
    episodes = [episode(i) for i in range(11)]
    root = write_v3(tmp_path / "pusht", [episodes[:5], episodes[5:6], episodes[6:]])
    check(root, tmp_path / "o.zarr", "v3.0")


def test_chosen_fields(tmp_path):
    root = write_v2(tmp_path / "d", [episode(0), episode(1)])
    chosen = {"obs": ["pose", "timestamp"], "task": "task_index", "terminated": "next.done"}
    store = convert(root, tmp_path / "o.zarr", fields=chosen)
    want = episode(1)
    flat = np.concatenate([want["pose"].reshape(4, 6), want["timestamp"][:, None]], 1)
    np.testing.assert_array_equal(store.episode(1)["obs"], flat)
    np.testing.assert_array_equal(store.episode(1)["task"], [1, 1, 1, 1])
    np.testing.assert_array_equal(store.episode(1)["terminated"], want["next.done"])
    source = LeRobotDirectory(root)
    assert source.fields["pose"].shape == (2, 3)
    assert source.fields["next.done"].dtype == "bool"
    assert "index" not in source.fields
    np.testing.assert_array_equal(source.episode(1)["pose"], want["pose"])


@pytest.mark.parametrize(
    ("present", "terminated"),
    [
        ({"next.truncated": True, "next.success": True}, False),
        ({"next.truncated": False, "next.success": False}, True),
        ({"next.success": True}, True),
        ({"next.success": False}, False),
        ({}, True),  # as LeRobot's own learner
    ],
)
def test_what_done_means(tmp_path, present, terminated):
    arrays = episode(0)
    del arrays["next.success"]
    arrays |= {name: np.array([False, False, value]) for name, value in present.items()}
    flag = {"dtype": "bool", "shape": [1]}
    features = {k: v for k, v in FEATURES.items() if k in arrays} | dict.fromkeys(present, flag)
    got = LeRobotDirectory(write_v2(tmp_path / "d", [arrays], features)).episode(0)
    assert got["terminated"].tolist() == [False, False, terminated]
    assert got["truncated"].tolist() == [False, False, not terminated]


def test_demonstrations_without_rewards(tmp_path):
    names = ["observation.state", "action", "episode_index"]
    arrays = {k: v for k, v in episode(0).items() if k in names}
    features = {k: FEATURES[k] for k in names}
    source = LeRobotDirectory(write_v2(tmp_path / "d", [arrays], features))
    assert source.default_fields() == {"obs": ["observation.state"], "action": "action"}
    assert source.episode(0, ["terminated", "truncated"])["truncated"].tolist() == [0, 0, 1]
    del features["observation.state"], arrays["observation.state"]
    root = write_v2(tmp_path / "images", [arrays], features)
    with pytest.raises(ValueError, match="does not say what 'obs' is; choose of its fields"):
        convert(root, tmp_path / "o.zarr")


def test_ids_are_looked_up(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path))
    write_v2(tmp_path / "lerobot/pusht", [episode(0)])
    assert LeRobotDirectory(Path("lerobot/pusht")).attrs["dataset"] == "lerobot/pusht"
    snapshot = tmp_path / "hub/datasets--me--cups/snapshots/abc"
    write_v2(snapshot, [episode(0)])
    assert lerobot.locate("me/cups") == snapshot
    assert LeRobotDirectory(Path("me/cups")).attrs["dataset"] == "me/cups"
    with pytest.raises(
        FileNotFoundError, match=r"(?s)me/plates.*HF_LEROBOT_HOME.*hf download me/p"
    ):
        lerobot.locate("me/plates")
    with pytest.raises(FileNotFoundError, match=r"there is no meta/info.json"):
        lerobot.locate(tmp_path)
    monkeypatch.delenv("HF_LEROBOT_HOME")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    assert lerobot.datasets_root() == tmp_path / "hf" / "lerobot"


def test_damaged_metadata(tmp_path):
    root, target = write_v2(tmp_path / "d", [episode(0), episode(1)]), tmp_path / "o.zarr"
    info = (root / "meta/info.json").read_text()

    def refused(changes, match):
        text = changes if isinstance(changes, str) else json.dumps(json.loads(info) | changes)
        (root / "meta/info.json").write_text(text)
        with pytest.raises(ValueError, match=match):
            convert(root, target)

    refused("{", r"info.json cannot be read, so it is damaged")
    refused("[]", r"info.json cannot be read.*codebase_version")
    refused({"codebase_version": "v1.6"}, r"version 'v1.6'; this reads v2.0, v2.1 and v3.0")
    refused({"total_episodes": 5}, r"has 2 entries for 2 episodes; .* says 5")
    extra = {"dtype": "float32", "shape": [3], "names": None}
    refused({"features": FEATURES | {"force": extra}}, r"lack the columns \['force'\] of meta/info")
    sizes = {"action": {"dtype": "float32", "shape": [3]}}
    refused({"features": FEATURES | sizes}, r"column 'action': expected numbers of shape \[3\]")
    (root / "meta/info.json").write_text(info)
    (root / "meta/episodes.jsonl").write_text('{"episode_index": 0, "length": 3}\n{"epi')
    with pytest.raises(ValueError, match=r"the list of episodes cannot be read"):
        convert(root, target)
    (root / "meta/episodes.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"No such file.*episodes.jsonl"):
        convert(root, target)
    assert not target.exists()


def test_damaged_data(tmp_path, monkeypatch):
    root, target = write_v2(tmp_path / "d", [episode(0), episode(1)]), tmp_path / "o.zarr"
    file = root / "data/chunk-000/episode_000001.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"the data cannot be read.*episode_000001.parquet"):
        convert(root, target)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match=r"the data cannot be read.*git lfs pull"):
        convert(root, target)
    file.unlink()
    with pytest.raises(ValueError, match=r"episode 1 has 0 rows; the list of episodes says 4"):
        convert(root, target)
    pq.write_table(table([episode(1)]).slice(0, 3), file)
    with pytest.raises(ValueError, match=r"episode 1 has 3 rows; the list of episodes says 4"):
        convert(root, target)
    gaps = table([episode(1)])
    gaps = gaps.set_column(
        gaps.column_names.index("action"),
        "action",
        pa.array([[0.0, 1.0], None, [0.0, 1.0], [0.0, 1.0]], pa.list_(pa.float32())),
    )
    pq.write_table(gaps, file)
    with pytest.raises(ValueError, match=r"column 'action': expected numbers .* gaps"):
        convert(root, target)
    pq.write_table(table([episode(1)]).drop_columns(["action"]), file)
    with pytest.raises(ValueError, match=r"column 'action': expected numbers .* gaps"):
        convert(root, target)
    with pytest.raises(ValueError, match=r"has no field \['speed'\]; it has \['action'"):
        LeRobotDirectory(root).episode(0, ["speed"])
    monkeypatch.setitem(sys.modules, "pyarrow.dataset", None)
    with pytest.raises(ImportError, match=r'pip install "diffpolicy\[lerobot\]"'):
        convert(root, target)
    assert not target.exists()


# -- pictures -------------------------------------------------------------------------------------


def with_stills(root: Path) -> Path:
    """Put a column of PNG files into every Parquet file of a dataset."""
    for file in root.glob("data/*/*.parquet"):
        found = pq.read_table(file)
        frames = zip(*(found[n].to_pylist() for n in ("episode_index", "frame_index")), strict=True)
        column = pa.array([png(255 - pictures(number)[step]) for number, step in frames])
        pq.write_table(found.append_column(STILL, column), file, row_group_size=3)
    return root


def write_films(root: Path, version: int, count: int = 3) -> Path:
    """A dataset with a film and a column of pictures; in version 3 one film of all episodes."""
    if version == 2:
        write_v2(root, [episode(i) for i in range(count)], FEATURES | CAMERAS)
        for number in range(count):
            place = V2_FILM.format(episode_chunk=0, video_key=TOP, episode_index=number)
            film(root / place, pictures(number))
        (root / "meta/tasks.jsonl").write_text(
            '{"task_index": 1, "task": "b"}\n{"task_index": 0, "task": "z"}'
        )
        return with_stills(root)
    write_v3(root, [[episode(i) for i in range(count)]], FEATURES | CAMERAS)
    place = root / V3_FILM.format(video_key=TOP, chunk_index=0, file_index=4)
    film(place, np.concatenate([pictures(i) for i in range(count)]))
    file, start = root / "meta/episodes/chunk-000/file-000.parquet", 0.0
    known = pq.ParquetDataset(root / "meta/episodes").read().to_pylist()
    for row in known:
        row |= {f"videos/{TOP}/chunk_index": 0, f"videos/{TOP}/file_index": 4}
        row[f"videos/{TOP}/from_timestamp"] = start / 10
        start += row["length"]
    (root / "meta/episodes/chunk-000/file-001.parquet").unlink()
    pq.write_table(pa.Table.from_pylist(known), file)
    texts = pa.table({"task_index": [0, 1], "__index_level_0__": ["z", "b"]})
    pq.write_table(texts, root / "meta/tasks.parquet")
    return with_stills(root)


@pytest.mark.parametrize("version", [2, 3])
def test_pictures_are_read_bit_for_bit(tmp_path, version):
    pytest.importorskip("av", reason='PyAV is not installed (extra "lerobot")')
    root = write_films(tmp_path / "d", version)
    store = convert(root, tmp_path / "o.zarr")
    assert store.attrs["tasks"] == ["z", "b"]  # in the order of their ids
    for number in range(3):
        got, want = store.episode(number), episode(number)
        np.testing.assert_array_equal(got["obs.top"], pictures(number))
        np.testing.assert_array_equal(got["obs.still"], 255 - pictures(number))
        np.testing.assert_array_equal(got["obs.state"][:, :2], want["observation.state"])
        np.testing.assert_array_equal(got["obs.task"][:, 0], want["task_index"])
    flat = convert(root, tmp_path / "flat.zarr", fields={"obs": "observation.state"})
    assert sorted(flat.fields) == ["action", "obs", "reward", "terminated", "truncated"]
    assert TOP in flat.attrs["left_out"]


def test_a_picture_is_that_of_its_time(tmp_path):
    pytest.importorskip("av", reason='PyAV is not installed (extra "lerobot")')
    root = write_films(tmp_path / "d", 2, 2)
    file = root / "data/chunk-000/episode_000001.parquet"
    found = pq.read_table(file)
    place = found.column_names.index("timestamp")

    def at(times):
        column = pa.array(np.array(times, np.float32))
        pq.write_table(found.set_column(place, "timestamp", column), file)
        return LeRobotDirectory(root).episode(1, [TOP])[TOP]

    np.testing.assert_array_equal(at([0.3, 0.00005, 0.1, 0.1]), pictures(1)[[3, 0, 1, 1]])
    with pytest.raises(ValueError, match=r"000001.mp4 shows nothing at 0.150000 s: the nearest"):
        at([0, 0.1, 0.15, 0.3])
    with pytest.raises(ValueError, match=r"shows nothing at 0.400000 s.* that of 0.300000 s"):
        at([0, 0.1, 0.2, 0.4])
    kept = convert(root, tmp_path / "o.zarr", exclude="failed_check")
    assert list(kept.attrs["left_out_episodes"]) == ["1"]
    film = next(root.glob("videos/*/*/episode_000000.mp4"))
    film.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"holds no pictures that can be decoded.*git lfs pull"):
        convert(root, tmp_path / "p.zarr")
    info = json.loads((root / "meta/info.json").read_text()) | {"video_path": "../{video_key}.mp4"}
    (root / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="lies outside of the dataset"):
        LeRobotDirectory(root).episode(0, [TOP])
    info["features"][TOP]["info"] = {"is_depth_map": True}
    (root / "meta/info.json").write_text(json.dumps(info))
    assert LeRobotDirectory(root).unread[TOP].startswith("a map of depths")


# -- written --------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path):
    """A store of ours with everything that LeRobot has a place for, and more."""
    rng = np.random.default_rng(0)
    lengths, steps = [7, 5, 9], 21
    ends, ramp = np.cumsum(lengths), np.linspace(0, 255, 24, dtype=np.uint8)
    arrays = {
        "obs.state": rng.normal(size=(steps, 3)),
        "obs.hand": rng.normal(size=(steps, 1)),
        "obs.top": np.broadcast_to(ramp[None, None, :, None], (steps, 16, 24, 3)),
        "obs.task": np.repeat([1, 0, 1], lengths)[:, None],
        "action": rng.normal(size=(steps, 2)),
        "reward": rng.normal(size=steps),
        "terminated": np.isin(np.arange(steps), ends[:2] - 1),
        "truncated": np.arange(steps) == steps - 1,
        "grid": rng.normal(size=(steps, 2, 3)),
        "next_obs.state": rng.normal(size=(steps, 3)),
    }
    arrays = {n: v.astype(np.float32) if v.dtype == np.float64 else v for n, v in arrays.items()}
    specs = {n: FieldSpec(v.shape[1:], str(v.dtype)) for n, v in arrays.items()}
    attrs = {"fps": 12.5, "tasks": ["open", "close"], "robot_type": "arm"}
    with EpisodeStore.create(tmp_path / "own.zarr", specs, attrs=attrs) as store:
        store.extend(arrays, ends)
    return EpisodeStore.open(tmp_path / "own.zarr"), arrays


def test_a_store_is_written_and_read_back(own, tmp_path, monkeypatch):
    pytest.importorskip("av", reason='PyAV is not installed (extra "lerobot")')
    monkeypatch.setattr(lerobot_writer, "_DATA_BYTES", 1)  # a file an episode
    store, arrays = own
    made = lerobot_writer.write_lerobot(store, tmp_path / "d", lossless=True)
    assert dict(made.psnr) == {"observation.images.top": np.inf}
    assert list(made.left_out) == ["next_obs.state"]
    back = convert(tmp_path / "d", None)  # by the names that the store had
    assert back.episode_ends.tolist() == store.episode_ends.tolist()
    for name in set(arrays) - {"next_obs.state"}:
        np.testing.assert_array_equal(back.read(name), arrays[name])
        assert back.read(name).dtype == arrays[name].dtype
    assert (back.attrs["fps"], back.attrs["robot_type"]) == (12.5, "arm")
    assert back.attrs["tasks"] == ["open", "close"]
    assert len(list((tmp_path / "d/data/chunk-000").iterdir())) == 3
    stats = json.loads((tmp_path / "d/meta/stats.json").read_text())
    np.testing.assert_allclose(stats["action"]["mean"], arrays["action"].mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats[TOP]["max"], np.ones((3, 1, 1)))
    with pytest.raises(FileExistsError, match="overwrite"):
        lerobot_writer.write_lerobot(store, tmp_path / "d")
    lossy = lerobot_writer.write_lerobot(store, tmp_path / "d", overwrite=True)
    assert 35 < lossy.psnr[TOP] < 100
    (tmp_path / "d/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"what diffpolicy did not write there: notes.txt"):
        lerobot_writer.write_lerobot(store, tmp_path / "d", overwrite=True)


@pytest.mark.parametrize("told", ["vector", "id", "nothing"])
def test_what_lerobot_has_no_place_for_is_kept_beside_it(tmp_path, told):
    rng = np.random.default_rng(1)
    tasks = {"vector": rng.normal(size=(2, 3)).astype(np.float32), "id": np.array([[0], [1]])}
    arrays = {
        "obs.arm": rng.normal(size=(9, 2)).astype(np.float32),
        "obs.hand": rng.normal(size=(9, 1)).astype(np.float32),
        "action": rng.integers(0, 3, (9, 1)).astype(np.float32),
        **({} if told == "nothing" else {"obs.task": np.repeat(tasks[told], [4, 5], axis=0)}),
    }
    specs = {n: FieldSpec(v.shape[1:], str(v.dtype)) for n, v in arrays.items()}
    attrs = {"env_id": "Keys-v0", "action_groups": [{"dims": [0], "choices": 3}]}
    episodes = [{"task": t, "seed": i, "success": not i} for i, t in enumerate(["open", "shut"])]
    store = EpisodeStore.create(None, specs, attrs=attrs)
    store.extend(arrays, np.array([4, 9]), episodes)
    store.finalize()
    made = lerobot_writer.write_lerobot(store, tmp_path / "d", fps=5)
    assert made.left_out == {}
    source = LeRobotDirectory(tmp_path / "d")
    assert [known["tasks"] for known in source.episode_attrs] == [["open"], ["shut"]]
    assert source.episode(1, ["task_index"])["task_index"].tolist() == [1] * 5
    back = convert(tmp_path / "d", None)
    assert set(back.fields) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(back.read(name), array)
        assert back.fields[name] == store.fields[name]
    assert attrs.items() <= back.attrs.items()
    for known, meant in zip(back.episode_attrs, episodes, strict=True):
        assert meant.items() <= known.items()
    # Others read the same vectors by the names that LeRobot's have.
    (tmp_path / "d/meta/diffpolicy.json").unlink()
    seen = {"vector": 6, "id": 3, "nothing": 3}[told]
    plain = convert(tmp_path / "d", None, task=None)
    np.testing.assert_array_equal(plain.read("obs")[:, :2], arrays["obs.arm"])
    assert plain.fields["obs"].shape == (seen,)


def test_notes_of_a_dataset_that_was_changed_are_not_used(own, tmp_path, caplog):
    pytest.importorskip("av", reason='PyAV is not installed (extra "lerobot")')
    lerobot_writer.write_lerobot(own[0], tmp_path / "d")
    notes = tmp_path / "d/meta/diffpolicy.json"
    said = json.loads(notes.read_text())
    notes.write_text(json.dumps(said | {"episodes": said["episodes"][:1]}))
    back = convert(tmp_path / "d", None)
    assert "the dataset has 3 episodes, not 1" in back.attrs["unread"]["meta/diffpolicy.json"]
    notes.write_text(json.dumps(said | {"fields": {"obs.arm": "observation.arm"}}))
    assert (
        "has no ['observation.arm']"
        in LeRobotDirectory(tmp_path / "d").unread["meta/diffpolicy.json"]
    )
    notes.write_text("[]")
    with pytest.raises(ValueError, match=r"meta/diffpolicy\.json cannot be read, so it is damaged"):
        LeRobotDirectory(tmp_path / "d")


def test_what_cannot_be_written(tmp_path, capsys):
    bare = {"obs": np.zeros((4, 2)), "action": np.zeros((4, 1))}
    with EpisodeStore.create(tmp_path / "s.zarr", {"obs": (2,), "action": (1,)}) as made:
        made.append(bare)
    args = ["convert", str(tmp_path / "s.zarr"), str(tmp_path / "d"), "format=lerobot"]
    with pytest.raises(ValueError, match="does not say how many steps a second has; give it"):
        run(args)
    with pytest.raises(ConfigError, match=r"no store at nowhere\.zarr"):
        run(["convert", "nowhere.zarr", *args[2:], "fps=20"])
    with pytest.raises(ConfigError, match="unknown option 'keep'"):
        run([*args, "keep=0"])
    assert run([*args, "fps=20"]) == 0
    out = capsys.readouterr().out
    assert "1 episodes, 4 steps, 20 a second" in out
    assert "left out: nothing" in out
    np.testing.assert_array_equal(convert(tmp_path / "d", None).read("obs"), bare["obs"])
    with EpisodeStore.open(tmp_path / "s.zarr", "a") as made:
        made.append(bare, success=True)
    with EpisodeStore.open(tmp_path / "s.zarr", "a") as made:
        made.append({"obs": bare["obs"]}, actions=False)
    with pytest.raises(ValueError, match=r"the episodes \[2\] .* exclude=actions=false"):
        run([*args, "fps=20", "overwrite=true"])
    with EpisodeStore.create(tmp_path / "t.zarr", {"state": (2,)}) as made:
        made.append({"state": bare["obs"]})
    with pytest.raises(ValueError, match=r"has no observation and no action; its fields are"):
        lerobot_writer.write_lerobot(EpisodeStore.open(tmp_path / "t.zarr"), tmp_path / "e", fps=1)
    assert not (tmp_path / "e").exists()
