"""Bundles: directories of safetensors and JSON with a manifest of hashes, written atomically.

A bundle is written beside its place, synced, and renamed into it, so a directory that has its name
is whole. Pointers (``last``, ``best``) are small text files that are replaced in one step.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

MANIFEST = "MANIFEST.json"


class CheckpointError(ValueError):
    """A bundle that is missing, incomplete or damaged, with the file at fault."""


def write_bundle(path: str | os.PathLike[str], files: Mapping[str, Any]) -> Path:
    """Write ``files`` as the directory ``path``, replacing what is there.

    Args:
        path: the directory.
        files: relative name to content: a ``*.safetensors`` name holds tensors, a ``*.json`` name
            plain values.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    manifest: dict[str, dict[str, Any]] = {}
    for name, content in files.items():
        data = _encode(name, content)
        manifest[name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        _write(partial / name, data)
    _write(partial / MANIFEST, _encode(MANIFEST, manifest))
    for folder in {(partial / name).parent for name in files} | {partial}:
        _sync_directory(folder)
    old = target.with_name(f".{target.name}.old.{os.getpid()}")
    if target.exists():
        target.rename(old)
    partial.rename(target)
    _sync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)
    return target


def read_bundle(path: str | os.PathLike[str], prefix: str = "") -> dict[str, Any]:
    """Read the files of a bundle whose names start with ``prefix``.

    Verifying size and hash of each.

    A directory inside a bundle (a checkpoint's ``policy``) can be read on its own.

    Raises:
        CheckpointError: no bundle, or a file that is missing, cut short or changed.
    """
    root = Path(path)
    if not (root / MANIFEST).is_file() and (root.parent / MANIFEST).is_file():
        root, prefix = root.parent, f"{root.name}/{prefix}"
    try:
        manifest = json.loads((root / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{root} has no {MANIFEST}: not a checkpoint, or only a part of one"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{root / MANIFEST} is damaged: {error}") from None
    return {
        name.removeprefix(prefix): _read(root / name, entry)
        for name, entry in manifest.items()
        if name.startswith(prefix)
    }


def _read(path: Path, entry: Mapping[str, Any]) -> Any:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing from its checkpoint") from None
    if len(data) != entry["size"]:
        raise CheckpointError(f"{path} is damaged: {len(data)} bytes, expected {entry['size']}")
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise CheckpointError(
            f"{path} is damaged: its content does not match the hash in {MANIFEST}"
        )
    try:
        return load_tensors(data) if path.suffix == ".safetensors" else json.loads(data)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def write_pointer(path: Path, name: str) -> None:
    """Replace the text file ``path`` by one holding ``name``, in one step."""
    partial = path.with_name(f".{path.name}.partial.{os.getpid()}")
    _write(partial, name.encode() + b"\n")
    partial.replace(path)
    _sync_directory(path.parent)


def read_pointer(path: Path) -> str | None:
    """The name that a pointer holds; ``None`` if there is no pointer."""
    return path.read_text().strip() if path.is_file() else None


def _encode(name: str, content: Any) -> bytes:
    if name.endswith(".safetensors"):
        return save_tensors({k: v.detach().cpu().contiguous() for k, v in content.items()})
    return json.dumps(content, indent=1).encode() + b"\n"


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
