"""What it costs to read parts of a store: seconds, those of the CPU, and the most memory held.

    python scripts/store_reads.py [steps=1000000] [length=1000] [dir=FOLDER]

Makes a store of `steps` steps (17 observations, 6 actions, episodes of `length` steps) in `dir`,
default a temporary folder, and reads it in four ways: all episodes, every other one, a tenth of
them, each with a checksum of the windows' rows; and the observations' usual step, which
`DiffusionPolicy.from_dataset` keeps for `rti.innovation`. The last two columns say how many chunks
were read from the disk and how many the store has.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from zarr.storage import LocalStore

from diffpolicy.commands.options import parse
from diffpolicy.data import EpisodeStore, Windows
from diffpolicy.policies.recorded import observation_step

DEFAULTS: dict[str, Any] = {"steps": 1_000_000, "length": 1000, "dir": None}


def make(path: Path, steps: int, length: int) -> None:
    rng = np.random.default_rng(0)
    fields = {"obs": (17,), "action": (6,)}
    with EpisodeStore.create(path, fields) as store:
        for start in range(0, steps, 100 * length):
            rows = min(100 * length, steps - start)
            walk = rng.normal(size=(rows, 17)).cumsum(0).astype(np.float32)
            action = rng.uniform(-1, 1, (rows, 6)).astype(np.float32)
            ends = np.append(np.arange(length, rows, length), rows)
            store.extend({"obs": walk, "action": action}, ends)


def count_reads() -> list[str]:
    """Every chunk that is read from now on, by its key."""
    seen: list[str] = []
    get = LocalStore.get

    async def counted(self: LocalStore, key: str, *args: Any, **kwargs: Any) -> Any:
        if key.startswith("data/") and "/c/" in key:
            seen.append(key)
        return await get(self, key, *args, **kwargs)

    LocalStore.get = counted  # type: ignore[method-assign]
    return seen


def checksum(store: EpisodeStore, episodes: Any) -> int:
    windows = Windows(
        store, horizon=1, n_obs_steps=1, n_action_steps=1, episodes=episodes, in_memory=True
    )
    return zlib.crc32(windows._runs["action"].numpy(), zlib.crc32(windows._runs["obs"].numpy()))


def main(arguments: list[str]) -> None:
    options = parse(arguments, [], DEFAULTS)
    with tempfile.TemporaryDirectory(dir=options["dir"]) as folder:
        path = Path(folder) / "store.zarr"
        make(path, options["steps"], options["length"])
        store = EpisodeStore.open(path)
        count = store.num_episodes
        chunks = len(list(path.glob("data/*/c/*/*")))
        works: dict[str, Callable[[], Any]] = {
            "all episodes": lambda: checksum(store, None),
            "every other episode": lambda: checksum(store, range(0, count, 2)),
            "every tenth episode": lambda: checksum(store, range(0, count, 10)),
            "usual step": lambda: zlib.crc32(np.array(observation_step(store))),
        }
        seen = count_reads()
        for name, work in works.items():
            seen.clear()
            began, busy = time.perf_counter(), time.process_time()
            result = work()
            seconds, used = time.perf_counter() - began, time.process_time() - busy
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            print(
                f"{name:<20} {seconds:6.2f} s  CPU {used:6.2f} s  checksum {result:08x}  "
                f"peak {peak:5d} MiB  chunks {len(seen)} read of {chunks}"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
