"""Export a policy for deployment: ONNX files of its whole loops and a JSON contract.

A file holds everything between raw observations and bounded actions: the normaliser, the shifted
and noised last plan, all K network evaluations, and the way back to environment units. Run it with
:mod:`diffpolicy.runtime.exported`, or with any ONNX runtime by the contract.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffpolicy.files import foreign_files, replaced_directory
from diffpolicy.policies.base import Array
from diffpolicy.policies.diffusion import DiffusionPlanner
from diffpolicy.runtime.backends import OPSET, missing, need, to_onnx
from diffpolicy.runtime.compile import TOLERANCE, check_close
from diffpolicy.runtime.deployed import DeployedLoop, Port, deployed_kinds
from diffpolicy.runtime.exported import CONTRACT, FORMAT, VERSION, checksum, cpu_session

Evaluate = Callable[[Mapping[str, Array]], list[Array]]
TRIALS = 3

_FIXED = (
    "this network cannot be exported with a free number of rows; export it with "
    "dynamic_batch=false; other numbers of rows are then cut and padded"
)
WARM_START = (
    "Run the cold file for the first plan of an episode and after every reset. Afterwards run the "
    "warm file: hand back its output (see 'carries') unchanged as the input last_..., and as "
    "'shift' the number of control steps executed since (actions[0] belongs to the step of the "
    "newest observation, so executing k actions means shift = k); the file does the rest. A shift "
    "above 'max_shift' means max_shift for a plan, and a cold start for a buffer. 'noise' is fresh "
    "standard normal noise for every plan. Where 'cold_if_step_exceeds' is given, a row whose "
    "observation changed by more than that between two control steps is planned cold."
)


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote.

    Attributes:
        path: the directory.
        contract: the content of ``contract.json``.
        max_error: largest absolute difference of normalised plans from eager PyTorch; ``None`` if
            nothing at hand could run the files.
    """

    path: Path
    contract: Mapping[str, Any]
    max_error: float | None


def export_policy(
    planner: DiffusionPlanner,
    output: str | os.PathLike[str],
    *,
    batch_size: int = 1,
    dynamic_batch: bool = False,
    deterministic: bool = False,
    rate_hz: float | None = None,
    overwrite: bool = False,
) -> ExportResult:
    """Write a policy as a directory: ``cold.onnx``, ``warm.onnx`` if it has one, ``contract.json``.

    The files are compared with eager PyTorch on random inputs by ONNX Runtime, or by ONNX's own
    reference evaluator where ONNX Runtime is not installed. The directory appears whole or not at
    all.

    Args:
        planner: the policy, on the CPU.
        output: directory to be made.
        batch_size: B.
        dynamic_batch: leave B free; ``batch_size`` is then only what it was traced with.
        deterministic: take the noise-free form of a stochastic solver.
        rate_hz: control rate that the policy is meant for, for the contract.
        overwrite: replace an earlier export in ``output``.

    Raises:
        ValueError: settings out of range, a policy on another device, an ``output`` that exists, or
            files that differ from eager PyTorch by more than 1e-4 (a single step from pure noise
            can, where the process leaves next to no signal there: rounding is divided by it).
        ImportError: the package ``onnx`` is missing.
    """
    target = Path(output)
    _check_request(planner, target, batch_size, rate_hz, overwrite)
    with replaced_directory(target, owned=_files_of(target)) as scratch:
        loops: dict[str, dict[str, Any]] = {}
        for kind in deployed_kinds(planner):
            deployed, model = _traced(
                planner, kind, batch_size, deterministic=deterministic, dynamic=dynamic_batch
            )
            (scratch / f"{kind}.onnx").write_bytes(model)
            error = _verify(planner, deployed, model, batch_size, dynamic=dynamic_batch)
            loops[kind] = _loop_entry(deployed, kind, model, error, batch_size, dynamic_batch)
        batch = {"size": batch_size, "dynamic": dynamic_batch}
        contract = _contract(planner, loops, batch, rate_hz)
        text = json.dumps(contract, indent=2) + "\n"
        (scratch / CONTRACT).write_text(text, encoding="utf-8")
    errors = [loop["max_error"] for loop in loops.values()]
    return ExportResult(target, contract, None if None in errors else max(errors))


def _check_request(
    planner: DiffusionPlanner, target: Path, batch_size: int, rate_hz: float | None, overwrite: bool
) -> None:
    if not isinstance(planner, DiffusionPlanner):
        raise ValueError(
            f"{type(planner).__name__} cannot be exported: only policies whose plans are one graph "
            "of their inputs can (diffusion, with rti, truncated, streaming); export the policy "
            "that it wraps"
        )
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")
    if planner.spec.layout != "action" or planner.spec.selection is not None:
        raise ValueError(
            "an exported file holds one plan of actions; a policy whose plans hold observations, "
            "or are chosen by a critic, runs from its directory (`diffpolicy serve`, compile())"
        )
    if rate_hz is not None and not rate_hz > 0:
        raise ValueError(f"rate_hz must be positive (or absent), got {rate_hz!r}")
    if planner.device.type != "cpu":
        raise ValueError(
            f"policies are exported from the CPU, this one is on {planner.device}; load it with "
            "device='cpu'"
        )
    if not target.exists():
        return
    if not overwrite:
        raise ValueError(f"{target} exists; give another output, or overwrite=true to replace it")
    foreign = next(foreign_files(target, _files_of(target)), None)
    if foreign is not None:
        raise ValueError(
            f"{target} is not an export: it holds other files ({foreign}) and is not replaced"
        )


def _files_of(export: Path) -> set[str]:
    """The files of an earlier export, by its contract."""
    try:
        contract = json.loads((export / CONTRACT).read_bytes())
        loops = contract["loops"] if contract["format"] == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {CONTRACT, *(f"{kind}.onnx" for kind in loops)}


def _traced(
    planner: DiffusionPlanner, kind: str, batch: int, *, deterministic: bool, dynamic: bool
) -> tuple[DeployedLoop, bytes]:
    """A loop and its graph, which holds the step once where that pays and the network allows it."""
    try:
        deployed = DeployedLoop(planner, kind, deterministic=deterministic).eval()
        return deployed, _trace(deployed, batch, dynamic=dynamic)
    except (RuntimeError, ValueError):  # of the exporter, or of networks with fixed rows
        deployed = DeployedLoop(planner, kind, deterministic=deterministic, roll=False).eval()
        return deployed, _trace(deployed, batch, dynamic=dynamic)


def _trace(deployed: DeployedLoop, batch: int, *, dynamic: bool) -> bytes:
    example = deployed.example(batch)
    names = [port.name for port in deployed.outputs()]
    if not dynamic:
        return to_onnx(deployed, example, deployed.names, names)
    free = {port.name: {port.axes.index("batch"): "batch"} for port in deployed.inputs()}
    free.update({name: {0: "batch"} for name in names})
    try:
        return to_onnx(deployed, example, deployed.names, names, dynamic=free)
    except RuntimeError as error:  # the exporter's own errors derive from it
        raise ValueError(f"{_FIXED} ({str(error).splitlines()[0]})") from error


def _verify(
    planner: DiffusionPlanner, deployed: DeployedLoop, model: bytes, batch: int, *, dynamic: bool
) -> float | None:
    """Largest difference of plans from eager, ``None`` if nothing can run the file.

    Plans are compared with eager's, actions with what the policy itself makes of those plans.
    """
    verifier = _verifier()
    if verifier is None:
        return None
    evaluate = _evaluator(model, verifier)
    worst = 0.0
    for trial in range(TRIALS):
        rows = batch + trial if dynamic else batch
        inputs = deployed.example(rows, seed=100 + trial)
        with torch.inference_mode():
            expected = deployed(*inputs)
        try:
            pairs = zip(deployed.names, (i.numpy() for i in inputs), strict=True)
            got = evaluate(dict(pairs))
        except Exception as failure:  # a runtime's own exceptions, of any type
            if dynamic and rows != batch:
                raise ValueError(_FIXED) from failure
            raise ValueError(f"the exported file does not run: {failure}") from failure
        plan, actions = got[:2]
        for mine, theirs in ((plan, expected[0]), *zip(got[2:], expected[2:], strict=True)):
            error = check_close(torch.from_numpy(mine), theirs, "the exported file")
            worst = max(worst, error)
        _check_actions(planner, plan[:, deployed.executed], actions)
    return worst


def _check_actions(planner: DiffusionPlanner, normalised: Array, actions: Array) -> None:
    flat = normalised.reshape(-1, planner.action_dim)
    expected = planner.to_actions(flat).reshape(normalised.shape)
    error = float(np.abs(actions - expected).max())
    if not error <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise ValueError(
            f"the exported file's actions differ from the policy's by {error:.2e}; this policy "
            "makes actions of its plans in a way that the export does not know"
        )


def _verifier() -> str | None:
    """The package that runs the files for comparison; ``None``: nothing here can."""
    if not missing("onnxruntime"):
        return "onnxruntime"
    try:
        need("onnx.reference", "onnx")
    except ImportError:
        return None
    return "onnx.reference"


def _evaluator(model: bytes, verifier: str) -> Evaluate:
    if verifier == "onnxruntime":
        session = cpu_session(model, torch.get_num_threads())
        return lambda feed: list(session.run(None, feed))
    loaded = need("onnx", "onnx").load_from_string(model)
    reference = need("onnx.reference", "onnx").ReferenceEvaluator(loaded)
    return lambda feed: list(reference.run(None, dict(feed)))


def _loop_entry(
    deployed: DeployedLoop, kind: str, model: bytes, error: float | None, batch: int, dynamic: bool
) -> dict[str, Any]:
    core = deployed.core

    def entry(port: Port) -> dict[str, Any]:
        shape = [
            "B" if a == "batch" and dynamic else batch if a == "batch" else a for a in port.axes
        ]
        return {**port._asdict(), "axes": list(port.axes), "shape": shape}

    return {
        "file": f"{kind}.onnx",
        "sha256": hashlib.sha256(model).hexdigest(),
        "bytes": len(model),
        "nfe": core.nfe,
        "draws": core.draws,
        "start_level": core.start_level,
        "carries": core.carries,
        "max_shift": core.max_shift,
        "inputs": [entry(port) for port in deployed.inputs()],
        "outputs": [entry(port) for port in deployed.outputs()],
        "max_error": error,
    }


def _contract(
    planner: DiffusionPlanner,
    loops: Mapping[str, Any],
    batch: Mapping[str, Any],
    rate_hz: float | None,
) -> dict[str, Any]:
    spec, verifier, jump = planner.spec, _verifier(), planner._unusual
    sizes = ("obs_dim", "action_dim", "horizon", "n_obs_steps", "n_action_steps")
    versions = {p: importlib.metadata.version(p) for p in ("diffpolicy", "torch", "onnx")}
    verified = None
    if verifier is not None:
        version = importlib.metadata.version(verifier.partition(".")[0])
        verified = {"by": f"{verifier} {version}", "trials": TRIALS, "tolerance": TOLERANCE}
    contract = {
        "format": FORMAT,
        "version": VERSION,
        "policy": {**{name: getattr(planner, name) for name in sizes}, "env_id": spec.env_id},
        "rate_hz": rate_hz,
        "batch": dict(batch),
        "actions": {
            "unit": "environment",
            "low": None if spec.action_low is None else list(spec.action_low),
            "high": None if spec.action_high is None else list(spec.action_high),
        },
        "loops": dict(loops),
        "cold_if_step_exceeds": None if jump is None else jump.tolist(),
        "warm_start": WARM_START if "warm" in loops else None,
        "verified": verified,
        "versions": {**versions, "opset": OPSET},
    }
    return {**contract, "checksum": checksum(contract)}
