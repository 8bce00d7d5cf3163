"""What a loop costs as K copies of its network and as one step repeated K times in the graph.

    python scripts/roll_cost.py [json=FILE] [networks=mlp,unet1d_small] [evaluations=3,6,...]
                                [backends=onnxruntime,openvino] [build_s=60] [seconds=2]

Batch 1, one thread. Per network, backend and number of evaluations K both forms are built, then
called in turns, so that a busy machine slows both alike: read the ratio, of medians. All is told in
processor time, which other programs hardly touch. The form of K copies is left out from where it
would take more than `build_s` seconds to build.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benches.latency import NETWORKS, SHAPE
from diffpolicy.commands.options import parse
from diffpolicy.core.sampler import Sampler
from diffpolicy.data.normalize import Normalizer
from diffpolicy.policies.diffusion import DiffusionPlanner
from diffpolicy.policies.plan_loop import PlanLoop
from diffpolicy.policies.spec import PolicySpec
from diffpolicy.runtime import rolled
from diffpolicy.runtime.compile import CompiledLoop
from diffpolicy.runtime.graph import example_inputs

FORMS = {"copies": math.inf, "rolled": 0}
DEFAULTS: dict[str, Any] = {
    "json": None,
    "networks": "mlp,unet1d_small",
    "backends": "onnxruntime,openvino",
    "evaluations": "3,6,10,20,40",
    "build_s": 60.0,
    "seconds": 2.0,
}
HEADER = "| network | runtime | K | build s, copies | rolled | ms a call, copies | rolled | ratio |"


def plain_loop(network: str, evaluations: int) -> PlanLoop:
    """The DDIM loop of an untrained policy of Push-T's shapes."""
    sampler = Sampler(solver="ddim", num_steps=evaluations)
    spec = PolicySpec(**SHAPE, network=NETWORKS[network], sampler=sampler)
    torch.manual_seed(0)
    names = {"obs": spec.obs_dim, "action": spec.action_dim}
    normalizer = Normalizer(
        dict.fromkeys(names, "minmax"),
        {name: torch.ones(size) for name, size in names.items()},
        {name: torch.zeros(size) for name, size in names.items()},
    )
    loop = DiffusionPlanner(spec, spec.make_denoiser(), normalizer).loop("cold")
    assert isinstance(loop, PlanLoop)
    return loop


def cost(network: str, backend: str, evaluations: int, forms: list[str], seconds: float) -> Any:
    """Build times and times of a call of some forms."""
    loop = plain_loop(network, evaluations)
    built, build_s = {}, {}
    for form in forms:
        rolled.ROLL_FROM = FORMS[form]  # type: ignore[assignment]
        began = time.process_time()
        built[form] = CompiledLoop(loop, backend, 1, threads=1)
        build_s[form] = round(time.process_time() - began, 2)
    inputs = example_inputs(loop, 1)
    taken: dict[str, list[float]] = {form: [] for form in built}
    began = time.process_time()
    while time.process_time() - began < seconds or min(map(len, taken.values())) < 5:
        for form, run in built.items():
            start = time.process_time()
            run(*inputs)
            taken[form].append(1e3 * (time.process_time() - start))
    call_ms = {form: statistics.median(values[1:]) for form, values in taken.items()}
    row = {"network": network, "runtime": backend, "nfe": evaluations, "build_cpu_s": build_s}
    return row | {"call_ms": {form: round(value, 3) for form, value in call_ms.items()}}


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    build, call = row["build_cpu_s"], row["call_ms"]
    ratio = f"{call['rolled'] / call['copies']:.2f}" if "copies" in call else "-"
    cells = [row["network"], row["runtime"], row["nfe"]]
    cells += [build.get("copies", "-"), build["rolled"], call.get("copies", "-"), call["rolled"]]
    return f"| {' | '.join(map(str, cells))} | {ratio} |"


def main() -> None:
    """Measures every case and prints the table."""
    asked = parse(sys.argv[1:], [], DEFAULTS)
    torch.set_num_threads(1)
    rows = []
    print(f"{HEADER}\n{'|---' * 8}|")
    for network in asked["networks"].split(","):
        for backend in asked["backends"].split(","):
            per_copy = 0.0
            for evaluations in map(int, str(asked["evaluations"]).split(",")):
                # Building grows a little faster than the number of copies.
                expected = 1.3 * per_copy * evaluations
                forms = ["copies", "rolled"] if expected <= asked["build_s"] else ["rolled"]
                row = cost(network, backend, evaluations, forms, asked["seconds"])
                rows.append(row)
                print(line(row), flush=True)
                if "copies" in forms:
                    per_copy = row["build_cpu_s"]["copies"] / evaluations
                if asked["json"]:
                    Path(asked["json"]).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
