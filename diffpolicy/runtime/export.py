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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffpolicy.extras import need
from diffpolicy.files import foreign_files, replaced_directory
from diffpolicy.policies.base import Array
from diffpolicy.policies.diffusion import DiffusionPlanner
from diffpolicy.policies.guided import check_closed_form
from diffpolicy.runtime.backends import OPSET, to_onnx
from diffpolicy.runtime.compile import TOLERANCE, check_close
from diffpolicy.runtime.deployed import DeployedLoop, deployed_kinds, deployed_loop
from diffpolicy.runtime.exported import CONTRACT, FORMAT, VERSIONS, checksum, cpu_session
from diffpolicy.runtime.ports import Port
from diffpolicy.settings import check_range

TRIALS = 3
_LOOP = ("nfe", "draws", "start_level", "carries", "max_shift")  # what is told of a loop

_FIXED = (
    "this network has no free number of rows; export it with dynamic_batch=false; other numbers "
    "of rows are then cut and padded"
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
        max_error: largest absolute difference of normalised plans from eager PyTorch.
    """

    path: Path
    contract: Mapping[str, Any]
    max_error: float


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

    The files are compared with eager PyTorch on random inputs by ONNX Runtime. The directory
    appears whole or not at all.

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
        ImportError: the package ``onnx`` or ``onnxruntime`` is missing.
    """
    target = Path(output)
    check_range("[1, inf)", batch_size=batch_size)
    check_range("(0, inf)", rate_hz=rate_hz)
    _check_exportable(planner)
    _check_replaceable(target, overwrite)
    need("onnxruntime")  # before minutes are spent
    with replaced_directory(target, owned=_files_of(target)) as scratch:
        loops: dict[str, dict[str, Any]] = {}
        for kind in deployed_kinds(planner):
            how = {"deterministic": deterministic, "dynamic": dynamic_batch}
            deployed, model = _traced(planner, kind, batch_size, **how)
            (scratch / f"{kind}.onnx").write_bytes(model)
            error = _verify(deployed, model, batch_size, dynamic=dynamic_batch)
            loops[kind] = _loop_entry(deployed, kind, model, error, batch_size, dynamic_batch)
        batch = {"size": batch_size, "dynamic": dynamic_batch}
        contract = _contract(planner, loops, batch, rate_hz)
        (scratch / CONTRACT).write_text(json.dumps(contract, indent=2) + "\n", encoding="utf-8")
    return ExportResult(target, contract, max(loop["max_error"] for loop in loops.values()))


def _check_exportable(planner: DiffusionPlanner) -> None:
    if not isinstance(planner, DiffusionPlanner):
        raise ValueError(f"{type(planner).__name__} cannot be exported; export what it wraps")
    if planner.layout.pinned or planner.spec.selection is not None:
        raise ValueError(
            "an exported file makes one plan given observations; plans that begin with them or are "
            "chosen by a critic run from the policy's directory (`diffpolicy serve`, compile())"
        )
    check_closed_form(planner)
    if planner.device.type != "cpu":
        raise ValueError(f"export from the CPU (device='cpu'), not from {planner.device}")


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists; give another output, or overwrite=true to replace it")
    foreign = next(foreign_files(target, _files_of(target)), None) if target.exists() else None
    if foreign is not None:
        raise ValueError(f"{target} is not an export: it holds other files, such as {foreign}")


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
        deployed = deployed_loop(planner, kind, deterministic=deterministic)
        return deployed, _trace(deployed, batch, dynamic=dynamic)
    except (RuntimeError, ValueError):  # of the exporter, or of networks with fixed rows
        deployed = deployed_loop(planner, kind, deterministic=deterministic, roll=False)
        return deployed, _trace(deployed, batch, dynamic=dynamic)


def _trace(deployed: DeployedLoop, batch: int, *, dynamic: bool) -> bytes:
    takes, makes = ([port.name for port in ports] for ports in (deployed.ports, deployed.made))
    every = [*deployed.ports, *deployed.made] if dynamic else []
    free = {port.name: {port.axes.index("batch"): "batch"} for port in every}
    try:
        return to_onnx(deployed, deployed.example(batch), takes, makes, dynamic=free)
    except RuntimeError as error:  # the exporter's own errors derive from it
        if not dynamic:
            raise
        raise ValueError(f"{_FIXED} ({str(error).splitlines()[0]})") from error


def _verify(deployed: DeployedLoop, model: bytes, batch: int, *, dynamic: bool) -> float:
    """Largest difference of plans from eager.

    Plans are compared with eager's, actions with what the policy itself makes of those plans.
    """
    session = cpu_session(model, torch.get_num_threads())
    worst = 0.0
    for trial in range(TRIALS):
        rows = batch + trial if dynamic else batch
        inputs = deployed.example(rows, seed=100 + trial)
        with torch.inference_mode():
            expected = deployed(*inputs)
        feed = {p.name: value.numpy() for p, value in zip(deployed.ports, inputs, strict=True)}
        try:
            plan, actions, *buffer = session.run(None, feed)
        except Exception as failure:  # a runtime's own exceptions, of any type
            if dynamic and rows != batch:
                raise ValueError(_FIXED) from failure
            raise ValueError(f"the exported file does not run: {failure}") from failure
        for mine, theirs in zip((plan, *buffer), (expected[0], *expected[2:]), strict=True):
            error = check_close(torch.from_numpy(mine), theirs, "the exported file")
            worst = max(worst, error)
        _check_actions(deployed.planner, plan[:, deployed.executed], actions)
    return worst


def _check_actions(planner: DiffusionPlanner, normalised: Array, actions: Array) -> None:
    flat = normalised.reshape(-1, planner.plan_dim)
    expected = planner.to_actions(flat).reshape(actions.shape)
    error = float(np.abs(actions - expected).max())
    if not error <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
        how = "this policy makes them in a way that the export does not know"
        raise ValueError(f"the exported actions differ from the policy's by {error:.2e}: {how}")


def _loop_entry(
    deployed: DeployedLoop, kind: str, model: bytes, error: float | None, batch: int, dynamic: bool
) -> dict[str, Any]:
    def entry(port: Port) -> dict[str, Any]:
        rows = "B" if dynamic else batch
        shape = [rows if axis == "batch" else axis for axis in port.axes]
        return {**port._asdict(), "axes": list(port.axes), "shape": shape}

    return {
        "file": f"{kind}.onnx",
        "sha256": hashlib.sha256(model).hexdigest(),
        "bytes": len(model),
        **{name: getattr(deployed, name) for name in _LOOP},
        "inputs": [entry(port) for port in deployed.ports],
        "outputs": [entry(port) for port in deployed.made],
        "max_error": error,
    }


def _contract(
    planner: DiffusionPlanner,
    loops: Mapping[str, Any],
    batch: Mapping[str, Any],
    rate_hz: float | None,
) -> dict[str, Any]:
    spec, jump = planner.spec, planner._unusual
    sizes = ("obs_dim", "action_dim", "horizon", "n_obs_steps", "n_action_steps")
    versions = {p: importlib.metadata.version(p) for p in ("diffpolicy", "torch", "onnx")}
    by = f"onnxruntime {importlib.metadata.version('onnxruntime')}"
    contract = {
        "format": FORMAT,
        "version": VERSIONS[-1],
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
        "verified": {"by": by, "trials": TRIALS, "tolerance": TOLERANCE},
        "versions": {**versions, "opset": OPSET},
    }
    return {**contract, "checksum": checksum(contract)}
