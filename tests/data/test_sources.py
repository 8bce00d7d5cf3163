"""What a source holds is converted, refused, or left out with a word: the same for every format."""

import json
import logging

import numpy as np
import pytest

from diffpolicy.commands.data import run
from diffpolicy.data import EpisodeStore, convert, load_d4rl
from diffpolicy.data.d4rl.catalogue import doubts, lookup, misfit
from diffpolicy.settings import ConfigError

h5py = pytest.importorskip("h5py", reason="half of the formats are HDF5")


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "obs": rng.normal(size=(60, 3)).astype(np.float32),
        "action": rng.uniform(-1, 1, (60, 2)).astype(np.float32),
        "done": np.zeros(60, bool),
        "img": rng.integers(0, 255, (60, 16, 16, 3), dtype=np.uint8),
    }


ENDS = [20, 40, 60]


def robomimic(path, arrays, *, lazy=False):
    with h5py.File(path, "w") as file:
        for index, (start, stop) in enumerate(zip([0, *ENDS], ENDS, strict=False)):
            demo = file.create_group(f"data/demo_{index}")
            demo.attrs["num_samples"] = stop - start
            demo["obs/state"] = arrays["obs"][start:stop]
            demo["next_obs/state"] = arrays["obs"][start:stop] + 1
            demo["obs/front_image"] = arrays["img"][start:stop]
            if lazy and index == 1:  # the writer was killed before it wrote the second half
                values = demo.create_dataset("actions", (20, 2), np.float32, chunks=(10, 2))
                values[:10] = arrays["action"][start : start + 10]
            else:
                demo["actions"] = arrays["action"][start:stop]
            demo["rewards"] = np.zeros(stop - start)
        file["mask/train"] = np.array([b"demo_0", b"demo_2"])
    return path


def d4rl(path, arrays, **changes):
    names = {"observations": "obs", "actions": "action", "terminals": "done"}
    data = {name: arrays[own] for name, own in names.items()} | {"rewards": np.arange(60.0)}
    data["timeouts"] = np.isin(np.arange(60), np.array(ENDS) - 1)
    with h5py.File(path, "w") as file:
        for name, values in {**data, **changes}.items():
            if values is not None:
                file[name] = values
    return path


def npz(path, arrays):
    np.savez(path, episode_ends=ENDS, good=np.array([True, False, True]), **arrays)
    return path


@pytest.fixture
def sources(tmp_path, arrays, write_replay):
    """One of each format (not Minari's and LeRobot's), and the fields that it must be told."""
    write_replay(tmp_path / "r.zarr", arrays, ENDS)
    state = {"obs": ["state"]}
    return {
        "replay_zarr": (tmp_path / "r.zarr", {}),
        "robomimic": (robomimic(tmp_path / "r.hdf5", arrays), state),
        "arrays": (npz(tmp_path / "a.npz", arrays), {}),
        "d4rl": (d4rl(tmp_path / "d.hdf5", arrays), {}),
    }


# -- chunks that are not there --------------------------------------------------------------------


def test_a_missing_chunk_is_no_zeros(tmp_path, arrays, write_replay):
    write_replay(tmp_path / "r.zarr", arrays, ENDS)
    (tmp_path / "r.zarr/data/action/2.0").unlink()  # rows 32..47, of the episodes 1 and 2
    with pytest.raises(ValueError, match=r"episodes 1\.\.2: data/action/2\.0 is missing"):
        convert(tmp_path / "r.zarr", tmp_path / "a.zarr")
    assert not (tmp_path / "a.zarr").exists()
    kept = convert(tmp_path / "r.zarr", tmp_path / "b.zarr", exclude="failed_check")
    np.testing.assert_array_equal(kept.read("action"), arrays["action"][:20])
    assert list(kept.attrs["left_out_episodes"]) == ["1", "2"]
    assert convert(tmp_path / "r.zarr", tmp_path / "c.zarr", exclude=[1, 2]).num_episodes == 1
    let = convert(tmp_path / "r.zarr", tmp_path / "d.zarr", allow_missing=True)
    assert not let.read("action", 32, 48).any()
    assert "let through" in let.attrs["warnings"][0]
    # What is not read may be missing; and so in a store of ours, whose flags would read as False.
    (tmp_path / "b.zarr/data/action/c/0/0").unlink()
    with pytest.raises(ValueError, match="is missing, so rows"):
        convert(tmp_path / "b.zarr", tmp_path / "e.zarr")


def test_chunks_of_hdf5_that_were_never_written(tmp_path, arrays):
    source = robomimic(tmp_path / "r.hdf5", arrays, lazy=True)
    fields = {"obs": ["state"]}
    with pytest.raises(ValueError, match=r"demo_1/actions: rows \[\(10, 20\)\] were never written"):
        convert(source, tmp_path / "a.zarr", fields=fields)
    kept = convert(source, tmp_path / "b.zarr", fields=fields, exclude="failed_check")
    assert [a["demo"] for a in kept.episode_attrs] == ["demo_0", "demo_2"]
    path = d4rl(tmp_path / "d.hdf5", arrays, rewards=None)
    with h5py.File(path, "a") as file:
        file.create_dataset("rewards", (60,), np.float32)  # declared, and never written
    with (
        load_d4rl(path) as file,
        pytest.raises(ValueError, match=r"rewards: rows 0\.\.59 were never"),
    ):
        file.to_store()


def test_ends_that_are_last_indices(tmp_path, arrays, write_replay):
    write_replay(tmp_path / "r.zarr", arrays, [19, 39, 59])
    with pytest.raises(ValueError, match=r"look like the indices of the last rows.*e\[:\] \+ 1"):
        convert(tmp_path / "r.zarr", tmp_path / "a.zarr")
    np.savez(tmp_path / "a.npz", episode_ends=[19, 39, 59], **arrays)
    with pytest.raises(ValueError, match="look like the indices of the last rows"):
        convert(tmp_path / "a.npz", tmp_path / "a.zarr")
    write_replay(tmp_path / "s.zarr", arrays, [20, 40])  # a recorder that was killed
    kept = convert(tmp_path / "s.zarr", tmp_path / "b.zarr")
    assert "the last 20 rows of obs" in kept.attrs["unread"]


# -- which episodes -------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["replay_zarr", "robomimic", "arrays", "d4rl"])
def test_episodes_are_left_out_alike(sources, arrays, tmp_path, format):
    source, fields = sources[format]
    options = {"fields": fields, "format": format}
    made = convert(source, tmp_path / "a.zarr", exclude=[1], **options)
    np.testing.assert_array_equal(made.read("action"), np.delete(arrays["action"], np.s_[20:40], 0))
    assert made.attrs["left_out_episodes"] == {"1": "exclude=1"}
    made = convert(source, tmp_path / "b.zarr", keep=[0, 2], exclude=2, **options)
    np.testing.assert_array_equal(made.read("action"), arrays["action"][:20])
    for wrong, message in [
        ({"exclude": 3}, r"has the episodes 0\.\.2; got 3"),
        ({"keep": "mask:no"}, "has no mask 'no'; it has"),
        ({"keep": "train"}, "names episodes by number, range"),
        ({"exclude": [0, 1, 2]}, "leave none of the 3 episodes"),
    ]:
        with pytest.raises(ValueError, match=message):
            convert(source, tmp_path / "c.zarr", **wrong, **options)


def test_masks(sources, tmp_path):
    path, fields = sources["robomimic"]
    made = convert(path, tmp_path / "a.zarr", keep="mask:train", fields=fields)
    assert [a["demo"] for a in made.episode_attrs] == ["demo_0", "demo_2"]
    made = convert(sources["arrays"][0], tmp_path / "b.zarr", exclude="mask:good")  # flags
    assert made.num_episodes == 1


@pytest.mark.parametrize("format", ["replay_zarr", "robomimic", "arrays", "d4rl"])
def test_bad_episodes_are_left_out_by_the_check(
    arrays, tmp_path, write_replay, monkeypatch, format
):
    arrays["obs"][25, 1] = np.nan  # cannot be stored
    for name in ("obs", "action", "img"):  # frozen: stored, but the checker names it
        arrays[name][40:60] = arrays[name][40]
    write_replay(tmp_path / "r.zarr", arrays, ENDS)
    source = {
        "replay_zarr": tmp_path / "r.zarr",
        "robomimic": robomimic(tmp_path / "r.hdf5", arrays),
        "arrays": npz(tmp_path / "a.npz", arrays),
        "d4rl": d4rl(tmp_path / "d.hdf5", arrays),
    }[format]
    fields = {} if format == "d4rl" else {"obs": "state" if format == "robomimic" else "obs"}
    with pytest.raises(ValueError, match=r"exclude=\[1\]"):
        convert(source, tmp_path / "a.zarr", fields=fields)
    made = convert(source, tmp_path / "b.zarr", fields=fields, exclude="failed_check")
    np.testing.assert_array_equal(made.read("obs"), arrays["obs"][:20])
    assert list(made.attrs["left_out_episodes"]) == ["1", "2"]
    if format == "d4rl":
        with load_d4rl(source) as file, pytest.raises(ValueError, match=r"exclude=\[1\]"):
            file.to_store()
        with load_d4rl(source) as file:
            again = file.to_store(tmp_path / "c.zarr", exclude="failed_check", extras=[])
        np.testing.assert_array_equal(again.read("obs"), arrays["obs"][:20])


# -- what is left out is said ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "left", "unread"),
    [
        ("replay_zarr", ["done"], []),
        ("robomimic", ["front_image", "next_obs/state", "rewards"], ["mask/train"]),
        ("arrays", ["done"], []),
        ("d4rl", [], []),
    ],
)
def test_what_is_left_out_is_said(sources, tmp_path, caplog, format, left, unread):
    source, fields = sources[format]
    with caplog.at_level(logging.WARNING, "diffpolicy.data"):
        made = convert(source, tmp_path / "a.zarr", fields=fields)
    assert sorted(made.attrs.get("left_out", {})) == left
    assert sorted(made.attrs.get("unread", {})) == unread
    for name in (*left, *unread):
        assert name in caplog.text


def test_images_stay_images(sources, arrays, tmp_path):
    source, _ = sources["replay_zarr"]
    alone = convert(source, tmp_path / "a.zarr", fields={"obs": "img"})
    np.testing.assert_array_equal(alone.read("obs"), arrays["img"])
    beside = convert(source, tmp_path / "b.zarr", fields={"obs": ["obs", "img"]})
    np.testing.assert_array_equal(beside.read("obs.img"), arrays["img"])
    np.testing.assert_array_equal(beside.read("obs.state"), arrays["obs"])
    for odd in ({"obs.both": ["obs", "img"]}, {"action": "img"}, {"obs.row": "img[:9]"}):
        with pytest.raises(ValueError, match=r"is a vector, but 'img.*' is an image or a grid"):
            convert(source, tmp_path / "c.zarr", fields=odd)
    kept = convert(source, tmp_path / "d.zarr", fields={"obs": "obs", "img": "img"})
    assert kept.fields["img"].shape == (16, 16, 3)
    again = convert(tmp_path / "d.zarr", tmp_path / "e.zarr")  # a store of ours keeps all it has
    assert set(again.fields) == {"obs", "action", "img"}
    flat = convert(source, tmp_path / "f.zarr", transform=lambda obs: 2 * obs)
    np.testing.assert_array_equal(flat.read("obs"), 2 * arrays["obs"])  # what makes one vector
    with pytest.raises(ValueError, match="transform is of the one array obs; there is obs of byt"):
        convert(source, tmp_path / "g.zarr", fields={"obs": "img"}, transform=lambda obs: obs)


def test_the_forms_of_the_command_line(sources, tmp_path, capsys):
    source, target = str(sources["robomimic"][0]), str(tmp_path / "t.zarr")
    with pytest.raises(ValueError, match=r"for example obs=\[NAME, NAME\] at the command line"):
        run(["convert", source, target])
    options = ["obs=[state]", "fields={reward: rewards}", "keep=mask:train", "exclude=[0]"]
    assert run(["convert", source, target, *options]) == 0
    store = EpisodeStore.open(target)
    assert (store.num_episodes, sorted(store.fields)) == (1, ["action", "obs", "reward"])
    named = ["obs.camera=front_image", "obs.hand=state[1:]", "overwrite=true"]
    assert run(["convert", source, target, *named]) == 0
    store = EpisodeStore.open(target)
    assert (store.fields["obs.hand"].shape, store.fields["obs.camera"].dtype) == ((2,), "uint8")
    assert (
        'left out: {"left_out": ["next_obs/state", "state", "rewards"]' in capsys.readouterr().out
    )
    assert store.attrs["left_out"]["state"] == "float32 [3], but for state[1:]"
    with pytest.raises(ValueError, match=r"state\[1:9\]: 'state' has the entries 0:3"):
        run(["convert", source, target, "obs.hand=state[1:9]", "overwrite=true"])
    with pytest.raises(ConfigError, match="fields is a table"):
        run(["convert", source, target, "fields=reward"])
    with pytest.raises(ConfigError, match="is no list or table"):
        run(["convert", source, target, "obs=[state"])
    own = str(sources["d4rl"][0])
    assert run(["convert", own, str(tmp_path / "u.zarr"), "exclude=[1]", "transforms=[]"]) == 0
    assert "2 episodes, 40 steps" in (out := capsys.readouterr().out)
    assert 'left out: {"left_out_episodes": ["1"]}' in out


# -- HDF5 files that reach for others -------------------------------------------------------------


def external(file, name, secret):
    space = h5py.h5s.create_simple((60, 2))
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_external(str(secret).encode(), 0, h5py.h5f.UNLIMITED)
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.NATIVE_FLOAT, space, plist)


def linked(file, name, secret):
    file[name] = h5py.ExternalLink(str(secret), "/x")


def soft(file, name, secret):
    file["elsewhere"] = h5py.ExternalLink(str(secret), "/")
    file[name] = h5py.SoftLink("/elsewhere/x")


def virtual(file, name, secret):
    layout = h5py.VirtualLayout((60, 2), np.float32)
    layout[:] = h5py.VirtualSource(str(secret), "x", (60, 2))
    file.create_virtual_dataset(name, layout)


@pytest.mark.parametrize("reach", [external, linked, soft, virtual])
@pytest.mark.parametrize("format", ["d4rl", "robomimic", "minari"])
def test_no_file_reaches_for_another(tmp_path, arrays, reach, format):
    secret = tmp_path / "secret.hdf5"
    with h5py.File(secret, "w") as file:
        file["x"] = np.ones((60, 2), np.float32)
    if format == "d4rl":
        path, name = d4rl(tmp_path / "d.hdf5", arrays), "actions"
    elif format == "robomimic":
        path, name = robomimic(tmp_path / "r.hdf5", arrays), "data/demo_0/actions"
    else:
        pytest.importorskip("minari")
        path, name = tmp_path / "main_data.hdf5", "episode_0/actions"
        with h5py.File(path, "w") as file:
            group = file.create_group("episode_0")
            group["observations"] = np.zeros((61, 3))
            for step in ("rewards", "terminations", "truncations"):
                group[step] = np.zeros(60)
            group["actions"] = 0
        box = {"type": "Box", "dtype": "float64", "low": [-1] * 3, "high": [1] * 3, "shape": [3]}
        known = {f"{part}_space": json.dumps(box) for part in ("observation", "action")}
        known |= {"data_format": "hdf5", "total_episodes": 1}
        (tmp_path / "metadata.json").write_text(json.dumps(known))
    with h5py.File(path, "a") as file:
        del file[name]
        reach(file, name, secret)
    with pytest.raises(ValueError, match=r"in another file, '.*secret\.hdf5', which is not read"):
        convert(
            path, tmp_path / "out.zarr", fields={"obs": "state"} if format == "robomimic" else {}
        )
    assert not (tmp_path / "out.zarr").exists()


def test_links_within_a_file_are_followed(tmp_path, arrays):
    path = d4rl(tmp_path / "d.hdf5", arrays)
    with h5py.File(path, "a") as file:
        file.move("actions", "real")
        file["actions"] = h5py.SoftLink("/real")
        file["loop"] = h5py.SoftLink("/loop")
    with pytest.raises(ValueError, match="leads in a circle"):
        load_d4rl(path)
    with h5py.File(path, "a") as file:
        del file["loop"]
    with load_d4rl(path) as file:
        np.testing.assert_array_equal(file.episode(1)["action"], arrays["action"][20:40])


# -- D4RL's layout, of one's own ------------------------------------------------------------------


def test_files_of_ones_own_without_timeouts(tmp_path, arrays):
    bare = d4rl(tmp_path / "push.hdf5", arrays, timeouts=None)
    with pytest.raises(ValueError, match=r"say the step limit: max_episode_steps=N"):
        load_d4rl(bare)
    assert run(["convert", str(bare), str(tmp_path / "s.zarr"), "max_episode_steps=20"]) == 0
    store = EpisodeStore.open(tmp_path / "s.zarr")
    assert store.episode_ends.tolist() == ENDS
    assert store.read("truncated").sum() == 3
    assert store.attrs["references"]["max"] is None
    following = np.roll(arrays["obs"], -1, 0)
    following[np.array(ENDS) - 1] += 1
    path = d4rl(tmp_path / "next.hdf5", arrays, timeouts=None, next_observations=following)
    with load_d4rl(path) as file:
        assert file.episodes.ends.tolist() == ENDS
        assert file.episodes.truncated.all()  # the last is as long as the others
        assert "next_observations" in file.notes[0]
    path = d4rl(tmp_path / "x.hdf5", arrays, timeouts=None, next_observations=-arrays["obs"])
    with pytest.raises(ValueError, match="in no order of time"):
        load_d4rl(path).to_store()
    with pytest.raises(ValueError, match="has timeouts, which say where its episodes end"):
        load_d4rl(d4rl(tmp_path / "t.hdf5", arrays), max_episode_steps=20).to_store()


def test_rows_must_fit_the_dataset_that_is_named(tmp_path, arrays):
    own = d4rl(tmp_path / "push.hdf5", arrays)
    with pytest.raises(ValueError, match=r"it has rows of observations \[3\] and actions \[2\]"):
        load_d4rl(own, dataset="hopper-medium-v2")
    with load_d4rl(own.rename(tmp_path / "hopper_medium-v2.hdf5")) as file:
        assert file.info is None  # and so no reference returns
        assert "it is taken for data of its own" in file.notes[0]


def test_a_name_is_not_enough_to_be_comparable():
    hopper = lookup("hopper-medium-v2")
    assert misfit(hopper, (11,), (3,)) is None
    assert doubts(hopper, 999_906) == []
    assert doubts(hopper, 16_047) == [
        "the data have 16047 rows, D4RL's hopper-medium-v2 has 1000000"
    ]
    assert "is not known here" in doubts(lookup("flow-ring-random-v0"), 1)[0]


def test_lerobot_splits_are_masks(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "d/meta").mkdir(parents=True)
    (tmp_path / "d/data/chunk-000").mkdir(parents=True)
    features = {n: {"dtype": "float32", "shape": [2]} for n in ("observation.state", "action")}
    info = {"codebase_version": "v2.1", "features": features, "splits": {"train": "1:3"}}
    (tmp_path / "d/meta/info.json").write_text(json.dumps(info))
    rng = np.random.default_rng(0)
    lines = []
    for i in range(3):
        lines.append(json.dumps({"episode_index": i, "length": 4, "tasks": []}))
        columns = {n: list(rng.normal(size=(4, 2)).astype(np.float32)) for n in features}
        table = pa.table({**columns, "episode_index": [i] * 4})
        pq.write_table(table, tmp_path / f"d/data/chunk-000/episode_{i:06d}.parquet")
    (tmp_path / "d/meta/episodes.jsonl").write_text("\n".join(lines))
    made = convert(tmp_path / "d", tmp_path / "s.zarr", keep="mask:train")
    assert [a["episode_index"] for a in made.episode_attrs] == [1, 2]
