"""A policy as ONNX files for deployment.

usage: diffpolicy export checkpoint=RUN output=DIR [key=value ...]

Writes the policy's whole sampling loop, with normaliser, warm start and bounds, as ONNX files
(cold.onnx and, with real-time iteration, warm.onnx) and a contract.json that says what goes in and
comes out. The files are compared with eager PyTorch before they are put in place. Needs
`pip install "diffpolicy[onnx]"`; to run an export, NumPy and ONNX Runtime are enough:

    from diffpolicy.runtime.exported import load_exported
    policy = load_exported("DIR")

settings:
    batch_size: 1            # rows per call
    dynamic_batch: false     # leave the number of rows free
    deterministic: false     # the noise-free form of a stochastic solver
    rate_hz: null            # control rate, for the contract
    overwrite: false         # replace an earlier export
    sampler.solver: null     # instead of the policy's
    sampler.num_steps: null
    n_action_steps: null
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from diffpolicy.commands.options import given, parse
from diffpolicy.commands.preflight import check_installed, check_writable

DEFAULTS = {
    "batch_size": 1,
    "dynamic_batch": False,
    "deterministic": False,
    "rate_hz": None,
    "overwrite": False,
    "sampler.solver": None,
    "sampler.num_steps": None,
    "n_action_steps": None,
}


def help_text() -> str:
    """The text of `diffpolicy export --help`: this module's own."""
    return str(__doc__)


def run(arguments: Sequence[str]) -> int:
    """Load, export, report."""
    from diffpolicy.api import DiffusionPolicy
    from diffpolicy.runtime.export import export_policy

    options = parse(arguments, ["checkpoint", "output"], DEFAULTS)
    check_writable(str(options["output"]))
    check_installed(("onnx", "onnxruntime"), "an export")
    sampler = {k: options[f"sampler.{k}"] for k in ("solver", "num_steps")}
    policy = DiffusionPolicy.from_pretrained(
        options["checkpoint"],
        sampler={k: v for k, v in sampler.items() if v is not None},
        **given(options, "n_action_steps"),
    )
    names = ("batch_size", "dynamic_batch", "deterministic", "rate_hz", "overwrite")
    result = export_policy(policy, options["output"], **{name: options[name] for name in names})
    report = {
        "output": str(result.path),
        "loops": {k: v["nfe"] for k, v in result.contract["loops"].items()},
        "max_error": result.max_error,
        "verified": result.contract["verified"],
    }
    print("RESULT " + json.dumps(report))
    return 0
