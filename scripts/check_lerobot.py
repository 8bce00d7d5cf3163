"""Do LeRobot's package and ours read each other's datasets?

    python scripts/check_lerobot.py STORE --python LEROBOT_VENV/bin/python [--episodes 3] [--fps 10]

LeRobot needs another Python and other versions than ours, so it stands in an environment of its
own: ``python3.12 -m venv LEROBOT_VENV; LEROBOT_VENV/bin/pip install "lerobot[dataset]==0.6.1"``.

Written by us, opened there: every state, action and task of the first episodes is compared bit for
bit, and every picture. Written there, opened by us: the same, with a film and a column of pictures.
Prints what agrees; exit status 1 if something does not.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

TASKS = ["pick", "place"]


def decibels(shown: np.ndarray, meant: np.ndarray) -> float:
    error = np.square(shown.astype(np.float64) - meant).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


# ------------------------------------------------------------------- within LeRobot's environment


def theirs(folder: Path) -> None:
    """Open what we wrote; write what we shall open."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    meant = dict(np.load(folder / "meant.npz"))
    data = LeRobotDataset("local/ours", root=folder / "ours", video_backend="pyav")
    assert data.num_frames == len(meant["action"]), data.num_frames
    shown: dict[str, list[np.ndarray]] = {name: [] for name in meant}
    for index in range(data.num_frames):
        row = data[index]
        for name in meant:
            value = row[name] if name == "task" else row[name].numpy()
            if name.startswith("observation.image"):
                value = np.rint(255 * value.transpose(1, 2, 0)).astype(np.uint8)
            shown[name].append(value)
    for name, rows in shown.items():
        found = np.stack(rows).reshape(meant[name].shape)
        if name.startswith("observation.image"):
            print(f"ours, read there: {name}: {decibels(found, meant[name]):.2f} dB")
        else:
            assert found.dtype == meant[name].dtype or name == "task", (name, found.dtype)
            assert (found == meant[name]).all(), name
            print(f"ours, read there: {name} {list(found.shape)}: every bit")
    for name in ("observation.state", "action"):
        known = data.meta.stats[name]
        assert np.allclose(known["mean"], meant[name].mean(0), atol=1e-4), name
    write_theirs(LeRobotDataset, folder)


def write_theirs(kind: type, folder: Path) -> None:
    rng = np.random.default_rng(0)
    picture = {"shape": (32, 48, 3), "names": ["height", "width", "channels"]}
    vector = {"dtype": "float32", "names": None}
    features = {
        "observation.state": {**vector, "shape": (3,)},
        "action": {**vector, "shape": (2,)},
        "observation.images.film": {**picture, "dtype": "video"},
        "observation.images.still": {**picture, "dtype": "image"},
    }
    made = kind.create("local/theirs", fps=10, features=features, root=folder / "theirs")
    meant: dict[str, list[np.ndarray]] = {name: [] for name in features}
    ramp = np.linspace(0, 200, 48, dtype=np.float32)[None, :, None] * np.ones((32, 1, 3))
    for index in range(2):
        for step in range(8 + index):
            values = {
                "observation.state": rng.normal(size=3).astype(np.float32),
                "action": rng.normal(size=2).astype(np.float32),
                "observation.images.film": (ramp + 5 * step).astype(np.uint8),
                "observation.images.still": rng.integers(0, 256, (32, 48, 3), dtype=np.uint8),
            }
            for name, value in values.items():
                meant[name].append(value)
            made.add_frame({**values, "task": TASKS[index]})
        made.save_episode()
    made.finalize()
    np.savez(folder / "theirs.npz", **{name: np.stack(rows) for name, rows in meant.items()})


# ------------------------------------------------------------------------------ within our own


def ours(folder: Path, path: str, python: str, episodes: int, fps: float) -> None:
    from diffpolicy.data import EpisodeStore, convert
    from diffpolicy.data.formats.lerobot_writer import write_lerobot

    store = convert(path, folder / "part.zarr", max_episodes=episodes)
    written = write_lerobot(store, folder / "ours", fps=fps)
    print(f"written: {written.episodes} episodes, {written.steps} steps, {dict(written.psnr)}")
    tasks = store.attrs.get("tasks") or [""]
    ids = store.read("obs.task")[:, 0] if "obs.task" in store.fields else [0] * store.num_steps
    meant = {"action": store.read("action"), "task": np.array([tasks[i] for i in ids])}
    for name, spec in store.fields.items():
        part = name.removeprefix("obs.")
        if name in ("obs", "obs.state") and not spec.is_image:
            meant["observation.state"] = store.read(name)
        elif name.startswith("obs.") and part != "task":
            kind = "observation.images." if spec.is_image else "observation."
            meant[kind + part] = store.read(name)
    np.savez(folder / "meant.npz", **meant)
    subprocess.run(
        [python, __file__, "--inside", str(folder)], check=True, env={"HF_HUB_OFFLINE": "1"}
    )
    read_theirs(EpisodeStore, convert(folder / "theirs", folder / "theirs.zarr"), folder)


def read_theirs(kind: type, store: object, folder: Path) -> None:
    assert isinstance(store, kind)
    meant = dict(np.load(folder / "theirs.npz"))
    for name, field in {"observation.state": "obs.state", "action": "action"}.items():
        np.testing.assert_array_equal(store.read(field), meant[name])
        print(f"theirs, read here: {field}: every bit")
    np.testing.assert_array_equal(store.read("obs.still"), meant["observation.images.still"])
    print("theirs, read here: obs.still (a column of pictures): every bit")
    quality = decibels(store.read("obs.film"), meant["observation.images.film"])
    assert quality > 30, quality
    print(f"theirs, read here: obs.film: {quality:.2f} dB")
    assert store.attrs["tasks"] == TASKS
    np.testing.assert_array_equal(store.read("obs.task")[:, 0], [0] * 8 + [1] * 9)
    print("theirs, read here: obs.task: every bit")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("store", nargs="?")
    parser.add_argument("--python", help="of an environment with lerobot")
    parser.add_argument("--episodes", type=int, default=3)
    parser.add_argument("--fps", type=float, default=10)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.inside:
        theirs(Path(chosen.inside))
        return 0
    if not chosen.store or not chosen.python:
        parser.error("give STORE and --python")
    with tempfile.TemporaryDirectory() as folder:
        ours(Path(folder), chosen.store, chosen.python, chosen.episodes, chosen.fps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
