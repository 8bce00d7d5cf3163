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
from diffpolicy.policies.diffusion import PolicySpec
from diffpolicy.policies.foreign import unpickle
from diffpolicy.policies.foreign.common import (
    ForeignPolicy,
    diffusion_settings,
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
    state = {n.removeprefix("model."): v for n, v in tensors.items() if n.startswith("model.")}
    where = "the checkpoint's policy"
    horizon = require(policy, "horizon", where)
    network, weights = from_diffusion_policy_state_dict(
        state, horizon=horizon, n_groups=model.get("n_groups", 8)
    )
    scheduler = dict(require(policy, "noise_scheduler", where))
    kind = str(scheduler.pop("_target_", "DDPMScheduler")).rpartition(".")[2]
    refuse_unless("noise_scheduler", kind, ("DDPMScheduler", "DDIMScheduler"))
    spec = PolicySpec(
        obs_dim=require(policy, "obs_dim", where),
        action_dim=require(policy, "action_dim", where),
        horizon=horizon,
        n_obs_steps=require(policy, "n_obs_steps", where),
        n_action_steps=require(policy, "n_action_steps", where),
        network=network,
        **diffusion_settings(
            scheduler,
            "ddpm" if kind == "DDPMScheduler" else "ddim",
            policy.get("num_inference_steps"),
            eta=policy.get("eta") or 0.0,
        ),
    )
    prefixed = {f"network.{name}": value for name, value in weights.items()}
    sizes = {"obs": spec.obs_dim, "action": spec.action_dim}
    return ForeignPolicy(spec, prefixed, _normalizer(tensors, sizes))


def extract(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of a ``.ckpt``, by the restricted reader in its own process.

    Raises:
        ValueError: The reader refused the file or did not finish.
    """
    with tempfile.TemporaryDirectory() as folder:
        # By path and isolated: the reader needs neither this package nor the caller's environment.
        command = [sys.executable, "-I", str(Path(unpickle.__file__)), str(path), folder]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired:
            raise ValueError(f"reading {path} took over {_TIMEOUT:.0f} s; given up") from None
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise ValueError(f"{path} cannot be imported: {lines[-1]}")
        return (
            read_json(Path(folder) / unpickle.CONFIG),
            read_tensors(Path(folder) / unpickle.TENSORS),
        )


def _check_policy(policy: Mapping[str, Any]) -> None:
    target = str(policy.get("_target_", "")).rpartition(".")[2]
    if target != "DiffusionUnetLowdimPolicy":
        raise ValueError(
            f"this checkpoint holds a {target or 'policy of unknown class'}; only "
            "DiffusionUnetLowdimPolicy (1-D U-Net, low-dimensional observations) can be imported, "
            "not image, hybrid or transformer policies"
        )
    for name, wanted in (
        ("obs_as_global_cond", True),
        ("obs_as_local_cond", False),
        ("pred_action_steps_only", False),
        ("oa_step_convention", True),
    ):
        refuse_unless(name, bool(policy.get(name, False)), (wanted,))


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
            raise ValueError(
                f"the checkpoint's normaliser of {field!r} has {wrong.pop()} dimensions, its "
                f"config says {size}"
            )
        full = {n: v.detach().float().flatten().expand(size).clone() for n, v in part.items()}
        scales[field], offsets[field] = full["scale"], full["offset"]
        modes[field] = _mode(full)
    return Normalizer(modes, scales, offsets)


def _mode(part: Mapping[str, Tensor]) -> Mode:
    """``minmax`` exactly when the recorded data end up in [-1, 1], which is what clipping needs."""
    scale, offset = part["scale"], part["offset"]
    if bool((scale == 1).all() & (offset == 0).all()):
        bounded: Mode = "identity"
    else:
        bounded = "gaussian"
    names = ("input_stats.min", "input_stats.max")
    if any(name not in part for name in names):
        return bounded
    ends = torch.stack([part[name] * scale + offset for name in names])
    return "minmax" if bool((ends.abs() <= 1 + 1e-3).all()) else bounded
