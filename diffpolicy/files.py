"""Files that are whole or absent, and directories of which nothing foreign is ever removed.

Whatever the library writes appears in one step: it is written beside its place, synced, and
renamed. What it replaces or removes must be its own. The proof is a ``MANIFEST.json`` in the
directory, which lists what we wrote: a file that is not in it is somebody else's, and the
directory then stays as it is.

Unfinished files and folders are hidden, and their names say which process makes them::

    .NAME.partial-MACHINE-PID-STARTED-NUMBER

so that those of a killed process can be told from those of a living one, and removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from diffpolicy.locks import is_alive, machine, started

MANIFEST = "MANIFEST.json"
_NUMBERS = itertools.count()
_HIDDEN = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|old|gone)-(\w+)-(\d+)-(\d+)-\d+(\.\w+)?")

Owned = Callable[[str], object] | Collection[str]


class ForeignFilesError(ValueError):
    """A directory that was to be replaced or removed holds what we did not write."""


# ------------------------------------------------------------------------------------ one file


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Write ``data`` (text as UTF-8) to the file ``path`` in one step.

    Returns:
        ``path``.

    Raises:
        OSError: it cannot be written; names the file, also when the disk is full.
    """
    with atomic_file(path) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)
    return Path(path)


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write ``value`` as JSON in one step; a number that is not finite raises ``ValueError``."""
    return write_atomic(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], suffix: str | None = None) -> Iterator[Path]:
    """Yield the path of a file to write; when the block ends, it takes the place of ``path``.

    An error in the block leaves ``path`` as it was.

    Args:
        path: the file.
        suffix: of the yielded path, for writers that choose the format by it; that of ``path`` by
            default.
    """
    target = Path(path).resolve()  # a link stays a link
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(target, "partial", target.suffix if suffix is None else suffix)
    try:
        with naming(target):
            yield partial
            sync(partial)
            partial.replace(target)
            sync(target.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let an ``OSError`` that names no file (a full disk) name ``path``."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


# ----------------------------------------------------------------------------------- directories


@contextlib.contextmanager
def replaced_directory(
    path: str | os.PathLike[str], *, owned: Owned | None = None
) -> Iterator[Path]:
    """Yield an empty directory to fill; when the block ends, it takes the place of ``path``.

    An error in the block leaves ``path`` as it was. A process that is killed leaves the earlier or
    the new directory: at ``path``, or, between two renames, where :func:`settled` finds it.

    Args:
        path: the directory; there need not be one yet.
        owned: what in an earlier directory may be removed, as for :func:`foreign_files`.

    Raises:
        ForeignFilesError: something else is in it. Nothing was changed.
    """
    settled(path)  # what a killed writer has moved aside is back before it is checked and replaced
    target = Path(path).resolve()
    check_owned(target, owned)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent, target.name)
    partial = _beside(target, "partial")
    with naming(target):
        partial.mkdir()
        try:
            yield partial
            if owned is None and not (partial / MANIFEST).exists():
                write_manifest(partial, {name: {} for name in _files(partial)})
            for folder, _, names in os.walk(partial):
                for name in names:
                    sync(Path(folder, name))
                sync(Path(folder))
            check_owned(target, owned)  # again: something may have been put there meanwhile
            _swap(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _swap(partial: Path, target: Path) -> None:
    old = _beside(target, "old")
    if target.exists():
        target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    sync(target.parent)
    _discard(old, target)


def settled(path: str | os.PathLike[str]) -> Path:
    """Return where the content of ``path`` is, also between the two renames of a replacement.

    If nothing is at ``path`` because its writer is just replacing it, or was killed doing so, then
    the earlier content lies beside it. That of a killed writer is moved back, if possible.
    """
    target = Path(path)
    if target.exists() or not target.parent.is_dir():
        return target
    for place, match in _hidden(target.parent, target.name):
        if match["kind"] == "old":
            if not _is_dead(match):
                return place
            with contextlib.suppress(OSError):  # it was another's to move, or is read-only
                place.rename(target)
            return target if target.exists() else place
    return target


def check_owned(folder: str | os.PathLike[str], owned: Owned | None = None) -> None:
    """Raise unless all that is at ``folder`` is our own, so that it may be removed.

    Raises:
        ForeignFilesError: names what is not.
    """
    target = Path(folder)
    some = list(islice(foreign_files(target, owned), 6))
    if some:
        listed = ", ".join(some[:5]) + (", ..." if len(some) > 5 else "")
        raise ForeignFilesError(
            f"{target} is not replaced or removed, because it holds what diffpolicy did not write "
            f"there: {listed}. Choose another place, or move that away first"
        )


def foreign_files(folder: Path, owned: Owned | None = None) -> Iterator[str]:
    """Yield what is in ``folder`` without being ours, relative to it; nothing if it is absent.

    Args:
        folder: where to look. If it is a file, it is foreign.
        owned: names, relative to the folder and with ``/``, or a function that tells for each
            whether it is ours (an empty directory's name ends with ``/``); by default what the
            folder's manifest lists, which is nothing if there is none.
    """
    if not folder.is_dir():
        if folder.exists() or folder.is_symlink():
            yield folder.name
        return
    if owned is None:
        owned = set(manifest_names(folder))
    is_ours = owned if callable(owned) else owned.__contains__
    yield from (name for name in _files(folder) if not is_ours(name))


def remove_owned(folder: str | os.PathLike[str], owned: Owned | None = None) -> None:
    """Remove a directory of ours with all that is in it; do nothing if it is absent.

    Args:
        folder: the directory.
        owned: as for :func:`foreign_files`.

    Raises:
        ForeignFilesError: something else is in it. Nothing was removed.
    """
    target = Path(folder)
    check_owned(target, owned)
    if target.is_symlink():
        raise ForeignFilesError(f"{target} is a link; remove it, or what it points to, yourself")
    if target.exists():
        _discard(target, target)


def _discard(folder: Path, target: Path) -> None:
    """Remove what was at ``target`` such that it is never seen with a part of its files."""
    if folder.exists():
        gone = folder.rename(_beside(target, "gone"))
        shutil.rmtree(gone, ignore_errors=True)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove from ``folder`` the unfinished files of killed processes of this machine.

    What a living process writes, or one of another machine, stays.

    Args:
        folder: where they are.
        name: only those that were to become this file or directory.
    """
    for place, match in _hidden(folder, name):
        needed = match["kind"] == "old" and not (folder / match["name"]).exists()
        if _is_dead(match) and not needed:
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place, ignore_errors=True)
            else:
                place.unlink(missing_ok=True)


def _hidden(folder: Path, name: str | None) -> list[tuple[Path, re.Match[str]]]:
    if not folder.is_dir():
        return []
    found = [(p, m) for p in sorted(folder.iterdir()) if (m := _HIDDEN.fullmatch(p.name))]
    return [(p, m) for p, m in found if name in (None, m["name"])]


def _is_dead(match: re.Match[str]) -> bool:
    return match[3] == machine() and not is_alive(int(match[4]), int(match[5]))


def _beside(target: Path, kind: str, suffix: str = "") -> Path:
    maker = f"{machine()}-{os.getpid()}-{started(os.getpid())}-{next(_NUMBERS)}"
    return target.with_name(f".{target.name}.{kind}-{maker}{suffix}")


# -------------------------------------------------------------------------------------- manifests


def write_manifest(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """List what a new directory holds: name, relative to it, to what is known of the file."""
    listing = {"sha256": _digest(files), "files": files}
    (folder / MANIFEST).write_text(json.dumps(listing, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the files that a directory's manifest lists.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or not one of ours.
    """
    place = folder / MANIFEST
    try:
        listing = json.loads(place.read_bytes())
        files: dict[str, dict[str, Any]] = listing["files"]
        intact = listing["sha256"] == _digest(files)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{place} is damaged: {error!r}") from None
    if not intact:
        raise ValueError(f"{place} is damaged: it does not match its own hash")
    return files


def manifest_names(folder: Path) -> list[str]:
    """Return the files that are ours by a directory's manifest, itself among them.

    Manifests of parts too. Without a manifest, or with a damaged one, none is.
    """
    try:
        names = list(read_manifest(folder))
    except (OSError, ValueError):
        return []
    parts = {name.split("/")[0] for name in names if "/" in name}
    return [*names, MANIFEST, *(f"{part}/{MANIFEST}" for part in parts)]


def _digest(files: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, indent=1).encode() + b"\n").hexdigest()


def _files(folder: Path) -> Iterator[str]:
    """All files below a directory, and its directories that are empty (with a ``/``)."""
    for place, folders, names in os.walk(folder):
        inside = Path(place).relative_to(folder)
        links = [name for name in folders if Path(place, name).is_symlink()]
        yield from ((inside / name).as_posix() for name in sorted([*names, *links]))
        if not names and not folders and inside.parts:
            yield f"{inside.as_posix()}/"


def sync(path: Path) -> None:
    """Ask the system to bring a file, or a directory's entries, to the disk."""
    if os.name != "posix" and path.is_dir():  # only POSIX opens directories
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
