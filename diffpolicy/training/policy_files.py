"""The directory that a policy is kept in: what its files are, and where a run keeps it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from diffpolicy.data.normalize import Normalizer
from diffpolicy.files import settled
from diffpolicy.policies.anchors import Anchors
from diffpolicy.policies.spec import PolicySpec
from diffpolicy.training.checkpoint import CheckpointError, Snapshots

FORMAT, VERSION = "diffpolicy-policy", 1


def policy_files(
    spec: PolicySpec,
    weights: Mapping[str, Tensor],
    normalizer: Normalizer,
    anchors: Anchors | None = None,
    heads: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """The files of a policy directory.

    As values for :func:`diffpolicy.training.checkpoint.write_bundle`.
    """
    config = {
        "format": FORMAT,
        "version": VERSION,
        **spec.to_config(),
        "normalizer": normalizer.to_config(),
        "anchors": None if anchors is None else anchors.to_config(),
    }
    extra = {} if anchors is None else {"anchors.safetensors": anchors.to_tensors()}
    if heads:
        extra["heads.safetensors"] = dict(heads)
    return {
        "config.json": config,
        "model.safetensors": dict(weights),
        "normalizer.safetensors": normalizer.to_tensors(),
        **extra,
    }


def find_policy(path: str | os.PathLike[str]) -> Path:
    """The policy directory that ``path`` (policy, checkpoint or run) stands for.

    Raises:
        ValueError: nothing there, with what was looked for.
    """
    return find_bundle(path, FORMAT, "policy")


def find_bundle(path: str | os.PathLike[str], wanted: str, what: str) -> Path:
    """The directory of format ``wanted`` that ``path`` (it, a checkpoint or a run) stands for.

    A run stands for its checkpoints (the best, or the last of a run without scores), whatever else
    has been saved into it.

    Args:
        path: where to look.
        wanted: ``format`` in its ``config.json``.
        what: its name in messages.

    Raises:
        CheckpointError: the checkpoint, or a ``config.json``, is damaged.
        ValueError: nothing there, with what was looked for.
    """
    root = settled(path)
    if _format(root) == wanted:
        return root
    checkpoints = root / "checkpoints"
    inside = Snapshots(checkpoints).policy() if checkpoints.is_dir() else root / "policy"
    if _format(inside) == wanted:
        return settled(inside)
    raise ValueError(
        f"no {what} in {root}: expected a {what} directory (config.json, model.safetensors), a "
        "checkpoint directory (policy/) or a run directory (checkpoints/best or checkpoints/last)"
    )


def _format(folder: Path) -> Any:
    """What a directory says that it is; ``None`` without a ``config.json``."""
    file = settled(folder) / "config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None
    return config.get("format") if isinstance(config, dict) else None
