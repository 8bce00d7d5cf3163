"""Drawing from masked denoisers: a schedule of reveals, then the one sampling loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from diffpolicy.core.denoiser import BaseDenoiser
from diffpolicy.core.masking import MaskingProcess, to_tokens
from diffpolicy.core.reveal import Scheduled, reveals
from diffpolicy.core.sampling import Trajectory, Transition, sample
from diffpolicy.core.starts import Start

ROWS = 512  # sequences drawn or scored at once: bounds the memory of the noise


class Chain(NamedTuple):
    """A batch of sequences drawn together, and how.

    Attributes:
        x0: final states ``[B, L, V + 1]``.
        groups: the evaluation that revealed each position ``[B, L]``; of positions that were not
            masked, without meaning.
        transitions: of the loop, if recorded.
    """

    x0: Tensor
    groups: Tensor
    transitions: tuple[Transition, ...]


def run_chain(
    denoiser: BaseDenoiser,
    start: Start,
    *,
    time_free: bool,
    num_steps: int | None = None,
    cond: Tensor | None = None,
    generator: torch.Generator | None = None,
    record: bool = False,
) -> Chain:
    """Reveal every mask of ``start`` with hard draws.

    Args:
        denoiser: a masked denoiser, or guidance around one.
        start: hard states ``[B, L, V + 1]`` and their level.
        time_free: the denoiser does not depend on the level. Rows then advance on their own, in at
            most ``min(num_steps, L)`` evaluations.
        num_steps: steps of the grid of levels; ``None``: one position at a time, for denoisers
            that are ``time_free``.
        cond: ``[B, C]``.
        generator: of reveal times and tokens, on the state's device.
        record: keep the transitions.

    Raises:
        ValueError: ``num_steps=None`` with a denoiser that depends on the level.
    """
    process: MaskingProcess = denoiser.process  # type: ignore[assignment]
    groups, grid = reveals(process, start, num_steps, time_free=time_free, generator=generator)
    solver = Scheduled(groups)
    out = sample(denoiser, solver, start, grid, cond=cond, generator=generator, record=record)
    if isinstance(out, Trajectory):
        return Chain(out.x0, groups, out.transitions)
    return Chain(out, groups, ())


def tokens_of(chains: Iterable[Chain]) -> Tensor:
    """Join the sequences that chains have ended with, int64 ``[N, L]``."""
    return torch.cat([to_tokens(chain.x0) for chain in chains])
