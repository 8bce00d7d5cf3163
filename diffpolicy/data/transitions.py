"""Transitions for temporal-difference learning: a plan, what it earned, and where it led.

A transition belongs to one step of an episode, its "now". Its observations and actions are those of
[`Windows`][diffpolicy.data.windows.Windows]; beside them it holds the discounted reward of the
steps from now on that the plan covers, the observations after them, and the discount of whatever
follows. Everything is held once, in memory; a batch is index arithmetic over it.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from diffpolicy.data.blocks import read_blocks
from diffpolicy.data.fields import check_vector
from diffpolicy.data.windows import checked_episodes, load_rows, ranges

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from diffpolicy.data.normalize import Normalizer
    from diffpolicy.data.store import EpisodeStore


class Transitions:
    """All transitions of a store's episodes, normalised.

    The store needs `obs`, `action`, `reward` and `terminated`; it may have `truncated` and
    `next_obs`. An episode also ends wherever one of the two flags is set inside of it. From now, a
    plan runs `n = min(horizon - n_obs_steps + 1, steps left)` steps. A terminal end is worth 0
    afterwards. After any other end the episode would have gone on: with `next_obs`, its value is
    that of the last `next_obs`; without, that of the last observation, so that the last step
    itself has nothing to learn from and is left out (as in D4RL's `qlearning_dataset`). Inside an
    episode the next observation is the following row's, whatever `next_obs` says.

    Args:
        store: The episodes.
        horizon: H, the actions in a plan. Its first `n_obs_steps - 1` lie before now, as in
            `Windows`.
        n_obs_steps: To, the observations that the policy and the critic see; 1..H.
        normalizer: Applied to `obs`, `next_obs` (as `obs`) and `action` where it knows them.
        discount: Per environment step, in (0, 1].
        reward_scale: Rewards are taken as `reward * reward_scale + reward_shift`.
        reward_shift: See `reward_scale`.
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
        _check_settings(horizon, n_obs_steps, discount, reward_scale)
        check_fields(store)
        self.horizon, self.n_obs_steps, self.discount = horizon, n_obs_steps, discount
        self.episodes = checked_episodes(store, episodes)
        lengths = store.episode_lengths[self.episodes]
        first_row = store.episode_ends[self.episodes] - lengths
        source = np.repeat(first_row, lengths) + ranges(lengths)

        first, last, stretch = _stretches(store, source, lengths)
        terminal = (_read_flat(store, "terminated", source) != 0)[last]
        followed = terminal | ("next_obs" in store.fields)
        row = np.arange(len(source))
        steps = np.minimum(horizon - n_obs_steps + 1, (last + followed)[stretch] - row)
        self._now = torch.from_numpy(np.flatnonzero(steps > 0))
        if len(self._now) == 0:
            raise ValueError(
                f"{store.name}: no transition in {len(lengths)} episodes: every one is a single "
                "step that is not terminal, and without next_obs nothing follows it"
            )
        reward = _rewards(store, source) * reward_scale + reward_shift
        earned = _discounted(reward, steps, discount)
        over = terminal[stretch] & (row + steps > last[stretch])
        left = np.where(over, 0.0, float(discount) ** steps)

        obs = load_rows(store, "obs", source, normalizer, in_memory=True)
        after = last  # where the observation after a stretch lies in the table
        if "next_obs" in store.fields:
            obs = torch.cat([obs, _next_obs(store, source[last], normalizer)])
            after = len(source) + np.arange(len(last))
        self._tables = {
            "obs": obs,
            "action": load_rows(store, "action", source, normalizer, in_memory=True),
            "reward": torch.from_numpy(earned.astype(np.float32)),
            "discount": torch.from_numpy(left.astype(np.float32)),
            "steps": torch.from_numpy(steps.astype(np.int32)),
            "stretch": torch.from_numpy(stretch.astype(np.int32)),
            "first": torch.from_numpy(first),
            "last": torch.from_numpy(last),
            "after": torch.from_numpy(after),
        }
        self._before = torch.arange(1 - n_obs_steps, 1)  # observations, relative to now
        self._plan = torch.arange(horizon) + 1 - n_obs_steps
        self._lengths = lengths

    def __len__(self) -> int:
        return len(self._now)

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        """A batch of transitions.

        Args:
            indices: `[B]` int64, each in 0..len-1.

        Returns:
            `obs` `[B, To, O]`, `action` `[B, H, A]` and `next_obs` `[B, To, O]` float32,
            normalised, repeated at an episode's edges; `reward` `[B]`, the discounted sum over the
            n steps; `discount` `[B]`, that of the value after them, 0 if a terminal step was among
            them; `valid` `[B, H]` bool, False where an edge was repeated.

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
        then = (now + table["steps"].index_select(0, now))[:, None] + self._before
        then = torch.where(then > last, after, torch.maximum(then, first))
        planned = now[:, None] + self._plan
        inside = planned.clamp(first, last)
        return {
            "obs": _rows(table["obs"], seen),
            "action": _rows(table["action"], inside),
            "reward": table["reward"].index_select(0, now),
            "next_obs": _rows(table["obs"], then),
            "discount": table["discount"].index_select(0, now),
            "valid": planned == inside,
        }

    def locate(self, index: int) -> tuple[int, int]:
        """Where transition `index` is: its episode in the store, and its now, a step of it.

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
        """What these transitions are, for telling one training run from another."""
        sizes = {name: getattr(self, name) for name in ("horizon", "n_obs_steps", "discount")}
        return {**sizes, "episodes": len(self.episodes), "now": self._now, **self._tables}

    def to(self, device: torch.device | str) -> Transitions:
        """The same transitions with everything, and every batch, on `device`."""
        moved = copy.copy(self)
        moved._tables = {k: v.to(device) for k, v in self._tables.items()}
        moved._now, moved._before, moved._plan = (
            v.to(device) for v in (self._now, self._before, self._plan)
        )
        return moved

    def __repr__(self) -> str:
        return (
            f"Transitions({len(self)} of {self.horizon} actions, {len(self.episodes)} episodes, "
            f"discount {self.discount})"
        )


def _check_settings(horizon: int, n_obs_steps: int, discount: float, reward_scale: float) -> None:
    if horizon < 1 or not 1 <= n_obs_steps <= horizon:
        raise ValueError(
            f"n_obs_steps must be in 1..horizon; got n_obs_steps={n_obs_steps}, horizon={horizon}"
        )
    if not 0 < discount <= 1:
        raise ValueError(f"discount must be in (0, 1], got {discount}")
    if not reward_scale > 0:
        raise ValueError(f"reward_scale must be positive, got {reward_scale}")


def check_fields(store: EpisodeStore) -> None:
    """Raise ``ValueError`` unless a store holds what actor-critics learn from."""
    needed = ("obs", "action", "reward", "terminated")
    missing = [name for name in needed if name not in store.fields]
    if missing:
        raise ValueError(
            f"{store.name} has no field {missing}; it has {sorted(store.fields)}. Actor-critics "
            f"learn from {', '.join(needed)}: D4RL and Minari files are read with all of them, "
            "and demonstrations without rewards can be imitated only"
        )
    for name in ("obs", "action"):
        check_vector(name, store.fields[name].shape, store.name)
    for name in ("reward", "terminated", "truncated"):
        if name in store.fields and int(np.prod(store.fields[name].shape)) != 1:
            raise ValueError(
                f"{store.name}: field {name!r} must be one number per step, got rows of shape "
                f"{list(store.fields[name].shape)}"
            )
    if "next_obs" in store.fields and store.fields["next_obs"].shape != store.fields["obs"].shape:
        raise ValueError(
            f"{store.name}: next_obs has rows of shape {list(store.fields['next_obs'].shape)}, "
            f"obs of {list(store.fields['obs'].shape)}"
        )


def _stretches(
    store: EpisodeStore, source: NDArray[np.int64], lengths: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Steps that follow each other: first and last of each stretch, and the stretch of a step."""
    ends = _read_flat(store, "terminated", source) != 0
    if "truncated" in store.fields:
        ends |= _read_flat(store, "truncated", source) != 0
    ends[np.cumsum(lengths)[lengths > 0] - 1] = True
    last = np.flatnonzero(ends)
    first = np.concatenate([np.zeros(1, np.int64), last + 1])[: len(last)]
    return first, last, np.repeat(np.arange(len(last)), last - first + 1)


def _rewards(store: EpisodeStore, source: NDArray[np.int64]) -> NDArray[np.float64]:
    """The rewards of rows `source`, all of them finite."""
    reward = _read_flat(store, "reward", source)
    finite = np.isfinite(reward)
    if not finite.all():
        raise ValueError(
            f"{store.name}: field 'reward' is not finite at row {int(source[finite.argmin()])}; "
            f"`diffpolicy data check {store.name}` lists every such row"
        )
    return reward


def _read_flat(store: EpisodeStore, field: str, source: NDArray[np.int64]) -> NDArray[np.float64]:
    """One number per row of `source`."""
    return store.read(field).reshape(-1)[source].astype(np.float64)


def _discounted(
    reward: NDArray[np.float64], steps: NDArray[np.int64], discount: float
) -> NDArray[np.float64]:
    """The sum of `discount^k reward[row + k]` over k < steps[row], at every row."""
    total = np.zeros(len(reward))
    for k in range(int(steps.max(initial=0))):
        rows = np.flatnonzero(steps > k)
        total[rows] += discount**k * reward[rows + k]
    return total


def _next_obs(
    store: EpisodeStore, rows: NDArray[np.int64], normalizer: Normalizer | None
) -> Tensor:
    """`next_obs` of some rows (ascending), normalised as `obs`, float32 `[len(rows), O]`."""
    width = int(np.prod(store.fields["obs"].shape))
    out = torch.empty(len(rows), width)
    for start, stop, values in read_blocks(store, "next_obs", rows):
        block = torch.from_numpy(values.astype(np.float32))
        if normalizer is not None and "obs" in normalizer.fields:
            block = normalizer.normalize("obs", block)
        out[start:stop] = block.reshape(-1, width)
    bad = (~torch.isfinite(out).all(1)).nonzero()
    if len(bad):
        raise ValueError(
            f"{store.name}: field 'next_obs' is not finite at row {int(rows[int(bad[0])])}; "
            f"`diffpolicy data check {store.name}` lists every such row"
        )
    return out


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows `[B, K, D]` of a table `[T, D]` at `[B, K]`."""
    return table.index_select(0, index.flatten()).view(*index.shape, -1)
