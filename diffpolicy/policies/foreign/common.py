"""What the readers of foreign checkpoints share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffpolicy.core.processes import DiscreteVP
from diffpolicy.core.sampler import Sampler
from diffpolicy.data.normalize import Normalizer
from diffpolicy.policies.spec import SIZES, PolicySpec
from diffpolicy.settings import check_range

PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


class ForeignPolicy(NamedTuple):
    """A foreign checkpoint in our terms: spec, the denoiser's state dict, normaliser."""

    spec: PolicySpec
    weights: dict[str, Tensor]
    normalizer: Normalizer


def imported(
    state: Mapping[str, Tensor],
    prefix: str,
    convert: Callable[..., tuple[dict[str, Any], dict[str, Tensor]]],
    config: Mapping[str, Any],
    where: str,
    *,
    groups: int,
    normalizer: Normalizer,
    sight: Any = None,
    **settings: Any,
) -> ForeignPolicy:
    """The policy of a checkpoint, whose sizes stand in its config by the field's names.

    Args:
        state: Its weights, those of the U-Net under ``prefix``.
        prefix: Of the U-Net's names.
        convert: To our names, see :mod:`diffpolicy.networks.convert`.
        config: The checkpoint's.
        where: What the config is, for messages.
        groups: Of the U-Net's normalisations.
        normalizer: The checkpoint's.
        sight: Of its cameras, a :class:`~diffpolicy.policies.foreign.cameras.Sight`; None: it has
            none.
        settings: Of the spec, what else there is.

    Raises:
        ValueError: A size is missing, or weights of another architecture.
    """
    sizes = {name: require(config, name, where) for name in SIZES}
    network, weights = convert(under(state, prefix), horizon=sizes["horizon"], n_groups=groups)
    named = {f"network.{n}": v for n, v in weights.items()}
    if sight is not None:
        settings |= {"observations": sight.observations, "encoder": sight.encoder}
        named |= {f"encoder.{n}": v.clone() for n, v in sight.weights.items()}
        columns, embed = sight.columns(sizes["n_obs_steps"]), network["diffusion_step_embed_dim"]
        if len(columns) != network["cond_dim"]:
            raise ValueError(
                f"the U-Net takes {network['cond_dim']} features, the config says {len(columns)}"
            )
        film = named["network.film.weight"]
        named["network.film.weight"] = torch.cat([film[:, :embed], film[:, embed:][:, columns]], 1)
    spec = PolicySpec(**sizes, **settings, network=network)
    return ForeignPolicy(spec, named, normalizer)


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
    check_range(f"[1, {count}]", num_inference_steps=steps)
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


def under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose names start with ``prefix``, without it."""
    return {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}


def refuse_unless(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise unless the checkpoint's setting is one that this library has.

    Raises:
        ValueError: Names the setting, its value and what can be imported.
    """
    if value not in allowed:
        known = " or ".join(map(repr, allowed))
        raise ValueError(f"this checkpoint has {name}={value!r}; only {known} can be imported")


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
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
