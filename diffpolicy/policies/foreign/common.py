"""What the readers of foreign checkpoints share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffpolicy.core.noise import DiscreteVP
from diffpolicy.data.normalize import Normalizer
from diffpolicy.policies.diffusion import PolicySpec, Sampler

PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


class ForeignPolicy(NamedTuple):
    """A foreign checkpoint in our terms: spec, the denoiser's state dict, normaliser."""

    spec: PolicySpec
    weights: dict[str, Tensor]
    normalizer: Normalizer


def diffusion_settings(
    scheduler: Mapping[str, Any], solver: str, inference_steps: int | None, *, eta: float = 0.0
) -> dict[str, Any]:
    """The noise schedule and sampler of a policy trained with a discrete scheduler.

    Args:
        scheduler: Its settings by their published names; those left out have their published
            defaults.
        solver: ``ddpm`` or ``ddim``.
        inference_steps: Steps of a plan; None: as many as in training.
        eta: Noise of ``ddim``.

    Returns:
        ``process``, ``prediction``, ``clip`` and ``sampler`` of a ``PolicySpec``.

    Raises:
        ValueError: A setting without an equivalent here.
    """
    values = {
        "num_train_timesteps": 1000,
        "beta_schedule": "linear",
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "trained_betas": None,
        "variance_type": "fixed_small",
        "prediction_type": "epsilon",
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "thresholding": False,
        **scheduler,
    }
    count = int(values["num_train_timesteps"])
    steps = count if inference_steps is None else int(inference_steps)
    refuse_unless("prediction_type", values["prediction_type"], tuple(PREDICTIONS))
    refuse_unless("thresholding", values["thresholding"], (False,))
    if values["clip_sample"]:
        refuse_unless("clip_sample_range", values["clip_sample_range"], (1.0,))
    if not 1 <= steps <= count:
        raise ValueError(f"num_inference_steps must be in 1..{count}, got {steps}")
    options: dict[str, Any] = {}
    if solver == "ddpm":
        known = ("fixed_small", "fixed_small_log", "fixed_large")
        refuse_unless("variance_type", values["variance_type"], known)
        options = {"variance": "large"} if values["variance_type"] == "fixed_large" else {}
    elif eta:
        options = {"eta": float(eta)}
    return {
        "process": {"type": "discrete_vp", "betas": list(_betas(values, count))},
        "prediction": PREDICTIONS[values["prediction_type"]],
        "clip": bool(values["clip_sample"]),
        "sampler": Sampler(solver=solver, num_steps=steps, options=options),
    }


def _betas(values: Mapping[str, Any], count: int) -> tuple[float, ...]:
    if values["trained_betas"] is not None:
        return tuple(float(b) for b in values["trained_betas"])
    schedule, first, last = (values[k] for k in ("beta_schedule", "beta_start", "beta_end"))
    refuse_unless("beta_schedule", schedule, ("squaredcos_cap_v2", "linear", "scaled_linear"))
    if schedule == "squaredcos_cap_v2":
        return DiscreteVP.cosine(count).betas
    if schedule == "linear":
        return DiscreteVP.linear(count, beta_start=first, beta_end=last).betas
    roots = torch.linspace(first**0.5, last**0.5, count, dtype=torch.float64)
    return tuple(roots.square().tolist())


def refuse_unless(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise unless the checkpoint's setting is one that this library has.

    Raises:
        ValueError: Names the setting, its value and what can be imported.
    """
    if value not in allowed:
        raise ValueError(
            f"this checkpoint has {name}={value!r}; only {' or '.join(map(repr, allowed))} can be "
            "imported"
        )


def require(config: Mapping[str, Any], name: str, where: str) -> Any:
    """``config[name]``.

    Raises:
        ValueError: It is not there.
    """
    if config.get(name) is None:
        raise ValueError(f"{where} has no {name!r}; it has {', '.join(sorted(config))}")
    return config[name]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: No such file, or something else in it.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(values).__name__}")
    return values


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: No such file, or a damaged one.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    return tensors
