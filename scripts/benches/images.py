"""`python scripts/bench.py images`: what images cost on the disk, in memory and at every step."""

from __future__ import annotations

import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ZstdCodec
from zarr.storage import LocalStore

from benches.sampling import interleaved, ratio
from diffpolicy.commands.options import parse
from diffpolicy.files import write_atomic

ROWS = (1, 8, 32, 128)
CODECS: dict[str, Any] = {
    "none": None,
    "zstd 1": ZstdCodec(level=1),
    "zstd 3": ZstdCodec(level=3),
    "zstd 5": ZstdCodec(level=5),
    "zstd 9": ZstdCodec(level=9),
    "blosc lz4 5": BloscCodec(cname="lz4", clevel=5, shuffle="noshuffle"),
    "blosc zstd 1": BloscCodec(cname="zstd", clevel=1, shuffle="noshuffle"),
    "blosc zstd 5": BloscCodec(cname="zstd", clevel=5, shuffle="noshuffle"),
}


def help_text() -> str:
    """What `python scripts/bench.py images` does."""
    return """\
usage: python scripts/bench.py images [store=PATH field=img] [frames=2048] [rounds=3] [episodes=20]
           [only=codecs|training] [output=FILE.json]

codecs    writes and reads frames of a store (Push-T's) and noise of 96 x 96, by codec and rows of
          a chunk: MB of raw bytes per second of the CPU, and how many times smaller they are.
training  samples/s from EPISODES x 300 steps x 2 cameras of 96 x 96 beside the same step on one
          fixed batch of 64 (two observation steps, four convolutions): >= 0.9; and the memory that
          the windows hold: <= 1.2 times the raw bytes."""


def run(arguments: Sequence[str]) -> int:
    """Measure, print, and write ``output``."""
    defaults = {
        **{"store": None, "field": "img", "frames": 2048, "rounds": 3, "episodes": 20},
        **{"only": None, "output": None},
    }
    options = parse(arguments, [], defaults)
    report: dict[str, Any] = {}
    if options["only"] in (None, "codecs"):
        report["codecs"] = codecs(
            options["store"], options["field"], options["frames"], options["rounds"]
        )
    if options["only"] in (None, "training"):
        report["training"] = training(options["episodes"], options["rounds"])
        print(json.dumps(report["training"]))
    if options["output"]:
        write_atomic(Path(options["output"]), json.dumps(report, indent=1) + "\n")
    return 0


def codecs(store: str | None, field: str, frames: int, rounds: int) -> list[dict[str, Any]]:
    """Every codec and size of chunk, on frames of a store and on noise."""
    from diffpolicy.data import EpisodeStore

    noise = np.random.default_rng(0).integers(0, 256, (frames, 96, 96, 3), dtype=np.uint8)
    data = {"noise": noise}
    if store is not None:
        data = {Path(store).name.split(".")[0]: EpisodeStore.open(store).read(field, 0, frames)}
        data["noise"] = noise
    found = []
    for name, images in data.items():
        for codec in CODECS:
            for rows in ROWS:
                entry = {"data": name, "codec": codec, "rows": rows}
                found.append(entry | _timed(images, CODECS[codec], rows, rounds))
                print(json.dumps(found[-1]), flush=True)
    return found


def _timed(images: NDArray[Any], codec: Any, rows: int, rounds: int) -> dict[str, Any]:
    """Medians over rounds of CPU seconds; frames come in blocks of 128, as episodes do."""
    times: dict[str, list[float]] = {"write": [], "read": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            array: Any = zarr.create_array(
                LocalStore(folder),
                shape=images.shape,
                chunks=(rows, *images.shape[1:]),
                dtype=images.dtype,
                serializer=BytesCodec(),
                compressors=[codec, Crc32cCodec()] if codec else [Crc32cCodec()],
            )
            began = time.process_time()
            for start in range(0, len(images), 128):
                array[start : start + 128] = images[start : start + 128]
            times["write"].append(time.process_time() - began)
            began = time.process_time()
            read = [array[i : i + 128] for i in range(0, len(images), 128)]
            times["read"].append(time.process_time() - began)
            if not np.array_equal(np.concatenate(read), images):
                raise ValueError(f"{codec} does not give back what was written")
            size = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
    speed = {
        f"{k}_mb_s": round(images.nbytes / 1e6 / statistics.median(t)) for k, t in times.items()
    }
    return {**speed, "times_smaller": round(images.nbytes / size, 2)}


def training(episodes: int, rounds: int) -> dict[str, Any]:
    """A step of batch 64 on windows of two cameras beside the same step on one fixed batch."""
    import torch
    from torch import nn

    from diffpolicy.data import EpisodeStore, Windows

    torch.set_num_threads(1)
    size, steps, batch = 96, 300, 64
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store.zarr"
        _make(path, episodes, steps, size)
        store = EpisodeStore.open(path)
        before = _resident()
        began = time.process_time()
        windows = Windows(store, horizon=16, n_obs_steps=2, n_action_steps=8, in_memory=True)
        load_s = time.process_time() - began
        held = _resident() - before
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    raw = episodes * steps * 2 * size * size * 3
    network = nn.Sequential(
        *(nn.Conv2d(3, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, 1), nn.Flatten()),
        nn.LazyLinear(2),
    )
    order = torch.Generator().manual_seed(0)

    def indices() -> torch.Tensor:
        return torch.randint(len(windows), (batch,), generator=order)

    def step(data: dict[str, torch.Tensor]) -> None:
        network.zero_grad()
        for name in ("obs.left", "obs.right"):
            images = data[name].flatten(0, 1).permute(0, 3, 1, 2).float().div(255)
            network(images).square().mean().backward()

    fixed = windows.gather(indices())
    sides: dict[str, Callable[[], Any]] = {
        "store": lambda: step(windows.gather(indices())),
        "fixed": lambda: step(fixed),
        "gather": lambda: windows.gather(indices()),
    }
    times = interleaved(sides, max(rounds, 15), time.process_time)  # one thread: others may run
    return {
        "episodes": episodes,
        "raw_mb": round(raw / 1e6),
        "held_over_raw": round(held / raw, 3),
        "peak_over_raw": round(peak / raw, 3),
        "load_mb_s": round(raw / 1e6 / load_s),
        "step_ms": round(1e3 * statistics.median(times["fixed"]), 1),
        "gather_ms": round(1e3 * statistics.median(times["gather"]), 2),
        "samples_store_over_fixed": ratio(times["fixed"], times["store"]),
    }


def _make(path: Path, episodes: int, steps: int, size: int) -> None:
    """A moving gradient with a little noise: neither a flat colour nor incompressible."""
    from diffpolicy.data import EpisodeStore
    from diffpolicy.data.fields import FieldSpec

    rng = np.random.default_rng(0)
    image = FieldSpec((size, size, 3), "uint8")
    fields = {"obs.left": image, "obs.right": image, "obs.state": (4,), "action": (2,)}
    grid = np.add.outer(np.arange(size), np.arange(size))[None, :, :, None]
    with EpisodeStore.create(path, fields) as store:
        for _ in range(episodes):
            shift = np.arange(steps)[:, None, None, None]
            noise = rng.integers(0, 8, (steps, size, size, 3))
            frames = ((grid + shift + noise) % 256).astype(np.uint8)
            rows = rng.normal(size=(steps, 4)).astype(np.float32)
            store.append(
                {"obs.left": frames, "obs.right": frames, "obs.state": rows, "action": rows[:, :2]}
            )


def _resident() -> int:
    """Bytes of this process in memory."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * resource.getpagesize()
