"""Bundles: directories of safetensors and JSON with a manifest of hashes, written atomically.

A bundle is written beside its place, synced, and renamed into it, so a directory that has its name
is whole. Pointers (``last``, ``best``) are small text files that are replaced in one step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from diffpolicy.files import (
    MANIFEST,
    ForeignFilesError,
    Owned,
    check_owned,
    manifest_names,
    naming,
    read_manifest,
    remove_leftovers,
    remove_owned,
    replaced_directory,
    settled,
    write_atomic,
    write_manifest,
)
from diffpolicy.networks.registry import check_stored_code


class CheckpointError(ValueError):
    """A bundle that is missing, incomplete or damaged, with the file at fault."""


def write_bundle(
    path: str | os.PathLike[str], files: Mapping[str, Any], *, owned: Owned | None = None
) -> Path:
    """Write ``files`` as the directory ``path``, replacing an earlier bundle of the same kind.

    Args:
        path: the directory.
        files: relative name to content: a ``*.safetensors`` name holds tensors, a ``*.json`` name
            plain values.
        owned: what else in an earlier directory is ours; by default only what its manifest lists.

    Raises:
        ForeignFilesError: something else than an earlier bundle of this kind is there.
    """
    target = Path(path)
    check_replaceable(target, files)
    manifest: dict[str, dict[str, Any]] = {}
    with replaced_directory(target, owned=owned) as partial:
        for name, content in files.items():
            data = _encode(name, content)
            manifest[name] = {"sha256": _digest(data), "size": len(data)}
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            with naming(target / name):
                (partial / name).write_bytes(data)
        for part in {name.split("/")[0] for name in files if "/" in name}:
            inner = {n[len(part) + 1 :]: e for n, e in manifest.items() if n.startswith(f"{part}/")}
            write_manifest(partial / part, inner)  # a part can be copied and read alone
        write_manifest(partial, manifest)
    return target


def check_replaceable(target: Path, files: Mapping[str, Any]) -> None:
    """Raise if writing the bundle ``files`` to ``target`` would destroy another thing of ours."""
    place = target.resolve()
    if any(name.startswith(f"{place.name}/") for name in manifest_names(place.parent)):
        raise ForeignFilesError(
            f"{target} is a part of {place.parent}, which would be damaged; save elsewhere"
        )
    there, kind = manifest_names(place), _kind(files, files.get("config.json"))
    with contextlib.suppress(OSError, json.JSONDecodeError):
        config = place / "config.json"
        old = _kind(there, json.loads(config.read_bytes()) if config.is_file() else None)
        if there and old != kind:
            raise ForeignFilesError(
                f"{target} holds a {old}, which a {kind} does not replace; save elsewhere"
            )


def _kind(names: Any, config: Any) -> str:
    if any(str(name).startswith("training/") for name in names):
        return "checkpoint"
    return str(config.get("format", "bundle")) if isinstance(config, Mapping) else "bundle"


def read_bundle(path: str | os.PathLike[str], prefix: str = "") -> dict[str, Any]:
    """Read the files of a bundle whose names start with ``prefix``, verifying each one's hash.

    A directory inside a bundle (a checkpoint's ``policy``) can be read on its own.

    Raises:
        CheckpointError: no bundle, or a file that is missing, cut short or changed.
        ValueError: its ``config.json`` names code that the user did not choose, see
            :func:`~diffpolicy.networks.registry.check_stored_code`.
    """
    root = settled(path)
    manifest = _manifest(root)
    if not any(name.startswith(prefix) for name in manifest):
        raise CheckpointError(f"{root} holds nothing under {prefix!r}; it has {sorted(manifest)}")
    files = {
        name.removeprefix(prefix): _read(root / name, entry)
        for name, entry in manifest.items()
        if name.startswith(prefix)
    }
    check_stored_code(files.get("config.json"), root)
    return files


def _manifest(root: Path) -> dict[str, dict[str, Any]]:
    try:
        return read_manifest(root)
    except FileNotFoundError:
        raise CheckpointError(
            f"{root} has no {MANIFEST}: not a checkpoint, or only a part of one (from_pretrained "
            "finds the policy of a run)"
        ) from None
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _read(path: Path, entry: Mapping[str, Any]) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing from its checkpoint")
    data = path.read_bytes()
    if len(data) != entry["size"]:
        raise CheckpointError(f"{path} is damaged: {len(data)} bytes, expected {entry['size']}")
    if _digest(data) != entry["sha256"]:
        raise CheckpointError(f"{path} is damaged: it does not match the hash in {MANIFEST}")
    try:
        return load_tensors(data) if path.suffix == ".safetensors" else json.loads(data)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def read_pointer(path: Path) -> str | None:
    """The name that a pointer holds; ``None`` if there is no pointer."""
    return path.read_text(errors="replace").strip() if path.is_file() else None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _encode(name: str, content: Any) -> bytes:
    if name.endswith(".safetensors"):
        return save_tensors({k: v.detach().cpu().clone().contiguous() for k, v in content.items()})
    return json.dumps(content, indent=1).encode() + b"\n"


# What this or an earlier version leaves in ``checkpoints/``, whole, damaged or unfinished.
_OURS = re.compile(
    r"last|best|(\.?\d{7,}(\.(partial|old|gone)[\w.-]*)?/)"
    r"((training|policy)/)?(MANIFEST|config|state|\w+(?=\.safetensors))\.(json|safetensors)"
    r"|\.?\d{7,}[\w.-]*(/training|/policy)?/"
)


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
        """Whether there is something to resume from, be its pointer lost."""
        return read_pointer(self.folder / "last") is not None or bool(self._names())

    def save(
        self, step: int, state: Mapping[str, Any], policy: Mapping[str, Any], *, is_best: bool
    ) -> None:
        """Write one checkpoint, point to it, and remove what is no longer needed."""
        name = f"{step:07d}"
        if read_pointer(self.folder / "last") == name:
            return  # an interrupt on a checkpoint's own step
        files = {f"training/{k}": v for k, v in state.items()}
        files |= {f"policy/{k}": v for k, v in policy.items()}
        place = self.folder / name
        known = {*files, MANIFEST, f"training/{MANIFEST}", f"policy/{MANIFEST}"}
        # What is there has been left behind by going back to an earlier one, and may be damaged.
        write_bundle(place, files, owned=known | set(manifest_names(place)))
        if is_best:
            write_atomic(self.folder / "best", name + "\n")
        write_atomic(self.folder / "last", name + "\n")
        best, names = read_pointer(self.folder / "best"), self._names()
        if state.get("state.json", {}).get("best_score") is None or best in names:
            self._prune()  # else any of them may be the best

    def load_last(self) -> dict[str, Any]:
        """The training state that ``last`` points to.

        Raises:
            CheckpointError: it is damaged or not known; names an intact one to go on from, if any.
        """
        place = self._named("last")
        with self._hint("last"):
            return read_bundle(place, "training/")

    def policy(self) -> Path:
        """The policy of the best checkpoint, or of the last one of a run without scores.

        Raises:
            CheckpointError: it is damaged, or it is not known which it is; names an intact one.
        """
        if read_pointer(self.folder / "best") is not None:
            return self._named("best") / "policy"
        last = self._named("last")
        state = last / "training" / "state.json"
        if state.is_file() and json.loads(state.read_bytes()).get("best_score") is not None:
            with self._hint("best"):
                raise CheckpointError(f"{self.folder / 'best'} is missing")
        return last / "policy"

    def _named(self, pointer: str) -> Path:
        """The checkpoint that a pointer names; its manifest is intact and its files are there."""
        file = self.folder / pointer
        name = read_pointer(file)
        with self._hint(pointer):
            if name is None:
                raise CheckpointError(f"{file} is missing")
            if not name.isdecimal():
                raise CheckpointError(f"{file} is damaged: it names no checkpoint: {name!r}")
            place = settled(self.folder / name)
            for part, entry in _manifest(place).items():
                if not (place / part).is_file() or (place / part).stat().st_size != entry["size"]:
                    raise CheckpointError(f"{place / part} is damaged")
        return place

    @contextlib.contextmanager
    def _hint(self, pointer: str) -> Iterator[None]:
        """Let an error within the block name an intact checkpoint to write into a pointer."""
        try:
            yield
        except CheckpointError as error:
            intact = [name for name in self._names() if self._is_intact(name)]
            use = f"; {intact[-1]} is intact: write that name into {self.folder / pointer}"
            raise CheckpointError(f"{error}{use if intact else ''}") from None

    def clear(self, *, only_check: bool = False) -> None:
        """Remove all checkpoints.

        Raises:
            ForeignFilesError: something else is among them. Nothing was removed.
        """
        check_owned(self.folder, self._is_ours)
        if not only_check:
            remove_owned(self.folder, self._is_ours)

    def _is_ours(self, name: str) -> bool:
        """Whether a file in the folder is of a checkpoint, be that damaged."""
        first, _, rest = name.partition("/")
        return _OURS.fullmatch(name) is not None or rest in manifest_names(self.folder / first)

    def _is_intact(self, name: str) -> bool:
        try:
            read_bundle(self.folder / name)
        except CheckpointError:
            return False
        return True

    def _names(self) -> list[str]:
        if not self.folder.is_dir():
            return []
        return sorted(p.name for p in self.folder.iterdir() if p.is_dir() and p.name.isdecimal())

    def _prune(self) -> None:
        keep = {read_pointer(self.folder / "best"), read_pointer(self.folder / "last")}
        names = self._names()
        for name in set(names) - keep - set(names[-self.keep_last :]):
            with contextlib.suppress(ForeignFilesError):  # somebody has put something into it
                remove_owned(self.folder / name)
        remove_leftovers(self.folder)  # of writers that were killed
