"""Training windows of episodes, gathered a batch at a time.

A window belongs to one step of an episode, its "now". It covers ``horizon`` steps, from
``n_obs_steps - 1`` before now onwards; its first ``n_obs_steps`` observations are what the policy
sees, the last of them being now's. Where a window reaches over an end of its episode, the frame at
that end is repeated, as in Diffusion Policy (Chi et al. 2023).

Of vectors each episode is laid out once with its edges repeated. Every window is then one run of
memory, and a batch is one ``index_select`` over overlapping runs. Images are held once, as they
are, and gathered frame by frame.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffpolicy.data.action_groups import Representation
from diffpolicy.data.blocks import Ints, episode_rows, ranges
from diffpolicy.data.fields import check_has, check_rows_train
from diffpolicy.data.joined import apart
from diffpolicy.data.normalize import Normalizer
from diffpolicy.data.observation import each, from_fields, is_obs, obs_fields
from diffpolicy.data.reader import EpisodeReader
from diffpolicy.data.rows import checked_episodes, free_memory, is_raw, load_rows
from diffpolicy.data.statistics import RunningStatistics
from diffpolicy.data.store import EpisodeStore
from diffpolicy.settings import check_range, check_shape

_MEMORY_SHARE = 0.5  # of what is free, above which windows are streamed from the disk


class Windows:
    """All windows of a store's episodes, normalised.

    By default every step of every episode is now exactly once. Diffusion Policy leaves out the
    last ``horizon - n_obs_steps - pad_after`` steps of each episode;
    ``pad_after=n_action_steps - 1`` gives its set of windows.

    Args:
        store: The episodes.
        horizon: H, the steps in a window.
        n_obs_steps: To, the observations a policy sees; 1..H.
        n_action_steps: Ta, the actions executed of a plan; 1..H-To+1.
        normalizer: Applied to the fields it knows; the other fields are returned as they are.
        episodes: Indices of the episodes to use (see :func:`split_episodes`); default all.
        fields: What a batch holds; default the store's observations (``obs``, or all ``obs.NAME``)
            and ``action``. The first one and all observations have To steps, the others H.
        in_memory: True holds everything in memory; False streams it from a temporary file (made
            once, decompressed and normalised, in the directory TMPDIR names), which the system
            maps into memory as needed; None decides by what is free.
        pad_after: How many steps a window may reach over the end of its episode, 0..H-To; default
            H-To.
        whole: A batch holds H steps of the observation too, for plans that hold observations.
        actions: How plans say actions; the normaliser's field ``action`` is then of what they say.
            Default: as they are.

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
        fields: Sequence[str] | None = None,
        in_memory: bool | None = None,
        pad_after: int | None = None,
        whole: bool = False,
        actions: Representation | None = None,
    ) -> None:
        check_sizes(horizon, n_obs_steps)
        limit = horizon - n_obs_steps  # the steps of a plan after now
        check_range(f"[1, {limit + 1}]", n_action_steps=n_action_steps)
        check_range(f"[0, {limit}]", pad_after=pad_after)
        self.horizon, self.n_obs_steps, self.n_action_steps = horizon, n_obs_steps, n_action_steps
        self.pad_after = limit if pad_after is None else pad_after
        self._actions, self._normalizer = actions, normalizer
        own = normalizer if actions is None or normalizer is None else normalizer.without("action")
        self.fields = _checked_fields(store, fields, own)
        self.episodes = checked_episodes(store, episodes)
        self._lengths = store.episode_lengths[self.episodes]
        self._device = torch.device("cpu")
        used, valid = self._lay_out()

        rows = episode_rows(store, self.episodes)
        specs = {name: store.fields[name] for name in self.fields}
        self._shapes = {
            name: (n_obs_steps if not whole and _seen(name, self.fields) else horizon, *spec.shape)
            for name, spec in specs.items()
        }
        raw = {name: is_raw(name, spec, own) for name, spec in specs.items()}
        size = sum(
            len(rows) * spec.row_bytes if raw[name] else 4 * len(used) * spec.size
            for name, spec in specs.items()
        )
        self.in_memory = size <= _MEMORY_SHARE * free_memory() if in_memory is None else in_memory
        self._runs, self._frames = {}, {}
        for name in self.fields:
            wanted = rows if raw[name] else rows[used]
            table = load_rows(store, {name: wanted}, own, in_memory=self.in_memory)
            if raw[name]:
                self._frames[name] = table
            else:
                self._runs[name] = _runs(table, self._shapes[name][0])
        self._valid = _runs(valid[:, None], horizon)
        self._used = torch.from_numpy(used) if self._frames else torch.zeros(0, dtype=torch.int64)

    def _lay_out(self) -> tuple[Ints, Tensor]:
        """Pad every episode: To-1 copies of the first row, its rows, pad_after copies of the last.

        Returns:
            Per place of the padded episodes, back to back, the row of the episodes' own that is
            there, and whether it is no copy.
        """
        front = self.n_obs_steps - 1
        sizes = self._lengths + front + self.pad_after
        self._counts = np.maximum(sizes - self.horizon + 1, 0)
        if self._counts.sum() == 0:
            raise ValueError(
                f"no window of {self.horizon} steps fits: the longest of {len(sizes)} episodes has "
                f"{self._lengths.max(initial=0)} steps, padded by {front} and {self.pad_after}"
            )
        # Window k of an episode begins at place k of its padded rows.
        offsets = np.cumsum(sizes) - sizes
        self._starts = torch.from_numpy(np.repeat(offsets, self._counts) + ranges(self._counts))
        # Of each episode the place of its last step, and how many windows there are up to its end.
        self._finals = torch.from_numpy(offsets + front + self._lengths - 1)
        self._through = torch.from_numpy(np.cumsum(self._counts))
        step = ranges(sizes) - front
        length = np.repeat(self._lengths, sizes)
        first = np.repeat(np.cumsum(self._lengths) - self._lengths, sizes)
        valid = torch.from_numpy((step >= 0) & (step < length))
        return first + np.clip(step, 0, length - 1), valid

    def __len__(self) -> int:
        return len(self._starts)

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        """Return a batch of windows.

        Args:
            indices: ``[B]`` int64, each in 0..len-1.

        Returns:
            Per field ``[B, To or H, *shape]``: vectors as float32, normalised, such as ``obs``
            ``[B, To, O]`` and ``action`` ``[B, H, A]``; images in the store's type. And ``valid``
            ``[B, H]`` bool, False where an edge was repeated. All new tensors, on the windows'
            device.

        Raises:
            IndexError: An index is out of range (on the CPU).
        """
        starts = self._starts.index_select(0, indices.to(self._starts.device))
        batch = {
            name: runs.index_select(0, starts).view(-1, *self._shapes[name])
            for name, runs in self._runs.items()
        }
        for name, frames in self._frames.items():
            steps = torch.arange(self._shapes[name][0], device=starts.device)
            places = (starts[:, None] + steps).flatten()
            rows = self._used.index_select(0, places).to(frames.device)
            batch[name] = frames.index_select(0, rows).view(-1, *self._shapes[name])
        batch["valid"] = self._valid.index_select(0, starts)
        batch = {name: value.to(self._device) for name, value in batch.items()}
        if self._actions is not None:
            batch["action"] = self._said(batch, self._actions)
        return batch

    def _said(self, batch: dict[str, Tensor], actions: Representation) -> Tensor:
        """The actions of a batch as plans say them in the state of its now, normalised."""
        plan, known = actions.entries(batch["action"]), self._normalizer
        if actions.moves:
            now = each(lambda obs: obs[:, self.n_obs_steps - 1], from_fields(batch))
            plan = actions.relative(plan, now if known is None else known.unnormalize_obs(now))
        return plan if known is None else known.normalize("action", plan)

    def left(self, indices: Tensor) -> Tensor:
        """Return how many steps follow the now of each window in its episode, ``[B]`` int64."""
        now = self._starts.index_select(0, indices.to(self._starts.device)) + self.n_obs_steps - 1
        episode = torch.searchsorted(
            self._through.to(now.device), indices.to(now.device), right=True
        )
        return self._finals.to(now.device)[episode] - now

    def later(self, field: str, indices: Tensor, steps: Tensor) -> Tensor:
        """Return rows of a field so many steps after the now of each window.

        Args:
            field: one of a batch.
            indices: ``[B]`` of windows.
            steps: ``[B]``, 0 to what is :meth:`left`.

        Returns:
            ``[B, *shape]``, as a batch has them.
        """
        starts = self._starts.index_select(0, indices.to(self._starts.device))
        places = starts + self.n_obs_steps - 1 + steps.to(starts.device)
        if field in self._runs:
            rows = _rows(self._runs[field]).index_select(0, places)
        else:
            frames = self._frames[field]
            rows = frames.index_select(0, self._used.index_select(0, places).to(frames.device))
        return rows.view(-1, *self._shapes[field][1:]).to(self._device)

    def locate(self, index: int) -> tuple[int, int]:
        """Return where window ``index`` is: its episode, and its now, a step of that episode.

        Raises:
            IndexError: No such window.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        ends = np.cumsum(self._counts)
        place = int(np.searchsorted(ends, index, side="right"))
        return int(self.episodes[place]), index - int(ends[place] - self._counts[place])

    def identity(self) -> dict[str, Any]:
        """Return what these windows are, for telling one run from another: sizes and rows."""
        rows = {name: _rows(runs) for name, runs in self._runs.items()} | self._frames
        counts = {"windows": len(self), "episodes": len(self.episodes), "lengths": self._lengths}
        sizes = ("horizon", "n_obs_steps", "n_action_steps", "pad_after")
        return {**counts, **{name: getattr(self, name) for name in sizes}, **rows}

    def to(self, device: torch.device | str) -> Windows:
        """Return the same windows with batches on ``device``.

        In memory, the data move there too, but for images, of which there is usually not room.
        """
        moved = copy.copy(self)
        moved._device = torch.device(device)
        if self._actions is not None and self._normalizer is not None:
            moved._normalizer = self._normalizer.to(device)
        if self.in_memory:
            moved._starts, moved._used = self._starts.to(device), self._used.to(device)
            moved._runs = {k: _moved(v, device) for k, v in self._runs.items()}
            moved._valid = _moved(self._valid, device)
        return moved

    def __repr__(self) -> str:
        where = "in memory" if self.in_memory else "streamed"
        return (
            f"Windows({len(self)} of {self.horizon} steps, {len(self.episodes)} episodes, {where})"
        )


def said_statistics(windows: Windows) -> dict[str, Any]:
    """Statistics of the actions of all windows, edges included, as their batches hold them.

    Those of a store are of actions as they are; of what plans say relative to the state it knows
    nothing.
    """
    width = windows.gather(torch.zeros(1, dtype=torch.int64))["action"].shape[-1]
    running = RunningStatistics("action", (width,), len(windows) * windows.horizon)
    for some in torch.split(torch.arange(len(windows)), 1024):
        running.update(windows.gather(some)["action"].flatten(0, 1).numpy())
    return running.result()


def split_episodes(num_episodes: int, val_fraction: float, seed: int) -> tuple[Ints, Ints]:
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
    check_range("[0, 1)", val_fraction=val_fraction)
    if num_episodes < (2 if val_fraction else 1):
        raise ValueError(f"{num_episodes} episodes cannot be split; set val_fraction=0")
    count = 0
    if val_fraction:
        count = min(max(1, round(num_episodes * val_fraction)), num_episodes - 1)
    order = np.random.default_rng(seed).permutation(num_episodes)
    return np.sort(order[count:]), np.sort(order[:count])


def split_store(
    store: EpisodeReader, episodes: Ints, val_fraction: float, seed: int
) -> tuple[Ints, Ints]:
    """Split some episodes of a store, those of each part by themselves; see :func:`split_episodes`.

    Args:
        store: The store, or a joined one.
        episodes: Of which episodes.
        val_fraction: Share of each part to validate on.
        seed: Decides which.

    Returns:
        Training and validation episodes.
    """
    halves = [
        [own[half] for half in split_episodes(len(own), val_fraction, seed)]
        for own in apart(store, episodes).values()
    ]
    train, val = (np.concatenate(parts) for parts in zip(*halves, strict=True))
    return train, val


def check_sizes(horizon: int, n_obs_steps: int) -> None:
    """Raise ``ValueError`` unless a window of H steps has room for To observations."""
    check_range("[1, inf)", horizon=horizon)
    check_range(f"[1, {horizon}]", n_obs_steps=n_obs_steps)


def _checked_fields(
    store: EpisodeStore, fields: Sequence[str] | None, normalizer: Normalizer | None
) -> tuple[str, ...]:
    names = (*(obs_fields(store) or ["obs"]), "action") if fields is None else tuple(fields)
    why = ". Training needs obs and action, which `diffpolicy data convert` makes of other fields"
    check_has(store.name, names or ["obs"], store.fields, why)
    check_rows_train({name: store.fields[name] for name in names}, store.name)
    for name in names:
        if normalizer and name in normalizer.fields:
            what = f"by the normaliser rows of {name!r} in {store.name}"
            check_shape(what, store.fields[name].shape, normalizer.shape(name))
    return names


def _seen(name: str, fields: Sequence[str]) -> bool:
    """Whether a field is (a part of) the observation."""
    return name == fields[0] or is_obs(name)


def _runs(rows: Tensor, length: int) -> Tensor:
    """View ``[T, D]`` as the overlapping runs of ``length`` rows: ``[T-length+1, length * D]``."""
    width = rows.shape[1]
    return rows.as_strided((len(rows) - length + 1, length * width), (width, 1))


def _rows(runs: Tensor) -> Tensor:
    """View overlapping runs as the rows ``[T, D]`` that they are made of."""
    (count, size), width = runs.shape, runs.stride(0)
    return runs.as_strided((count - 1 + size // width, width), (width, 1))


def _moved(runs: Tensor, device: torch.device | str) -> Tensor:
    """Runs on another device, still overlapping (a plain ``.to`` would write each of them out)."""
    return _runs(_rows(runs).to(device), runs.shape[1] // runs.stride(0))
