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
        manifest[name] = {"sha256": _digest(data), "size": len(data)}
        _write(partial / name, data)
    _write(partial / MANIFEST, _listing(manifest))
    for part in {name.split("/")[0] for name in files if "/" in name}:
        inner = {
            n.removeprefix(f"{part}/"): e for n, e in manifest.items() if n.startswith(f"{part}/")
        }
        _write(partial / part / MANIFEST, _listing(inner))  # a part can be copied and read alone
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
    manifest = _manifest(root)
    if not any(name.startswith(prefix) for name in manifest):
        raise CheckpointError(f"{root} holds nothing under {prefix!r}; it has {sorted(manifest)}")
    return {
        name.removeprefix(prefix): _read(root / name, entry)
        for name, entry in manifest.items()
        if name.startswith(prefix)
    }


def _manifest(root: Path) -> dict[str, dict[str, Any]]:
    try:
        listing = json.loads((root / MANIFEST).read_bytes())
        files: dict[str, dict[str, Any]] = listing["files"]
        if listing["sha256"] != _digest(_encode(MANIFEST, files)):
            raise ValueError("it does not match its own hash")
    except FileNotFoundError:
        raise CheckpointError(
            f"{root} has no {MANIFEST}: not a checkpoint, or only a part of one"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{root / MANIFEST} is damaged: {error}") from None
    return files


def _read(path: Path, entry: Mapping[str, Any]) -> Any:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing from its checkpoint") from None
    if len(data) != entry["size"]:
        raise CheckpointError(f"{path} is damaged: {len(data)} bytes, expected {entry['size']}")
    if _digest(data) != entry["sha256"]:
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


def _listing(manifest: Mapping[str, Any]) -> bytes:
    return _encode(MANIFEST, {"sha256": _digest(_encode(MANIFEST, manifest)), "files": manifest})


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _encode(name: str, content: Any) -> bytes:
    if name.endswith(".safetensors"):
        return save_tensors({k: v.detach().cpu().clone().contiguous() for k, v in content.items()})
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


class Snapshots:
    """The checkpoints of a run: ``RUN/checkpoints/0005000/`` with pointers ``last`` and ``best``.

    Args:
        folder: ``RUN/checkpoints``.
        keep_last: how many of the newest are kept beside the best.
    """

    def __init__(self, folder: Path, keep_last: int = 2) -> None:
        self.folder, self.keep_last = folder, keep_last

    @property
    def exist(self) -> bool:
        """Whether there is one to resume from."""
        return read_pointer(self.folder / "last") is not None

    def save(
        self, step: int, state: Mapping[str, Any], policy: Mapping[str, Any], *, is_best: bool
    ) -> None:
        """Write one checkpoint, point to it, and remove what is no longer needed."""
        name = f"{step:07d}"
        if read_pointer(self.folder / "last") == name:
            return  # an interrupt on a checkpoint's own step
        files = {f"training/{k}": v for k, v in state.items()}
        files |= {f"policy/{k}": v for k, v in policy.items()}
        write_bundle(self.folder / name, files)
        if is_best:
            write_pointer(self.folder / "best", name)
        write_pointer(self.folder / "last", name)
        self._prune()

    def load_last(self) -> dict[str, Any]:
        """The training state that ``last`` points to.

        Raises:
            CheckpointError: it is damaged; names an intact one to go back to, if any.
        """
        name = read_pointer(self.folder / "last")
        try:
            return read_bundle(self.folder / str(name), "training/")
        except CheckpointError as error:
            intact = [n for n in self._names() if n != name and self._is_intact(n)]
            pointer = self.folder / "last"
            hint = f"; {intact[-1]} is intact: write that name into {pointer}" if intact else ""
            raise CheckpointError(f"{error}{hint}") from None

    def _is_intact(self, name: str) -> bool:
        try:
            read_bundle(self.folder / name)
        except CheckpointError:
            return False
        return True

    def _names(self) -> list[str]:
        return sorted(p.name for p in self.folder.iterdir() if p.is_dir() and p.name[0] != ".")

    def _prune(self) -> None:
        keep = {read_pointer(self.folder / "best"), read_pointer(self.folder / "last")}
        names = self._names()
        for name in set(names) - keep - set(names[-self.keep_last :]):
            shutil.rmtree(self.folder / name)
        for leftover in self.folder.glob(".*"):  # of a writer that was killed
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
