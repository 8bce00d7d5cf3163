from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from diffpolicy.cli import main
from diffpolicy.data.preferences.records import Pair, Span
from diffpolicy.data.preferences.set import PreferenceSet
from diffpolicy.data.store import EpisodeStore

HUMAN = Path(__file__).resolve().parents[3] / "shared" / "data" / "adroit_door_human"
FAKES = Path(__file__).parents[1] / "helpers"
ENV = "env=rollout_fake_envs:rollout_fakes/Point-v0"
SMALL = ("episodes=2", "num_envs=4", "num_workers=0", "points=2", "branches=3", "lookahead=6")


@pytest.fixture(autouse=True)
def _fakes(monkeypatch):
    monkeypatch.syspath_prepend(str(FAKES))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained policy for the fake point."""
    from diffpolicy.api import DiffusionPolicy

    rng = np.random.default_rng(0)
    arrays = {"obs": rng.uniform(-2, 2, (60, 3)), "action": rng.uniform(-1, 1, (60, 2))}
    store = EpisodeStore.from_arrays(arrays, [30, 60])
    spec = {
        "horizon": 6,
        "n_obs_steps": 2,
        "n_action_steps": 3,
        "network": {"type": "mlp", "width": 16, "depth": 1},
        "process": {"type": "ddpm_cosine", "num_steps": 10},
        "sampler": {"solver": "ddim", "num_steps": 2, "spacing": "t"},
    }
    return DiffusionPolicy.from_dataset(store, spec=spec).save(tmp_path_factory.mktemp("p") / "p")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A store with frames, and a preference file of it."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    img = rng.integers(0, 255, (20, 32, 32, 3), np.uint8)
    arrays = {"obs": np.zeros((20, 1)), "action": np.zeros((20, 1)), "img": img}
    store = EpisodeStore.from_arrays(arrays, [5, 10, 15, 20], path=folder / "demos.zarr")
    preferences = PreferenceSet.create(folder / "asked.jsonl", store)
    preferences.append(Pair((Span(0, 0, 3),), (Span(1, 0, 3),), source="script"))
    preferences.append(Pair((Span(2, 1, 3),), (Span(3, 0, 2),), tie=True, source="script"))
    return folder


def _run(*arguments):
    return main(["data", "prefs", *map(str, arguments)])


def test_collect_and_info(checkpoint, tmp_path, capsys):
    target = tmp_path / "rollouts.zarr"
    assert _run("collect", target, f"checkpoint={checkpoint}", ENV, *SMALL, "seed=7") == 0
    preferences = PreferenceSet.open(tmp_path / "rollouts.jsonl")
    assert len(preferences.pairs()) == 4
    assert {p.info["seed"] for p in preferences.pairs()} == {7, 8}
    assert preferences.store.attrs["rollouts"]["settings"]["lookahead"] == 6
    out = capsys.readouterr().out
    assert f"{tmp_path / 'rollouts.jsonl'}: 4 pairs, 0 ties" in out
    steps = preferences.store.attrs["rollouts"]["env_steps"]
    # another score, and every pair: no new rollouts
    more = ("score=numpy:sum", "pairs=all", f"prefs={tmp_path / 'all.jsonl'}", "seed=7")
    # numpy.sum takes no successes
    assert _run("collect", target, f"checkpoint={checkpoint}", ENV, *SMALL, *more) == 1
    assert "TypeError" in capsys.readouterr().err
    more = ("score=max_reward", *more[1:])
    assert _run("collect", target, f"checkpoint={checkpoint}", ENV, *SMALL, *more) == 0
    every = PreferenceSet.open(tmp_path / "all.jsonl")
    assert every.store.attrs["rollouts"]["env_steps"] == steps
    assert len(every.pairs()) > 4
    capsys.readouterr()
    other = (*SMALL, "seed=8", 'sampler={"num_steps": 1}')
    assert _run("collect", target, f"checkpoint={checkpoint}", ENV, *other) == 1
    assert "'num_steps': 2" in capsys.readouterr().err
    assert _run("info", tmp_path / "rollouts.jsonl") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["attrs"]["scoring"]["score"] == "return"
    assert (told["pairs"], told["sources"]) == (4, {"rollout": 4})


def test_collect_whole_episodes(checkpoint, tmp_path):
    plain = ("kind=episodes", "repeats=2", "episodes=3", "num_envs=6", "num_workers=0")
    assert _run("collect", tmp_path / "e.zarr", f"checkpoint={checkpoint}", ENV, *plain) == 0
    preferences = PreferenceSet.open(tmp_path / "e.jsonl")
    assert {p.info["seed"] for p in preferences.pairs()} == {50_000, 50_001, 50_002}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "expected one of"),
        (["label"], "expected one of"),
        (["collect", "a.zarr"], "collect needs checkpoint=RUN"),
        (["collect", "a.zarr", "checkpoint=x", "kind=some"], "unknown kind 'some'"),
        (["collect", "a.zarr", "checkpoint=x", "score=best"], "unknown score 'best'"),
        (["collect", "a.zarr", "checkpoint=x", "score=nowhere:f"], "write MODULE:FUNCTION"),
        (["collect", "a.zarr", "checkpoint=x", "look=1"], "did you mean 'lookahead'"),
        (["collect", "a.zarr", "checkpoint=x", "branches=1"], "branches must be at least 2"),
        (["info", "absent.jsonl"], "no preference file"),
        (["page", "absent.jsonl", "out"], "neither a preference file nor a store"),
        (["render", "absent.jsonl", "out"], "no preference file"),
    ],
)
def test_messages(arguments, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _run(*arguments) == 1
    assert text in capsys.readouterr().err


def test_help(capsys):
    assert main(["data", "prefs", "--help"]) == 0
    told = capsys.readouterr().out
    for word in ("collect", "import", "info", "render", "page", "common_noise"):
        assert word in told


def test_import_of_a_label_file(tmp_path, capsys):
    store = EpisodeStore.from_arrays({"obs": np.zeros((20, 1))}, [10, 20], path=tmp_path / "d.zarr")
    labels = {"index_1": [0, 2, 3], "index_2": [10, 11, 12], "human_label": [0, 1, -1]}
    np.savez(tmp_path / "labels.npz", **{k: np.array(v) for k, v in labels.items()}, seg_len=4)
    wanted = ("import", store.path, tmp_path / "labels.npz", tmp_path / "human.jsonl")
    assert _run(*wanted) == 1
    assert "index=qlearning" in capsys.readouterr().err  # what the indices count must be said
    wanted = (*wanted, "index=rows")
    assert _run(*wanted) == 0
    assert "2 pairs, 1 ties" in capsys.readouterr().out
    first, second, _ = PreferenceSet.open(tmp_path / "human.jsonl").records
    assert first.chosen == (Span(0, 0, 4),)
    assert second.chosen == (Span(1, 1, 4),)
    assert _run(*wanted) == 1
    assert "exists" in capsys.readouterr().err
    assert _run(*wanted, "overwrite=true", "length=2") == 0
    assert PreferenceSet.open(tmp_path / "human.jsonl").records[0].chosen == (Span(0, 0, 2),)


@pytest.mark.skipif(not HUMAN.is_dir(), reason=f"no human labels at {HUMAN}")
def test_import_of_real_human_labels(tmp_path, capsys):
    files = HUMAN / "door_human.npz", HUMAN / "door_human_prefs_unirlhf.npz"
    fields = ("obs=observations", "action=actions")
    assert main(["data", "convert", str(files[0]), str(tmp_path / "door.zarr"), *fields]) == 0
    assert _run("import", tmp_path / "door.zarr", files[1], tmp_path / "door.jsonl") == 0
    capsys.readouterr()
    assert _run("info", tmp_path / "door.jsonl") == 0
    told = json.loads(capsys.readouterr().out.split("\n}\n")[0] + "\n}")
    assert told["sources"]["human"] == told["pairs"] + told["ties"] > 1000
    assert told["length"] == [50, 50]
    assert _run("render", tmp_path / "door.jsonl", tmp_path / "out") == 1
    assert "neither frames" in capsys.readouterr().err


def test_render(pictures, tmp_path, capsys):
    pytest.importorskip("imageio.v2", reason="needs the media extra")
    ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="needs the media extra")
    assert _run("render", pictures / "asked.jsonl", tmp_path, "fps=4", "after=1") == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["contact_sheet.png", "pair_0.mp4", "pair_1.mp4"]
    assert capsys.readouterr().out.splitlines() == [
        str(tmp_path / n) for n in ("pair_0.mp4", "pair_1.mp4", "contact_sheet.png")
    ]
    assert ffmpeg.count_frames_and_secs(str(tmp_path / "pair_0.mp4"))[0] == 4 + 4  # held for 1 s
    reader = ffmpeg.read_frames(str(tmp_path / "pair_0.mp4"))
    width, height = next(reader)["size"]
    picture = np.frombuffer(next(reader), np.uint8).reshape(height, width, 3).astype(int)
    reader.close()
    green, red = picture[20, 6], picture[20, -7]
    assert green[1] > green[0] + 50
    assert red[0] > red[1] + 50
    assert _run("render", pictures / "asked.jsonl", tmp_path / "one", "pairs=[1]") == 0
    assert (tmp_path / "one" / "pair_1.mp4").is_file()
    assert _run("render", pictures / "asked.jsonl", tmp_path / "two", "pairs=[2]") == 1
    assert "numbered 0..1" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["asked.jsonl", "demos.zarr"])
def test_a_page_and_its_answers(pictures, tmp_path, source, capsys):
    pytest.importorskip("imageio_ffmpeg", reason="needs the media extra")
    folder, target = tmp_path / "page", tmp_path / "human.jsonl"
    made = ("page", pictures / source, folder, "count=2", "length=2", "side=16")
    assert _run(*made) == 0
    assert f"2 questions in {folder / 'index.html'}" in capsys.readouterr().out
    assert _run(*made) == 1
    assert "choose another folder" in capsys.readouterr().err
    text = (folder / "index.html").read_text()
    page = json.loads(text.split('type="application/json">')[1].split("</script>")[0])
    (key, _) = page["questions"]
    answer = {"question": key, "choice": "left", "seconds": 1, "when": "2026-01-02T03:04:05Z"}
    values = {"format": "diffpolicy-answers", "page": page["page"], "answers": [answer]}
    (tmp_path / "answers.json").write_text(json.dumps(values))
    imported = ("import", folder, tmp_path / "answers.json", target)
    assert _run(*imported) == 0
    assert f"{target}: 1 pairs, 0 ties" in capsys.readouterr().out
    (record,) = PreferenceSet.open(target).records
    assert (record.source, record.info["question"]) == ("human", key)
    assert _run(*imported) == 1  # answers are not overwritten
    assert "exists" in capsys.readouterr().err
