"""What is saved as a directory of ``config.json`` and weights, and how it is found."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from diffpolicy.data.normalize import Normalizer
from diffpolicy.files import MANIFEST, settled
from diffpolicy.policies.anchors import Anchors
from diffpolicy.policies.spec import PolicySpec
from diffpolicy.training.checkpoint import CheckpointError, Snapshots, read_bundle, write_bundle

FORMAT, VERSION = "diffpolicy-policy", 1
Device = str | torch.device


class Saved(ABC):
    """Base of what has weights and is saved as a directory, such as a learned reward.

    A class says ``FORMAT``, what its ``config.json`` says that it is; ``VERSION``, of its layout;
    and ``WHAT``, its name in messages.
    """

    FORMAT: ClassVar[str]
    VERSION: ClassVar[int] = 1
    WHAT: ClassVar[str]

    @abstractmethod
    def _files(self) -> dict[str, Any]:
        """Its files, as ``write_bundle`` takes them, with :meth:`_config` as ``config.json``."""

    @classmethod
    @abstractmethod
    def _made_of(cls, config: dict[str, Any], files: Mapping[str, Any], device: Device) -> Self:
        """Make it from its ``config.json``, without format and version, and all of its files."""

    @classmethod
    def _config(cls, **values: Any) -> dict[str, Any]:
        return {"format": cls.FORMAT, "version": cls.VERSION, **values}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as a directory: ``config.json``, safetensors files and their hashes."""
        return write_bundle(path, self._files())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: Device = "cpu") -> Self:
        """Read it from its directory, a checkpoint or a run, verifying every hash.

        Of a run, its best checkpoint, else its last.

        Args:
            path: where it is.
            device: where the weights go.

        Raises:
            ValueError: nothing of this kind is there, or a file is damaged.
        """
        files = read_bundle(find_bundle(path, cls.FORMAT, cls.WHAT))
        config = dict(files["config.json"])
        version = config.pop("version", None)
        if config.pop("format") != cls.FORMAT or version != cls.VERSION:
            raise ValueError(
                f"{path} holds a {cls.WHAT} of version {version}; this library reads {cls.VERSION}"
            )
        return cls._made_of(config, files, device)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *, device: Device = "cpu") -> Self:
        """Read it as :meth:`load` does, under the name that policies use."""
        return cls.load(path, device=device)


def find_bundle(path: str | os.PathLike[str], wanted: str, what: str) -> Path:
    """Find the directory of format ``wanted`` that ``path`` (it, a checkpoint, a run) stands for.

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
    if (root / MANIFEST).is_file():
        read_bundle(root)  # raises if it was one and is damaged
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


def part_of(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Take the weights of one module out of those of an objective that holds it.

    Example:
        >>> part_of({"network.bias": b, "critic.bias": c}, "network")
        {'bias': b}
    """
    prefix = f"{name}."
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


# ------------------------------------------------------------------ policies


def find_policy(path: str | os.PathLike[str]) -> Path:
    """Find the policy directory that ``path`` (policy, checkpoint or run) stands for.

    Raises:
        ValueError: nothing there, with what was looked for.
    """
    return find_bundle(path, FORMAT, "policy")


def policy_files(
    spec: PolicySpec,
    weights: Mapping[str, Tensor],
    normalizer: Normalizer,
    anchors: Anchors | None = None,
    heads: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """The files of a policy directory, for :func:`diffpolicy.training.checkpoint.write_bundle`."""
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
