"""How fast environments run, by number of environments and of processes, also against another tree.

    python scripts/rollout_speed.py [--env ID] [--episodes N] [--steps N] [--repeats N]
                                    [--against TREE] [--cases ENVS:PROCESSES ...]

Every case runs in a process of its own, all cases in turn and again, so that a busy machine slows
all alike; printed are the medians. Wall time begins with the first reset; the making of the
environments has a column of its own. Beside it stand the steps a second of processor
time, of the main process alone and of all together, starts included, which other programs hardly
touch. The policy costs next to nothing, so what is measured is the rest. With `--against` another
checkout is measured beside this one and the ratio of the two is printed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

COLUMNS = ("steps/s", "steps per main s", "steps per cpu s", "setup ms")


class Memory:
    """The memory of a policy that remembers nothing."""

    def __init__(self, count: int) -> None:
        self.nfe = self.plans = np.zeros(count, np.int64)

    def take(self, rows: np.ndarray) -> Memory:
        """Memory of some rows."""
        return Memory(len(rows))

    def put(self, rows: np.ndarray, other: Memory) -> Memory:
        """Itself: nothing changes."""
        return self


class Still:
    """Acts with zeros."""

    def __init__(self, action_dim: int) -> None:
        self.action_dim = action_dim

    def initial_state(self, seeds: Sequence[int]) -> Memory:
        """Memory of as many rows as seeds."""
        return Memory(len(seeds))

    def forget(self, state: Memory, done: np.ndarray, seeds: object = None) -> Memory:
        """The same memory."""
        return state

    def act(self, obs: object, state: Memory, *, deterministic: bool = False) -> object:
        """Zeros, and the same memory."""
        return np.zeros((len(state.nfe), self.action_dim), np.float32), state


def measure(env: str, episodes: int, steps: int, num_envs: int, num_workers: int) -> list[float]:
    """The four figures of one case, in this process."""
    from diffpolicy.rollout.env_spec import EnvSpec, describe
    from diffpolicy.rollout.evaluate import evaluate
    from diffpolicy.rollout.pool.supervisor import Workers

    spec = EnvSpec(env, max_episode_steps=steps)
    policy = Still(describe(spec).action_dim)
    workers = Workers(num_envs=num_envs, num_workers=num_workers)
    main = time.process_time()
    result = evaluate(policy, spec, range(episodes), workers=workers, progress=False)
    main = time.process_time() - main
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = result.summary["steps"]
    both = main + children.ru_utime + children.ru_stime
    setup_ms = 1000 * result.summary.get("setup_s", math.nan)  # not told by older trees
    return [result.summary["steps_per_s"], done / main, done / both, setup_ms]


def main() -> None:
    """Measures every case in every tree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", default="Pendulum-v1")
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--cases", nargs="+", default=["1:0", "8:0", "8:1", "8:2", "64:2"])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        envs, processes = map(int, asked.one.split(":"))
        print(json.dumps(measure(asked.env, asked.episodes, asked.steps, envs, processes)))
        return
    trees = [Path(__file__).resolve().parent.parent, *([asked.against] if asked.against else [])]
    found: dict[tuple[str, Path], list[list[float]]] = {}
    command = [sys.executable, __file__, "--env", asked.env, "--episodes", str(asked.episodes)]
    command += ["--steps", str(asked.steps), "--one"]
    for _ in range(asked.repeats):
        for case in asked.cases:
            for tree in trees:
                path = os.pathsep.join([str(tree), str(tree / "envs")])
                environment = {**os.environ, "PYTHONPATH": path}
                out = subprocess.run(
                    [*command, case], env=environment, stdout=subprocess.PIPE, text=True, check=True
                )
                found.setdefault((case, tree), []).append(json.loads(out.stdout))
    print("envs:processes", *COLUMNS, *(["ratios to the other tree"] if asked.against else []))
    for case in asked.cases:
        medians = [
            [statistics.median(column) for column in zip(*found[case, tree], strict=True)]
            for tree in trees
        ]
        ratios = [a / b for a, b in zip(medians[0], medians[-1], strict=True)]
        shown = [f"{r:.2f}" for r in ratios] if asked.against else []
        print(f"{case:>8}", *(f"{value:10.0f}" for value in medians[0]), *shown)


if __name__ == "__main__":
    main()
