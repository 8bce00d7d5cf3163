"""Transitions for temporal-difference learning: a plan, what it earned, and where it led.

A transition belongs to one step of an episode, its "now". Its observations and actions are those of
:class:`~diffpolicy.data.windows.Windows`; beside them it holds the discounted reward of the steps
from now on that the plan covers, the observations after them, and the discount of whatever follows.
Everything is held once, in memory; a batch is index arithmetic over it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffpolicy.data.blocks import Ints, episode_rows
from diffpolicy.data.fields import check_has, check_rows_train
from diffpolicy.data.normalize import Normalizer
from diffpolicy.data.observation import obs_fields
from diffpolicy.data.rows import check_finite, checked_episodes, is_raw, load_rows
from diffpolicy.data.store import EpisodeStore
from diffpolicy.data.windows import check_sizes
from diffpolicy.settings import check_range, check_shape

Floats = NDArray[np.float64]


class Transitions:
    """All transitions of a store's episodes, normalised.

    The store needs ``obs`` (or ``obs.NAME``), ``action``, ``reward`` and ``terminated``; it may
    have ``truncated`` and ``next_obs`` (or ``next_obs.NAME``, one for each). An episode also ends
    wherever one of the two flags is set inside of it. From now, a plan runs
    ``n = min(horizon - n_obs_steps + 1, steps left)`` steps. A terminal end is worth 0 afterwards.
    After any other end the episode would have gone on: with ``next_obs``, its value is that of the
    last ``next_obs``; without, that of the last observation, so that the last step itself has
    nothing to learn from and is left out (as in D4RL's ``qlearning_dataset``). Inside an episode
    the next observation is the following row's, whatever ``next_obs`` says.

    Args:
        store: The episodes.
        horizon: H, the actions in a plan. Its first ``n_obs_steps - 1`` lie before now, as in
            ``Windows``.
        n_obs_steps: To, the observations that the policy and the critic see; 1..H.
        normalizer: Applied to observations, next observations (as observations) and actions where
            it knows them.
        discount: Per environment step, in (0, 1].
        reward_scale: Rewards are taken as ``reward * reward_scale + reward_shift``.
        reward_shift: See ``reward_scale``.
        episodes: Indices of the episodes to use; default all.

    Raises:
        ValueError: Sizes or a discount out of range, missing or misshapen fields, values that are
            not finite, or no transition at all.
        StoreDamagedError: The store cannot be read.
    """

    def __init__(
        self,
        store: EpisodeStore,
        *,
        horizon: int,
        n_obs_steps: int = 1,
        normalizer: Normalizer | None = None,
        discount: float = 0.99,
        reward_scale: float = 1.0,
        reward_shift: float = 0.0,
        episodes: Sequence[int] | NDArray[np.integer] | None = None,
    ) -> None:
        check_sizes(horizon, n_obs_steps)
        check_range("(0, 1]", discount=discount)
        check_range("(0, inf)", reward_scale=reward_scale)
        follows = check_fields(store)
        self.horizon, self.n_obs_steps, self.discount = horizon, n_obs_steps, discount
        self.episodes = checked_episodes(store, episodes)
        self._lengths = store.episode_lengths[self.episodes]
        source = episode_rows(store, self.episodes)

        first, last, stretch = _stretches(store, source, self._lengths)
        terminal = (_read_flat(store, "terminated", source) != 0)[last]
        followed = terminal | bool(follows)
        row = np.arange(len(source))
        steps = np.minimum(horizon - n_obs_steps + 1, (last + followed)[stretch] - row)
        self._now = torch.from_numpy(np.flatnonzero(steps > 0))
        if len(self._now) == 0:
            raise ValueError(
                f"{store.name}: no transition in {len(self._lengths)} episodes: nothing follows "
                "their single steps"
            )
        reward = _read_flat(store, "reward", source)
        check_finite(store, "reward", source, torch.from_numpy(reward))
        earned = _discounted(reward * reward_scale + reward_shift, steps, discount)
        over = terminal[stretch] & (row + steps > last[stretch])
        left = np.where(over, 0.0, float(discount) ** steps)

        # The observations after the stretches lie behind all others in one table.
        self._obs = {}
        for name in obs_fields(store):
            parts = {name: source} | ({follows[name]: source[last]} if follows else {})
            self._obs[name] = load_rows(store, parts, normalizer)
        self._images = {n for n in self._obs if is_raw(n, store.fields[n], normalizer)}
        tables = {
            "reward": earned.astype(np.float32),
            "discount": left.astype(np.float32),
            "steps": steps.astype(np.int32),
            "stretch": stretch.astype(np.int32),
            "first": first,
            "last": last,
            "after": len(source) + np.arange(len(last)) if follows else last,
        }
        self._tables = {"action": load_rows(store, {"action": source}, normalizer)}
        self._tables |= {name: torch.from_numpy(values) for name, values in tables.items()}
        self._before = torch.arange(1 - n_obs_steps, 1)  # observations, relative to now
        self._plan = torch.arange(horizon) + 1 - n_obs_steps

    def __len__(self) -> int:
        return len(self._now)

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        """Return a batch of transitions.

        Args:
            indices: ``[B]`` int64, each in 0..len-1.

        Returns:
            ``obs`` ``[B, To, O]``, ``action`` ``[B, H, A]`` and ``next_obs`` ``[B, To, O]``
            float32, normalised, repeated at an episode's edges; of several observations each by its
            name, images in the store's type; ``reward`` ``[B]``, the discounted sum over the n
            steps; ``discount`` ``[B]``, that of the value after them, 0 if a terminal step was
            among them; ``valid`` ``[B, H]`` bool, False where an edge was repeated.

        Raises:
            IndexError: An index is out of range (on the CPU).
        """
        table = self._tables
        now = self._now.index_select(0, indices.to(self._now.device))
        stretch = table["stretch"].index_select(0, now)
        first, last, after = (
            table[k].index_select(0, stretch)[:, None] for k in ("first", "last", "after")
        )
        seen = torch.maximum(now[:, None] + self._before, first)
        # Past the stretch's end comes what followed it; before its begin the first row again.
        then = (now + table["steps"].index_select(0, now))[:, None] + self._before
        then = torch.where(then > last, after, torch.maximum(then, first))
        planned = now[:, None] + self._plan
        inside = planned.clamp(first, last)
        batch = {name: _rows(obs, seen) for name, obs in self._obs.items()}
        batch |= {f"next_{name}": _rows(obs, then) for name, obs in self._obs.items()}
        return batch | {
            "action": _rows(table["action"], inside),
            "reward": table["reward"].index_select(0, now),
            "discount": table["discount"].index_select(0, now),
            "valid": planned == inside,
        }

    def locate(self, index: int) -> tuple[int, int]:
        """Return where transition ``index`` is: its episode, and its now, a step of that episode.

        Raises:
            IndexError: No such transition.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"transition {index} of {len(self)}")
        row = int(self._now[index])
        ends = np.cumsum(self._lengths)
        place = int(np.searchsorted(ends, row, side="right"))
        return int(self.episodes[place]), row - int(ends[place] - self._lengths[place])

    def identity(self) -> dict[str, Any]:
        """Return what these transitions are, for telling one training run from another."""
        sizes = {name: getattr(self, name) for name in ("horizon", "n_obs_steps", "discount")}
        rows = {**self._obs, **self._tables}
        return {**sizes, "episodes": len(self.episodes), "now": self._now, **rows}

    def to(self, device: torch.device | str) -> Transitions:
        """Return the same transitions with every batch on ``device``, and all data but images."""
        moved = copy.copy(self)
        moved._tables = {k: v.to(device) for k, v in self._tables.items()}
        moved._obs = {k: v if k in self._images else v.to(device) for k, v in self._obs.items()}
        moved._now, moved._before, moved._plan = (
            v.to(device) for v in (self._now, self._before, self._plan)
        )
        return moved

    def __repr__(self) -> str:
        return (
            f"Transitions({len(self)} of {self.horizon} actions, {len(self.episodes)} episodes, "
            f"discount {self.discount})"
        )


def check_fields(store: EpisodeStore) -> dict[str, str]:
    """Raise ``ValueError`` unless a store holds what actor-critics learn from.

    Returns:
        The field of what follows each observation; empty if the store has none.
    """
    fields, seen = store.fields, obs_fields(store)
    needed = (*(seen or ["obs"]), "action", "reward", "terminated")
    check_has(store.name, needed, fields, f". Actor-critics learn from {', '.join(needed)}")
    check_rows_train(fields, store.name)
    for name in ("reward", "terminated", "truncated"):
        if name in fields and fields[name].size != 1:
            shape = list(fields[name].shape)
            raise ValueError(f"{store.name}: {name!r} must be one number per step, got {shape}")
    follows = {name: f"next_{name}" for name in seen if f"next_{name}" in fields}
    if follows and len(follows) < len(seen):
        raise ValueError(
            f"{store.name} has {sorted(follows.values())} but not what follows each of {seen}; "
            "store next_obs.NAME for all of them, or for none"
        )
    for name, after in follows.items():
        check_shape(f"rows of {after} in {store.name}", fields[after].shape, fields[name].shape)
    return follows


def _stretches(store: EpisodeStore, source: Ints, lengths: Ints) -> tuple[Ints, Ints, Ints]:
    """Steps that follow each other: first and last of each stretch, and the stretch of a step."""
    ends = _read_flat(store, "terminated", source) != 0
    if "truncated" in store.fields:
        ends |= _read_flat(store, "truncated", source) != 0
    ends[np.cumsum(lengths)[lengths > 0] - 1] = True
    last = np.flatnonzero(ends)
    first = np.concatenate([np.zeros(1, np.int64), last + 1])[: len(last)]
    return first, last, np.repeat(np.arange(len(last)), last - first + 1)


def _read_flat(store: EpisodeStore, field: str, source: Ints) -> Floats:
    """One number per row of ``source``."""
    return store.read(field).reshape(-1)[source].astype(np.float64)


def _discounted(reward: Floats, steps: Ints, discount: float) -> Floats:
    """The sum of ``discount^k reward[row + k]`` over k < steps[row], at every row."""
    total = np.zeros(len(reward))
    for k in range(int(steps.max(initial=0))):
        rows = np.flatnonzero(steps > k)
        total[rows] += discount**k * reward[rows + k]
    return total


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows ``[B, K, *shape]`` of a table ``[T, *shape]`` at ``[B, K]``, on the index's device."""
    rows = table.index_select(0, index.flatten().to(table.device))
    return rows.view(*index.shape, *table.shape[1:]).to(index.device)
