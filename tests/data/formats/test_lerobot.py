"""LeRobot datasets through the store; the files here have the layouts of versions 2.1 and 3.0."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from diffpolicy.data import check_store, convert
from diffpolicy.data.formats import get_format, lerobot
from diffpolicy.data.formats.lerobot import LeRobotDirectory

pa = pytest.importorskip("pyarrow", reason='pyarrow is not installed (extra "lerobot")')
pq = pytest.importorskip("pyarrow.parquet")

V2_PATH = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
V3_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
FEATURES = {
    "observation.image": {"dtype": "video", "shape": [96, 96, 3], "names": ["h", "w", "c"]},
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


def write_info(root: Path, version: str, path: str, count: int, features: dict) -> None:
    (root / "meta").mkdir(parents=True, exist_ok=True)
    info = {
        "codebase_version": version,
        "robot_type": "2d",
        "fps": 10,
        "total_episodes": count,
        "chunks_size": 8,
        "data_path": path,
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
    assert attrs["unread"] == {"observation.image": "video: only columns of numbers are read"}
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
