"""What one, two, four or ten evaluations buy: plain policies, students, and one-step objectives.

    python scripts/few_evaluations.py [env=diffpolicy_envs:diffpolicy/FetchPush-v0] [demos=60]
                  [steps=1200] [seeds=1] [episodes=40] [nfe=[1,2,4,10]] [arms=[plain, ...]]
                  [runs=runs/few_evaluations] [output=few_evaluations.json]

Every policy has as many training steps of 128 examples: `plain` (flow matching), `plain_v`
(prediction v of a cosine schedule), `meanflow` and `shortcut` all of them; the students `rectified`
and `consistency` the second half, after a flow matching teacher that had the first. All act on the
same episode seeds (300,000 and up), with DDIM (students by consistency: noising anew) in each of
`nfe` steps. Milliseconds a decision are of the processor, so that other work beside it does not
count: one plan of one robot, eager and exported (ONNX Runtime), one thread. What is done is read.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffpolicy import DiffusionPolicy, TrainerConfig
from diffpolicy.commands.options import parse
from diffpolicy.data.store import EpisodeStore
from diffpolicy.files import write_json
from diffpolicy.learn.learning import Learning
from diffpolicy.learn.material import TuningData
from diffpolicy.rollout.env_spec import EnvSpec
from diffpolicy.rollout.evaluate import evaluate
from diffpolicy.rollout.intervals import paired_difference, wilson_interval
from diffpolicy.rollout.pool.supervisor import Workers
from diffpolicy.rollout.record.experts import collect
from diffpolicy.runtime.export import export_policy
from diffpolicy.runtime.exported import load_exported
from diffpolicy.settings import ConfigError, check_choice
from diffpolicy.training.identity import machine

DEFAULTS: dict[str, Any] = {
    "env": "diffpolicy_envs:diffpolicy/FetchPush-v0",
    "demos": 60,
    "steps": 1200,
    "seeds": 1,
    "episodes": 40,
    "nfe": [1, 2, 4, 10],
    "arms": ["plain", "plain_v", "meanflow", "shortcut", "rectified", "consistency"],
    "runs": "runs/few_evaluations",
    "output": "few_evaluations.json",
}
SIZES = {"horizon": 12, "n_obs_steps": 1, "n_action_steps": 6}
SIZES["network"] = {"type": "mlp", "width": 256, "depth": 3}  # type: ignore[assignment]
FLOW = {**SIZES, "process": {"type": "flow"}, "prediction": "velocity"}
STEPS = {**FLOW, "prediction": "mean_velocity", "clip": False}
FROM_SCRATCH: dict[str, tuple[dict[str, Any], Learning]] = {
    "plain": (FLOW, Learning()),
    "plain_v": ({**SIZES, "process": {"type": "ddpm_cosine"}, "prediction": "v"}, Learning()),
    "meanflow": (STEPS, Learning.from_config({"objective": {"type": "meanflow"}})),
    "shortcut": (STEPS, Learning.from_config({"objective": {"type": "shortcut"}})),
}
STUDENTS = ("rectified", "consistency")
TIMED = ("plain", "meanflow")  # the others are the same arithmetic as plain
FIRST_EPISODE, WORKERS, DECISIONS = 300_000, Workers(num_envs=10, num_workers=0), 200


def cloned(
    store: EpisodeStore, arm: str, steps: int, seed: int, settings: dict[str, Any], where: Path
) -> DiffusionPolicy:
    """A policy trained on the demonstrations alone."""
    spec, learning = FROM_SCRATCH[arm]
    policy = DiffusionPolicy.from_dataset(store, spec=spec, seed=seed)
    how = {"max_episodes": settings["demos"], "overwrite": True}
    return policy.learn(
        store, trainer(steps, seed), where, learning=learning, val_fraction=0, **how
    )


def trainer(steps: int, seed: int) -> TrainerConfig:
    """The trainer of every policy."""
    return TrainerConfig(steps=steps, batch_size=128, lr=1e-3, seed=seed, progress=False)


def trained(
    store: EpisodeStore, arm: str, seed: int, settings: dict[str, Any], runs: Path
) -> DiffusionPolicy:
    """The policy of an arm, trained in as many steps as any other."""
    where, steps = runs / arm / f"seed{seed}", settings["steps"]
    if arm not in STUDENTS:
        return cloned(store, arm, steps, seed, settings, where)
    half = runs / "teacher" / f"seed{seed}"
    if (half / "policy").exists():
        teacher = DiffusionPolicy.from_pretrained(half)
    else:
        teacher = cloned(store, "plain", steps // 2, seed, settings, half)
        teacher.save(half / "policy")
    data = TuningData(demonstrations=store, max_episodes=settings["demos"])
    how = {"type": arm}, trainer(steps - steps // 2, seed), where
    return teacher.distill(data, *how, overwrite=True)


def cell(
    store: EpisodeStore, arm: str, seed: int, settings: dict[str, Any], runs: Path
) -> dict[str, Any]:
    """Success of one policy by evaluations, and what its plans cost; one that is done is read."""
    file = runs / arm / f"seed{seed}.json"
    if file.exists():
        return json.loads(file.read_text())  # type: ignore[no-any-return]
    began = time.process_time()
    policy = trained(store, arm, seed, settings, runs)
    found: dict[str, Any] = {"train_cpu_s": time.process_time() - began, "success": {}, "ms": {}}
    episodes = range(FIRST_EPISODE, FIRST_EPISODE + settings["episodes"])
    for nfe in settings["nfe"]:
        acting = policy.with_settings(sampler=replace(policy.spec.sampler, num_steps=nfe))
        how: dict[str, Any] = {"workers": WORKERS, "progress": False}
        result = evaluate(acting, EnvSpec(settings["env"]), episodes, **how)
        found["success"][str(nfe)] = [bool(episode.success) for episode in result.episodes]
        if arm in TIMED:
            found["ms"][str(nfe)] = milliseconds(acting, file.parent / f"exported{nfe}")
    found["cpu_s"] = time.process_time() - began
    write_json(file, found)
    return found


def milliseconds(policy: DiffusionPolicy, folder: Path) -> dict[str, float]:
    """Processor milliseconds of one plan for one robot, the median of many, by how it is run."""
    obs = np.zeros((1, policy.obs_dim), np.float32)
    export_policy(policy, folder, overwrite=True)
    exported = load_exported(folder)
    history, first = obs[:, None], policy.initial_state([0])

    def eager() -> None:
        policy.act(obs, first)

    def deployed() -> None:
        exported.reset()
        exported.plan(history)

    return {"eager": median_ms(eager), "exported": median_ms(deployed)}


def median_ms(decide: Callable[[], None]) -> float:
    """The median of what decisions take of the processor, after a few that warm it up."""
    taken = []
    for number in range(DECISIONS + 10):
        began = time.thread_time()
        decide()
        if number >= 10:
            taken.append(1e3 * (time.thread_time() - began))
    return statistics.median(taken)


def tables(cells: dict[str, list[dict[str, Any]]], nfe: list[int]) -> dict[str, Any]:
    """Rates with Wilson intervals, differences to plain sampling in most steps, and costs.

    Differences are per episode of the mean over the training seeds.
    """
    full = str(max(nfe))
    plain = np.array([found["success"][full] for found in cells["plain"]], float)
    answer: dict[str, Any] = {}
    for arm, each in cells.items():
        answer[arm] = {"train_cpu_s": statistics.mean(found["train_cpu_s"] for found in each)}
        for key in map(str, nfe):
            values = np.array([found["success"][key] for found in each], float)
            minus = paired_difference(values.mean(0), plain[: len(each)].mean(0))
            answer[arm][key] = {
                "success": wilson_interval(int(values.sum()), values.size)._asdict(),
                "minus_plain": {"value": minus[0], "low": minus[1], "high": minus[2]},
            }
            if arm in TIMED:
                answer[arm][key]["ms"] = {
                    how: statistics.median(found["ms"][key][how] for found in each)
                    for how in ("eager", "exported")
                }
    return answer


def main(arguments: list[str]) -> None:
    settings = parse(arguments, (), DEFAULTS)
    torch.set_num_threads(1)
    for arm in settings["arms"]:
        check_choice("arm", arm, DEFAULTS["arms"])
    if settings["arms"][:1] != ["plain"]:
        raise ConfigError("the first of arms must be plain, which the others are compared with")
    runs, spec = Path(settings["runs"]), EnvSpec(settings["env"])
    tries = range(settings["demos"] + settings["demos"] // 3)  # some fail
    store = collect(spec, tries, runs / "demos.zarr", noise=0.15, progress=False, workers=WORKERS)
    cells: dict[str, list[dict[str, Any]]] = {}
    for seed in range(settings["seeds"]):
        for arm in settings["arms"]:
            found = cell(store, arm, seed, settings, runs)
            cells.setdefault(arm, []).append(found)
            rates = {key: float(np.mean(values)) for key, values in found["success"].items()}
            print(f"{arm}, seed {seed}: {rates}, {found['cpu_s']:.0f} s of processor", flush=True)
            answer = {
                "command": " ".join(["python scripts/few_evaluations.py", *arguments]),
                "settings": settings,
                "policies": tables(cells, settings["nfe"]),
                "cells": cells,
                "machine": machine(torch.device("cpu")),
            }
            write_json(settings["output"], answer)  # after each, so that one that was stopped tells


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(__doc__)
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        sys.exit(f"few_evaluations: {error}")
