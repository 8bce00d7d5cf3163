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
from diffpolicy.data.observation import ObsField
from diffpolicy.networks import from_diffusion_policy_state_dict
from diffpolicy.policies.foreign import unpickle
from diffpolicy.policies.foreign.cameras import IMAGENET, Eye, Sight, cameras_of, image_field
from diffpolicy.policies.foreign.common import (
    ForeignPolicy,
    diffusion_settings,
    imported,
    read_json,
    read_tensors,
    refuse_unless,
    require,
    under,
)

POLICIES = (
    "DiffusionUnetLowdimPolicy",
    "DiffusionUnetHybridImagePolicy",
    "DiffusionUnetImagePolicy",
)
_TIMEOUT = 600.0


def read_diffusion_policy(path: Path) -> ForeignPolicy:
    """Read a ``.ckpt`` of one of ``POLICIES`` with global conditioning.

    Args:
        path: The file.

    Returns:
        The policy in our terms, with the averaged weights when the file has them.

    Raises:
        ValueError: Another policy class or format, or a setting without an equivalent here.
    """
    config, tensors = extract(path)
    policy = require(config, "policy", "the checkpoint's config")
    where = "the checkpoint's policy"
    kind = _check_policy(policy)
    scheduler = dict(require(policy, "noise_scheduler", where))
    scheduler_kind = str(scheduler.pop("_target_", "DDPMScheduler")).rpartition(".")[2]
    refuse_unless("noise_scheduler", scheduler_kind, ("DDPMScheduler", "DDIMScheduler"))
    solver = "ddpm" if scheduler_kind == "DDPMScheduler" else "ddim"
    steps, eta = policy.get("num_inference_steps"), policy.get("eta") or 0.0
    observed: dict[str, Any] = {}
    if kind == POLICIES[0]:
        unet = require(policy, "model", where)
        sizes = {name: require(policy, f"{name}_dim", where) for name in ("obs", "action")}
        observed["obs_dim"] = sizes["obs"]
    else:
        unet, meta = policy, require(policy, "shape_meta", where)
        observed["sight"] = sight = _sight(kind, policy, meta, tensors)
        vectors = {n: f.size for n, f in sight.observations.items() if not f.is_image}
        observed["obs_dim"] = sum(vectors.values())
        sizes = {**vectors, "action": int(meta["action"]["shape"][0])}
    return imported(
        tensors,
        "model.",
        from_diffusion_policy_state_dict,
        policy,
        where,
        groups=unet.get("n_groups", 8),
        normalizer=_normalizer(tensors, sizes, named=kind != POLICIES[0]),
        action_dim=sizes["action"],
        **observed,
        **diffusion_settings(scheduler, solver, steps, eta=eta),
    )


def _sight(
    kind: str, policy: Mapping[str, Any], meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Sight:
    """The cameras of an image policy: robomimic's encoder, or ``MultiImageObsEncoder``."""
    fields, types = {}, {}
    for name, entry in require(meta, "obs", "shape_meta").items():
        types[name] = entry.get("type", "low_dim")
        refuse_unless(f"type of {name}", types[name], ("rgb", "low_dim"))
        image = types[name] == "rgb"
        fields[name] = image_field(entry["shape"]) if image else ObsField(tuple(entry["shape"]))
    cameras = [name for name, what in types.items() if what == "rgb"]
    order, shared, normalise, options = list(types), False, False, policy
    if kind == POLICIES[1]:
        eyes = {name: _robomimic_eye(tensors, name) for name in cameras}
    else:
        options = require(policy, "obs_encoder", "the checkpoint's policy")
        shared, normalise = (bool(options.get(k)) for k in ("share_rgb_model", "imagenet_norm"))
        prefix = "obs_encoder.key_model_map."
        eyes = {n: Eye(under(tensors, f"{prefix}{'rgb' if shared else n}.")) for n in cameras}
        order = sorted(cameras) + sorted(set(types) - set(cameras))
        sizes = [list(fields[name].shape[:2]) for name in cameras]
        refuse_unless("resize_shape", options.get("resize_shape"), (None, *sizes))
    crop = options.get("crop_shape")
    if isinstance(crop, Mapping):
        each = [list(crop[name]) for name in cameras]
        refuse_unless("crop_shape", each, ([each[0]] * len(each),))
        crop = each[0]
    pixels = {name: _pixels(tensors, name, normalise) for name in cameras}
    parts = [(name, 0 if name in cameras else fields[name].size) for name in order]
    return cameras_of(eyes, fields, pixels, crop, parts, shared=shared)


def _robomimic_eye(tensors: Mapping[str, Tensor], name: str) -> Eye:
    """A ``VisualCore``: ResNet-18, spatial softmax, a linear layer, and the encoder's ReLU."""
    core = under(tensors, f"obs_encoder.obs_nets.{name}.")
    maps, head = under(core, "pool.nets."), under(core, "nets.3.")
    if not ({"weight", "bias"} <= maps.keys() & head.keys()):
        raise ValueError(
            f"camera {name!r} is not seen by a VisualCore with SpatialSoftmax and a linear layer; "
            f"it has {sorted(core)[:3]}"
        )
    heat = float(core.get("pool.temperature", torch.ones(1)))
    return Eye(
        under(core, "backbone.nets."),
        (maps["weight"] / heat, maps["bias"] / heat),
        (head["weight"], head["bias"]),
    )


def _pixels(tensors: Mapping[str, Tensor], name: str, normalise: bool) -> dict[str, list[float]]:
    """Mean and standard deviation of [0, 1] that a camera's pictures are normalised by."""
    part = _affine(tensors, name, 3)
    mean, std = (torch.tensor(IMAGENET[key]) for key in ("mean", "std"))
    if not normalise:
        mean, std = torch.zeros(3), torch.ones(3)
    scale, offset = part["scale"], part["offset"]
    values = {"mean": (mean - offset) / scale, "std": std / scale}
    return {key: [round(float(v), 7) for v in value] for key, value in values.items()}


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


def _check_policy(policy: Mapping[str, Any]) -> str:
    target = str(policy.get("_target_", "")).rpartition(".")[2]
    if target not in POLICIES:
        held = target or "policy of unknown class"
        raise ValueError(
            f"this checkpoint holds a {held}; only {', '.join(POLICIES)} can be imported"
        )
    usual, wanted = {"obs_as_global_cond"}, {"obs_as_global_cond"}
    if target == POLICIES[0]:
        usual, wanted = set(), {"obs_as_global_cond", "oa_step_convention"}
    for name in sorted(wanted | {"obs_as_local_cond", "pred_action_steps_only"}):
        refuse_unless(name, bool(policy.get(name, name in usual)), (name in wanted,))
    return target


def _normalizer(
    tensors: Mapping[str, Tensor], sizes: Mapping[str, int], *, named: bool
) -> Normalizer:
    modes: dict[str, Mode] = {}
    scales, offsets = {}, {}
    for name, size in sizes.items():
        full = _affine(tensors, name, size)
        field = f"obs.{name}" if named and name != "action" else name
        scales[field], offsets[field] = full["scale"], full["offset"]
        modes[field] = _mode(full)
    return Normalizer(modes, scales, offsets)


def _affine(tensors: Mapping[str, Tensor], field: str, size: int) -> dict[str, Tensor]:
    """Scale, offset and statistics of one field, each ``[size]``."""
    prefix = f"normalizer.params_dict.{field}."
    part = under(tensors, prefix)
    if not {"scale", "offset"} <= part.keys():
        raise ValueError(f"the checkpoint has no normaliser for {field!r} ({prefix}scale)")
    wrong = {v.numel() for v in part.values()} - {1, size}
    if wrong:
        what = f"the checkpoint's normaliser of {field!r}"
        raise ValueError(f"{what} has {wrong.pop()} dimensions, its config says {size}")
    return {n: v.detach().float().flatten().expand(size).clone() for n, v in part.items()}


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
