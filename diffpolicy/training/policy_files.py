"""The directory that a policy is kept in: what its files are, and where a run keeps it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from diffpolicy.data.normalize import Normalizer
from diffpolicy.policies.anchors import Anchors
from diffpolicy.policies.spec import PolicySpec

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

    Args:
        path: where to look.
        wanted: ``format`` in its ``config.json``.
        what: its name in messages.

    Raises:
        ValueError: nothing there, with what was looked for.
    """
    root = Path(path)
    candidates = [root, root / "policy"]
    for pointer in ("best", "last"):
        file = root / "checkpoints" / pointer
        if file.is_file():
            candidates.append(root / "checkpoints" / file.read_text().strip() / "policy")
    for candidate in candidates:
        config = candidate / "config.json"
        if config.is_file() and json.loads(config.read_text()).get("format") == wanted:
            return candidate
    raise ValueError(
        f"no {what} in {root}: expected a {what} directory (config.json, model.safetensors), a "
        "checkpoint directory (policy/) or a run directory (checkpoints/best or checkpoints/last)"
    )
