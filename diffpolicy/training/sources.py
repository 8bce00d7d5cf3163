"""Sources: what the trainer draws its batches from, and sources made of others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from diffpolicy.data.observation import is_obs
from diffpolicy.data.preferences.examples import PairExamples
from diffpolicy.training.settings import mix_seed

ROWS = 65_536
"""Least length of a source: an epoch of the trainer holds whole batches only."""


class Source(Protocol):
    """Examples by index.

    A resumed run must find the examples that it began with, so the trainer takes digests of the
    arrays that a source holds. One that holds other things (a path, a cache) says what its
    examples are with a method ``identity()``; see :mod:`diffpolicy.training.identity`.
    """

    def __len__(self) -> int:
        """Number of examples."""

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        """A batch: every value has ``len(indices)`` rows."""


class Mixed:
    """Examples of a method beside demonstrations: a source of the trainer.

    ``gather`` gives what ``main`` does, and with ``anchor`` also its values under
    ``anchor_<name>`` (and with ``mask_padding`` as ``anchor_steps [B, 1, H]`` which positions are
    not padded). Row i is example ``i mod len(main)``, and demonstrations in an order of their
    own; few examples are repeated until an epoch has ``ROWS`` rows.
    """

    def __init__(
        self, main: Source, anchor: Source | None, *, seed: int = 0, mask_padding: bool = False
    ) -> None:
        self.main, self.anchor, self.mask_padding = main, anchor, mask_padding
        self.rows = len(main) * -(-ROWS // len(main))
        order = torch.Generator().manual_seed(mix_seed(seed, 0xA2C))
        count = 1 if anchor is None else len(anchor)
        self.order = torch.randperm(self.rows, generator=order) % count

    def __len__(self) -> int:
        return self.rows

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        """A batch."""
        batch = self.main.gather(indices % len(self.main))
        if self.anchor is not None:
            other = self.anchor.gather(self.order[indices])
            batch |= {f"anchor_{k}": v for k, v in other.items() if k == "action" or is_obs(k)}
            if self.mask_padding:
                batch["anchor_steps"] = other["valid"].unsqueeze(1)
        return batch


class Turns:
    """Sources that take turns, each with the same share of an epoch."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)

    def __len__(self) -> int:
        return len(self.sources) * min(len(source) for source in self.sources)

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        """A batch."""
        turn, row = indices % len(self.sources), indices // len(self.sources)
        parts = [source.gather(row[turn == i]) for i, source in enumerate(self.sources)]
        back = torch.cat([(turn == i).nonzero() for i in range(len(parts))]).flatten().argsort()
        names = set.intersection(*(set(part) for part in parts))
        return {name: torch.cat([part[name] for part in parts])[back] for name in names}


class ChosenWindows:
    """The windows of preferred items, each by itself, for behaviour cloning.

    ``gather`` gives ``obs [B, To, O]``, ``action [B, H, A]`` and ``valid [B, H]``: the positions
    that belong to the item.
    """

    def __init__(self, pairs: PairExamples) -> None:
        self.pairs = pairs
        every = pairs.gather(torch.arange(len(pairs)))
        self.entries = every["chosen_steps"].any(-1).nonzero()

    def __len__(self) -> int:
        return len(self.entries)

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        """A batch."""
        pair, window = self.entries[indices].unbind(1)
        batch, rows = self.pairs.gather(pair), torch.arange(len(indices))
        found = {k[len("chosen_") :]: v for k, v in batch.items() if k.startswith("chosen_")}
        found["valid"] = found.pop("steps")
        return {name: value[rows, window] for name, value in found.items()}
