"""What bounds the time from pixels to a plan on one thread: the convolutions, in every runtime.

    python scripts/image_latency_limits.py [json=FILE] [seconds=20] [num_steps=10] [size=96]

The policy of `image_latency.py`. Timed in turns, in processor time: the encoder of images in eager
PyTorch and its convolutions alone; the same in OpenVINO, whose kernels for them are the same
library's; and encoder and whole loop under each of OpenVINO's own settings, with how far their
answers are from eager PyTorch's.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffpolicy.commands.options import parse
from diffpolicy.runtime.backends import _feed, _graph, _openvino_core
from diffpolicy.runtime.compile import CompiledLoop
from image_latency import DEFAULTS, policy_of

HINTS: dict[str, dict[str, Any]] = {
    "latency": {},  # what policies are compiled with
    "throughput": {"PERFORMANCE_HINT": "THROUGHPUT"},
    "one stream": {"NUM_STREAMS": 1},
    "not pinned": {"ENABLE_CPU_PINNING": False},
    "bf16": {"INFERENCE_PRECISION_HINT": "bf16"},
}


def openvino(module: nn.Module, example: list[torch.Tensor], **options: Any) -> Callable[[], Any]:
    """A call of a module in OpenVINO with further settings."""
    core = _openvino_core()
    model = core.read_model(_graph(module, example))
    usual = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1}
    usual |= {"INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(model, "CPU", usual | options).create_infer_request()
    fed = _feed(example, {name for port in model.inputs for name in port.get_names()})
    return lambda: request.infer(fed, share_inputs=True, share_outputs=True)[0]


def main(arguments: list[str]) -> int:
    """Time in turns, print a table, write JSON."""
    options = parse(arguments, [], {k: v for k, v in DEFAULTS.items() if k != "backends"})
    torch.set_num_threads(1)
    policy = policy_of(options)
    loop, calls, exact = policy.loop("cold"), {}, {}
    eye = policy.denoiser.encoder.eyes[0]
    see = nn.Sequential(eye.backbone, eye.pool.maps).eval()
    pixels = torch.rand(2, 3, 84, 84).contiguous(memory_format=torch.channels_last)
    calls["convolutions", "eager"] = lambda: see(pixels)
    calls["convolutions", "openvino, latency"] = openvino(see, [pixels.contiguous()])
    for part in ("encoder", "whole"):
        eager = CompiledLoop(loop, "eager", 1, threads=1, part=part)
        example = eager._graph.example(1)
        exact[part] = eager._run(*example)
        calls[part, "eager"] = lambda run=eager._run, given=example: run(*given)
        for name, hints in HINTS.items():
            calls[part, f"openvino, {name}"] = openvino(eager._graph, example, **hints)
    taken: dict[Any, list[float]] = {key: [] for key in calls}
    until = time.monotonic() + options["seconds"]
    with torch.inference_mode():
        while time.monotonic() < until or min(map(len, taken.values())) < 20:
            for key, call in calls.items():
                start = time.process_time()
                call()
                taken[key].append(1e3 * (time.process_time() - start))
    rows = []
    print("| part | runtime | cpu ms, median | times eager | error |")
    for part, runtime in calls:
        ms, eager = (statistics.median(taken[part, one][3:]) for one in (runtime, "eager"))
        row: dict[str, Any] = {"part": part, "runtime": runtime, "cpu_ms": round(ms, 3)}
        row["speedup"] = round(eager / ms, 2)
        if part in exact:
            found = torch.as_tensor(calls[part, runtime]())
            row["error"] = float((found - exact[part]).abs().max())
        rows.append(row)
        cells = (part, runtime, f"{ms:.2f}", row["speedup"], f"{row.get('error', 0):.1e}")
        print("| " + " | ".join(map(str, cells)) + " |")
    told = {"command": ["scripts/image_latency_limits.py", *arguments], "rows": rows}
    if options["json"] is not None:
        Path(options["json"]).write_text(json.dumps(told, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
