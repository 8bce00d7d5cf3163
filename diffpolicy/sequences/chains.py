"""Drawing from masked denoisers: a schedule of reveals, then the one sampling loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from diffpolicy.core.denoiser import BaseDenoiser
from diffpolicy.core.masking import MaskingProcess, to_tokens
from diffpolicy.core.reveal import Scheduled, reveals
from diffpolicy.core.sampling import Trajectory, Transition, sample
from diffpolicy.core.starts import Start

ROWS = 512  # sequences drawn or scored at once: bounds the memory of the noise


class Drawing(TypedDict, total=False):
    """How sequences are drawn from a model; every entry may be left out.

    Attributes:
        num_steps: steps from all masks to none; ``None``: one position at a time, the exact law of
            a ``time_free`` model.
        cond: ``[C]`` or ``[N, C]``; left out, a model with ``cond_dropout`` is drawn from
            unconditionally.
        generator: of the draws, on the model's device; the global one when absent.
        guidance: strength of classifier-free guidance; needs ``cond_dropout``.
    """

    num_steps: int | None
    cond: Tensor | None
    generator: torch.Generator | None
    guidance: float | None


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
    x0, transitions = (out.x0, out.transitions) if isinstance(out, Trajectory) else (out, ())
    return Chain(x0, groups, transitions)


def tokens_of(chains: Iterable[Chain]) -> Tensor:
    """Join the sequences that chains have ended with, int64 ``[N, L]``."""
    return torch.cat([to_tokens(chain.x0) for chain in chains])
