"""Diffusion Policy's ``.ckpt`` files: pickles, read in a process of their own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffpolicy.data.normalize import Mode, Normalizer
from diffpolicy.networks import from_diffusion_policy_state_dict
from diffpolicy.policies.foreign import unpickle
from diffpolicy.policies.foreign.common import (
    ForeignPolicy,
    diffusion_settings,
    imported,
    read_json,
    read_tensors,
    refuse_unless,
    require,
)

_TIMEOUT = 600.0


def read_diffusion_policy(path: Path) -> ForeignPolicy:
    """Read a ``.ckpt`` of ``DiffusionUnetLowdimPolicy`` with global conditioning.

    Args:
        path: The file.

    Returns:
        The policy in our terms, with the averaged weights when the file has them.

    Raises:
        ValueError: Another policy class or format, or a setting without an equivalent here.
    """
    config, tensors = extract(path)
    policy = require(config, "policy", "the checkpoint's config")
    _check_policy(policy)
    model = require(policy, "model", "the checkpoint's policy")
    where = "the checkpoint's policy"
    scheduler = dict(require(policy, "noise_scheduler", where))
    kind = str(scheduler.pop("_target_", "DDPMScheduler")).rpartition(".")[2]
    refuse_unless("noise_scheduler", kind, ("DDPMScheduler", "DDIMScheduler"))
    sizes = {name: require(policy, f"{name}_dim", where) for name in ("obs", "action")}
    solver = "ddpm" if kind == "DDPMScheduler" else "ddim"
    steps, eta = policy.get("num_inference_steps"), policy.get("eta") or 0.0
    return imported(
        tensors,
        "model.",
        from_diffusion_policy_state_dict,
        policy,
        where,
        groups=model.get("n_groups", 8),
        normalizer=_normalizer(tensors, sizes),
        obs_dim=sizes["obs"],
        action_dim=sizes["action"],
        **diffusion_settings(scheduler, solver, steps, eta=eta),
    )


def extract(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of a ``.ckpt``, by the restricted reader in its own process.

    Raises:
        ValueError: The reader refused the file or did not finish.
    """
    with tempfile.TemporaryDirectory() as folder:
        # By path and isolated: the reader needs neither this package nor the caller's environment.
        command = [sys.executable, "-I", str(Path(unpickle.__file__)), str(path), folder]
        options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": _TIMEOUT}
        try:
            done = subprocess.run(command, check=False, **options)
        except subprocess.TimeoutExpired:
            raise ValueError(f"reading {path} took over {_TIMEOUT:.0f} s; given up") from None
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise ValueError(f"{path} cannot be imported: {lines[-1]}")
        made = Path(folder)
        return read_json(made / unpickle.CONFIG), read_tensors(made / unpickle.TENSORS)


def _check_policy(policy: Mapping[str, Any]) -> None:
    target = str(policy.get("_target_", "")).rpartition(".")[2]
    if target != "DiffusionUnetLowdimPolicy":
        held = target or "policy of unknown class"
        only = "only DiffusionUnetLowdimPolicy can be imported"
        raise ValueError(f"this checkpoint holds a {held}; {only}")
    wanted = {"obs_as_global_cond", "oa_step_convention"}
    for name in sorted(wanted | {"obs_as_local_cond", "pred_action_steps_only"}):
        refuse_unless(name, bool(policy.get(name, False)), (name in wanted,))


def _normalizer(tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Normalizer:
    modes: dict[str, Mode] = {}
    scales, offsets = {}, {}
    for field, size in sizes.items():
        prefix = f"normalizer.params_dict.{field}."
        part = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
        if not {"scale", "offset"} <= part.keys():
            raise ValueError(f"the checkpoint has no normaliser for {field!r} ({prefix}scale)")
        wrong = {v.numel() for v in part.values()} - {1, size}
        if wrong:
            what = f"the checkpoint's normaliser of {field!r}"
            raise ValueError(f"{what} has {wrong.pop()} dimensions, its config says {size}")
        full = {n: v.detach().float().flatten().expand(size).clone() for n, v in part.items()}
        scales[field], offsets[field] = full["scale"], full["offset"]
        modes[field] = _mode(full)
    return Normalizer(modes, scales, offsets)


def _mode(part: Mapping[str, Tensor]) -> Mode:
    """``minmax`` exactly when the recorded data end up in [-1, 1], which is what clipping needs."""
    scale, offset = part["scale"], part["offset"]
    same = bool((scale == 1).all() & (offset == 0).all())
    unbounded: Mode = "identity" if same else "gaussian"
    names = ("input_stats.min", "input_stats.max")
    if any(name not in part for name in names):
        return unbounded
    ends = torch.stack([part[name] * scale + offset for name in names])
    return "minmax" if bool((ends.abs() <= 1 + 1e-3).all()) else unbounded
