"""The checker finds each kind of damage, says where, and is silent about what is whole."""

from pathlib import Path

import numpy as np
import pytest
import zarr

from diffpolicy.data import EpisodeStore, Issue, check_store, convert, format_issue

SHARED = Path(__file__).parents[3] / "shared" / "data"


def only(issues, severity="error"):
    assert len(issues) == 1, [format_issue(i) for i in issues]
    assert issues[0].severity == severity
    assert issues[0].fix
    return issues[0]


def edit(path, name, change):
    array = zarr.open_group(path, mode="r+")[name]
    values = array[:]
    change(values)
    array[:] = values


def refresh(path):
    """Statistics of the changed data, so that only the change is found."""
    store = EpisodeStore.open(path, "a")
    store.finalize()
    store.close()


def test_no_false_alarm_on_real_data(pusht_zip, tmp_path):
    assert check_store(pusht_zip, action_low=0, action_high=512) == []
    target = tmp_path / "pusht.zarr"
    with convert(pusht_zip, target) as store:
        assert check_store(store, action_low=[0, 0], action_high=[512, 512]) == []
    assert check_store(target) == []


def test_no_false_alarm_on_our_own(make_store):
    assert check_store(make_store(), action_low=-1, action_high=1) == []
    x = np.random.default_rng(0).normal(size=(40, 3))
    assert check_store(EpisodeStore.from_arrays({"obs": x, "action": x}, [10, 40])) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(make_store, value):
    path = make_store()

    def change(obs):
        obs[[34, 36], 1] = value

    edit(path, "data/obs", change)
    issue = only(check_store(path))
    assert (issue.field, issue.episode, issue.row) == ("obs", 3, 34)
    assert "not finite in 2 steps, first in step 4" in issue.message
    assert issue.file == f"{path}/data/obs"
    line = format_issue(issue)
    assert line.startswith(f"error: {path}/data/obs, field obs, episode 3, row 34: ")
    assert "Fix: leave the episode out" in line


def test_actions_out_of_range(make_store):
    path = make_store()

    def change(action):
        action[47, 0] = 1.5

    edit(path, "data/action", change)
    refresh(path)
    assert check_store(path) == []
    issue = only(check_store(path, action_low=-1, action_high=[1.0, 2.0]))
    assert (issue.field, issue.episode, issue.row) == ("action", 4, 47)
    assert "outside [[-1.0, -1.0], [1.0, 2.0]]" in issue.message
    store = EpisodeStore.open(path, "a")
    store.update_attrs({"action_low": [-1, -1], "action_high": [1, 1]})  # the store's own bounds
    store.close()
    assert only(check_store(path)).row == 47
    assert check_store(path, action_high=2) == []
    with pytest.raises(ValueError, match=r"bounds of shape \[3\] do not fit .*\[2\]"):
        check_store(path, action_low=[0, 0, 0])


def test_a_field_that_is_too_short(make_store):
    path = make_store()
    zarr.open_group(path, mode="r+")["data/action"].resize((43, 2))
    issue = only([i for i in check_store(path) if i.field == "action" and "rows" in i.message])
    assert (issue.episode, issue.row) == (4, 43)
    assert "has 43 rows, but episode_ends counts 60" in issue.message


@pytest.mark.parametrize(
    ("ends", "episode", "message"),
    [
        ([10, 20, 20, 40, 50, 60], 2, "ends at row 20, but begins at row 20"),
        ([10, 20, 30, 25, 50, 60], 3, "ends at row 25, but begins at row 30"),
        ([0, 20, 30, 40, 50, 60], 0, "ends at row 0, but begins at row 0"),
        ([10, 20, 30, 40, 50, 90], 5, "60 rows, but episode_ends counts 90"),
    ],
)
def test_ends_that_cannot_be(make_store, ends, episode, message):
    path = make_store()

    def change(values):
        values[:] = ends

    edit(path, "meta/episode_ends", change)
    issues = [i for i in check_store(path) if i.severity == "error"]
    assert {i.episode for i in issues} == {episode}
    assert message in issues[0].message
    with pytest.raises(ValueError, match="data check"):
        EpisodeStore.open(path)


def test_ends_of_the_wrong_kind(tmp_path, write_replay):
    path = tmp_path / "r.zarr"
    write_replay(path, {"action": np.ones((4, 1))}, [4])
    group = zarr.open_group(path, mode="r+")
    del group["meta/episode_ends"]
    assert any("episode_ends cannot be read" in i.message for i in check_store(path))
    group.create_array("meta/episode_ends", data=np.array([4.0]))
    assert any(
        "vector of whole numbers; got shape [1], dtype float64" in i.message
        for i in check_store(path)
    )


def test_no_episodes(tmp_path):
    EpisodeStore.create(tmp_path / "n.zarr", {"obs": (1,), "action": (1,)}).close()
    assert "no episodes" in only(check_store(tmp_path / "n.zarr")).message


def test_duplicated_and_frozen_episodes(make_store, make_episode):
    still = np.ones((10, 3), np.float32)
    replace = {3: make_episode(1, 10), 4: {"obs": still}}
    path = make_store(replace=replace)
    duplicate, frozen = check_store(path)
    assert (duplicate.episode, duplicate.row, duplicate.severity) == (3, 30, "warning")
    assert "copy of episode 1" in duplicate.message
    assert (frozen.episode, frozen.row, frozen.field) == (4, 40, "obs")
    assert "no observation changes in its 10 steps" in frozen.message


def test_surprising_types(tmp_path, write_replay):
    rng = np.random.default_rng(0)
    arrays = {
        "obs": rng.normal(size=(40, 2)),
        "action": rng.integers(0, 5, size=(40, 1)),
        "when": np.array(["2024-01-01"] * 40, dtype="datetime64[D]"),
    }
    write_replay(tmp_path / "t.zarr", arrays, [20, 40])
    found = {i.field: i for i in check_store(tmp_path / "t.zarr")}
    assert found["obs"].severity == "warning"
    assert "float64 takes twice the memory" in found["obs"].message
    assert "int64 is not continuous" in found["action"].message
    assert found["when"].severity == "error"
    assert "not a number type" in found["when"].message
    with EpisodeStore.open(tmp_path / "t.zarr") as store:  # the others can be read all the same
        assert sorted(store.fields) == ["action", "obs"]


def test_objects_in_an_array(tmp_path, write_replay):
    path = tmp_path / "o.zarr"
    write_replay(path, {"action": np.random.default_rng(0).normal(size=(9, 2))}, [9])
    meta = path / "data" / "action" / ".zarray"
    meta.write_text(meta.read_text().replace("<f8", "|O"))
    issue = only([i for i in check_store(path) if i.field == "action"])
    assert issue.severity == "error"


CHUNK = "data/obs/c/1/0"  # rows 16..31, which belong to episodes 1..3


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_damaged_chunks(make_store, damage):
    path = make_store()
    chunk = path / CHUNK
    data = bytearray(chunk.read_bytes())
    if damage == "flip":
        data[20] ^= 4
        chunk.write_bytes(data)
    elif damage == "cut":
        chunk.write_bytes(data[:-7])
    elif damage == "empty":
        chunk.write_bytes(b"")
    else:
        chunk.unlink()
    issue = only(check_store(path))
    assert (issue.file, issue.field) == (f"{path}/{CHUNK}", "obs")
    assert (issue.episode, issue.row) == (1, 16)
    assert "16..31" in issue.message
    assert "copy the store again" in issue.fix


def test_a_zip_that_was_damaged(tmp_path, write_replay):
    path = tmp_path / "z.zarr.zip"
    write_replay(path, {"action": np.random.default_rng(0).normal(size=(40, 2))}, [20, 40])
    whole = path.read_bytes()
    data = bytearray(whole)
    place = data.index(b"data/action/1.0") + 60
    data[place] ^= 255
    path.write_bytes(data)
    issue = [i for i in check_store(path) if i.severity == "error"]
    assert only(issue).file == f"{path}/data/action/1.0"
    assert only(issue).episode == 0
    path.write_bytes(whole[: len(whole) // 2])
    assert "not an episode store" in only(check_store(path)).message


def test_missing_fields_and_metadata(make_store):
    import shutil

    path = make_store()
    shutil.rmtree(path / "data" / "action")
    issue = only(check_store(path))
    assert (issue.field, issue.message) == ("action", "the field is missing")
    (path / "data" / "obs" / "zarr.json").write_text('{"zarr_format": 3, ')
    assert any(i.field == "obs" and "cannot be opened" in i.message for i in check_store(path))
    (path / "zarr.json").write_text("")
    assert "not an episode store" in only(check_store(path)).message


def test_nothing_to_train_on(tmp_path, write_replay):
    with EpisodeStore.create(tmp_path / "s.zarr", {"state": (1,)}) as store:
        store.append({"state": np.arange(3.0)[:, None]})
    assert {i.field for i in check_store(tmp_path / "s.zarr")} == {"obs", "action"}
    write_replay(tmp_path / "r.zarr", {"state": np.arange(3.0, dtype=np.float32)}, [3])
    assert "no field 'action'" in only(check_store(tmp_path / "r.zarr")).message


def test_metadata_that_do_not_fit(make_store):
    path = make_store()
    meta = path / "zarr.json"
    meta.write_text(meta.read_text().replace('"dtype": "float32"', '"dtype": "uint8"', 1))
    assert "rows are" in only(check_store(path)).message


def test_statistics_missing_stale_or_of_other_data(make_store, make_episode):
    path = make_store()

    def change(obs):
        obs[5] += 10

    edit(path, "data/obs", change)
    issue = only(check_store(path), "warning")
    assert "changed since" in issue.message
    assert "--update-statistics" in issue.fix
    group = zarr.open_group(path, mode="r+")
    attrs = {k: v for k, v in group.attrs.items() if k != "statistics"}
    group.attrs.put(attrs)
    assert "no statistics" in only(check_store(path), "warning").message


def test_an_unfinished_writer(tmp_path, make_episode):
    path = tmp_path / "w.zarr"
    store = EpisodeStore.create(path, {"obs": (3,), "action": (2,)}, chunk_rows=16)
    for i in range(3):
        store.append(make_episode(i, 9))
    messages = [i.message for i in check_store(path)]
    assert {i.severity for i in check_store(path)} == {"warning"}
    assert any("writer still runs, or was killed" in m for m in messages)
    store.close()
    assert check_store(path) == []


def test_lost_attributes(make_store):
    path = make_store()
    (path / "meta" / "episode_attrs" / "c" / "0").write_bytes(b"junk")
    assert "attributes cannot be read" in only(check_store(path), "warning").message


def test_rows_that_belong_to_no_episode(tmp_path, write_replay):
    path = tmp_path / "x.zarr"
    action = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    write_replay(path, {"action": action}, [20, 30])
    issue = only(check_store(path), "warning")
    assert (issue.row, issue.field) == (30, "action")
    assert "the last episode ends at 30" in issue.message


def test_many_of_a_kind_are_counted(make_store):
    path = make_store(count=50)

    def change(obs):
        obs[:, 0] = np.nan

    edit(path, "data/obs", change)
    issues = check_store(path)
    assert len([i for i in issues if i.severity == "error"]) == 20
    assert "30 more are not listed" in issues[-1].message


def test_nothing_there(tmp_path):
    issue = only(check_store(tmp_path / "nowhere"))
    assert "no episode store" in issue.message
    (tmp_path / "file").write_text("x")
    assert "not an episode store" in only(check_store(tmp_path / "file")).message


def test_issue_without_a_place():
    issue = Issue("warning", "a.zarr", "it is odd", "look")
    assert format_issue(issue) == "warning: a.zarr: it is odd. Fix: look."


def demonstrations(seed=0, episodes=12, length=60):
    """A double integrator pushed around: positions and velocities, and forces on both axes."""
    rng = np.random.default_rng(seed)
    obs, action = [], []
    for _ in range(episodes):
        force = np.clip(rng.normal(size=(length, 2)).cumsum(0) * 0.3, -1, 1)
        speed = np.concatenate([rng.normal(size=(1, 2)), 0.1 * force[:-1]]).cumsum(0)
        obs.append(np.concatenate([0.1 * speed.cumsum(0), speed], axis=1))
        action.append(force)
    ends = length * np.arange(1, episodes + 1)
    return {"obs": np.concatenate(obs), "action": np.concatenate(action)}, ends


def suspicious(change):
    arrays, ends = demonstrations()
    change(arrays)
    return check_store(EpisodeStore.from_arrays(arrays, ends))


def test_an_outlier_a_frozen_sensor_and_a_shift_are_named():
    assert suspicious(lambda arrays: None) == []

    def outlier(arrays):
        arrays["obs"][130, 1] = 1e4

    issue = only(suspicious(outlier), "warning")
    assert (issue.field, issue.episode, issue.row) == ("obs", 2, 130)
    assert "first 10000 in entry 1" in issue.message

    def stuck(arrays):
        arrays["obs"][190:205, 2] = arrays["obs"][190, 2]

    issue = only(suspicious(stuck), "warning")
    assert (issue.field, issue.episode, issue.row) == ("obs", 3, 190)
    assert "entries [2] stay exactly the same, entry 2 in steps 10..24" in issue.message

    def late(arrays):
        arrays["action"][240:300] = np.roll(arrays["action"][240:300], 2, axis=0)

    issue = only(suspicious(late), "warning")
    assert (issue.field, issue.episode, issue.row) == ("action", 4, 240)
    assert "those of 2 steps later explain" in issue.message

    def flipped(arrays):
        arrays["action"][240:300] *= -1

    issue = only(suspicious(flipped), "warning")
    assert (issue.field, issue.episode, issue.row) == ("action", 4, 240)
    assert "do not act as in the other episodes" in issue.message

    def all_early(arrays):
        arrays["action"][:] = np.roll(arrays["action"], -1, axis=0)

    issue = only(suspicious(all_early), "warning")
    assert (issue.episode, issue.field) == (None, "action")
    assert "those of 1 steps earlier" in issue.message


def test_no_suspicion_of_real_robots():
    folder = SHARED / "mujoco_sb3_rollouts"
    files = [*folder.glob("*_medium.npz"), SHARED / "adroit_door_human" / "door_human.npz"]
    if not all(f.exists() for f in files) or len(files) < 4:
        pytest.skip("the recordings (../shared/data) are not here")
    for file in files:
        with np.load(file) as data:
            arrays = {"obs": data["observations"], "action": data["actions"]}
            store = EpisodeStore.from_arrays(arrays, data["episode_ends"])
        assert check_store(store) == []


def test_statistics_that_were_swapped(make_store):
    path = make_store()
    group = zarr.open_group(path, mode="r+")
    values = dict(group.attrs["statistics"])
    values["obs"] = {**values["obs"], "mean": values["obs"]["std"]}
    group.attrs.update({"statistics": values})
    with pytest.raises(ValueError, match=r"zarr.json: the statistics were altered.*--update-stat"):
        dict(EpisodeStore.open(path).statistics)
    group.attrs.put({k: v for k, v in group.attrs.items() if k != "statistics_crc32"})
    issue = only(check_store(path), "warning")  # of an older store, without a checksum
    assert "mean are not those of the data" in issue.message
    refresh(path)
    assert check_store(path) == []
