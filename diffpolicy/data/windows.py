"""Training windows of episodes, gathered a batch at a time.

A window belongs to one step of an episode, its "now". It covers `horizon` steps, from
`n_obs_steps - 1` before now onwards; its first `n_obs_steps` observations are what the policy sees,
the last of them being now's. Where a window reaches over an end of its episode, the frame at that
end is repeated, as in Diffusion Policy (Chi et al. 2023).

Each episode is laid out once with its edges repeated. Every window is then one run of memory, and
a batch is one `index_select` over overlapping runs.
"""

from __future__ import annotations

import copy
import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from diffpolicy.data.blocks import read_blocks
from diffpolicy.data.fields import check_vector

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from diffpolicy.data.normalize import Normalizer
    from diffpolicy.data.store import EpisodeStore

_MEMORY_SHARE = 0.5  # of what is free, above which windows are streamed from the disk


class Windows:
    """All windows of a store's episodes, normalised.

    By default every step of every episode is now exactly once. Diffusion Policy leaves out the
    last `horizon - n_obs_steps - pad_after` steps of each episode; `pad_after=n_action_steps - 1`
    gives its set of windows.

    Args:
        store: The episodes.
        horizon: H, the steps in a window.
        n_obs_steps: To, the observations a policy sees; 1..H.
        n_action_steps: Ta, the actions executed of a plan; 1..H-To+1.
        normalizer: Applied to the fields it knows; the other fields are returned as they are.
        episodes: Indices of the episodes to use (see `split_episodes`); default all.
        fields: The first one is the observation, of which a batch holds To steps; of the others
            it holds H.
        in_memory: True holds everything in memory; False streams it from a temporary file (made
            once, decompressed and normalised, in the directory TMPDIR names), which the system
            maps into memory as needed; None decides by what is free.
        pad_after: How many steps a window may reach over the end of its episode, 0..H-To; default
            H-To.
        whole: A batch holds H steps of the observation too, for plans that hold observations.

    Raises:
        ValueError: Sizes that do not fit each other, unknown fields or episodes, values that are
            not finite, or no window at all.
        StoreDamagedError: The store cannot be read.
    """

    def __init__(
        self,
        store: EpisodeStore,
        *,
        horizon: int,
        n_obs_steps: int,
        n_action_steps: int,
        normalizer: Normalizer | None = None,
        episodes: Sequence[int] | NDArray[np.integer] | None = None,
        fields: Sequence[str] = ("obs", "action"),
        in_memory: bool | None = None,
        pad_after: int | None = None,
        whole: bool = False,
    ) -> None:
        _check_sizes(horizon, n_obs_steps, n_action_steps)
        self.horizon = horizon
        self.n_obs_steps = n_obs_steps
        self.n_action_steps = n_action_steps
        self.pad_after = _checked_pad(pad_after, horizon - n_obs_steps)
        _check_fields(store, fields, normalizer)
        self.fields = tuple(fields)
        self.episodes = checked_episodes(store, episodes)
        ends = store.episode_ends[self.episodes]
        self._first_row = ends - store.episode_lengths[self.episodes]
        self._lengths = store.episode_lengths[self.episodes]

        # Padded layout: To-1 copies of the first row, the episode, pad_after copies of the last.
        front = n_obs_steps - 1
        sizes = self._lengths + front + self.pad_after
        self._counts = np.maximum(sizes - horizon + 1, 0)
        if self._counts.sum() == 0:
            raise ValueError(
                f"no window of {horizon} steps fits: the longest of {len(sizes)} episodes has "
                f"{self._lengths.max(initial=0)} steps, padded by {front} before and "
                f"{self.pad_after} after. Use a shorter horizon or a larger pad_after"
            )
        offsets = np.cumsum(sizes) - sizes
        self._starts = torch.from_numpy(np.repeat(offsets, self._counts) + ranges(self._counts))
        step = ranges(sizes) - front
        length = np.repeat(self._lengths, sizes)
        source = np.repeat(self._first_row, sizes) + np.clip(step, 0, length - 1)
        valid = torch.from_numpy((step >= 0) & (step < length))

        shapes = {name: store.fields[name].shape for name in fields}
        self._shapes = {
            k: (n_obs_steps if k == fields[0] and not whole else horizon, *s)
            for k, s in shapes.items()
        }
        size = 4 * len(source) * sum(int(np.prod(s)) for s in shapes.values())
        self.in_memory = size <= _MEMORY_SHARE * _free_memory() if in_memory is None else in_memory
        self._device = torch.device("cpu")
        self._runs = {
            name: _runs(
                load_rows(store, name, source, normalizer, in_memory=self.in_memory),
                self._shapes[name][0],
            )
            for name in fields
        }
        self._valid = _runs(valid[:, None], horizon)

    def __len__(self) -> int:
        return len(self._starts)

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        """A batch of windows.

        Args:
            indices: `[B]` int64, each in 0..len-1.

        Returns:
            Per field `[B, To or H, *shape]` float32, normalised: `obs` `[B, To, O]` and `action`
            `[B, H, A]`; and `valid` `[B, H]` bool, False where an edge was repeated. All new
            tensors, on the windows' device.

        Raises:
            IndexError: An index is out of range (on the CPU).
        """
        indices = indices.to(self._starts.device)
        starts = self._starts.index_select(0, indices)
        batch = {
            name: runs.index_select(0, starts).view(-1, *self._shapes[name])
            for name, runs in self._runs.items()
        }
        batch["valid"] = self._valid.index_select(0, starts)
        if self._starts.device != self._device:  # streamed: the rows come from the disk
            batch = {name: value.to(self._device) for name, value in batch.items()}
        return batch

    def locate(self, index: int) -> tuple[int, int]:
        """Where window `index` is: its episode in the store, and its now, a step of that episode.

        Raises:
            IndexError: No such window.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        ends = np.cumsum(self._counts)
        place = int(np.searchsorted(ends, index, side="right"))
        return int(self.episodes[place]), index - int(ends[place] - self._counts[place])

    def identity(self) -> dict[str, Any]:
        """What these windows are, for telling one training run from another: sizes and rows."""
        rows = {name: _rows(runs) for name, runs in self._runs.items()}
        counts = {"windows": len(self), "episodes": len(self.episodes), "lengths": self._lengths}
        sizes = ("horizon", "n_obs_steps", "n_action_steps", "pad_after")
        return {**counts, **{name: getattr(self, name) for name in sizes}, **rows}

    def to(self, device: torch.device | str) -> Windows:
        """The same windows with batches on `device`; in memory, the data move there too."""
        moved = copy.copy(self)
        moved._device = torch.device(device)
        if self.in_memory:
            moved._starts = self._starts.to(device)
            moved._runs = {k: _moved(v, device) for k, v in self._runs.items()}
            moved._valid = _moved(self._valid, device)
        return moved

    def __repr__(self) -> str:
        where = "in memory" if self.in_memory else "streamed"
        return (
            f"Windows({len(self)} of {self.horizon} steps, {len(self.episodes)} episodes, {where})"
        )


def split_episodes(
    num_episodes: int, val_fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split by episode, so that no validation window overlaps a training one.

    Args:
        num_episodes: How many there are.
        val_fraction: Share to validate on, 0..1 without 1; if above 0 at least one episode, and at
            least one is left to train on.
        seed: Decides which.

    Returns:
        Training and validation episodes, each in ascending order.

    Raises:
        ValueError: A fraction outside the range, or fewer than two episodes to split.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be in [0, 1); got {val_fraction}")
    if num_episodes < (2 if val_fraction else 1):
        raise ValueError(f"{num_episodes} episodes cannot be split; set val_fraction=0")
    count = 0
    if val_fraction:
        count = min(max(1, round(num_episodes * val_fraction)), num_episodes - 1)
    order = np.random.default_rng(seed).permutation(num_episodes)
    return np.sort(order[count:]), np.sort(order[:count])


def _check_sizes(horizon: int, n_obs_steps: int, n_action_steps: int) -> None:
    if horizon < 1 or not 1 <= n_obs_steps <= horizon:
        raise ValueError(
            f"n_obs_steps must be in 1..horizon; got n_obs_steps={n_obs_steps}, horizon={horizon}"
        )
    limit = horizon - n_obs_steps + 1
    if not 1 <= n_action_steps <= limit:
        raise ValueError(
            f"n_action_steps must be in 1..{limit} (horizon - n_obs_steps + 1: the plan from now "
            f"on); got {n_action_steps} with horizon={horizon}, n_obs_steps={n_obs_steps}"
        )


def _checked_pad(pad_after: int | None, limit: int) -> int:
    if pad_after is None:
        return limit
    if not 0 <= pad_after <= limit:
        raise ValueError(
            f"pad_after must be in 0..{limit} (horizon - n_obs_steps); got {pad_after}"
        )
    return pad_after


def _check_fields(
    store: EpisodeStore, fields: Sequence[str], normalizer: Normalizer | None
) -> None:
    missing = [name for name in fields if name not in store.fields]
    if missing or not fields:
        raise ValueError(
            f"{store.name} has no field {missing}; it has {sorted(store.fields)}. Training needs "
            "obs and action: `diffpolicy data convert` makes them of other fields"
        )
    for name in fields:
        shape = store.fields[name].shape
        if name in ("obs", "action"):
            check_vector(name, shape, store.name)
        if normalizer and name in normalizer.fields and normalizer.shape(name) != shape:
            raise ValueError(
                f"the normaliser was fitted to {name!r} of shape {list(normalizer.shape(name))}, "
                f"but {store.name} holds {list(shape)}; fit it to this store"
            )


def checked_episodes(
    store: EpisodeStore, episodes: Sequence[int] | NDArray[np.integer] | None
) -> NDArray[np.int64]:
    """Indices of the episodes to use, ascending; all of the store's unless given.

    Raises:
        ValueError: An index out of range, or one that comes twice.
    """
    if episodes is None:
        return np.arange(store.num_episodes)
    chosen = np.sort(np.asarray(episodes, dtype=np.int64))
    if len(chosen) and (chosen[0] < 0 or chosen[-1] >= store.num_episodes):
        raise ValueError(
            f"episodes must be in 0..{store.num_episodes - 1}; got {chosen[0]}..{chosen[-1]}"
        )
    if len(np.unique(chosen)) != len(chosen):
        raise ValueError("episodes must be different from each other; some come twice")
    return chosen


def ranges(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """0..n-1 for each n of `counts`, one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _runs(rows: Tensor, length: int) -> Tensor:
    """View `[T, ...]` as the overlapping runs of `length` rows: `[T-length+1, length * D]`."""
    flat = rows.reshape(len(rows), -1)
    width = flat.shape[1]
    return flat.as_strided((len(flat) - length + 1, length * width), (width, 1))


def _rows(runs: Tensor) -> Tensor:
    """The rows `[T, D]` that overlapping runs are made of."""
    (count, size), width = runs.shape, runs.stride(0)
    return runs.as_strided((count - 1 + size // width, width), (width, 1))


def _moved(runs: Tensor, device: torch.device | str) -> Tensor:
    """Runs on another device, still overlapping (a plain `.to` would write each of them out)."""
    return _runs(_rows(runs).to(device), runs.shape[1] // runs.stride(0))


def load_rows(
    store: EpisodeStore,
    field: str,
    source: NDArray[np.int64],
    normalizer: Normalizer | None,
    *,
    in_memory: bool,
) -> Tensor:
    """Rows `source` of a field, normalised, as float32 `[len(source), D]`."""
    width = int(np.prod(store.fields[field].shape))
    rows = torch.empty(len(source), width) if in_memory else _on_disk(len(source), width)
    for start, stop, values in read_blocks(store, field, source):
        block = torch.from_numpy(values.astype(np.float32))
        if normalizer is not None and field in normalizer.fields:
            block = normalizer.normalize(field, block)
        block = block.reshape(stop - start, width)
        if not bool(torch.isfinite(block).all()):
            row = int(source[start + int(torch.isfinite(block).all(1).logical_not().nonzero()[0])])
            episode = int(np.searchsorted(store.episode_ends, row, side="right"))
            raise ValueError(
                f"{store.name}: field {field!r} is not finite at row {row} (episode {episode}); "
                f"`diffpolicy data check {store.name}` lists every such row"
            )
        rows[start:stop] = block
    return rows


def _on_disk(rows: int, width: int) -> Tensor:
    """A float32 tensor `[rows, width]` in a temporary file that goes when the tensor does.

    Its place on the disk is taken at once: where a file has holes and the disk fills, the system
    kills the process (SIGBUS) at whatever row it is.

    Raises:
        OSError: The disk is full, with the file's name.
    """
    handle, name = tempfile.mkstemp(prefix="diffpolicy-windows-")
    path = Path(name)
    try:
        _reserve(handle, path, 4 * rows * width)
        tensor = torch.from_numpy(np.memmap(path, np.float32, "r+", shape=(rows, width)))
    except BaseException:
        path.unlink()
        raise
    finally:
        os.close(handle)
    if os.name == "posix":  # the mapping outlives the name
        path.unlink()
    return tensor


def _reserve(handle: int, path: Path, size: int) -> None:
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)
            return
        free = shutil.disk_usage(path.parent).free
        if free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.truncate(handle, size)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{os.strerror(error.errno or 0)}: windows streamed from the disk need "
            f"{size / 2**20:.0f} MiB there. Set TMPDIR to a folder of a disk with more room, or "
            "train on fewer episodes",
            str(path),
        ) from error


def _free_memory() -> int:
    """Bytes of memory that are free, as far as the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields: Mapping[str, str] = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 2**33
