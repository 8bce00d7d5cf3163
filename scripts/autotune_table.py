"""Searched samplers beside those with a name: distance to many steps, and success.

    python scripts/autotune_table.py RUN data=STORE [env=diffpolicy_envs:diffpolicy/FetchPush-v0]
                                     [nfe=[2,4,6]] [episodes=100] [output=autotune.json]

For each number of evaluations `policy.autotune` searches on half of the recorded episodes;
distances are those on the other half. Full sampling (100 steps of DDIM), the best solver with a
name and the searched one then act on the same episodes (seeds 300,000 and up).
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from diffpolicy import DiffusionPolicy
from diffpolicy.commands.options import parse
from diffpolicy.files import write_json
from diffpolicy.policies.spec import PolicySampler
from diffpolicy.rollout.env_spec import EnvSpec
from diffpolicy.rollout.evaluate import evaluate
from diffpolicy.rollout.intervals import mean_interval, paired_difference
from diffpolicy.rollout.pool.supervisor import Workers
from diffpolicy.training.identity import machine

DEFAULTS: dict[str, Any] = {
    "data": "data/fetch_push.zarr",
    "env": "diffpolicy_envs:diffpolicy/FetchPush-v0",
    "nfe": [2, 4, 6],
    "episodes": 100,
    "output": "autotune.json",
}
FIRST_EPISODE, WORKERS = 300_000, Workers(num_envs=25, num_workers=0)


def successes(policy: DiffusionPolicy, settings: dict[str, Any]) -> list[float]:
    """Of the episodes, in their order."""
    episodes = range(FIRST_EPISODE, FIRST_EPISODE + settings["episodes"])
    spec = EnvSpec(settings["env"])
    result = evaluate(policy, spec, episodes, workers=WORKERS, progress=False)
    return [float(episode.success) for episode in result.episodes]


def main(arguments: list[str]) -> None:
    settings = parse(arguments, ("run",), DEFAULTS)
    torch.set_num_threads(1)
    policy = DiffusionPolicy.from_pretrained(settings["run"])
    full = policy.with_settings(sampler=PolicySampler(num_steps=100))
    reference = successes(full, settings)
    table: dict[str, Any] = {}
    for nfe in settings["nfe"]:
        began = time.process_time()
        tuned, report = policy.autotune(settings["data"], nfe)
        print(report.table(), flush=True)
        named = report.named[0].sampler
        ways = {
            "named": policy.with_settings(sampler=PolicySampler(**vars(named))),
            "searched": tuned,
        }
        row = {
            "best_named": report.named[0].name,
            "kept": report.kept.name,
            "distance": {"named": report.named[0].held_out, "searched": report.kept.held_out},
            "without_teleport": report.without_teleport,
            "ratio": report.ratio,
            "search_cpu_s": time.process_time() - began,
        }
        found = {way: successes(acting, settings) for way, acting in ways.items()}
        for way, values in found.items():
            row[way] = {
                "success": mean_interval(values)[:3],
                "minus_full": paired_difference(values, reference)[:3],
            }
        row["minus_named"] = paired_difference(found["searched"], found["named"])[:3]
        print(nfe, row, flush=True)
        table[str(nfe)] = row
        answer = {
            "command": " ".join(["python scripts/autotune_table.py", *arguments]),
            "episodes": settings["episodes"],
            "full": mean_interval(reference)[:3],
            "nfe": table,
            "machine": machine(torch.device("cpu")),
        }
        write_json(settings["output"], answer)


if __name__ == "__main__":
    main(sys.argv[1:])
