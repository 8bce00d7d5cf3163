"""LeRobot's diffusion policies: a directory of JSON and safetensors files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffpolicy.data.normalize import Mode, Normalizer
from diffpolicy.networks import from_lerobot_state_dict
from diffpolicy.policies.foreign.common import (
    ForeignPolicy,
    diffusion_settings,
    imported,
    read_json,
    read_tensors,
    refuse_unless,
)

STATE, ENV, ACTION = "observation.state", "observation.environment_state", "action"
_TYPES = {STATE: "STATE", ENV: "ENV", ACTION: "ACTION"}
# Two statistics that become -1 and 1, and our name for the mode.
_ENDS: dict[str, tuple[str, str, Mode]] = {
    "MIN_MAX": ("min", "max", "minmax"),
    "QUANTILES": ("q01", "q99", "quantile"),
    "QUANTILE10": ("q10", "q90", "quantile"),
}
# Where files of before keep a statistic of a feature.
_BUFFER = re.compile(
    r"(?:normalize_inputs|unnormalize_outputs|(?:un)?normalize_targets)\.buffer_(.+)\.([^.]+)"
)
# Published code maps a constant action back to exactly its value, whatever the network says; a
# steep scale does so to a ten-thousandth and stays exact in float32.
_CONSTANT_ACTION_SCALE = 1e4

Statistics = dict[str, dict[str, Tensor]]


def read_lerobot(path: Path) -> ForeignPolicy:
    """Read a LeRobot diffusion policy without cameras.

    Args:
        path: The directory with ``config.json`` and ``model.safetensors``.

    Returns:
        The policy in our terms.

    Raises:
        ValueError: A missing file or setting, cameras, or a setting without an equivalent here.
    """
    config = read_json(path / "config.json")
    refuse_unless("type", config.get("type", "diffusion"), ("diffusion",))
    shapes = _shapes(config)
    tensors = read_tensors(path / "model.safetensors")
    modes, statistics = _normalisation(path, config, tensors)
    solver = config.get("noise_scheduler_type", "DDPM")
    refuse_unless("noise_scheduler_type", solver, ("DDPM", "DDIM"))
    return imported(
        {name.replace("_orig_mod.", ""): value for name, value in tensors.items()},
        "diffusion.unet.",
        from_lerobot_state_dict,
        config,
        "config.json",
        groups=config.get("n_groups", 8),
        normalizer=_normalizer(shapes, modes, statistics),
        obs_dim=sum(size for name, size in shapes.items() if name != ACTION),
        action_dim=shapes[ACTION],
        **diffusion_settings(_scheduler(config), solver.lower(), config.get("num_inference_steps")),
    )


def _shapes(config: Mapping[str, Any]) -> dict[str, int]:
    """Sizes of the observation's parts, in their order, then of the action."""
    inputs = config.get("input_features") or config.get("input_shapes")
    outputs = config.get("output_features") or config.get("output_shapes")
    if not inputs or not outputs or ACTION not in outputs or STATE not in inputs:
        got = f"it has {sorted(inputs or [])} and {sorted(outputs or [])}"
        raise ValueError(f"config.json needs the input {STATE!r}, the output {ACTION!r}; {got}")
    foreign = sorted(set(inputs) - {STATE, ENV})
    if foreign:
        only = f"only policies on {STATE} and {ENV} are supported, not image observations"
        raise ValueError(f"this policy observes {', '.join(foreign)}; {only}")
    sizes = {}
    for name in (STATE, ENV, ACTION):
        entry = inputs.get(name) if name != ACTION else outputs[ACTION]
        if entry is not None:
            shape = entry["shape"] if isinstance(entry, Mapping) else entry
            sizes[name] = int(torch.Size(shape).numel())
    return sizes


def _scheduler(config: Mapping[str, Any]) -> dict[str, Any]:
    schedule = ("beta_schedule", "beta_start", "beta_end")
    names = (*schedule, "prediction_type", "clip_sample", "clip_sample_range")
    count = {"num_train_timesteps": config.get("num_train_timesteps", 100)}
    return count | {name: config[name] for name in names if name in config}


def _normalisation(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, str], Statistics]:
    """Mode and statistics per feature: from buffers in the weights, else from the processors."""
    old: dict[str, Any] = {}
    for side in ("input", "output"):
        old |= config.get(f"{side}_normalization_modes") or {}
    mapping = dict(config.get("normalization_mapping") or {})
    statistics: Statistics = {}
    for file, step in (
        ("policy_preprocessor.json", "normalizer_processor"),
        ("policy_postprocessor.json", "unnormalizer_processor"),
    ):
        for entry in read_json(path / file).get("steps", []) if (path / file).is_file() else []:
            if entry.get("registry_name") == step and entry.get("state_file"):
                mapping.update(entry.get("config", {}).get("norm_map") or {})
                for name, value in read_tensors(path / Path(entry["state_file"]).name).items():
                    feature, _, statistic = name.rpartition(".")
                    statistics.setdefault(feature, {})[statistic] = value
    flat = {name.replace(".", "_"): name for name in _TYPES}
    for name, value in tensors.items():
        if found := _BUFFER.fullmatch(name):
            statistics.setdefault(flat.get(found[1], found[1]), {})[found[2]] = value
    modes = {
        name: str(old.get(name, mapping.get(kind, "IDENTITY"))).upper()
        for name, kind in _TYPES.items()
    }
    return modes, statistics


def _normalizer(
    shapes: Mapping[str, int], modes: Mapping[str, str], statistics: Statistics
) -> Normalizer:
    parts = {
        name: _affine(name, modes[name], size, statistics.get(name, {}))
        for name, size in shapes.items()
    }
    observed = [part for name, part in parts.items() if name != ACTION]
    kinds = {mode for mode, _, _ in observed}
    # Of a mixture only one thing matters to us: it is not bounded by [-1, 1].
    mode: Mode = kinds.pop() if len(kinds) == 1 else "gaussian"
    return Normalizer(
        {"obs": mode, "action": parts[ACTION][0]},
        {"obs": torch.cat([scale for _, scale, _ in observed]), "action": parts[ACTION][1]},
        {"obs": torch.cat([offset for _, _, offset in observed]), "action": parts[ACTION][2]},
    )


def _affine(
    name: str, mode: str, size: int, statistics: Mapping[str, Tensor]
) -> tuple[Mode, Tensor, Tensor]:
    """Mode, scale [size] and offset [size] of one feature."""
    refuse_unless(f"normalization of {name}", mode, ("MEAN_STD", "IDENTITY", *_ENDS))
    if mode == "IDENTITY":
        return "identity", torch.ones(size), torch.zeros(size)
    needed = ("mean", "std") if mode == "MEAN_STD" else _ENDS[mode][:2]
    missing = [statistic for statistic in needed if statistic not in statistics]
    if missing:
        raise ValueError(
            f"no {' and '.join(missing)} of {name} in model.safetensors (normalize_inputs.*) or "
            "beside policy_preprocessor.json: the policy cannot act"
        )
    first, second = (statistics[s].detach().double().flatten() for s in needed)
    if {first.numel(), second.numel()} != {size}:
        raise ValueError(f"the statistics of {name} have another size than its shape [{size}]")
    steep = _CONSTANT_ACTION_SCALE if name == ACTION else 1.0
    width = second if mode == "MEAN_STD" else (second - first) / 2
    scale = torch.where(width > 0, 1 / width.clamp_min(1e-30), steep)
    if mode == "MEAN_STD":
        return "gaussian", scale.float(), (-first * scale).float()
    return _ENDS[mode][2], scale.float(), (-1 - first * scale).float()
