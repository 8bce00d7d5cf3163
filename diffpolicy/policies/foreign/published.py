"""Published checkpoints as policies of ours: LeRobot (safetensors) and Diffusion Policy (.ckpt)."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import torch

from diffpolicy.networks import make_network
from diffpolicy.policies.foreign.common import ForeignPolicy, read_json
from diffpolicy.policies.foreign.diffusion_policy import read_diffusion_policy
from diffpolicy.policies.foreign.lerobot import read_lerobot
from diffpolicy.policies.spec import check_normalizer
from diffpolicy.settings import check_choice

KINDS = ("auto", "lerobot", "diffusion_policy")


def read_checkpoint(source: str | os.PathLike[str], *, kind: str = "auto") -> ForeignPolicy:
    """Read a published checkpoint of a diffusion policy.

    - LeRobot: a directory with ``config.json`` and ``model.safetensors``. The observation is
      ``observation.state`` followed by ``observation.environment_state``; with cameras these two
      are ``state``, beside each ``observation.images.NAME`` as ``NAME``.
    - Diffusion Policy: a ``.ckpt`` of ``DiffusionUnetLowdimPolicy``,
      ``DiffusionUnetHybridImagePolicy`` or ``DiffusionUnetImagePolicy`` with global conditioning,
      whose observations keep their names. It is a pickle, so it is read in a process of its own
      that builds tensors and plain containers and calls nothing the file names; the averaged (EMA)
      weights are taken when there are any.

    Cameras have a ResNet-18 of any width, with group normalisation or with batch normalisation,
    which is folded into the convolutions. Pictures are bytes ``[h, w, C]``, as robots give them;
    what the checkpoint normalises them by is kept.

    The noise schedule is kept exactly (``discrete_vp``). Fewer inference steps than training steps
    are spread over the whole schedule, from pure noise; the published loops start below it. With
    DDIM and clipping, the noise is recomputed from the clipped estimate, as DDPM does.

    Args:
        source: The directory or file.
        kind: ``auto`` (by what is there), ``lerobot`` or ``diffusion_policy``.

    Returns:
        The spec, the denoiser's weights and the normaliser: what
        :func:`diffpolicy.api.policy_files` takes.

    Raises:
        ValueError: Not such a checkpoint, a damaged one, or one that needs what this library does
            not have (other backbones, local conditioning, ...), by name.
    """
    path = Path(source)
    check_choice("kind", kind, KINDS)
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if kind == "auto":
        kind = detect_kind(path)
    foreign = read_lerobot(path) if kind == "lerobot" else read_diffusion_policy(path)
    _check(foreign)
    return foreign


def detect_kind(path: Path) -> str:
    """``lerobot`` or ``diffusion_policy``, by what lies at ``path``.

    Raises:
        ValueError: Neither, with what was looked for.
    """
    if path.is_file() and zipfile.is_zipfile(path):
        return "diffusion_policy"
    config = path / "config.json"
    if config.is_file():
        if str(read_json(config).get("format", "")).startswith("diffpolicy"):
            raise ValueError(f"{path} is a policy of ours already; nothing to import")
        return "lerobot"
    usual = ("checkpoints/*/pretrained_model", "*/pretrained_model", "checkpoints/*.ckpt", "*.ckpt")
    nested = [found for pattern in usual for found in sorted(path.glob(pattern))]
    hint = f"; did you mean {nested[-1]}?" if nested else ""
    raise ValueError(
        f"{path} is neither a LeRobot policy (a directory with config.json and model.safetensors) "
        f"nor a Diffusion Policy checkpoint (a .ckpt file in torch's zip format){hint}"
    )


def _check(foreign: ForeignPolicy) -> None:
    """Raise unless the parts fit together; no weight is copied."""
    spec = foreign.spec
    check_normalizer(spec, foreign.normalizer)
    with torch.device("meta"):
        encoder, network = spec.make_encoder(), make_network(spec.network)
    cond_dim = encoder.cond_dim
    shape = {"horizon": spec.horizon, "dim": spec.action_dim, "cond_dim": cond_dim}
    stated = {name: spec.network[name] for name in shape}
    if stated != shape:
        raise ValueError(f"the weights are for {stated}, the policy's config says {shape}")
    try:
        torch.nn.ModuleDict({"network": network, "encoder": encoder}).load_state_dict(
            foreign.weights, assign=True
        )
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit the architecture they imply: {error}") from None
