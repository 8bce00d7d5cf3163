"""D4RL files as episodes: every quirk, transforms, and stores made of them."""

import json
import sys

import numpy as np
import pytest

from diffpolicy.commands import data as command
from diffpolicy.data import EpisodeStore, check_store, convert, load_d4rl
from diffpolicy.data.d4rl.episodes import find_episodes
from diffpolicy.data.d4rl.transforms import parse_transforms
from diffpolicy.data.formats import get_format
from diffpolicy.settings import ConfigError

h5py = pytest.importorskip("h5py")


def arrays(n=30, ends=(9, 19), last=29, dims=(11, 3), **changes):
    """Rows whose numbers say where they are; terminal at `ends`, timed out at `last`."""
    row = np.arange(n, dtype=np.float32)
    flags = {"terminals": np.zeros(n, bool), "timeouts": np.zeros(n, bool)}
    flags["terminals"][list(ends)] = True
    if last is not None:
        flags["timeouts"][last] = True
    data = {
        "observations": np.stack([row, -row, *(row / k for k in range(2, 2 + dims[0] - 2))], 1),
        "actions": np.stack([np.sin(row), np.cos(row), *[np.sin(row)] * (dims[1] - 2)], 1),
        "rewards": row + 1,
        "infos/qpos": np.stack([row, row], 1).astype(np.float64),
        **flags,
    }
    return {key: value for key, value in {**data, **changes}.items() if value is not None}


@pytest.fixture
def write(tmp_path):
    def write(data, name="hopper_medium-v2.hdf5", **attrs):
        path = tmp_path / name
        with h5py.File(path, "w") as file:
            for key, values in data.items():
                file[key] = values
            file.attrs.update(attrs)
        return path

    return write


# -- where episodes end ---------------------------------------------------------------------------


def loop_episodes(terminals, timeouts, limit):
    found, start = [], 0
    for i, terminal in enumerate(terminals):
        out = timeouts[i] if timeouts is not None else i - start + 1 == limit
        if terminal or out:
            found.append((i + 1, bool(terminal), not terminal))
            start = i + 1
    if start < len(terminals):
        found.append((len(terminals), False, False))
    return found, start < len(terminals)


@pytest.mark.parametrize("with_timeouts", [True, False])
@pytest.mark.parametrize("limit", [1, 2, 7, 50])
def test_episodes_against_a_loop(with_timeouts, limit):
    rng = np.random.default_rng(limit)
    for n in [1, 2, 6, 7, 8, 14, 60, 61]:
        for share in (0.0, 0.1, 0.5):
            terminals = rng.random(n) < share
            timeouts = rng.random(n) < 0.2 if with_timeouts else None
            found = find_episodes(terminals, timeouts, limit)
            want, partial = loop_episodes(terminals, timeouts, limit)
            rows = list(zip(found.ends, found.terminated, found.truncated, strict=True))
            assert rows == want
            assert found.partial == partial


def test_terminal_wins_where_both_flags_are_set():
    both = np.array([False, True, False, True])
    found = find_episodes(both, both)
    np.testing.assert_array_equal(found.terminated, [True, True])
    np.testing.assert_array_equal(found.truncated, [False, False])


# -- reading --------------------------------------------------------------------------------------


def test_fields_and_episodes(write):
    following = arrays()["observations"] + 1
    path = write(arrays(next_observations=following), algorithm="SAC")
    with load_d4rl(path) as file:
        assert (file.num_episodes, file.num_steps) == (3, 30)
        shapes = {name: (f.shape, f.dtype) for name, f in file.fields.items()}
        assert shapes == {
            "obs": ((11,), "float32"),
            "action": ((3,), "float32"),
            "reward": ((), "float32"),
            "terminated": ((), "bool"),
            "truncated": ((), "bool"),
            "next_obs": ((11,), "float32"),
            "infos/qpos": ((2,), "float32"),
        }
        episode = file.episode(2)
        np.testing.assert_array_equal(episode["obs"][:, 0], np.arange(20, 30))
        np.testing.assert_array_equal(episode["next_obs"][:, 0], np.arange(21, 31))
        np.testing.assert_array_equal(episode["truncated"], [False] * 9 + [True])
        assert not episode["terminated"].any()
        assert file.episode(1, ["terminated"])["terminated"][-1]
        np.testing.assert_array_equal(file.returns, [55, 155, 255])
        assert file.attrs["dataset"] == "hopper-medium-v2"
        assert file.attrs["references"]["max"] == 3234.3
        assert file.attrs["metadata"] == {"algorithm": "SAC"}
        assert file.notes == []
        with pytest.raises(IndexError, match=r"episode 3 of .* has 3"):
            file.episode(3)
        with pytest.raises(ValueError, match=r"no field \['state'\]"):
            file.episode(0, ["state"])


def test_columns_and_float64(write):
    data = arrays()
    for key in ("rewards", "terminals", "timeouts"):
        data[key] = data[key][:, None]
    data["observations"] = data["observations"].astype(np.float64)
    with load_d4rl(write(data)) as file:
        assert file.num_episodes == 3
        assert file.episode(0)["reward"].shape == (10,)
        assert file.episode(0)["obs"].dtype == np.float32


def test_without_timeouts_the_limit_of_the_dataset_counts(write):
    data = arrays(250, ends=(29,), last=None, timeouts=None, dims=(45, 24))
    with load_d4rl(write(data, "pen-human-v0_renamed.hdf5"), dataset="pen-human-v0") as file:
        np.testing.assert_array_equal(file.episodes.ends, [30, 130, 230, 250])
        np.testing.assert_array_equal(file.episodes.truncated, [False, True, True, False])
        assert "cut every 100 steps, the limit of pen-human-v0" in file.notes[0]
        assert "marked partial" in file.notes[1]
        assert file.episode_attrs == [{}, {}, {}, {"partial": True}]


def test_the_partial_trajectory(write):
    path = write(arrays(last=None))
    with load_d4rl(path) as file:
        assert file.num_episodes == 3
        episode = file.episode(2)
        assert not episode["terminated"].any()
        assert not episode["truncated"].any()
    with load_d4rl(path, keep_partial=False) as file:
        assert (file.num_episodes, file.num_steps) == (2, 20)
        assert "left out" in file.notes[0]
        assert file.episode_attrs == [{}, {}]
    with load_d4rl(write(arrays(ends=(), last=None)), keep_partial=False) as file:
        assert file.num_episodes == 0
        with pytest.raises(ValueError, match="leave none of the 0 episodes"):
            file.to_store()


def test_metadata_is_kept_apart(write):
    data = arrays() | {
        "metadata/algorithm": np.bytes_("SAC"),
        "metadata/policy/w": np.ones((30, 2)),
    }
    data |= {"infos/odd": np.ones(7), "metadata/iteration": np.array(50)}
    data["images"] = np.zeros((len(data["rewards"]), 2, 2, 3), np.uint8)
    with load_d4rl(write(data, "ours.hdf5", env=json.dumps({"id": "X"}), env_id="X-v0")) as file:
        said = file.attrs["metadata"]
        assert said == {"algorithm": "SAC", "iteration": 50, "env": {"id": "X"}, "env_id": "X-v0"}
        assert file.attrs["env_id"] == "X-v0"
        assert file.attrs["dataset"] == "ours"
        assert "infos/odd" not in file.fields
        assert list(file.unread) == ["infos/odd", "images"]  # said, since nothing else would tell


# -- transforms -----------------------------------------------------------------------------------


def rewards(path, *transforms):
    with load_d4rl(path, transforms=transforms) as file:
        assert file.attrs["transforms"] == list(transforms)
        return np.concatenate([file.episode(i)["reward"] for i in range(file.num_episodes)])


def test_rewards_are_mapped_in_the_order_given(write):
    path = write(arrays())
    raw = np.arange(1, 31, dtype=np.float32)
    np.testing.assert_array_equal(rewards(path), raw)
    np.testing.assert_array_equal(rewards(path, "antmaze_reward"), raw - 1)
    np.testing.assert_array_equal(rewards(path, "reward_scale:2", "reward_shift:3"), 2 * raw + 3)
    np.testing.assert_array_equal(rewards(path, "reward_shift:3", "reward_scale:2"), 2 * raw + 6)
    # The returns are 55, 155 and 255.
    np.testing.assert_allclose(rewards(path, "normalize_reward"), raw * 5, rtol=1e-6)
    shifted = rewards(path, "reward_scale:0.5", "normalize_reward")
    np.testing.assert_allclose(shifted, raw * 5, rtol=1e-6)
    with load_d4rl(path, transforms=["normalize_reward", "reward_shift:-1"]) as file:
        assert (file.attrs["reward_scale"], file.attrs["reward_shift"]) == (5.0, -1.0)
        np.testing.assert_array_equal(file.returns, [55, 155, 255])  # scores know no transforms


def test_transforms_are_checked(write):
    for names, message in [
        (
            ["antmaze"],
            "unknown transform 'antmaze'; expected one of .*did you mean 'antmaze_reward'",
        ),
        (["reward_scale"], "reward_scale needs a finite number"),
        (["reward_scale:0"], "reward_scale must be positive, got 0"),
        (["reward_shift:much"], "needs a finite number.* got 'reward_shift:much'"),
        (["antmaze_reward:1"], "takes no number"),
        (["reward_scale:2", "split_goals"], "name it once, and first"),
        ("antmaze_reward", r"a list of names, such as \['antmaze_reward'\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_transforms(names)
    path = write(arrays(rewards=np.ones(30)))
    with (
        load_d4rl(path, transforms=["normalize_reward"]) as file,
        pytest.raises(ValueError, match="all 3 episodes have the same"),
    ):
        file.episode(0)
    with pytest.raises(ValueError, match="split_goals needs infos/goal"):
        load_d4rl(path, transforms=["split_goals"])


def test_goals_are_split(write):
    # Two trajectories; goals at x = 4 (reached), 20 (not), then 12, and 29 to the end.
    goal = np.zeros((30, 2), np.float32)
    goal[:5, 0], goal[5:10, 0], goal[10:13, 0], goal[13:, 0] = 4, 20, 12, 29
    goal[:, 1] = -goal[:, 0]
    extra = {"infos/goal": goal, "rewards": np.zeros(30)}
    data = arrays(ends=(), last=29, dims=(4, 2), **extra)
    data["timeouts"][9] = True
    data["next_observations"] = data["observations"] + 1
    path = write(data, "maze2d-umaze-sparse-v1.hdf5")
    with load_d4rl(path, transforms=["split_goals"]) as file:
        np.testing.assert_array_equal(file.episodes.ends, [5, 10, 13, 30])
        np.testing.assert_array_equal(file.episodes.terminated, [True, False, True, True])
        np.testing.assert_array_equal(file.episodes.truncated, [True, True, True, True])
        assert file.fields["obs"].shape == (6,)
        first = file.episode(0)
        np.testing.assert_array_equal(first["obs"][:, 4:], np.tile([4, -4], (5, 1)))
        np.testing.assert_array_equal(first["next_obs"][:, 4:], np.tile([4, -4], (5, 1)))
        np.testing.assert_array_equal(first["reward"], [0, 0, 0, 0, 1])
        assert file.attrs["goal_radius"] == 0.45
        np.testing.assert_array_equal(file.returns, [0] * 4)  # the file's own rewards
        assert file.to_store().fields["obs"].shape == (6,)
    with load_d4rl(path, transforms=["split_goals:1.5", "antmaze_reward"]) as file:
        np.testing.assert_array_equal(file.episode(0)["reward"], [-1, -1, -1, 0, 0])


# -- stores ---------------------------------------------------------------------------------------


def test_store(write, tmp_path):
    data = arrays(last=None)
    path = write(data)
    with load_d4rl(path, transforms=["reward_scale:0.5"]) as file:
        store = file.to_store(tmp_path / "s.zarr", extras=["infos/qpos"], attrs={"env_id": "X"})
        memory = file.to_store(max_episodes=2)
    np.testing.assert_array_equal(store.read("obs"), data["observations"])
    np.testing.assert_array_equal(store.read("reward"), data["rewards"] / 2)
    np.testing.assert_array_equal(store.read("infos.qpos"), data["infos/qpos"])
    np.testing.assert_array_equal(store.episode_ends, [10, 20, 30])
    assert store.episode_attrs == [{}, {}, {"partial": True}]
    assert store.attrs["dataset"] == "hopper-medium-v2"
    assert store.attrs["origin"] == "d4rl"
    assert store.attrs["transforms"] == ["reward_scale:0.5"]
    assert store.attrs["env_id"] == "X"
    assert store.attrs["warnings"] == []
    assert check_store(tmp_path / "s.zarr") == []
    assert memory.num_episodes == 2
    assert set(memory.fields) == {"obs", "action", "reward", "terminated", "truncated"}
    assert memory.statistics["obs"]["count"] == 20
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hopper_medium-v2.hdf5", "s.zarr"]
    with load_d4rl(path) as file:
        with pytest.raises(FileExistsError, match="overwrite=True"):
            file.to_store(tmp_path / "s.zarr")
        with pytest.raises(ValueError, match=r"no field \['infos/x'\]; it has \['action', 'infos"):
            file.to_store(extras=["infos/x"])
        with pytest.raises(ValueError, match="max_episodes must be at least 1"):
            file.to_store(max_episodes=0)


def test_blocks_make_no_difference(write, monkeypatch):
    path = write(arrays())
    whole = load_d4rl(path).to_store()
    monkeypatch.setattr("diffpolicy.data.conversion._BLOCK_BYTES", 500)
    parts = load_d4rl(path).to_store()
    for name in whole.fields:
        np.testing.assert_array_equal(whole.read(name), parts.read(name))
    assert whole.attrs["constant_obs_columns"] == parts.attrs["constant_obs_columns"] == []


def test_what_is_wrong_is_found(write):
    data = arrays(last=None, observations=np.ones((30, 11)))
    data["actions"][3], data["actions"][25] = 1.5, -1.25
    data["actions"][10:20] = data["actions"][:10]
    data["rewards"][10:20] = data["rewards"][:10]
    store = load_d4rl(write(data)).to_store()
    said = store.attrs["warnings"]  # what the checker knows of the result is carried along
    counts = [sum(text in line for line in said) for text in ("up to 1.5", "copy", "frozen")]
    assert counts == [1, 1, 3]
    assert store.attrs["constant_obs_columns"] == list(range(11))
    store = load_d4rl(write(data, "flow-ring-v0-idm.hdf5")).to_store()
    assert not any("outside" in line for line in store.attrs["warnings"])  # accelerations
    data["rewards"] = np.where(np.arange(30) == 24, np.nan, data["rewards"])
    with pytest.raises(ValueError, match=r"episode 2: field 'reward' is not finite at row 4"):
        load_d4rl(write(data)).to_store()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": None}, "is no D4RL file: it has no rewards; at its top there is"),
        (
            {"actions": np.zeros((29, 2))},
            r"actions must be numbers \[30, 2\].*got float64 \[29, 2\]",
        ),
        ({"rewards": np.zeros((30, 2))}, r"rewards must be numbers \[30\] or \[30, 1\]"),
        ({"timeouts": np.zeros(5)}, r"timeouts must be .* got float64 \[5\]"),
        ({"next_observations": np.zeros((30, 2))}, r"next_observations must be numbers \[30, 11\]"),
        ({"observations": np.array([b"x"] * 30)}, r"observations must be numbers .*got \|S1"),
    ],
)
def test_bad_files(write, changes, message):
    with pytest.raises(ValueError, match=message):
        load_d4rl(write(arrays(**changes)))


def test_broken_and_misnamed_files(write, tmp_path, monkeypatch):
    path = write(arrays())
    with pytest.raises(
        ValueError, match=r"is the file of 'hopper-medium-v2', but dataset='hopper-"
    ):
        load_d4rl(path, dataset="hopper-expert-v2")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"not a whole HDF5 file: .*copy or download it again"):
        load_d4rl(path)
    with pytest.raises(ValueError, match="holds no steps"):
        load_d4rl(write({k: v[:0] for k, v in arrays().items()}))
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r'pip install "diffpolicy\[hdf5\]"'):
        load_d4rl(path)


# -- formats and command --------------------------------------------------------------------------


def test_the_format_is_recognised_inside_the_file(write, tmp_path):
    path = write(arrays(), "anything.h5")
    assert get_format("auto", path)[0] == "d4rl"
    store = convert(path, tmp_path / "c.zarr", fields={"qpos": "infos/qpos"})
    assert set(store.fields) == {"obs", "action", "reward", "terminated", "truncated", "qpos"}
    np.testing.assert_array_equal(store.read("obs"), arrays()["observations"])
    assert store.attrs["source"] == {"name": "anything.h5", "format": "d4rl"}
    robot = write({"data/demo_0/actions": np.zeros((3, 2))}, "robot.hdf5")
    assert get_format("auto", robot)[0] == "robomimic"
    with pytest.raises(ValueError, match="looks like none of the formats"):
        get_format("auto", write({"x": np.zeros(3)}, "other.hdf5"))


def test_command(write, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    path = write(arrays(last=None))
    assert command.run(["d4rl", "hopper-medium-v?"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["id", "steps", "score", "0", "score", "100", "file"]
    assert lines[3].split() == ["hopper-medium-v2", "1000", "-20.2723", "3234.3", str(path)]
    assert lines[-1] == f"3 datasets, 1 of them in {tmp_path}"
    assert command.run(["d4rl", "eval-umaze", "data_dir=elsewhere"]) == 0
    assert "maze2d-eval-umaze-sparse-v1.hdf5 (not found)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no dataset 'hoper'"):
        command.run(["d4rl", "hoper"])
    target = str(tmp_path / "s.zarr")
    options = ["transforms=[antmaze_reward]", "extras=[infos/qpos]", "keep_partial=false"]
    assert command.run(["convert", "hopper-medium-v2", target, "env=Hopper-v4", *options]) == 0
    out = capsys.readouterr().out
    assert "within an episode, which was left out" in out
    assert "2 episodes, 20 steps" in out
    attrs = EpisodeStore.open(target).attrs
    assert attrs["transforms"] == ["antmaze_reward"]
    assert attrs["env_id"] == "Hopper-v4"
    assert command.run(["convert", str(path), target, "overwrite=true"]) == 0
    assert EpisodeStore.open(target).num_episodes == 3
    with pytest.raises(ConfigError, match="unknown option 'obs'"):
        command.run(["convert", str(path), target, "obs=state", "format=d4rl"])
    with pytest.raises(ConfigError, match=r"a list: transforms=\[antmaze_reward\]"):
        command.run(["convert", str(path), target, "transforms=antmaze_reward"])
    with pytest.raises(ConfigError, match="unknown option 'transforms'"):
        command.run(["convert", target, str(tmp_path / "t.zarr"), 'transforms=["antmaze_reward"]'])
    with pytest.raises(ValueError, match="did you mean hopper-medium-v2"):
        command.run(["convert", "hopper-medum-v2", target])
    with pytest.raises(FileNotFoundError, match="nothing to convert"):
        command.run(["convert", str(tmp_path / "gone"), target])
