"""Prediction with action beside the plain policy, also where half of the actions are missing.

    python scripts/pad.py [env=diffpolicy_envs:diffpolicy/FetchPush-v0] [demos=40] [steps=1500]
                          [batch_size=128] [seeds=2] [episodes=100] [cpu_s=1500] [runs=runs/pad]
                          [output=pad.json]

Five policies per training seed, of equal steps and batches: `plain` and `pad` on all
demonstrations, `plain_half` and `pad_half` on the first half of them, and `pad_cotrained` on that
half and the other half without its actions. All act on the same episode seeds (300,000 and up);
`pad` also draws what it imagines when acting (`pad_joint`). Cells that are done are read; none is
begun that is expected to take the processor time beyond cpu_s.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffpolicy import DiffusionPolicy, TrainerConfig
from diffpolicy.commands.options import parse
from diffpolicy.data.store import EpisodeStore
from diffpolicy.files import write_json
from diffpolicy.rollout.env_spec import EnvSpec
from diffpolicy.rollout.evaluate import evaluate
from diffpolicy.rollout.intervals import mean_interval, paired_difference
from diffpolicy.rollout.pool.supervisor import Workers
from diffpolicy.rollout.record.experts import collect
from diffpolicy.settings import ConfigError
from diffpolicy.training.identity import machine

DEFAULTS: dict[str, Any] = {
    "env": "diffpolicy_envs:diffpolicy/FetchPush-v0",
    "demos": 40,
    "steps": 1500,
    "batch_size": 128,
    "seeds": 2,
    "episodes": 100,
    "cpu_s": 1500.0,
    "runs": "runs/pad",
    "output": "pad.json",
}
BASE = {"type": "mlp", "width": 256, "depth": 3}
PLAIN = {
    "horizon": 12,
    "n_obs_steps": 1,
    "n_action_steps": 6,
    "process": {"type": "ddpm_cosine"},
    "prediction": "v",
    "network": BASE,
}
PAD = {
    **PLAIN,
    "layout": "joint",
    "imagined": {"field": "obs"},
    "network": {"type": "modalities", "base": BASE, "width": 64},
}
# Name -> spec, demonstrations used (all or the first half), and which store.
ARMS = {
    "plain": (PLAIN, 1, "demos"),
    "pad": (PAD, 1, "demos"),
    "plain_half": (PLAIN, 2, "demos"),
    "pad_half": (PAD, 2, "demos"),
    "pad_cotrained": (PAD, 1, "stripped"),
}
COMPARED = [
    ("pad", "plain"),
    ("pad_joint", "plain"),
    ("pad_half", "plain_half"),
    ("pad_cotrained", "plain_half"),
    ("pad_cotrained", "pad_half"),
]
FIRST_EPISODE, WORKERS = 300_000, Workers(num_envs=10, num_workers=0)


def stores(settings: dict[str, Any], runs: Path) -> dict[str, EpisodeStore]:
    """The demonstrations, and those whose second half has lost its actions."""
    whole, stripped = runs / "demos.zarr", runs / "stripped.zarr"
    spec, count = EnvSpec(settings["env"]), settings["demos"]
    # Some fail; more are tried than needed, and the first that succeed are used.
    store = collect(spec, range(2 * count), whole, noise=0.15, progress=False, workers=WORKERS)
    if store.num_episodes < count:
        raise ConfigError(f"the expert of {spec.id} succeeded {store.num_episodes} times only")
    if not stripped.exists():
        fields = {name: store.fields[name] for name in ("obs", "action")}
        with EpisodeStore.create(stripped, fields, attrs=store.attrs) as target:
            for index in range(count):
                episode = store.episode(index, ["obs", "action"])
                known = index < count // 2
                rows = episode if known else {"obs": episode["obs"]}
                target.append(rows, actions=known)
    return {"demos": store, "stripped": EpisodeStore.open(stripped)}


def cell(settings: dict[str, Any], runs: Path, arm: str, seed: int) -> dict[str, Any]:
    """Train and evaluate one policy; a cell that is done is read."""
    file = runs / arm / f"seed{seed}.json"
    if file.exists():
        return json.loads(file.read_text())  # type: ignore[no-any-return]
    began, clock = time.process_time(), time.perf_counter()
    spec, share, name = ARMS[arm]
    store = stores(settings, runs)[name]
    policy = DiffusionPolicy.from_dataset(store, spec=spec, seed=seed)
    trainer = {"steps": settings["steps"], "batch_size": settings["batch_size"], "lr": 1e-3}
    config = TrainerConfig(**trainer, seed=seed, progress=False)
    most = settings["demos"] // share
    where = runs / arm / f"seed{seed}"
    policy.learn(store, config, where, val_fraction=0.0, max_episodes=most, overwrite=True)
    trained = time.process_time() - began
    ways = {arm: policy}
    if arm == "pad":
        assert policy.spec.imagined is not None
        joint = replace(policy.spec.imagined, predict="joint")
        ways["pad_joint"] = policy.with_settings(imagined=joint)
    episodes = range(FIRST_EPISODE, FIRST_EPISODE + settings["episodes"])
    found: dict[str, Any] = {"train_cpu_s": trained}
    for way, acting in ways.items():
        how: dict[str, Any] = {"workers": WORKERS, "progress": False}
        result = evaluate(acting, EnvSpec(settings["env"]), episodes, **how)
        found[way] = {
            "success": [bool(episode.success) for episode in result.episodes],
            "nfe_per_plan": result.summary["nfe_per_plan"],
        }
    found |= {"cpu_s": time.process_time() - began, "wall_s": time.perf_counter() - clock}
    write_json(file, found)
    return found


def tables(cells: dict[tuple[str, int], dict[str, Any]], seeds: list[int]) -> dict[str, Any]:
    """Success rates per training seed, and differences over all episodes of all of them.

    The intervals are those of episodes: the training seeds are taken as they are.
    """
    names = {way for found in cells.values() for way in found if isinstance(found[way], dict)}
    success = {
        name: np.stack([cells["pad" if name == "pad_joint" else name, s][name]["success"]
                        for s in seeds])
        for name in sorted(names)
    }  # fmt: skip
    return {
        "success": {
            name: {"mean": float(values.mean()), "per_seed": values.mean(1).tolist()}
            for name, values in success.items()
        },
        # Per episode the mean over the training seeds, so that what is compared is independent.
        "differences": {
            f"{a} - {b}": [
                float(v) for v in paired_difference(success[a].mean(0), success[b].mean(0))[:3]
            ]
            for a, b in COMPARED
        },
        "interval": {
            name: [float(v) for v in mean_interval(values.mean(0))[:3]]
            for name, values in success.items()
        },
    }


def main(arguments: list[str]) -> None:
    settings = parse(arguments, (), DEFAULTS)
    runs, spent, longest = Path(settings["runs"]), 0.0, 0.0
    runs.mkdir(parents=True, exist_ok=True)
    cells: dict[tuple[str, int], dict[str, Any]] = {}
    done: list[int] = []
    for seed in range(settings["seeds"]):
        for arm in ARMS:
            if spent + longest > settings["cpu_s"]:
                break
            found = cells[arm, seed] = cell(settings, runs, arm, seed)
            spent, longest = spent + found["cpu_s"], max(longest, found["cpu_s"])
            rates = {
                k: float(np.mean(v["success"])) for k, v in found.items() if isinstance(v, dict)
            }
            print(f"seed {seed}: {rates}, {found['cpu_s']:.0f} s of processor", flush=True)
        if all((arm, seed) in cells for arm in ARMS):
            done.append(seed)
            kept = {f"{arm}/{s}": found for (arm, s), found in cells.items() if s in done}
            answer = {
                "command": " ".join(["python scripts/pad.py", *arguments]),
                "settings": settings,
                "training_seeds": done,
                "cpu_s": sum(found["cpu_s"] for found in kept.values()),
                **tables({k: v for k, v in cells.items() if k[1] in done}, done),
                "cells": kept,
                "machine": machine(torch.device("cpu")),
            }
            write_json(settings["output"], answer)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(__doc__)
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        sys.exit(f"pad: {error}")
