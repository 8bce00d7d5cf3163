"""LeRobot's diffusion policies: a directory of JSON and safetensors files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffpolicy.data.normalize import Mode, Normalizer
from diffpolicy.data.observation import ObsField
from diffpolicy.networks import from_lerobot_state_dict
from diffpolicy.policies.foreign.cameras import Eye, Sight, cameras_of, image_field
from diffpolicy.policies.foreign.common import (
    ForeignPolicy,
    diffusion_settings,
    imported,
    read_json,
    read_tensors,
    refuse_unless,
    under,
)

STATE, ENV, ACTION = "observation.state", "observation.environment_state", "action"
_IMAGE = re.compile(r"observation\.images?(?:[._](.+))?")
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
    """Read a LeRobot diffusion policy.

    Args:
        path: The directory with ``config.json`` and ``model.safetensors``.

    Returns:
        The policy in our terms.

    Raises:
        ValueError: A missing file or setting, or a setting without an equivalent here.
    """
    config = read_json(path / "config.json")
    refuse_unless("type", config.get("type", "diffusion"), ("diffusion",))
    shapes, cameras = _shapes(config)
    tensors = read_tensors(path / "model.safetensors")
    modes, statistics = _normalisation(path, config, tensors, cameras)
    solver = config.get("noise_scheduler_type", "DDPM")
    refuse_unless("noise_scheduler_type", solver, ("DDPM", "DDIM"))
    state = {name.replace("_orig_mod.", ""): value for name, value in tensors.items()}
    sight = _sight(config, shapes, cameras, state, modes, statistics) if cameras else None
    return imported(
        state,
        "diffusion.unet.",
        from_lerobot_state_dict,
        config,
        "config.json",
        groups=config.get("n_groups", 8),
        normalizer=_normalizer(shapes, modes, statistics, "obs.state" if cameras else "obs"),
        sight=sight,
        obs_dim=sum(size for name, size in shapes.items() if name != ACTION),
        action_dim=shapes[ACTION],
        **diffusion_settings(_scheduler(config), solver.lower(), config.get("num_inference_steps")),
    )


def _shapes(config: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, list[int]]]:
    """Sizes of the observation's vectors, in their order, then of the action; cameras' shapes."""
    inputs = config.get("input_features") or config.get("input_shapes")
    outputs = config.get("output_features") or config.get("output_shapes")
    if not inputs or not outputs or ACTION not in outputs or STATE not in inputs:
        got = f"it has {sorted(inputs or [])} and {sorted(outputs or [])}"
        raise ValueError(f"config.json needs the input {STATE!r}, the output {ACTION!r}; {got}")
    shapes = {
        name: list(entry["shape"] if isinstance(entry, Mapping) else entry)
        for name, entry in [*inputs.items(), (ACTION, outputs[ACTION])]
    }
    cameras = {name: shape for name, shape in shapes.items() if _IMAGE.fullmatch(name)}
    foreign = sorted(set(inputs) - {STATE, ENV} - set(cameras))
    if foreign:
        only = f"only {STATE}, {ENV} and observation.image* are supported"
        raise ValueError(f"this policy observes {', '.join(foreign)}; {only}")
    known = (name for name in (STATE, ENV, ACTION) if name in shapes)
    return {name: torch.Size(shapes[name]).numel() for name in known}, cameras


def _sight(
    config: Mapping[str, Any],
    shapes: Mapping[str, int],
    cameras: Mapping[str, list[int]],
    state: Mapping[str, Tensor],
    modes: Mapping[str, str],
    statistics: Statistics,
) -> Sight:
    """The cameras, which stand between the two states in the condition of a step."""
    refuse_unless("vision_backbone", config.get("vision_backbone", "resnet18"), ("resnet18",))
    sizes = [shape[1:] for shape in cameras.values()]
    refuse_unless("resize_shape", config.get("resize_shape"), (None, *sizes))
    names = {key: found[1] or "image" for key in cameras if (found := _IMAGE.fullmatch(key))}
    shared = not config.get("use_separate_rgb_encoder_per_camera", False)
    eyes, pixels = {}, {}
    for place, key in enumerate(cameras):
        seen = under(state, f"diffusion.rgb_encoder.{'' if shared else f'{place}.'}")
        layers = [(seen.get(f"{n}.weight"), seen.get(f"{n}.bias")) for n in ("pool.nets", "out")]
        if any(value is None for layer in layers for value in layer):
            raise ValueError(f"no diffusion.rgb_encoder of camera {key!r} in model.safetensors")
        eyes[names[key]] = Eye(under(seen, "backbone."), *layers)  # type: ignore[arg-type]
        pixels[names[key]] = _pixels(key, modes[key], cameras[key][0], statistics.get(key, {}))
    fields = {names[key]: image_field(shape) for key, shape in cameras.items()}
    vectors = [(name, size) for name, size in shapes.items() if name != ACTION]
    fields["state"] = ObsField((sum(size for _, size in vectors),))
    parts = [(f"state/{n}", size) for n, (_, size) in enumerate(vectors)]
    order = [parts[0], *((name, 0) for name in names.values()), *parts[1:]]
    return cameras_of(eyes, fields, pixels, config.get("crop_shape"), order, shared=shared)


def _pixels(
    name: str, mode: str, channels: int, statistics: Mapping[str, Tensor]
) -> dict[str, list[float]]:
    """Mean and standard deviation of [0, 1] that a camera's pictures are normalised by."""
    _, scale, offset = _affine(name, mode, channels, statistics)
    return {"mean": (-offset / scale).tolist(), "std": (1 / scale).tolist()}


def _scheduler(config: Mapping[str, Any]) -> dict[str, Any]:
    schedule = ("beta_schedule", "beta_start", "beta_end")
    names = (*schedule, "prediction_type", "clip_sample", "clip_sample_range")
    count = {"num_train_timesteps": config.get("num_train_timesteps", 100)}
    return count | {name: config[name] for name in names if name in config}


def _normalisation(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], cameras: Iterable[str]
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
    types = {**_TYPES, **dict.fromkeys(cameras, "VISUAL")}
    flat = {name.replace(".", "_"): name for name in types}
    for name, value in tensors.items():
        if found := _BUFFER.fullmatch(name):
            statistics.setdefault(flat.get(found[1], found[1]), {})[found[2]] = value
    modes = {
        name: str(old.get(name, mapping.get(kind, "IDENTITY"))).upper()
        for name, kind in types.items()
    }
    return modes, statistics


def _normalizer(
    shapes: Mapping[str, int], modes: Mapping[str, str], statistics: Statistics, obs: str
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
        {obs: mode, "action": parts[ACTION][0]},
        {obs: torch.cat([scale for _, scale, _ in observed]), "action": parts[ACTION][1]},
        {obs: torch.cat([offset for _, _, offset in observed]), "action": parts[ACTION][2]},
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
