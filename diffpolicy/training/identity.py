"""What a run is: all that its result depends on, as plain values that can be kept and compared.

A resumed run must not go on as something else. So the trainer describes its objective and its
source by what they hold: numbers and names as they are, arrays by a digest of their content,
functions by their code and what they close over. An object that knows better what it is says so
with a method ``identity()``, which returns plain values, arrays or further objects.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import sys
import types
import warnings
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffpolicy.training.settings import MAY_CHANGE, TrainerConfig

DEEPEST = 16  # levels of objects within objects that are looked at
MOST_SHOWN = 12  # differences in one message
LONGEST = 16  # entries that are kept one by one; more of them become a digest
_MODULE_STATE = set(vars(nn.Module())) | {"_compiled_call_impl"}  # of torch, not of the objective
_CODE = f"py{sys.version_info.major}.{sys.version_info.minor}"


def describe(value: Any, *, trained: nn.Module | None = None) -> Any:
    """Plain values that say what ``value`` is.

    Args:
        value: settings, arrays, modules, functions, or objects made of them.
        trained: a module whose weights are restored from the checkpoint; of these only the shapes
            belong to the identity, of all other weights the numbers do.

    Example:
        >>> describe({"lr": 0.1, "rows": torch.arange(100)})
        {'lr': 0.1, 'rows': 'int64 [100] #...'}
    """
    own = set() if trained is None else {id(module) for module in trained.modules()}
    return _Describer(own)(value)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested plain values by dotted names."""
    if isinstance(value, Mapping) and value:
        parts = (flatten(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in value.items())
        return {name: leaf for part in parts for name, leaf in part.items()}
    return {prefix: value}


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two flat identities, one sentence each."""
    out = []
    for name in dict.fromkeys([*saved, *now]):  # in order
        code = name.rpartition(".")[2].startswith("py3")
        if code and (name not in saved or name not in now):
            continue  # another Python compiles the same function to other code
        was, found = (_shown(part[name]) if name in part else "absent" for part in (saved, now))
        if was != found:
            out.append(f"{name} was {was}, is {found}")
    return out


def machine(device: torch.device) -> dict[str, Any]:
    """What rounding depends on: a run that goes on elsewhere may differ in its last bits."""
    return {"threads": torch.get_num_threads(), "device": device.type, "torch": torch.__version__}


class ResumeWarning(UserWarning):
    """A run goes on, but not bit for bit as it would have."""


def check_same_run(saved: Mapping[str, Any], now: Mapping[str, Any], where: object) -> None:
    """Raise unless the run that ``saved`` is of is the one that ``now`` describes.

    Both are what the trainer keeps as ``state.json``. More steps and another learning rate are
    taken, and so is another number of threads, with a warning where the result is not that of a run
    which had them from the start (more steps at a constant rate are exact).

    Raises:
        ValueError: another run, with all that differs, or fewer steps than are done.
    """
    before, after = (_settings(state) for state in (saved, now))
    changed = differences(before, after)
    if saved["config"]["warmup_steps"] == now["config"]["warmup_steps"]:
        changed = [c for c in changed if not c.startswith("warmup_steps")]  # it follows steps
    if "identity" in saved:
        changed += differences(saved["identity"], now["identity"])
    else:
        _warn(
            f"{where} is of an old version: only settings and the number of examples are compared"
        )
    if changed:
        if len(changed) > MOST_SHOWN:
            changed[MOST_SHOWN:] = [f"and {len(changed) - MOST_SHOWN} more"]
        raise ValueError(
            f"{where} cannot go on as another run: {'; '.join(changed)}. Give it what it began "
            "with, or start a new run in another directory"
        )
    done, wanted = saved["step"], now["config"]["steps"]
    if wanted < done:
        raise ValueError(f"{where} has done {done} steps already; steps={wanted} is fewer")
    exact = saved["config"]["lr_schedule"] == "constant" and before == after
    for name in ("lr",) if exact else ("steps", "lr"):
        was, found = saved["config"][name], now["config"][name]
        if was != found:
            _warn(
                f"{where} goes on from step {done} with {name}={found} (it was {was}): from here "
                "on it is not the run that either value gives from the start"
            )
    other = differences(saved.get("machine", now["machine"]), now["machine"])
    if other:
        _warn(f"{where} goes on, but may differ in its last bits: {'; '.join(other)}")


def _settings(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a run must keep of the trainer's settings."""
    config = TrainerConfig(**state["config"])
    values = {k: v for k, v in asdict(config).items() if k not in MAY_CHANGE}
    counts = {"examples": state["examples"], "processes": state["processes"]}
    return {**counts, **values, "warmup_steps": config.warmup}


def _warn(text: str) -> None:
    warnings.warn(text, ResumeWarning, stacklevel=4)


def array_digest(value: Tensor | np.ndarray[Any, Any]) -> str:
    """Dtype, shape and a SHA-256 of the content, shortened to 64 bits."""
    tensor = torch.as_tensor(value).detach()
    flat = tensor.contiguous().cpu().reshape(-1)
    flat = flat.as_strided(flat.shape, (1,))  # a single entry counts as contiguous at any stride
    digest = hashlib.sha256(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype} {list(tensor.shape)} #{digest.hexdigest()[:16]}"


def _shown(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, list | dict) else repr(value)
    if len(text) <= 90:
        return text
    return f"{text[:60]}... #{hashlib.sha256(text.encode()).hexdigest()[:8]}"


class _Describer:
    """The walk through an object; each module is described once."""

    def __init__(self, own: set[int]) -> None:
        self._own = own
        self._within: list[int] = []
        self._modules: set[int] = set()

    def __call__(self, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else repr(value)
        if isinstance(value, Tensor | np.ndarray | np.generic):
            return self._array(value)
        if isinstance(value, Path | torch.device):
            return type(value).__name__  # a place is no content: runs and data may be moved
        if isinstance(value, torch.dtype | Enum | types.ModuleType):
            return str(value)
        if isinstance(value, torch.Generator):
            return {"seed": value.initial_seed()}
        if id(value) in self._within or len(self._within) >= DEEPEST:
            return type(value).__qualname__
        self._within.append(id(value))
        try:
            return self._structure(value)
        finally:
            self._within.pop()

    def _structure(self, value: Any) -> Any:
        if isinstance(value, type):
            return value.__qualname__
        if callable(getattr(value, "identity", None)):
            return self(value.identity())
        if isinstance(value, Mapping):
            return {str(k): self(v) for k, v in value.items()}
        if isinstance(value, Set):
            return _short(sorted((self(v) for v in value), key=repr))
        if isinstance(value, Sequence):
            return _short([self(v) for v in value])
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, functools.partial):
            return {k: self(getattr(value, k)) for k in ("func", "args", "keywords")}
        if isinstance(value, types.MethodType):
            return {"function": value.__qualname__, "of": self(value.__self__)}
        if isinstance(value, types.FunctionType):
            return self._function(value)
        held = getattr(value, "__dict__", {})
        name = getattr(value, "__qualname__", type(value).__qualname__)
        return {"type": name, **{k: self(v) for k, v in held.items()}} if held else name

    def _array(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return array_digest(value)
        array = np.asarray(value)
        if array.dtype.kind in "fiub":
            return array_digest(array)
        return _short([self(v) for v in array.reshape(-1).tolist()])  # strings, objects

    def _module(self, module: nn.Module) -> Any:
        name = type(module).__qualname__
        if id(module) in self._modules:
            return f"{name}, as above"
        self._modules.add(id(module))
        out: dict[str, Any] = {"type": name}
        for key, tensor in {**module._parameters, **module._buffers}.items():
            restored = id(module) in self._own and key not in module._non_persistent_buffers_set
            if tensor is not None:
                out[key] = list(tensor.shape) if restored else array_digest(tensor)
        held = {k: v for k, v in vars(module).items() if k not in _MODULE_STATE}
        return out | {k: self(v) for k, v in {**held, **module._modules}.items()}

    def _function(self, function: types.FunctionType) -> Any:
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        plain = (bool, int, float, str, Tensor, np.ndarray)
        known = {n: function.__globals__.get(n) for n in function.__code__.co_names}
        values = {n: v for n, v in known.items() if isinstance(v, plain) and n[:2] != "__"}
        held = {
            **{name: _contents(cell) for name, cell in cells},
            **values,
            "defaults": function.__defaults__,
            "keywords": function.__kwdefaults__,
        }
        out = {name: self(v) for name, v in held.items() if v is not None}
        return {"function": function.__qualname__, _CODE: _code(function.__code__), **out}


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _code(code: types.CodeType) -> str:
    """A digest of what a function does, wherever it stands."""
    digest = hashlib.sha256(code.co_code)
    digest.update(repr((code.co_names, code.co_varnames, code.co_freevars)).encode())
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            digest.update(_code(constant).encode())
        else:  # the order of a set differs from process to process
            plain = sorted(constant, key=repr) if isinstance(constant, frozenset) else constant
            digest.update(repr(plain).encode())
    return digest.hexdigest()[:16]


def _short(value: list[Any]) -> Any:
    """Many entries as their number and one digest."""
    text = json.dumps(value)
    if len(value) <= LONGEST and len(text) <= 1000:
        return value
    return f"{len(value)} entries #{hashlib.sha256(text.encode()).hexdigest()[:16]}"
