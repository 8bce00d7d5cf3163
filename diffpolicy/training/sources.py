"""Sources: what the trainer draws its batches from, and sources made of others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
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

    A source may choose itself what a batch is made of, by a method ``draw(step, size, seed)`` that
    returns ``size`` indices and depends on nothing else; without one, examples come in an order
    that (seed, epoch) decide.
    """

    def __len__(self) -> int:
        """Number of examples."""

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        """A batch: every value has ``len(indices)`` rows."""


class Weighted:
    """Sources of which each is drawn in proportion to its weight.

    Of a batch of B, a source of share p has ``floor(p B)`` or ``ceil(p B)`` rows, ``p B`` in the
    mean: row j belongs to the source in whose stretch of [0, 1) the point ``(j + u) / B`` lies
    (systematic sampling), where u moves on by the golden section from batch to batch, so that over
    thousands of batches shares are kept within a few rows. Each source's own rows come in
    permutations, all of them once before any comes again.

    Args:
        parts: The sources by name.
        weights: One for each, positive.

    Example:
        >>> source = Weighted({"real": real, "simulated": simulated}, [1, 3])
        >>> source.gather(source.draw(step=0, size=64, seed=0))  # 16 real rows, 48 simulated ones
    """

    def __init__(self, parts: Mapping[str, Source], weights: Sequence[float]) -> None:
        self.parts = dict(parts)
        total = math.fsum(weights)
        self.shares = [weight / total for weight in weights]
        sizes = [len(part) for part in self.parts.values()]
        self._ends = torch.tensor(sizes).cumsum(0)
        self._drawn = ((-1, -1, -1), np.zeros(len(sizes), np.int64))
        self._orders: dict[int, tuple[tuple[int, int], Tensor]] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def identity(self) -> dict[str, object]:
        """What the examples are: the parts and their shares."""
        parts = {f"part {i}": part for i, part in enumerate(self.parts.values())}
        return {"shares": self.shares, **parts}  # names are places, which may change

    def counts(self, steps: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
        """Rows of each source in the batches of these steps, ``[len(steps), K]``."""
        first = mix_seed(seed, 0x317) / 2**63
        moved = np.modf(first + steps * GOLDEN)[0]
        edges = np.append(np.cumsum(self.shares)[:-1], 1.0)
        below = np.ceil(size * edges - moved[:, None]).clip(0, size)
        found: NDArray[np.int64] = np.diff(below.astype(np.int64), axis=1, prepend=0)
        return found

    def draw(self, step: int, size: int, seed: int) -> Tensor:
        """Indices ``[size]`` of the batch at ``step``, source by source; see the class."""
        key, before = self._drawn
        if key != (step, size, seed):
            before = self.counts(np.arange(step), size, seed).sum(0)
        counts = self.counts(np.array([step]), size, seed)[0]
        self._drawn = (step + 1, size, seed), before + counts
        firsts = [0, *self._ends.tolist()]
        rows = [
            firsts[number] + self._next(number, int(start), int(count), seed)
            for number, (start, count) in enumerate(zip(before, counts, strict=True))
        ]
        return torch.cat(rows)

    def _next(self, number: int, start: int, count: int, seed: int) -> Tensor:
        """Rows ``start..start+count-1`` of the order in which a source's rows come."""
        size = len(list(self.parts.values())[number])
        found = [torch.zeros(0, dtype=torch.int64)]
        while count:
            epoch, place = divmod(start, size)
            if self._orders.get(number, (None,))[0] != (epoch, seed):
                order = torch.Generator().manual_seed(mix_seed(seed, number, epoch, 0x51C))
                self._orders[number] = (epoch, seed), torch.randperm(size, generator=order)
            found.append(self._orders[number][1][place : place + count])
            start, count = start + len(found[-1]), count - len(found[-1])
        return torch.cat(found)

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        """A batch."""
        part = torch.bucketize(indices, self._ends, right=True)
        starts = self._ends - self._ends.diff(prepend=torch.zeros(1, dtype=torch.int64))
        return _together(list(self.parts.values()), part, indices - starts[part])


GOLDEN = (math.sqrt(5) - 1) / 2


def _together(sources: Sequence[Source], part: Tensor, row: Tensor) -> dict[str, Tensor]:
    """A batch whose row i is row ``row[i]`` of source ``part[i]``; of what all sources give."""
    found = [source.gather(row[part == i]) for i, source in enumerate(sources)]
    # In the order of the first: observations by name stand side by side in the order they come in.
    names = [name for name in found[0] if all(name in batch for batch in found)]
    batch = {name: torch.cat([one[name] for one in found]) for name in names}
    if bool((part.diff() >= 0).all()):  # in order already
        return batch
    back = part.argsort(stable=True).argsort()
    return {name: value[back.to(value.device)] for name, value in batch.items()}


class Drawn:
    """Examples of a source that chooses its batches itself, as often as it draws them."""

    def __init__(self, source: Weighted, seed: int) -> None:
        self.source = source
        self.order = source.draw(0, max(ROWS, len(source)), mix_seed(seed, 0x0A3))

    def __len__(self) -> int:
        return len(self.order)

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        """A batch."""
        return self.source.gather(self.order[indices])


def in_any_order(source: Source, seed: int) -> Source:
    """A source whose rows may be taken in any order: one that draws itself is drawn from once."""
    return Drawn(source, seed) if isinstance(source, Weighted) else source


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
        count = len(self.sources)
        return _together(self.sources, indices % count, indices // count)


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
