"""What preference losses compare: plans or sequences, and the noise they are compared at."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffpolicy.core.denoiser import BaseDenoiser
from diffpolicy.data.observation import each, from_fields, holds
from diffpolicy.learn.method import Batch


class Items(NamedTuple):
    """Rows that make up items: a segment of 50 steps is several chunks.

    Attributes:
        x0: clean normalised plans ``[N, H, D]``, or tokens ``[N, L]``, int64.
        cond: ``[N, C]``, or None.
        steps: bool ``[N, H]``, the positions that are scored; None: all. Padded rows have none.
        item: which item a row belongs to, int64 ``[N]``.
        count: items, B.
    """

    x0: Tensor
    cond: Tensor | None
    steps: Tensor | None
    item: Tensor
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody calls

    def entries(self) -> Tensor:
        """How many numbers (or tokens) of each item are scored, ``[B]``, float32."""
        size = self.x0.shape[2] if self.x0.dim() == 3 else 1
        if self.steps is None:
            rows = torch.full((len(self.x0),), float(self.x0.shape[1]), device=self.x0.device)
        else:
            rows = self.steps.sum(1, dtype=torch.float32)
        return size * self.total(rows)

    def total(self, rows: Tensor) -> Tensor:
        """Sums over the rows ``[N]`` of every item, ``[B]``."""
        return rows.new_zeros(self.count).index_add(0, self.item, rows)


class Draw(NamedTuple):
    """Levels and noise, R per row; whatever is compared is scored at the same draw.

    Attributes:
        t: ``[R, N, 1, 1]``.
        noise: standard normal ``[R, N, H, D]``, or which tokens are masked, bool ``[R, N, L]``.
        weight: of the error at this level, ``[R, N]``.
    """

    t: Tensor
    noise: Tensor
    weight: Tensor

    def twice(self) -> Draw:
        """The draw of two sets of items of the same shape, one after the other."""
        return Draw(*(torch.cat([value, value], dim=1) for value in self))


def batch_items(denoiser: BaseDenoiser, batch: Batch, name: str, *, masked: bool) -> Items | None:
    """The items that a batch has under ``name``; None: it has none.

    Args:
        denoiser: encodes their observations, without gradients: both sides of a comparison, and
            the reference, see the same condition.
        batch: see :class:`diffpolicy.learn.preferences.dpo.PreferenceLoss`.
        name: ``"chosen"``, ``"rejected"``, ``"anchor"``, or ``""``: single items.
        masked: sequences, rather than plans.
    """
    if masked:
        key = {"": "tokens", "anchor": "anchor_tokens"}.get(name, name)
        if key not in batch:
            return None
        tokens = batch[key].long()
        cond = batch.get("anchor_cond" if name == "anchor" else "cond")
        rows = torch.arange(len(tokens), device=tokens.device)
        return Items(tokens, cond, None, rows, len(tokens))
    prefix = f"{name}_" if name else ""
    if f"{prefix}action" not in batch:
        return None
    action, key = batch[f"{prefix}action"], f"{prefix}obs"
    obs = from_fields(batch, key) if holds(batch, key) else None
    steps = batch.get(f"{prefix}steps")
    if name == "anchor":  # windows of demonstrations, one of each
        action = action.unsqueeze(1)
    elif obs is not None:
        obs = each(lambda one: one.flatten(0, 1), obs)
    count, windows = action.shape[:2]
    rows = torch.arange(count, device=action.device).repeat_interleave(windows)
    with torch.no_grad():
        cond = None if obs is None else denoiser.encode(obs)
    steps = None if steps is None else steps.flatten(0, 1).bool()
    return Items(action.flatten(0, 1), cond, steps, rows, count)


def pair_items(denoiser: BaseDenoiser, batch: Batch, *, masked: bool) -> tuple[Items, Items]:
    """The chosen and the rejected items of a batch, which share their noise.

    Raises:
        ValueError: a batch without, or items of two shapes.
    """
    chosen, rejected = (
        batch_items(denoiser, batch, name, masked=masked) for name in ("chosen", "rejected")
    )
    if chosen is None or rejected is None:
        keys = "sequences need chosen" if masked else "plans need chosen_obs, chosen_action"
        raise ValueError(f"pairs of {keys}, rejected... in a batch; got {sorted(batch)}")
    if chosen.x0.shape != rejected.x0.shape:
        shapes = f"{list(chosen.x0.shape)} and {list(rejected.x0.shape)}"
        raise ValueError(f"pad the shorter segments, with no steps: chosen, rejected are {shapes}")
    return chosen, rejected


def joined(first: Items, second: Items) -> Items:
    """Both, the second's items after the first's: one evaluation of a network for all."""
    cond, steps = (
        None if a is None or b is None else torch.cat([a, b])
        for a, b in zip(first[1:3], second[1:3], strict=True)
    )
    x0 = torch.cat([first.x0, second.x0])
    item = torch.cat([first.item, second.item + first.count])
    return Items(x0, cond, steps, item, first.count + second.count)
