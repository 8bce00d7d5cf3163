"""From pixels to a plan: what eager PyTorch takes, and what other runtimes take.

    python scripts/image_latency.py [checkpoint=RUN] [json=FILE] [backends=onnxruntime,openvino]
                                    [num_steps=10] [rti_steps=3] [seconds=20] [size=96]

The architecture of `experiment=pusht_image` (or a trained run): two images of 96 x 96 pixels
through a small CNN, an MLP of 3 x 256, DDIM. Batch 1, one thread. The whole loop, its encoder, the
rest, and the rest of a warm loop (RTI) are built under every backend and called in turns. All is
told in processor time, which other programs on the machine hardly touch; read the ratios.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from diffpolicy.api import DiffusionPolicy
from diffpolicy.commands.options import parse
from diffpolicy.config_compose import compose
from diffpolicy.core.sampler import Sampler
from diffpolicy.data.normalize import Normalizer
from diffpolicy.policies.rti import RTI
from diffpolicy.policies.spec import PolicySpec
from diffpolicy.runtime.compile import CompiledLoop

DEFAULTS: dict[str, Any] = {
    "checkpoint": None,
    "json": None,
    "backends": "onnxruntime,openvino",
    "num_steps": 10,
    "rti_steps": 3,
    "seconds": 20.0,
    "size": 96,
}
PARTS = (
    ("cold", "whole"),
    ("warm", "whole"),
    ("cold", "encoder"),
    ("cold", "rest"),
    ("warm", "rest"),
)


def policy_of(options: dict[str, Any]) -> DiffusionPolicy:
    """The trained run, or the experiment's architecture with fresh weights; with warm starts."""
    if options["checkpoint"] is not None:
        policy = DiffusionPolicy.from_pretrained(options["checkpoint"])
    else:
        values, side = compose("train", ["experiment=pusht_image"]), options["size"]
        own = {key: value for key, value in values["policy"].items() if key != "anchors"}
        given = {key: values[key] for key in ("network", "process", "sampler")}
        seen = {
            "agent_pos": {"shape": (2,), "dtype": "float32", "role": "state"},
            "image": {"shape": (side, side, 3), "dtype": "uint8", "role": "image"},
        }
        sizes = {"obs_dim": 2, "action_dim": 2, "observations": seen}
        spec = PolicySpec.from_config({**own, **given, **sizes})
        torch.manual_seed(0)
        parts = {"obs.agent_pos": torch.ones(2), "action": torch.ones(2)}
        zero = {name: torch.zeros_like(one) for name, one in parts.items()}
        normalizer = Normalizer(dict.fromkeys(parts, "minmax"), parts, zero)
        denoiser = spec.make_denoiser()
        with torch.no_grad():  # fresh networks begin with zeros, whose plans agree for no merit
            for weight in denoiser.parameters():
                weight.add_(0.02 * torch.randn_like(weight))
        policy = DiffusionPolicy(spec, denoiser, normalizer)
    return policy.with_settings(
        sampler=Sampler(num_steps=options["num_steps"]),
        rti=RTI(t_start=0.3, num_steps=options["rti_steps"]),
    )


def main(arguments: list[str]) -> int:
    """Build, call in turns, print a table, write JSON."""
    options = parse(arguments, [], DEFAULTS)
    torch.set_num_threads(1)
    policy, names = policy_of(options), ["eager", *options["backends"].split(",")]
    runs: dict[str, CompiledLoop] = {}
    for kind, part in PARTS:
        for name in names:
            loop = policy.loop(kind)
            runs[f"{kind} {part} {name}"] = CompiledLoop(loop, name, 1, threads=1, part=part)
    inputs = {key: run._graph.example(1) for key, run in runs.items()}
    taken: dict[str, list[float]] = {key: [] for key in runs}
    until = time.monotonic() + options["seconds"]
    while time.monotonic() < until or min(map(len, taken.values())) < 20:
        for key, run in runs.items():
            start = time.process_time()
            run._run(*inputs[key])
            taken[key].append(1e3 * (time.process_time() - start))
    rows = []
    print("| loop | part | runtime | NFE | cpu ms, median | times eager | error |")
    for kind, part in PARTS:
        eager = statistics.median(taken[f"{kind} {part} eager"][3:])
        for name in names:
            run, values = runs[f"{kind} {part} {name}"], taken[f"{kind} {part} {name}"][3:]
            nfe, ms = 0 if part == "encoder" else run.nfe, statistics.median(values)
            row = {"loop": kind, "part": part, "runtime": name, "nfe": nfe, "cpu_ms": round(ms, 3)}
            rows.append({**row, "speedup": round(eager / ms, 2), "error": run.error})
            cells = (kind, part, name, nfe, f"{ms:.2f}", f"{eager / ms:.2f}", f"{run.error:.1e}")
            print("| " + " | ".join(map(str, cells)) + " |")
    told = {"command": ["scripts/image_latency.py", *arguments], "calls": len(values), "rows": rows}
    told |= {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
    if options["json"] is not None:
        Path(options["json"]).write_text(json.dumps(told, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
