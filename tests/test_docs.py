"""Every command and every Python example of the documents runs, with tiny settings."""

from __future__ import annotations

import pickle
import re
import shlex
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from diffpolicy import cli
from diffpolicy.data import EpisodeStore
from diffpolicy.rollout.video import choose_gl_backend
from generators.command import run as generate

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
FORMATS = "Data as people keep it"
OWN = "Sequences of your own"
STORES = "Data: some episodes, several stores"
PUSHT = DATA / "pusht" / "pusht_lowdim.zarr.zip"
DOOR = [
    DATA / "adroit_door_human" / name for name in ("door_human.npz", "door_human_prefs_unirlhf.npz")
]
CAMERAS = "Encoders, tasks, and parts of your own"
TINY = [
    "trainer.steps=4",
    "trainer.eval_every=4",
    "trainer.batch_size=16",
    "trainer.warmup_steps=1",
    "evaluation.val_episodes=1",
    "evaluation.episodes=1",
    "evaluation.video_episodes=0",
    "evaluation.num_workers=0",
]
TUNE = ["trainer.batch_size=8", "trainer.warmup_steps=1", "trainer.progress=false", "threads=1"]
SHORT = [
    "evaluation.val_episodes=0",
    "evaluation.episodes=1",
    "evaluation.num_workers=0",
    "nfe=[1]",
]
PREFER = [*TUNE, *SHORT, "trainer.steps=2", "trainer.eval_every=2"]
BRANCHES = {"points": 1, "branches": 2, "lookahead": 8}
SMALL = {
    "compare": [],
    "network=transformer": [
        *TINY,
        "data.collect.episodes=3",
        "network.width=16",
        "network.depth=1",
    ],
    "experiment=pusht_40": [*TINY, *TUNE, "network.width=16", "env.max_episode_steps=40"],
    "preferences=runs/pusht_dpo/plans.jsonl": PREFER,
    "preferences=data/pusht_rollouts_human.jsonl": PREFER,
    "method=bc": PREFER,
    "method=draft_k": [
        *PREFER,
        *("collect.episodes=2", "judge.width=8"),
        *("judge.trainer.steps=2", "judge.trainer.batch_size=8"),
    ],
    "judge.path=runs/pusht_dpo/value": [*SHORT[:3], "selection.num_candidates=2"],
    "experiment=pusht_dpo": [
        *PREFER,
        "collect.episodes=2",
        "collect.repeats=2",
        *("judge.width=8", "judge.members=1", "judge.trainer.steps=2"),
        *("judge.trainer.batch_size=8", "plans.every=8", "plans.candidates=2"),
    ],
    "experiment=pusht_dro": PREFER,
    "distill": PREFER,
    "experiment=door_human": [*TINY, *TUNE, "network.width=16", "env.max_episode_steps=20"],
    "experiment=door_human_dpo": [*PREFER, "windows=2"],
    "experiment=tfbind8_dpo": [*TUNE, "trainer.steps=2", "draws=32", "eval_draws=16"],
    "collect": [
        "episodes=2",
        "num_envs=4",
        "num_workers=0",
        *(f"{name}={value}" for name, value in BRANCHES.items()),
    ],
    "render": ["count=1"],
    "import": [],
    "env=fetch_push_camera": [
        *TINY,
        "data.collect.episodes=3",
        "network.width=16",
        "policy.encoder.backbone={type: cnn, widths: [4, 4, 4]}",
    ],
    "experiment=fetch_push": [*TINY, "data.collect.episodes=3", "network.width=16"],
    "experiment=fetch_push_pad": [*TINY, "data.collect.episodes=3", "network.base.width=16"],
    "experiment=demo": [*TINY, "data.collect.episodes=3"],
    "experiment=pusht_state_small": [
        *TINY,
        "network.width=16",
        "evaluation.seed=100000",
        "evaluation.val_seed=200000",
    ],
    "experiment=maze2d_umaze": [*TINY, "network.width=16"],
    "experiment=d4rl_hopper_medium_expert": [*TINY, "env.max_episode_steps=20"],
    "experiment=tfbind8": [*TUNE, "trainer.steps=4", "draws=32"],
    "method=none": ["draws=32", "threads=1"],
    "experiment=tfbind8_drakes": [*TUNE, "trainer.steps=2", "draws=32", "eval_draws=16"],
    "experiment=dna": [*TUNE, "trainer.steps=4", "draws=32", "oracles.trainer.steps=4"],
    "experiment=dna_drakes": [*TUNE, "trainer.steps=1", "draws=16", "eval_draws=16"],
    "pointmaze": ["steps=700"],
    "eval": ["evaluation.episodes=1", "evaluation.num_workers=0"],
    "doctor": ["probe=false"],
    "resume": [],
    "rti": ["episodes=2", "num_steps=1"],
    "anchors": ["count=4"],
    "autotune": ["episodes=2", "pairs=8", "teacher_steps=10"],
    "export": [],
    "fetch/push": ["episodes=2", "workers=0"],
    "metaworld/mt10": ["episodes=2", "workers=0"],
    "data": [],
}


def blocks(name: str, language: str, section: str | None = None) -> list[str]:
    """Fenced blocks of a document, or of one of its sections, in one language."""
    text = (ROOT / name).read_text()
    if section is not None:
        text = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    parts = re.split(r"^```(.*)\n", text, flags=re.M)
    opened = list(
        zip(parts[1::4], parts[2::4], strict=True)
    )  # [text, language, block, "", text, ...]
    return [block for found, block in opened if found == language]


def commands(name: str, section: str | None = None) -> list[list[str]]:
    """`diffpolicy ...` lines of a document, or of one of its sections, without their comments."""
    lines = [line for block in blocks(name, "", section) for line in block.splitlines()]
    return [
        shlex.split(line, comments=True)[1:] for line in lines if line.startswith("diffpolicy ")
    ]


def tiny(command: list[str]) -> list[str]:
    for key, extra in SMALL.items():
        if key in command:
            return [*command, *extra]
    raise AssertionError(f"no tiny settings for `diffpolicy {' '.join(command)}`: add them here")


def write_hopper(path: Path) -> None:
    """A file of D4RL's layout, with noise in it."""
    h5py = pytest.importorskip("h5py", reason="needs the hdf5 extra")
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["observations"] = rng.standard_normal((60, 11)).astype(np.float32)
        file["actions"] = rng.uniform(-1, 1, (60, 3)).astype(np.float32)
        file["rewards"] = rng.uniform(0, 1, 60).astype(np.float32)
        file["terminals"] = np.arange(60) % 20 == 19
        file["timeouts"] = np.zeros(60, bool)


@pytest.mark.mujoco
@pytest.mark.filterwarnings("ignore::diffpolicy.training.identity.ResumeWarning")
@pytest.mark.filterwarnings("ignore:a student of prediction:UserWarning")
@pytest.mark.filterwarnings("ignore:this policy is a student:UserWarning")
def test_commands(tmp_path, monkeypatch):
    pytest.importorskip("gymnasium_robotics", reason="needs the robotics extra")
    pytest.importorskip("metaworld", reason="needs the metaworld extra")
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks("docs/guide.md", "") for line in block.splitlines()]
    maze = next(line for line in lines if line.startswith("python scripts/generate.py pointmaze"))
    arguments = [a for a in shlex.split(maze)[2:] if not a.startswith("steps=")]
    assert generate([*arguments, "steps=700"]) == 0
    elsewhere = (
        STORES,
        FORMATS,
        "Push-T with the human demonstrations",
        "Sequences, tuned by a reward",
        OWN,
        "Preferences",
        CAMERAS,
    )
    others = [c for section in elsewhere for c in commands("docs/guide.md", section)]
    found = []
    for command in commands("README.md") + commands("docs/guide.md"):
        known = command in found or command in others
        if not known and command[0] not in ("import-checkpoint", "serve"):
            found.append(command)
    assert len(found) >= 7
    longer = ["trainer.steps=3000", "trainer.steps=6"]
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    write_hopper(tmp_path / "hopper_medium_expert-v2.hdf5")
    drawn = choose_gl_backend().backend is not None
    for command in found:
        if not drawn and any("camera" in argument for argument in command):
            continue
        if command[:2] == [
            "train",
            "experiment=demo",
        ]:  # the demonstrations that a later line checks
            command = [*command, "data.path=data/fetch_pick_place.zarr"]
        command = [longer[1] if argument == longer[0] else argument for argument in command]
        status = cli.main(tiny(command))
        assert status == 0 or command[0] == "doctor", command


def test_camera_commands():
    """They are composed; trained are smaller ones, in tests of their own."""
    found = commands("docs/guide.md", CAMERAS)
    assert len(found) == 3
    for command in found:
        assert cli.main([*command, "--print-config"]) == 0, command


def test_format_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arrays = {"obs": np.zeros((6, 3)), "action": np.random.default_rng(0).normal(size=(6, 2))}
    texts = {"instruction": np.array(["open", "close"]), "episode_ends": [2, 6]}
    np.savez("demos.npz", **arrays, **texts)
    module = types.ModuleType("my_module")
    module.encode = lambda texts: [[len(text), 1.0] for text in texts]
    monkeypatch.setitem(sys.modules, "my_module", module)
    found = [c for c in commands("docs/guide.md", FORMATS) if "demos.npz" in c]
    assert len(found) == 2
    for command in found:
        assert cli.main(command) == 0, command
    assert EpisodeStore.open("data/demos.zarr").fields["obs.task"].shape == (2,)


def test_store_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("demos", "lift", "monday", "tuesday", "real", "simulated"):
        rows = {"obs": (60 * 21, 3), "action": (60 * 21, 2)}
        arrays = {k: rng.normal(size=shape).astype(np.float32) for k, shape in rows.items()}
        with EpisodeStore.create(f"{name}.zarr", {"obs": (3,), "action": (2,)}) as store:
            known = [{"success": i % 3 > 0, "masks": ["train"][: i % 2]} for i in range(60)]
            store.extend(arrays, np.arange(21, 61 * 21, 21), known)
    found = commands("docs/guide.md", STORES)
    assert len(found) == 5
    for command in found:
        small = ["network.width=16", "evaluation.val_episodes=0", "evaluation.episodes=0"]
        more = [*TINY, *small, "trainer.progress=false"] if command[0] == "train" else []
        assert cli.main([*command, *more]) == 0, command
    assert EpisodeStore.open("good.zarr").num_episodes == 32


def test_sequence_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = commands("docs/guide.md", "Sequences, tuned by a reward")
    assert len(found) == 7
    tuned_by_labels = next(c for c in commands("docs/guide.md") if "experiment=tfbind8_dpo" in c)
    for command in [*found, tuned_by_labels]:
        assert cli.main(tiny(command)) == 0, command


def test_commands_of_own_sequences(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("ACGT"), n)) for n in (6, 8) * 40]
    Path("mine.fasta").write_text("".join(f">{i}\n{t}\n" for i, t in enumerate(texts)))
    rows = [f"{t},{t.count('G')},{i % 8}\n" for i, t in enumerate(texts)]
    Path("measured.csv").write_text("sequence,activity,plate\n" + "".join(rows))
    module = types.ModuleType("my_oracles")
    module.score = lambda texts: [text.count("G") for text in texts]
    monkeypatch.setitem(sys.modules, "my_oracles", module)
    found = commands("docs/guide.md", OWN)
    assert len(found) == 3
    small = [f"pretrain.{one}" for one in ("trainer.steps=4", "network.width=8", "draws=16")]
    small += ["pretrain.oracles.trainer.steps=4", "report.chains=8", "draws=32"]
    for command in found:
        training = [] if "method=none" in command else [*TUNE, "trainer.steps=2", "eval_draws=16"]
        assert cli.main([*command, *small, *training, "threads=1"]) == 0, command
    assert Path("runs/measured_tuned/designs.fasta").is_file()


def test_pusht_commands(tmp_path, monkeypatch):
    pytest.importorskip("gym_pusht", reason="needs the pusht extra")
    if not PUSHT.is_file():
        pytest.skip(f"the human demonstrations are not at {PUSHT}")
    monkeypatch.chdir(tmp_path)
    shutil.copy(PUSHT, tmp_path)
    found = commands("docs/guide.md", "Push-T with the human demonstrations")
    assert len(found) == 2
    for command in found:
        assert cli.main(tiny(command)) == 0, command


def test_pusht_preference_commands(tmp_path, monkeypatch):
    pytest.importorskip("gym_pusht", reason="needs the pusht extra")
    pytest.importorskip("imageio_ffmpeg", reason="needs the media extra")
    if not PUSHT.is_file():
        pytest.skip(f"the human demonstrations are not at {PUSHT}")
    monkeypatch.chdir(tmp_path)
    shutil.copy(PUSHT, tmp_path)
    convert = commands("docs/guide.md", "Push-T with the human demonstrations")[0]
    assert cli.main(convert) == 0
    found = [c for c in commands("docs/guide.md", "Preferences") if "pusht" in " ".join(c)]
    assert len(found) == 12
    for command in found:
        if command[:3] == ["data", "prefs", "import"]:  # a person answers; tested by itself
            shutil.copy("data/pusht_rollouts.jsonl", command[5])
            continue
        assert cli.main(tiny(command)) == 0, command


@pytest.mark.mujoco
def test_door_commands(tmp_path, monkeypatch):
    pytest.importorskip("gymnasium_robotics", reason="needs the robotics extra")
    if not all(path.is_file() for path in DOOR):
        pytest.skip(f"the demonstrations and labels are not at {DOOR[0].parent}")
    monkeypatch.chdir(tmp_path)
    shutil.copy(DOOR[0], tmp_path)
    folder = tmp_path / "door-human-v1_human_labels"  # as Uni-RLHF publishes them
    folder.mkdir()
    with np.load(DOOR[1]) as labels:
        for name, key in (("indices_1", "index_1"), ("indices_2", "index_2")):
            (folder / f"{name}_len_50.pkl").write_bytes(pickle.dumps(labels[key]))
        (folder / "human_label_len_50.pkl").write_bytes(pickle.dumps(labels["human_label"]))
    found = [c for c in commands("docs/guide.md", "Preferences") if "door" in " ".join(c)]
    assert len(found) == 4
    for command in found:
        assert cli.main(tiny(command)) == 0, command


@pytest.mark.mujoco
def test_python(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gymnasium_robotics", reason="needs the robotics extra")
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks("README.md", "python") + blocks("docs/guide.md", "python"))
    for long, short in (
        ("range(50)", "range(3)"),
        ("steps=1500", "steps=60, warmup_steps=5, batch_size=32"),
        ("steps=500", "steps=3, warmup_steps=1, batch_size=8"),
        ("steps=200", "steps=3, warmup_steps=1, batch_size=8"),
        ("300_020", "300_001"),
    ):
        assert long in code
        code = code.replace(long, short)
    exec(compile(code, "README.md and docs/guide.md", "exec"), {})
    assert "value" in capsys.readouterr().out


def test_concepts_python():
    found = blocks("docs/concepts.md", "python")
    assert found
    for code in found:
        exec(compile(code, "concepts.md", "exec"), {})


def test_make_targets_named_in_the_documents_exist():
    text = "".join(
        (ROOT / n).read_text() for n in ("README.md", "docs/guide.md", "CONTRIBUTING.md")
    )
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`)make ([a-z-]+)", text, flags=re.M)):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
