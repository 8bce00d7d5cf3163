"""Stores made of others: the same rows bit for bit, and a word about what is not there."""

import logging

import numpy as np
import pytest
import torch

from diffpolicy.commands.data import run
from diffpolicy.data import EpisodeStore, FieldSpec, Transitions, Windows, convert
from diffpolicy.data.joined import Joined, apart, each_part, open_store
from diffpolicy.data.remaking import filtered, halved, merged
from diffpolicy.data.statistics import compute_statistics
from diffpolicy.data.windows import split_store


def make(path, lengths=(7, 30, 12, 19), seed=0, attrs=None, **more):
    """Episodes of images, doubles, flags and vectors; episodes know their number and outcome."""
    rng = np.random.default_rng(seed)
    kinds = {"obs.image": FieldSpec((6, 6, 3), "uint8"), "obs.depth": FieldSpec((5,), "float64")}
    fields = {
        **kinds,
        "obs.state": (3,),
        "action": (2,),
        "terminated": FieldSpec((), "bool"),
        **more,
    }
    with EpisodeStore.create(path, fields, attrs=attrs, chunk_rows=8) as store:
        for index, length in enumerate(lengths):
            rows = {
                name: rng.integers(0, 2, (length, *spec.shape)).astype(spec.dtype)
                if spec.dtype in ("bool", "int64")
                else (255 * rng.random((length, *spec.shape))).astype(spec.dtype)
                for name, spec in store.fields.items()
            }
            known = {"demo": f"demo_{index}", "success": index % 2 == 0, "return": index / 10}
            store.append(rows, **known)
    return EpisodeStore.open(path)


def same(store, episodes, *parts):
    """Whether a store holds these episodes of other stores, bit for bit, with their attributes."""
    there = [(part, e) for part, chosen in zip(parts, episodes, strict=True) for e in chosen]
    assert store.num_episodes == len(there)
    for index, (part, episode) in enumerate(there):
        found, wanted = store.episode(index), part.episode(episode)
        assert found.keys() == wanted.keys()
        for name, rows in wanted.items():
            assert found[name].dtype == rows.dtype
            assert found[name].tobytes() == rows.tobytes(), (name, index)
        assert store.episode_attrs[index] == part.episode_attrs[episode]
    assert store.statistics == compute_statistics(store)


@pytest.mark.parametrize(
    ("choice", "left"),
    [
        ({"exclude": 1}, [0, 2, 3]),
        ({"keep": "1..2"}, [1, 2]),
        ({"keep": ["0..1", 3]}, [0, 1, 3]),
        ({"exclude": "success=false"}, [0, 2]),
        ({"keep": "mask:success"}, [0, 2]),
        ({"exclude": ["length<12", "demo_2"]}, [1, 3]),
        ({"keep": "length >= 12", "exclude": "return>0.2"}, [1, 2]),
        ({"keep": "demo!=demo_0", "max_episodes": 2}, [1, 2]),
        ({"keep": "demo=demo_3"}, [3]),
    ],
)
def test_filter_keeps_the_chosen_episodes_and_says_which_not(tmp_path, caplog, choice, left):
    source = make(tmp_path / "a.zarr", attrs={"env_id": "x", "warnings": ["episode 0: odd"]})
    with caplog.at_level(logging.WARNING, "diffpolicy.data"):
        store = filtered(tmp_path / "a.zarr", tmp_path / "b.zarr", **choice)
    same(store, [left], source)
    attrs = store.attrs
    gone = [str(i) for i in range(4) if i not in left]
    assert list(attrs["left_out_episodes"]) == gone
    assert f"leaves out {len(gone)} episodes: {gone[0]} (" in caplog.text
    assert attrs["env_id"] == "x"
    assert "warnings" not in attrs
    (made_of,) = attrs["made_of"]
    assert made_of["store"] == "a.zarr"
    assert made_of["episodes"] == 4
    assert made_of["steps"] == 68
    assert made_of["attrs"] == {"warnings": ["episode 0: odd"]}


def test_split_then_merge_gives_the_rows_back(tmp_path):
    source = make(tmp_path / "a.zarr", attrs={"env_id": "x"})
    one, two = halved(source, tmp_path / "1.zarr", tmp_path / "2.zarr", keep="0..1")
    same(one, [[0, 1]], source)
    same(two, [[2, 3]], source)
    back = merged([one, two], tmp_path / "back.zarr")
    same(back, [range(4)], source)
    assert back.attrs["env_id"] == "x"
    first = back.attrs["made_of"][0]
    assert first["store"] == "1.zarr"
    assert first["attrs"]["left_out_episodes"] == {"2": "in 2.zarr", "3": "in 2.zarr"}
    places = [(tmp_path / f"{n}a.zarr", tmp_path / f"{n}b.zarr") for n in (1, 2)]
    halves = [halved(source, *two, fraction=0.5, seed=n) for n, two in enumerate(places)]
    for half, other in halves:
        numbers = [a["demo"] for a in half.episode_attrs + other.episode_attrs]
        assert len(half) == 2
        assert sorted(numbers) == [f"demo_{i}" for i in range(4)]
    again = halved(source, tmp_path / "x.zarr", tmp_path / "y.zarr", fraction=0.5, seed=1)
    assert again[0].episode_attrs == halves[1][0].episode_attrs


def test_each_step_says_what_it_leaves_out_itself(tmp_path, capsys):
    before = {"left_out": {"keypoint": "float32 [9, 2]"}, "max_episodes": 4}
    make(tmp_path / "a.zarr", attrs=before)
    a, b = str(tmp_path / "a.zarr"), str(tmp_path / "b.zarr")
    for command in ("filter", "convert"):
        assert run([command, a, b, "overwrite=true"]) == 0
        assert "left out: nothing" in capsys.readouterr().out
        attrs = EpisodeStore.open(b).attrs
        assert not {*before, "left_out_episodes"} & set(attrs)
        assert attrs["made_of"][0]["attrs"] == before
        assert run([command, a, b, "overwrite=true", "max_episodes=3"]) == 0
        assert 'left out: {"left_out_episodes": ["3"]}' in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"fraction=0.01 puts 0 of the 4 episodes .* into the"):
        halved(a, tmp_path / "x.zarr", tmp_path / "y.zarr", fraction=0.01)


def test_memory_is_bounded_by_blocks(tmp_path, monkeypatch):
    source = make(tmp_path / "a.zarr", lengths=[200, 3])
    sizes = []
    read = EpisodeStore.read
    monkeypatch.setattr("diffpolicy.data.blocks.BLOCK_BYTES", 2**10)

    def counted(store, field, *rows):
        out = read(store, field, *rows)
        if field == "obs.image":  # the digest reads vectors, an episode at a time
            sizes.append(len(out))
        return out

    monkeypatch.setattr(EpisodeStore, "read", counted)
    filtered(source, tmp_path / "b.zarr", fields=["obs.image", "action"])
    assert max(sizes) <= 16


def test_failed_check_leaves_out_what_the_check_names(tmp_path, make_store, make_episode):
    stuck = make_episode(1, 10)
    stuck["obs"][:] = stuck["obs"][:1]
    path = make_store(replace={1: stuck})
    assert run(["filter", str(path), str(tmp_path / "b.zarr"), "exclude=failed_check"]) == 0
    store = EpisodeStore.open(tmp_path / "b.zarr")
    assert [a["seed"] for a in store.episode_attrs] == [0, 2, 3, 4, 5]
    assert list(store.attrs["left_out_episodes"]) == ["1"]


def test_episodes_that_have_no_actions_pass_the_check(tmp_path):
    rng = np.random.default_rng(0)
    with EpisodeStore.create(tmp_path / "a.zarr", {"obs": (3,), "action": (2,)}) as store:
        for index in range(6):
            rows = {"obs": rng.normal(size=(50, 3)), "action": rng.normal(size=(50, 2))}
            store.append(rows, actions=index != 2)
    assert len(filtered(tmp_path / "a.zarr", tmp_path / "b.zarr", exclude="failed_check")) == 6
    kept = filtered(tmp_path / "a.zarr", tmp_path / "c.zarr", exclude="actions=false")
    assert len(kept) == 5


def test_merge_refuses_what_differs_and_says_how_to_mend_it(tmp_path):
    a = make(tmp_path / "a.zarr", lengths=[3])
    b = make(tmp_path / "b.zarr", lengths=[4], **{"obs.state": (4,), "reward": ()})
    with pytest.raises(
        ValueError, match=r"obs.state is \[3\] float32 in .*a.zarr, \[4\].*reward is"
    ):
        merged([a, b], tmp_path / "c.zarr")
    with pytest.raises(ValueError, match="data convert STORE OTHER"):
        merged([a, b], tmp_path / "c.zarr")
    assert not (tmp_path / "c.zarr").exists()
    c = merged([a, b], tmp_path / "c.zarr", fields=["obs.image", "action"])
    assert set(c.fields) == {"obs.image", "action"}
    assert c.num_episodes == 2
    assert set(c.attrs["left_out"]) == {"obs.depth", "obs.state", "reward", "terminated"}


def test_instructions_are_numbered_anew(tmp_path):
    task = {"obs.task": FieldSpec((1,), "int64")}
    a = make(tmp_path / "a.zarr", attrs={"tasks": ["push", "pick"]}, **task)
    b = make(tmp_path / "b.zarr", seed=1, attrs={"tasks": ["pick", "fold"]}, **task)
    store = merged([a, b], tmp_path / "c.zarr")
    assert store.attrs["tasks"] == ["push", "pick", "fold"]
    said = [
        source.attrs["tasks"][int(i)] for source in (a, b) for i in source.read("obs.task")[:, 0]
    ]
    assert [store.attrs["tasks"][int(i)] for i in store.read("obs.task")[:, 0]] == said
    plain = make(tmp_path / "d.zarr", **task)
    with pytest.raises(ValueError, match=r"d\.zarr has no attribute 'tasks'"):
        merged([a, plain], tmp_path / "e.zarr")


def test_masks_of_robomimic_reach_the_store(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "r.hdf5", "w") as file:
        for index in range(3):
            file[f"data/demo_{index}/obs/state"] = np.full((4, 2), index, np.float32) + np.eye(4, 2)
            file[f"data/demo_{index}/actions"] = np.random.default_rng(index).random((4, 2))
        file["mask/train"] = np.array([b"demo_0", b"demo_2"])
    convert(tmp_path / "r.hdf5", tmp_path / "r.zarr", fields={"obs": "state"}).close()
    store = filtered(tmp_path / "r.zarr", tmp_path / "t.zarr", keep="mask:train")
    assert [a["demo"] for a in store.episode_attrs] == ["demo_0", "demo_2"]
    with pytest.raises(ValueError, match="no mask 'trian'; it has"):
        filtered(tmp_path / "r.zarr", tmp_path / "u.zarr", keep="mask:trian")


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"keep": 4}, r"has the episodes 0..3; got 4"),
        ({"keep": "2..9"}, r"0..3; got 2..9"),
        ({"exclude": "demo_7"}, "names episodes by number"),
        ({"exclude": "sucess=true"}, "unknown attribute .* did you mean 'success'"),
        ({"keep": "demo<3"}, "demo of episode 0 .* is 'demo_0', which cannot be compared with 3"),
        ({"keep": "length>99"}, "leave none of the 4 episodes"),
        ({"fields": ["obs"]}, r"has no field \['obs'\]"),
    ],
)
def test_refusals(tmp_path, choice, message):
    source = make(tmp_path / "a.zarr")
    with pytest.raises(ValueError, match=message):
        filtered(source, tmp_path / "b.zarr", **choice)
    assert not (tmp_path / "b.zarr").exists()


def test_command_line(tmp_path, capsys):
    make(tmp_path / "a.zarr")
    a, one, two, back = (str(tmp_path / f"{n}.zarr") for n in ("a", "1", "2", "back"))
    assert run(["filter", a, one, "exclude=[demo_0,length>20]"]) == 0
    assert f"{one}: 2 episodes, 31 steps" in capsys.readouterr().out
    assert run(["split", a, one, two, "keep=success=true", "overwrite=true"]) == 0
    assert run(["split", a, one, two, "keep=0", "overwrite=true"]) == 0
    assert f"{two}: 2 episodes, 49 steps" in capsys.readouterr().out
    assert run(["merge", one, two, back, "fields=[obs.state,action]"]) == 0
    assert f"{back}: 4 episodes, 68 steps" in capsys.readouterr().out
    for wrong, message in (
        (["merge", a, back], "two stores at least"),
        (["split", a, one, two], "one of them"),
        (["filter", a, one], "exists"),
        (["split", a, one, a, "keep=1", "overwrite=true"], "read or made already"),
        (["split", a, one, one, "keep=1", "overwrite=true"], "read or made already"),
        (["merge", a, one, a, "overwrite=true"], "read or made already"),
        (["filter", a, back, "excldue=1"], "did you mean 'exclude'"),
        (["filter", str(tmp_path / "no.zarr"), one, "keep=1"], "no store at"),
    ):
        with pytest.raises((ValueError, FileExistsError, FileNotFoundError), match=message):
            run(wrong)


def test_joined_stores_read_as_one(tmp_path):
    a, b = make(tmp_path / "a.zarr"), make(tmp_path / "b.zarr", lengths=[5, 6], seed=1)
    both = open_store([str(tmp_path / "a.zarr"), {"path": str(tmp_path / "b.zarr"), "weight": 3}])
    assert isinstance(both, Joined)
    assert list(both.parts) == ["a", "b"]
    assert both.weights == (1, 3)
    for name in a.fields:
        rows = np.concatenate([a.read(name), b.read(name)])
        assert both.read(name).tobytes() == rows.tobytes()
        for start, stop in [(0, 3), (60, 75), (68, 70), (79, 79), (70, 999)]:
            assert both.read(name, start, stop).tobytes() == rows[start:stop].tobytes()
    merge = merged([a, b], tmp_path / "c.zarr")
    for name, values in merge.statistics.items():
        for key in ("min", "max", "q01", "q99", "count"):
            assert both.statistics[name][key] == values[key]
        np.testing.assert_allclose(both.statistics[name]["std"], values["std"], rtol=1e-12)
    with pytest.raises(ValueError, match="part 0 of the data has no setting 'wieght'"):
        open_store([{"path": "a.zarr", "wieght": 1}])
    with pytest.raises(ValueError, match="weight must be positive, got 0"):
        open_store([{"path": "a.zarr", "weight": 0}])


def test_windows_and_transitions_of_joined_stores_are_those_of_a_merged_one(tmp_path):
    more = {"reward": ()}
    a, b = make(tmp_path / "a.zarr", **more), make(tmp_path / "b.zarr", [5, 6], seed=1, **more)
    both, merge = Joined({"a": a, "b": b}), merged([a, b], tmp_path / "c.zarr")
    for kind, sizes in ((Windows, {"n_action_steps": 2}), (Transitions, {})):
        found, wanted = (
            kind(s, horizon=4, n_obs_steps=2, episodes=[1, 3, 4], **sizes) for s in (both, merge)
        )
        rows = torch.arange(len(wanted))
        assert len(found) == len(wanted)
        for name, values in wanted.gather(rows).items():
            assert torch.equal(found.gather(rows)[name], values), name
    train, val = split_store(both, np.arange(6), 0.5, seed=0)
    assert sorted([*train, *val]) == list(range(6))
    assert {name: len(own) for name, own in apart(both, val).items()} == {"a": 2, "b": 1}
    assert each_part(both, lambda count: range(min(count, 1))).tolist() == [0, 4]
    chosen = make(
        tmp_path / "d.zarr", attrs={"action_groups": [{"dims": [0], "choices": 2}]}, **more
    )
    with pytest.raises(ValueError, match=r"the attribute 'action_groups' is .* do not go together"):
        Joined({"a": a, "d": chosen})
