"""How a preference file lies on disk: JSON lines beside an episode store.

```
{"format": "diffpolicy-preferences", "version": 1, "store": "door.zarr",
 "episodes": 25, "steps": 6729, "ends": "<sha256 of episode_ends>",
 "content": "<digest of the episodes>", "attrs": {}}
{"kind": "pair", "chosen": [[3, 10, 50]], "rejected": [[7, 0, 50]], "source": "human"}
{"kind": "ranking", "items": [[[0, 0, 8]], [[2, 0, 8]], [[1, 0, 8]]]}
{"kind": "label", "item": [[4, 100, 50]], "good": true}
{"kind": "store", "episodes": 31, "steps": 8210, "ends": "...", "content": "..."}
```

Each line ends with ``,"crc32":"<8 digits>"}``, the CRC-32 of the line without it, which is checked
when the file is read. A line without one is read too, as older files have them; whoever corrects a
line by hand removes that member. The header is one line; a span is ``[episode, start, length]``.
The last kind of line says that the store has grown since, and stands before the first record of a
new episode. Records are only ever appended, with one write and one fsync, so that a writer that is
killed leaves at most one torn line at the end; readers pass over it and the next writer removes it.
One writer at a time, any number of readers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffpolicy.data.blocks import content_digest
from diffpolicy.data.preferences.records import Record, check_fits, record_from_json
from diffpolicy.data.store import EpisodeStore
from diffpolicy.files import write_atomic
from diffpolicy.settings import ConfigError, from_values

FORMAT = "diffpolicy-preferences"
VERSION = 2  # 1 had no checksums
_CHECKED = re.compile(rb',"crc32":"([0-9a-f]{8})"}')
_ALTERED = "Copy the file again; if somebody corrected the line, remove its member 'crc32'"
NO_CONTENT = (
    "made by an earlier version, without a digest of the store's values: that the store is the one "
    "it was made for is known by the episodes' lengths alone"
)


class PreferenceFileError(ValueError):
    """A preference file is not one, is damaged, or does not belong to the store."""


@dataclass(frozen=True)
class Mark:
    """Which episodes a store had.

    Attributes:
        episodes: Their number E.
        steps: Their steps together.
        ends: SHA-256 (hexadecimal) of their cumulative ends as little-endian int64.
        content: Digest of their values (``diffpolicy.data.blocks``); None in memory, and in
            files of earlier versions, which cannot tell stores of equal lengths apart.
    """

    episodes: int
    steps: int
    ends: str
    content: str | None = None


@dataclass(frozen=True, kw_only=True)
class Header(Mark):
    """The first line: the mark of the store when the file was made, and more."""

    format: str
    version: int
    store: str
    attrs: dict[str, Any] = field(default_factory=dict)


@dataclass
class Contents:
    """What a file holds; more is appended to a file that nobody else writes.

    Attributes:
        path: The file.
        header: The first line.
        lines: The other whole lines that were read, each with its number from 1.
        kept: Bytes of all whole lines.
        size: Bytes of the file, a torn last line included.
        closed: Whether the last whole line ends with a newline.
    """

    path: Path
    header: Header
    lines: list[tuple[int, bytes]]
    kept: int
    size: int
    closed: bool

    def append(self, values: list[dict[str, Any]]) -> None:
        """Append JSON lines; when this returns they are on the disk.

        Raises:
            PreferenceFileError: Somebody else wrote to the file since it was read.
            OSError: The disk is full, or the file cannot be written; nothing was added.
        """
        data = b"".join(_encoded(value) for value in values)
        data = data if self.closed else b"\n" + data
        with self.path.open("r+b", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size != self.size:
                raise PreferenceFileError(
                    f"{self.path} had {self.size} bytes when it was read and has {size} now: "
                    "another program writes to it. Stop one of them and open the file again"
                )
            try:
                file.truncate(self.kept)
                file.seek(self.kept)
                _write_all(file, data)
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(self.kept)
                    self.size = self.kept
                raise
        self.kept = self.size = self.kept + len(data)
        self.closed = True


def _write_all(file: Any, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def read_contents(path: Path) -> Contents:
    """Read a file and check its header.

    Raises:
        FileNotFoundError: Nothing is there.
        PreferenceFileError: It does not begin with a header that this version understands.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no preference file at {path}; `diffpolicy data prefs` makes them")
    data = path.read_bytes()
    kept, closed = len(data), data.endswith(b"\n")
    last = data[data.rfind(b"\n") + 1 :]
    # Torn is what a killed writer left; a line with its checksum was whole, and is damaged.
    if not closed and not _is_json(last) and not _CHECKED.search(last):
        kept, closed = data.rfind(b"\n") + 1, True
    first, *lines = data[:kept].removesuffix(b"\n").split(b"\n")
    header = _checked_header(path, first)
    numbered = [(i, line) for i, line in enumerate(lines, start=2) if line.strip()]
    return Contents(path, header, numbered, kept, len(data), closed)


def check_overwritten(path: Path, *, overwrite: bool) -> None:
    """Raise ``FileExistsError`` unless what is there is a preference file that may be replaced."""
    if not overwrite:
        raise FileExistsError(f"{path} exists; choose another path, or overwrite=True")
    try:
        read_contents(path)
    except (FileNotFoundError, PreferenceFileError) as error:
        raise FileExistsError(f"{path} exists and is not a preference file: it stays") from error


def _checked_header(path: Path, line: bytes) -> Header:
    try:
        values = _parsed_line(line)
    except ValueError:
        values = None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise PreferenceFileError(
            f"{path}, line 1: expected a header with 'format': {FORMAT!r}; got {line[:60]!r}"
        )
    try:
        header = from_values(Header, values)
    except ConfigError as error:
        raise PreferenceFileError(f"{path}, line 1: {error}") from None
    if not 1 <= header.version <= VERSION:
        raise PreferenceFileError(
            f"{path}, line 1: version {header.version}; this diffpolicy reads up to {VERSION}: "
            "update it"
        )
    return header


def open_store(
    contents: Contents, store: EpisodeStore | str | os.PathLike[str] | None
) -> EpisodeStore:
    """Open the episodes of a file: those given, or those that its header names.

    Raises:
        FileNotFoundError: There are none.
        PreferenceFileError: They are not those that the file was made for.
    """
    if store is None:
        place = contents.path.parent / contents.header.store
        if not place.exists():
            raise FileNotFoundError(
                f"{contents.path} belongs to a store that is not at {place}; say where: store=..."
            )
        store = place
    found = EpisodeStore.open(store) if isinstance(store, str | os.PathLike) else store
    _check_mark(contents.header, found, f"{contents.path}, line 1")
    return found


def write_header(path: Path, store: Path, mark: Mark, attrs: dict[str, Any]) -> None:
    """Make a file that has only a header, in place of what is there."""
    try:
        place = Path(os.path.relpath(store.resolve(), path.parent.resolve())).as_posix()
    except ValueError:  # another drive: there is no way from here to there
        place = store.resolve().as_posix()
    header = {"format": FORMAT, "version": VERSION, "store": place, **asdict(mark), "attrs": attrs}
    write_atomic(path, _encoded(header))


def parsed(
    contents: Contents, store: EpisodeStore
) -> Iterator[tuple[int, Record | Mark | ValueError]]:
    """Yield the number of each line, and what it holds or what is wrong with it."""
    lengths = store.episode_lengths
    for number, line in contents.lines:
        try:
            value = _parsed_line(line)
            if isinstance(value, dict) and value.get("kind") == "store":
                mark = from_values(Mark, {k: v for k, v in value.items() if k != "kind"})
                _check_mark(mark, store, "a 'store' line")
                yield number, mark
            else:
                record = record_from_json(value)
                check_fits(record, lengths)
                yield number, record
        except ValueError as error:
            yield number, error


def _encoded(value: dict[str, Any]) -> bytes:
    """One line of a file."""
    line = json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    return line[:-1] + f',"crc32":"{zlib.crc32(line):08x}"}}\n'.encode()


def _parsed_line(line: bytes) -> Any:
    """The JSON value of a line.

    Raises:
        ValueError: It is not strict JSON (NaN and Infinity are refused too), or its checksum says
            that it was altered.
    """
    found = _CHECKED.search(line, max(0, len(line) - 20))
    if found is not None and found.end() == len(line):
        line = line[: found.start()] + b"}"
        if zlib.crc32(line) != int(found[1], 16):
            raise ValueError(f"the line was altered: it has another checksum. {_ALTERED}")
    try:
        value = json.loads(line, parse_constant=_no_constant)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"expected one JSON object; got {line[:60]!r} ({error})") from error
    if isinstance(value, dict) and "crc32" in value:
        raise ValueError(f"the line was altered: its checksum is not at its end. {_ALTERED}")
    return value


def _is_json(line: bytes) -> bool:
    try:
        _parsed_line(line)
    except ValueError:
        return False
    return True


def _no_constant(name: str) -> float:
    raise ValueError(f"numbers must be finite; got {name}")


def mark_of(store: EpisodeStore, episodes: int | None = None, *, content: bool = True) -> Mark:
    """Tell which episodes a store has; with ``episodes`` only the first so many.

    Without ``content`` their values are not read.
    """
    ends: NDArray[np.int64] = store.episode_ends[:episodes]
    digest = hashlib.sha256(ends.astype("<i8").tobytes()).hexdigest()
    values = content_digest(store, len(ends)) if content else None
    return Mark(len(ends), int(ends[-1]) if len(ends) else 0, digest, values)


def _check_mark(mark: Mark, store: EpisodeStore, where: str) -> None:
    """Make sure that a store (which may have grown since) is the one that a file was made for.

    Raises:
        PreferenceFileError: Its first episodes are others.
    """
    found = mark_of(store, mark.episodes, content=False)
    if (found.episodes, found.steps, found.ends) != (mark.episodes, mark.steps, mark.ends):
        differs = (
            f"made for a store of {mark.episodes} episodes and {mark.steps} steps (ends "
            f"{mark.ends[:12]}...), but the first {found.episodes} episodes of {store.name} have "
            f"{found.steps} steps (ends {found.ends[:12]}...)"
        )
    elif mark.content not in (None, content_digest(store, mark.episodes)):
        differs = (
            f"made for a store whose first {mark.episodes} episodes have the same lengths as those "
            f"of {store.name}, but other values: it was made anew, or changed since"
        )
    else:
        return
    raise PreferenceFileError(
        f"{where}: {differs}. Open it with the store that it was made for (store=...), or make the "
        "preferences again"
    )
