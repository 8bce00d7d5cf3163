"""The episode store: whole episodes, back to back, in a zarr group.

Layout (that of Diffusion Policy's replay buffers, in zarr format 3)::

    store.zarr/
      zarr.json            attributes: format, version, fields, statistics, and the user's own
      data/<field>         [T, *shape] rows of all episodes, chunked along T, zstd + crc32c
      meta/episode_ends    [E] int64, cumulative; -1 where nothing is published yet
      meta/episode_attrs   JSON lines (UTF-8 bytes), one line an episode

An episode is appended by writing its rows, then its line of attributes, and last of all its end:
one file, replaced atomically. Until then nobody sees the episode, so a writer that is killed
loses that one and no other. While a store is being written its arrays are longer than what is
published; ``finalize`` cuts them to size.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import LocalStore, MemoryStore

from diffpolicy.data import opening
from diffpolicy.data import store_layout as layout
from diffpolicy.data.blocks import episode_rows, read_blocks
from diffpolicy.data.fields import FieldSpec, checked_rows, field_specs, jsonable, user_attrs
from diffpolicy.data.reader import EpisodeReader
from diffpolicy.data.statistics import checksum, compute_statistics
from diffpolicy.files import naming
from diffpolicy.locks import WriterLock
from diffpolicy.settings import check_choice, check_range


class EpisodeStore(EpisodeReader):
    """Episodes on disk (or in memory): append whole ones, read rows of any field.

    Build one with :meth:`create`, :meth:`open` or :meth:`from_arrays`. Used as a context manager it
    is finalized on leaving (but not when an exception leaves). ``obs[t]``, or all ``obs.NAME[t]``,
    is what the policy saw before ``action[t]``. One process writes at a time, from its first append
    until it finalizes or closes the store; others are refused. Any number may read, also meanwhile.
    """

    _latest: ClassVar[weakref.WeakValueDictionary[Path, EpisodeStore]] = (
        weakref.WeakValueDictionary()
    )

    def __init__(self, group: zarr.Group, path: Path | None, *, writable: bool) -> None:
        super().__init__(group, path)
        self._writable = writable
        self._tails: dict[str, layout.Tail] | None = None
        what = "appending to it (until it finalizes or closes the store)"
        self._lock = WriterLock(path, what, wait_s=2.0) if writable and path is not None else None
        self._active = False

    # -- making one ---------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str] | None,
        fields: Mapping[str, tuple[int, ...] | FieldSpec],
        *,
        attrs: Mapping[str, Any] | None = None,
        chunk_rows: int | None = None,
        overwrite: bool = False,
    ) -> EpisodeStore:
        """Create an empty store to append to.

        Args:
            path: A directory that does not exist yet, by custom ``something.zarr``; None keeps the
                store in memory.
            fields: Row shape (float32) or ``FieldSpec`` of each field. To train on it a store needs
                ``obs`` and ``action``.
            attrs: JSON values kept with the store, such as ``{"env_id": ...}``.
            chunk_rows: Rows in a chunk; default as many as fit 256 KiB (of images
                1 MiB), at most 4096.
            overwrite: Replace the store that is at ``path``. Anything else there is left alone.

        Returns:
            The store, open for appending.

        Raises:
            FileExistsError: Something is at ``path``.
            ValueError: No fields, a bad name, shape or attribute.
        """
        specs, user = field_specs(fields), user_attrs(attrs)
        check_range("[1, inf)", chunk_rows=chunk_rows)
        if path is None:
            group = layout.create_group(MemoryStore(), specs, user, chunk_rows)
            return cls(group, None, writable=True)
        target = Path(path)
        if target.suffix == ".zip":
            raise ValueError(f"a zip cannot be appended to: name the directory {target.stem}")
        layout.clear_target(target, overwrite=overwrite, remove=False)
        with WriterLock(target, "making it"), layout.replaced(target) as partial, naming(partial):
            layout.create_group(LocalStore(partial), specs, user, chunk_rows).store.close()
        return cls(opening.open_group(target, writable=True), target, writable=True)

    @classmethod
    def open(cls, path: str | os.PathLike[str], mode: Literal["r", "a"] = "r") -> EpisodeStore:
        """Open a store, or a Diffusion Policy replay buffer (directory or zip) for reading.

        Args:
            path: The store.
            mode: ``"r"`` to read, ``"a"`` to append. Opening with ``"a"`` discards the rows of an
                episode that a killed writer did not finish.

        Returns:
            The store.

        Raises:
            FileNotFoundError: Nothing is there.
            ValueError: It is not a store, or cannot be appended to.
            StoreDamagedError: Its metadata contradict each other, or (to append) the last chunk
                cannot be read.
            BusyError: (to append) Another process is writing to it; names it.
        """
        check_choice("mode", mode, ("r", "a"))
        target = Path(path)
        group = opening.open_group(target, writable=mode == "a")
        try:
            store = cls(group, target, writable=mode == "a")
        except ValueError:
            group.store.close()
            raise
        if mode == "a":
            if not store.is_native:
                store.close()
                raise ValueError(
                    f"{target} is a Diffusion Policy replay buffer, which is only read; make a "
                    f"store of it with `diffpolicy data convert {target} TARGET.zarr`"
                )
            store._begin()
            for leftover in layout.partial_files(target):  # of a killed writer
                leftover.unlink()
            store._trim()
            store._end()
        return store

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, NDArray[Any]],
        episode_ends: Sequence[int] | NDArray[Any],
        *,
        path: str | os.PathLike[str] | None = None,
        attrs: Mapping[str, Any] | None = None,
    ) -> EpisodeStore:
        """Make a store, with statistics, of arrays you have.

        Args:
            arrays: Per field ``[T, ...]``; float64 is stored as float32.
            episode_ends: ``[E]`` cumulative ends: episode i is rows ``ends[i-1]..ends[i]-1``.
            path: Where to write it; None keeps it in memory.
            attrs: JSON values kept with the store.

        Returns:
            The store, open for appending.

        Raises:
            ValueError: Lengths that differ, ends that do not increase strictly up to T, or values
                that are not finite.
            FileExistsError: Something is at ``path``.
        """
        columns = {name: np.asarray(value) for name, value in arrays.items()}
        specs = {
            name: FieldSpec(c.shape[1:], "float32" if c.dtype == np.float64 else str(c.dtype))
            for name, c in columns.items()
        }
        store = cls.create(path, specs, attrs=attrs)
        store.extend(columns, episode_ends)
        store.finalize()
        return store

    # -- writing ------------------------------------------------------------------------------

    def append(self, arrays: Mapping[str, Any], **episode_attrs: Any) -> int:
        """Add one whole episode. When this returns, killing the process does not lose it.

        Args:
            arrays: Every field of the store, ``[T, *shape]`` with one T >= 1, finite.
            **episode_attrs: JSON values to keep with the episode, such as ``seed=3, success=True``.
                ``actions=False`` says that it has none: ``action`` is left out, and reads as 0.

        Returns:
            The episode's index.

        Raises:
            ValueError: Fields, shapes, lengths, types or values that do not fit; nothing was added.
        """
        length = min((len(a) for a in arrays.values() if np.ndim(a)), default=0)
        if episode_attrs.get("actions") is False and "action" in self._fields:
            spec = self._fields["action"]
            arrays = {**arrays, "action": np.zeros((length, *spec.shape), spec.dtype)}
        self.extend(arrays, [length], [episode_attrs])
        return self.num_episodes - 1

    def extend(
        self,
        arrays: Mapping[str, Any],
        episode_ends: Sequence[int] | NDArray[Any],
        episode_attrs: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Add several whole episodes at once, which is faster than one by one.

        Args:
            arrays: Every field of the store, ``[T, *shape]``, the episodes back to back.
            episode_ends: ``[E]`` their ends, counted from 0 in these arrays.
            episode_attrs: E mappings; default ``{}`` each.

        Raises:
            ValueError: As for ``append``.
        """
        self._require_writable()
        ends = np.asarray(episode_ends)
        attrs = [{}] * len(ends) if episode_attrs is None else episode_attrs
        if len(attrs) != len(ends):
            raise ValueError(f"{len(ends)} episodes need as many attributes; got {len(attrs)}")
        columns = {name: np.asarray(value) for name, value in arrays.items()}
        rows = checked_rows(self._fields, columns, ends)
        self._publish({name: [values] for name, values in rows.items()}, ends, attrs)

    def extend_from(self, other: EpisodeReader, episodes: Sequence[int] | NDArray[Any]) -> None:
        """Add episodes of another store, bit for bit and a few megabytes at a time.

        Args:
            other: A store that has the fields of this one, in shape and type.
            episodes: Which of its episodes, in ascending order.

        Raises:
            ValueError: A field that differs.
        """
        self._require_writable()
        for name, spec in self._fields.items():
            if other.fields.get(name) != spec:
                raise ValueError(f"{other.name} has no field {name!r} of {spec}")
        chosen = np.asarray(episodes, np.int64)
        rows, known = episode_rows(other, chosen), other.episode_attrs
        columns = {
            name: (values for _, _, values in read_blocks(other, name, rows))
            for name in self._fields
        }
        self._publish(columns, np.cumsum(other.episode_lengths[chosen]), [known[i] for i in chosen])

    def _publish(
        self,
        columns: Mapping[str, Iterable[NDArray[Any]]],
        ends: NDArray[Any],
        attrs: Sequence[Mapping[str, Any]],
    ) -> None:
        """Write blocks of rows of each field, and last of all the episodes' ends."""
        lines = "".join(json.dumps(jsonable(a, "episode_attrs")) + "\n" for a in attrs)
        self._begin()
        tails, self._tails = self._tails or self._open_tails(), None
        for name, blocks in columns.items():
            for block in blocks:
                tails[f"data/{name}"].append(block)
        tails["meta/episode_attrs"].append(np.frombuffer(lines.encode(), np.uint8))
        new_ends = ends.astype(np.int64) + self.num_steps
        tails["meta/episode_ends"].append(new_ends)
        self._ends = np.concatenate([self._ends, new_ends])
        self._episode_attrs = None
        # Kept only now: after a failure (a full disk) the next call starts from what is published.
        self._tails = tails

    def update_attrs(self, attrs: Mapping[str, Any]) -> None:
        """Add to the store's attributes.

        Raises:
            ValueError: The store is read-only, or a value is not JSON.
        """
        new = user_attrs(attrs)
        appending = self._tails is not None
        self._begin()
        try:
            self._put(new)
        finally:
            if not appending:
                self._end()

    def finalize(self) -> None:
        """Cut the arrays to size, compute the statistics and bring everything to the disk.

        More episodes may be appended afterwards; the statistics are then stale until the next call.

        Raises:
            ValueError: The store is read-only, or holds values that are not finite.
        """
        self._begin()
        try:
            self._trim()
            if self.num_steps:
                values = compute_statistics(self)
                self._put({"statistics": values, "statistics_crc32": checksum(values)})
            if self.path is not None:
                layout.sync_to_disk(self.path)
        finally:
            self._end()

    def close(self) -> None:
        """Finalize if episodes were appended since the last time, then let go of the files."""
        if self._tails is not None:
            self.finalize()
        self._end()
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:  # leave quickly; what was appended is published already
            self._tails = None
        self.close()

    # -- inside -------------------------------------------------------------------------------

    def _require_writable(self) -> None:
        if not self._writable:
            raise ValueError(f"{self.name} is open for reading; use EpisodeStore.open(path, 'a')")

    def _begin(self) -> None:
        """Become the one writer, and know what others have written before.

        Other processes are refused meanwhile, with the name of this one. Another handle of the same
        thread may take its turn; each then finds out that what it knows of the store is old.
        """
        self._require_writable()
        if self._lock is None or self.path is None:  # in memory
            return
        if self._active and self._latest.get(self._lock.path) is self:
            return
        if not self._active:
            self._lock.acquire()
        self._active, self._latest[self._lock.path] = True, self
        self._finalizer()
        super().__init__(opening.open_group(self.path, writable=True), self.path)
        self._tails = None

    def _end(self) -> None:
        """Let others write."""
        if self._lock is not None and self._active:
            self._active = False
            if self._latest.get(self._lock.path) is self:
                del self._latest[self._lock.path]
            self._lock.release()

    def _open_tails(self) -> dict[str, layout.Tail]:
        group, name = self._group, self.name
        tails = {f"data/{k}": layout.Tail(a, self.num_steps) for k, a in self._arrays.items()}
        place = "meta/episode_attrs"
        attrs = opening.child_array(group, place, name)
        lines = opening.read_growing(attrs, f"{name}/{place}", name)
        tails[place] = layout.Tail(attrs, opening.bytes_of_lines(lines, self.num_episodes))
        ends = opening.child_array(group, "meta/episode_ends", name)
        tails["meta/episode_ends"] = layout.Tail(ends, self.num_episodes)
        return tails

    def _put(self, attrs: Mapping[str, Any]) -> None:
        with naming(f"{self.name}/zarr.json"):
            self._group.attrs.update(cast("Any", dict(attrs)))

    def _trim(self) -> None:
        for tail in self._open_tails().values():
            tail.trim()
        self._tails = None
